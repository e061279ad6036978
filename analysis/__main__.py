"""``python -m analysis``: the commands that need no training packages."""

from analysis.cli import app, run

if __name__ == "__main__":
    run(app)
