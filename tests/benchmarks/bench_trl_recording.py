"""Time steps of TRL's GRPOTrainer with and without recording, paired by step.

The result is seconds per step. Each trainer has a process of its own and takes one step at a time, in turns and in
alternating order, so that all run under the same load. They have equal seeds and weights, and sample the same
responses: a quotient of their times holds what recording costs and nothing else. Batches are aligned: recording uses
the forward pass of the loss. The policies are the embedded one, whose steps are so short that Python dominates, and a
random Llama of 28 million parameters.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from entrace.analysis.trace.manifest import describe_machine
from entrace.trainer.resources import find_base_policy
from entrace.trl import TracedGRPOTrainer
from tests.benchmarks.measurements import AT_MOST, Measurement, quotients, to_markdown

WARM_UP = 2
MAX_OF_PLAIN = 1.02
PLAIN, AGAIN, RECORDED = "plain", "plain again", "recorded"
AFTER = "recorded, after-update values every 5 steps"
ARMS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    # Its ratio to the first shows how far ratios deviate without a cause.
    AGAIN: None,
    RECORDED: {"after_update_every": 0},
    AFTER: {"after_update_every": 5},
}
EMBEDDED, LLAMA = "embedded policy", "Llama, 28 million parameters"


class Turns(TrainerCallback):
    """Take a step when the benchmark asks for one, and answer with its times.

    The times are wall seconds and CPU seconds.
    """

    def __init__(self, peer: Connection) -> None:
        """Talk to the benchmark through ``peer``."""
        self._peer = peer
        self._started = (0.0, 0.0)

    def take(self) -> None:
        """Wait until the benchmark asks, and start the clocks."""
        self._peer.recv()
        self._started = (time.perf_counter(), time.process_time())

    def give(self) -> None:
        """Stop the clocks and answer."""
        wall, computing = self._started
        self._peer.send((time.perf_counter() - wall, time.process_time() - computing))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a turn.

        Later work in the trainer, such as recording the step, belongs to the next turn.
        """
        self.give()
        self.take()


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Return 1 for every text with an even number of characters."""
    return [float(len(text[0]["content"]) % 2 == 0) for text in completions]


def train(peer: Connection, folder: Path, policy: str, traced: dict[str, Any] | None, steps: int, size: int) -> None:
    """Train with one arm, in turns."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    turns = Turns(peer)
    turns.take()
    path = str(find_base_policy())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = path if policy == EMBEDDED else random_llama()
    arguments = GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=size,
        num_generations=8,
        max_completion_length=64,
        max_steps=steps,
        learning_rate=1e-12,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    prompts = [
        f"State the final answer to the following arithmetic problem: {a} + {b} =" for a in range(9) for b in range(9)
    ]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in prompts])
    common: dict[str, Any] = {
        "model": model,
        "processing_class": tokenizer,
        "reward_funcs": reward,
        "args": arguments,
        "train_dataset": rows,
        "callbacks": [turns],
    }
    trainer = GRPOTrainer(**common) if traced is None else TracedGRPOTrainer(**common, trace=folder / "run", **traced)
    trainer.train()
    turns.give()


def random_llama() -> LlamaForCausalLM:
    """Return a policy with random weights, equal for all arms.

    Most of its tokens have no text.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    config._name_or_path = "random-llama"
    return LlamaForCausalLM(config)


def measure(policy: str, arms: Sequence[str], steps: int, size: int) -> list[Measurement]:
    """Return the seconds of each arm and the ratios to the plain one."""
    context = multiprocessing.get_context("spawn")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as folder:
        peers = {}
        for number, name in enumerate(arms):
            here, there = context.Pipe()
            arguments = (there, Path(folder, str(number)), policy, ARMS[name], steps, size)
            context.Process(target=train, args=arguments, daemon=True).start()
            peers[name] = here
        # One turn more for what follows the last step.
        for turn in range(steps + 1):
            for name in arms if turn % 2 else arms[::-1]:
                peers[name].send("step")
                times[name].append(peers[name].recv())
    part = f"{policy}, {size} responses per step, {steps - WARM_UP} steps"
    found = []
    for index, kind in enumerate(("", ", CPU time")):
        seconds = {name: [pair[index] for pair in pairs[WARM_UP:-1]] for name, pairs in times.items()}
        found += [Measurement.of(part, f"{name}{kind}", "s per step", values) for name, values in seconds.items()]
        for name in arms[1:]:
            # After-update values are captured every five steps: a ratio covers one such cycle.
            width = 5 if name == AFTER else 1
            cycles = range(0, len(seconds[name]) - width + 1, width)
            above, below = ([sum(seconds[arm][i : i + width]) for i in cycles] for arm in (name, PLAIN))
            target = (AT_MOST, MAX_OF_PLAIN) if name == RECORDED else ()
            found.append(Measurement.of(part, f"{name} / plain{kind}", "ratio", quotients(above, below), *target))
    return found


def main() -> None:
    """Measure, print a table, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Report, as JSON (default: print only).")
    parser.add_argument("--steps", type=int, default=32, help="Steps per trainer, two of them to warm up (default 32).")
    parser.add_argument("--size", type=int, default=64, help="Responses per step (default 64).")
    parser.add_argument("--policy", choices=[EMBEDDED, LLAMA], action="append", help="Policies (default: both).")
    options = parser.parse_args()
    measurements = []
    for policy in options.policy or [EMBEDDED, LLAMA]:
        measurements += measure(policy, list(ARMS), options.steps, options.size)
    print(to_markdown(measurements))
    if options.out:
        report = {**describe_machine(), "measurements": [found.as_json() for found in measurements]}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
