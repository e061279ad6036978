"""Tokens per second of sampling and scoring with SmolLM2-135M, against ``generate`` and a plain forward pass, paired.

The same weights, prompts and numbers of tokens on both sides, nobody stopping early, in turn and in alternating order;
figures are medians of the ratios within a turn. Sampling records log-probability, entropy, sum p² and norm of every
token, which ``generate`` does not; scoring returns them, where the plain pass returns logits.

Run with ``make bench-smollm``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config import load_config
from trainer.policy import Policy
from trainer.pretrained import load_model
from trainer.resources import find_model
from trainer.rollout import SamplingParams, sample
from trainer.tasks import load_task

BATCH = 16


class Case:
    """``BATCH`` responses of ``length`` tokens to ``num_prompts`` prompts."""

    def __init__(self, policy: Policy, plain: Any, questions: list[Any], length: int) -> None:
        self.policy, self.plain, self.length = policy, plain, length
        self.prompts = [policy.encode_prompt(question) for question in questions]
        self.num_samples = BATCH // len(questions)
        width = max(map(len, self.prompts))
        rows = [prompt for prompt in self.prompts for _ in range(self.num_samples)]
        self.ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self.whole = torch.cat((self.ids, torch.randint(5, 1000, (BATCH, length))), dim=1)
        self.responses = list(self.whole[:, width:])
        self.rows = rows

    def sample(self) -> None:
        found = sample(
            self.policy, self.prompts, self.num_samples, SamplingParams(self.length), np.random.default_rng(0)
        )
        assert int(found.response_mask.sum()) == BATCH * self.length

    def generate(self) -> None:
        found = self.plain.generate(
            self.ids,
            attention_mask=self.mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=self.length,
            min_new_tokens=self.length,
            pad_token_id=0,
        )
        assert found.shape[1] == self.ids.shape[1] + self.length

    @torch.no_grad()
    def score(self) -> None:
        self.policy.score(self.rows, self.responses, 1.0)

    @torch.no_grad()
    def forward(self) -> None:
        self.plain(self.whole)


def compare(ours: Callable[[], None], theirs: Callable[[], None], tokens: int, rounds: int) -> dict[str, float]:
    """Tokens per second of both, and the median of how many times the other's rate ours is."""
    seconds: dict[Callable[[], None], list[float]] = {ours: [], theirs: []}
    for turn in range(rounds + 1):
        for work in (ours, theirs) if turn % 2 else (theirs, ours):
            started = time.perf_counter()
            work()
            seconds[work].append(time.perf_counter() - started)
    # The first turn warms up.
    mine, other = seconds[ours][1:], seconds[theirs][1:]
    return {
        "tokens_per_s": round(tokens / statistics.median(mine), 1),
        "transformers_tokens_per_s": round(tokens / statistics.median(other), 1),
        "ratio": round(statistics.median(b / a for a, b in zip(mine, other, strict=True)), 3),
    }


def main() -> None:
    """Prints the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default 7)")
    parser.add_argument("--length", type=int, default=32, help="tokens of a response (default 32)")
    parser.add_argument("--out", type=Path, help="file to write the result to as well")
    arguments = parser.parse_args()
    config = load_config("smollm", ["policy.device=cpu"])
    policy = Policy.load(config.policy)
    policy.stop_ids = torch.tensor([], dtype=torch.int64)
    plain = load_model(find_model(config.policy.path))
    task = load_task(config.task, config.seed)
    result: dict[str, Any] = {"batch": BATCH, "length": arguments.length, "threads": torch.get_num_threads()}
    for num_prompts in (BATCH, 2):
        case = Case(policy, plain, [task.train_prompt(i).question for i in range(num_prompts)], arguments.length)
        result["prompt_tokens"] = case.ids.shape[1]
        key = f"sampling, {num_prompts} prompts"
        result[key] = compare(case.sample, case.generate, BATCH * arguments.length, arguments.rounds)
        print(key, result[key], flush=True)
    result["scoring"] = compare(case.score, case.forward, case.whole.numel(), arguments.rounds)
    print("scoring", result["scoring"], flush=True)
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
