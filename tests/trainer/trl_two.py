"""Train with TRL in one of two processes, once plainly and once recorded.

``torch.distributed.run`` starts the processes.
"""

import json
import sys
from pathlib import Path

import torch

from .trl_runs import TracedWitnessGRPO, WitnessGRPO, build, dataset, weights


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    changed = json.loads((folder / "changed.json").read_text())
    for name, cls, traced in (
        ("plain", WitnessGRPO, {}),
        ("traced", TracedWitnessGRPO, {"trace": folder / "run", "after_update_every": 1}),
        (
            "shaped",
            TracedWitnessGRPO,
            {"trace": folder / "shaped-run", "shaping": {"method": "ppl", "ppl": {"alpha": 0.1}}},
        ),
    ):
        trainer = build(
            cls,
            folder / name,
            traced=traced,
            eval_dataset=dataset(3),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            eval_strategy="steps",
            eval_steps=2,
            max_steps=4,
            **changed,
        )
        trainer.train()
        rank = trainer.accelerator.process_index
        if rank == 0:
            torch.save(weights(trainer), folder / f"{name}.pt")
        if name == "traced":
            torch.save(trainer.batches, folder / f"batches-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
