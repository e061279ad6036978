"""GRPO steps on a GPU against TRL on the same machine, and token statistics against memory bandwidth.

Models: SmolLM2-135M, and a randomly initialized model with the shape of Qwen2.5-0.5B. Each runs with padding and with
sequence packing in the update. Both trainers do the same work: all responses reach the length limit, and rewards are
random, so that few groups are uniform. TRL generates with transformers. Both compute in bfloat16 with float32 master
weights, process about as many tokens at once in the update, alternate, and start from the same weights.

Bandwidth is that of a copy, which reads and writes. A share of 1 means reading every logit once at that speed.

Usage: python -m tests.benchmarks.bench_gpu --out reports/benchmarks_gpu [--device cpu --quick]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from entrace.trainer.config import Config, load_config
from entrace.trainer.model.loading import load_pretrained
from entrace.trainer.resources import EMBEDDED, SMOLLM
from entrace.trainer.tasks import load_task
from tests.benchmarks.bench import write_report
from tests.benchmarks.bench_grpo_step import STILL, WARM_UP, Ours, Pairing, run_trl
from tests.benchmarks.bench_token_stats import (
    FULL_TOKENS,
    MAX_EXTRA_GB,
    SHAPES,
    TOY_SHAPES,
    Case,
    backward,
    from_hidden,
)
from tests.benchmarks.logit_stats import stats_of_logits
from tests.benchmarks.measurements import AT_LEAST, AT_MOST, HAS_TRL, Measurement, quotients, time_in_rounds

QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TOY = {**QWEN, "vocab_size": 1024, "hidden_size": 28, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES = {
    False: ["rollout.prompts_per_step=32", "rollout.group_size=8", "rollout.max_response_tokens=128"],
    True: ["rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_response_tokens=4"],
}
TRL_MICRO_BATCHES = {False: 8, True: 2}
PART = "Token statistics and memory bandwidth"
COPIED_TOKENS = 4096
LEAST_OF_TRL, LEAST_OF_BANDWIDTH = 2, 0.6


def toss(completion: str, row: dict[str, Any]) -> float:
    """Score a completion 0 or 1 by its hash: random, but equal for equal completions."""
    return float(crc32(completion.encode()) & 1)


def synchronizer(device: str) -> Callable[[], None]:
    """Return a function that waits for all work on the device."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def make_random_model(folder: Path, shape: dict[str, Any]) -> str:
    """Write a random model of a shape, with the embedded policy's tokenizer; return its folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2Config(**shape)).save_pretrained(folder)
    load_pretrained(load_config("tiny").policy)[1].save_pretrained(folder)
    return str(folder)


def make_config(path: str, device: str, quick: bool, *more: str) -> Config:
    """Return the configuration of one model, with further overrides ``more``."""
    base = "smollm" if path == SMOLLM else "tiny"
    fixed = [
        "rollout.dynamic_sampling=false",
        "rollout.stop=[]",
        "rollout.overlong_buffer_tokens=0",
        f"optim.lr={STILL}",
        'task.verifiers.chain_sum="tests.benchmarks.bench_gpu:toss"',
        "optim.micro_batch_tokens=12288",
    ]
    return load_config(base, [f"policy.path={path}", f"policy.device={device}", *fixed, *SIZES[quick], *more])


def measure_steps(part: str, configs: dict[str, Config], steps: int, trl_micro_batches: int) -> list[Measurement]:
    """Measure samples per second of TRL and of each config, and the phases of the first config's steps."""
    config = next(iter(configs.values()))
    task = load_task(config.task, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: Ours(own, task, Path(folder, name), records=True) for name, own in configs.items()}
        for arm in arms.values():
            arm.learner.policy.stop_ids = torch.tensor([], dtype=torch.int64)
        pairing = Pairing(arms)
        seconds = pairing.seconds
        if HAS_TRL:
            least = {"min_new_tokens": config.rollout.max_response_tokens}
            seconds["trl"], _ = run_trl(config, task, WARM_UP + steps, pairing.take_steps, least, trl_micro_batches)
        else:
            for _ in range(WARM_UP + steps):
                pairing.take_steps()
    batch = config.rollout.prompts_per_step * config.rollout.group_size
    rates = {name: [batch / value for value in values[WARM_UP:]] for name, values in seconds.items()}
    measurements = [Measurement.of(part, f"{name}: samples", "per s", values) for name, values in rates.items()]
    first = next(iter(arms))
    if "trl" in rates:
        ratios = quotients(rates[first], rates["trl"])
        measurements.append(
            Measurement.of(part, f"samples per s, {first} / trl", "ratio", ratios, AT_LEAST, LEAST_OF_TRL)
        )
    return measurements + [
        Measurement.of(part, f"{name} phase", "share of a step", quotients(values, seconds[first])[WARM_UP:])
        for name, values in arms[first].phases.items()
    ]


@torch.no_grad()
def measure_bandwidth(
    name: str, shape: tuple[int, int], num_tokens: int, device: str, rounds: int
) -> list[Measurement]:
    """Measure the bandwidth of a copy, and the share of it at which the statistics read bfloat16 logits."""
    case = Case.draw(shape, num_tokens, torch.bfloat16, device)
    logits = case.logits()
    copy = torch.empty_like(logits)
    works = {"copy": lambda: copy.copy_(logits), "statistics": lambda: stats_of_logits(logits, case.targets)}
    seconds = time_in_rounds(works, rounds, synchronizer(device))
    copied = [2 * logits.nbytes / value / 1e9 for value in seconds["copy"]]
    read = [logits.nbytes / value / 1e9 for value in seconds["statistics"]]
    return [
        Measurement.of(PART, f"{name}: copy", "GB per s", copied),
        Measurement.of(PART, f"{name}: log-probability, entropy, sum p²", "GB per s of logits", read),
        Measurement.of(
            PART,
            f"{name}: statistics / copy",
            "share of bandwidth",
            quotients(read, copied),
            AT_LEAST,
            LEAST_OF_BANDWIDTH,
        ),
    ]


def measure_memory(name: str, shape: tuple[int, int], num_tokens: int) -> Measurement:
    """Measure the GPU memory of the statistics and their backward pass, without the gradients themselves."""
    case = Case.draw(shape, num_tokens, torch.bfloat16, "cuda")
    work = from_hidden(case)["entrace"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward(work)
    extra = torch.cuda.max_memory_allocated() - before - case.grad_bytes()
    key = f"{name}, bfloat16, {num_tokens:,} tokens: extra memory, both passes"
    return Measurement.of(PART, key, "GB", [extra / 1e9], AT_MOST, MAX_EXTRA_GB)


def measure(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Yield the measurements of each part, at toy size if ``quick``."""
    for name, shape in (TOY_SHAPES if quick else SHAPES).items():
        yield measure_bandwidth(name, shape, 64 if quick else COPIED_TOKENS, device, 2 if quick else 20)
        if device == "cuda":
            yield [measure_memory(name, shape, 64 if quick else FULL_TOKENS)]
    with tempfile.TemporaryDirectory() as folder:
        random = make_random_model(Path(folder, "random"), TOY if quick else QWEN)
        models = {"SmolLM2-135M": EMBEDDED if quick else SMOLLM, "Qwen2.5-0.5B, random weights": random}
        for name, path in models.items():
            ways = {"entrace": "auto", "entrace, packed": "packed"}
            configs = {way: make_config(path, device, quick, f"policy.attention={key}") for way, key in ways.items()}
            rollout = configs["entrace"].rollout
            batch = f"{rollout.prompts_per_step * rollout.group_size} responses of {rollout.max_response_tokens} tokens"
            yield measure_steps(f"{name}, {batch}", configs, 1 if quick else 5, TRL_MICRO_BATCHES[quick])


def main() -> None:
    """Measure and write the report; exit with code 2 if the device is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="report to write, without file extension")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device (default cuda)")
    parser.add_argument("--quick", action="store_true", help="run at toy size, without targets")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU; try the benchmark with --device cpu --quick", file=sys.stderr)
        raise SystemExit(2)
    more = {"gpu": torch.cuda.get_device_name()} if arguments.device == "cuda" else {}
    measurements: list[Measurement] = []
    for found in measure(arguments.device, arguments.quick):
        measurements += (
            [replace(measurement, bound=None, target=None) for measurement in found] if arguments.quick else found
        )
        # After each part, since time on a GPU may end at any moment.
        write_report(arguments.out, "make bench-gpu", measurements, **more)


if __name__ == "__main__":
    main()
