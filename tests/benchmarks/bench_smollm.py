"""Time SmolLM2-135M in entrace and in transformers, paired.

The measures are tokens per second of sampling and of a teacher-forced pass. Sampling is compared with ``generate``, and
``Policy.token_stats`` with a plain forward pass. Both sides use the same weights, prompts, and numbers of tokens,
without early stopping, in alternating order. Sampling also computes log-probability, entropy, sum of p², and norm of
every token. The plain pass returns logits only.
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
from tests.benchmarks.measurements import AT_LEAST, Measurement, quotients, time_in_rounds

PART = "Sampling and token statistics with SmolLM2-135M, batch 16"
BATCH = 16


class Case:
    """Hold ``BATCH`` responses of ``length`` tokens to some questions."""

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
    def token_stats(self) -> None:
        self.policy.token_stats(self.rows, self.responses, 1.0)

    @torch.no_grad()
    def forward(self) -> None:
        self.plain(self.whole)


def compare(name: str, ours: Any, theirs: Any, tokens: int, rounds: int) -> list[Measurement]:
    """Measure the paired ratio of tokens per second, ours to theirs, and both rates."""
    seconds = time_in_rounds({"ours": ours, "theirs": theirs}, rounds)
    rates = {key: [tokens / value for value in values] for key, values in seconds.items()}
    peer = theirs.__name__
    return [
        Measurement.of(
            PART, f"{name}: entrace / {peer}", "ratio", quotients(rates["ours"], rates["theirs"]), AT_LEAST, 1
        ),
        Measurement.of(PART, f"{name}: entrace", "tokens per s", rates["ours"]),
        Measurement.of(PART, f"{name}: {peer}", "tokens per s", rates["theirs"]),
    ]


def measure(quick: bool) -> list[Measurement]:
    """Return all measurements; with the embedded policy if ``quick``."""
    config = load_config("tiny" if quick else "smollm", ["policy.device=cpu"])
    length, rounds = (4, 2) if quick else (32, 5)
    policy = Policy.load(config.policy)
    policy.stop_ids = torch.tensor([], dtype=torch.int64)
    plain = load_pretrained(config.policy)[0].eval()
    task = load_task(config.task, config.seed)
    measurements = []
    for num_prompts in (BATCH, 2):
        case = Case(policy, plain, [task.train_prompt(i).question for i in range(num_prompts)], length)
        name = f"sampling {length} tokens, {num_prompts} prompts of {case.ids.shape[1]}"
        measurements += compare(name, case.sample, case.generate, BATCH * length, rounds)
    name = f"token statistics of {BATCH} responses to 2 prompts"
    return measurements + compare(name, case.token_stats, case.forward, case.whole.numel(), rounds)
