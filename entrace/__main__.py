"""Run ``python -m entrace``: the same command as ``entrace``."""

from entrace.trainer.cli import main

if __name__ == "__main__":
    main()
