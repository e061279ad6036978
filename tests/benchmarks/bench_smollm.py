"""Tokens per second of sampling and scoring with SmolLM2-135M, against ``generate`` and a plain forward pass, paired.

The same weights, prompts and numbers of tokens on both sides, nobody stopping early, in turn and in alternating order.
Sampling records log-probability, entropy, sum p² and norm of every token, which ``generate`` does not; scoring returns
them, where the plain pass returns logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from entrace.trainer.config import load_config
from entrace.trainer.model.loading import load_pretrained
from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import SamplingParams
from entrace.trainer.tasks import load_task
from tests.benchmarks.figures import AT_LEAST, Figure, quotients, time_in_turn

PART = "Sampling and scoring with SmolLM2-135M, batch 16"
BATCH = 16


class Case:
    """``BATCH`` responses of ``length`` tokens to some questions."""

    def __init__(self, policy: Policy, plain: Any, questions: list[Any], length: int) -> None:
        self.policy, self.plain, self.length = policy, plain, length
        self.prompts = [policy.encode_prompt(question) for question in questions]
        self.num_samples = BATCH // len(questions)
        width = max(map(len, self.prompts))
        self.rows = [prompt for prompt in self.prompts for _ in range(self.num_samples)]
        self.ids = torch.tensor([[0] * (width - len(row)) + row for row in self.rows])
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in self.rows])
        drawn = torch.randint(5, 500, (BATCH, length), generator=torch.Generator().manual_seed(0))
        self.whole = torch.cat((self.ids, drawn), dim=1)
        self.responses = list(drawn)

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
        self.policy.token_stats(self.rows, self.responses, 1.0)

    @torch.no_grad()
    def forward(self) -> None:
        self.plain(self.whole)


def compare(name: str, ours: Any, theirs: Any, tokens: int, rounds: int) -> list[Figure]:
    """How many times the other's tokens per second ours are, paired; and both rates."""
    seconds = time_in_turn({"ours": ours, "theirs": theirs}, rounds)
    rates = {key: [tokens / value for value in values] for key, values in seconds.items()}
    peer = theirs.__name__
    return [
        Figure.of(PART, f"{name}: entrace / {peer}", "ratio", quotients(rates["ours"], rates["theirs"]), AT_LEAST, 1),
        Figure.of(PART, f"{name}: entrace", "tokens per s", rates["ours"]),
        Figure.of(PART, f"{name}: {peer}", "tokens per s", rates["theirs"]),
    ]


def measure(quick: bool) -> list[Figure]:
    """All figures; with the embedded policy if ``quick``."""
    config = load_config("tiny" if quick else "smollm", ["policy.device=cpu"])
    length, rounds = (4, 2) if quick else (32, 5)
    policy = Policy.load(config.policy)
    policy.stop_ids = torch.tensor([], dtype=torch.int64)
    plain = load_pretrained(config.policy)[0].eval()
    task = load_task(config.task, config.seed)
    figures = []
    for num_prompts in (BATCH, 2):
        case = Case(policy, plain, [task.train_prompt(i).question for i in range(num_prompts)], length)
        name = f"sampling {length} tokens, {num_prompts} prompts of {case.ids.shape[1]}"
        figures += compare(name, case.sample, case.generate, BATCH * length, rounds)
    name = f"scoring {BATCH} responses to 2 prompts"
    return figures + compare(name, case.score, case.forward, case.whole.numel(), rounds)
