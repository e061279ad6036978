"""Time a GPU close to its limits.

The parts are decoding, updates, token statistics, and whole GRPO steps beside TRL. Models: SmolLM2-135M, and a randomly
initialized model with the shape of Qwen2.5-0.5B. Both compute in bfloat16 with float32 master weights. Each part takes
less than two minutes:

- statistics: bytes of logits per second beside the bandwidth of a copy, which reads and writes. A share of 1 means
  reading every logit once at that speed.
- decoding: the limit reads the weights and the keys and values of every sequence once per token, at that bandwidth. The
  share is the limit's time over that of a whole call, prompts and statistics included.
- update: 6 operations per parameter and token of prompts and responses, over the rate of a dense product in bfloat16.
- trl-smollm, trl-qwen: samples per second beside TRL, which generates with transformers. Both trainers do the same
  work: all responses reach the length limit, and rewards are random, so that few groups are uniform. They process about
  as many tokens at once in the update, alternate, and start from the same weights.

Usage: python -m tests.benchmarks.bench_gpu --out reports/benchmarks_gpu [--part decoding] [--profile] [--device cpu
--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from entrace.trainer.config import Config, load_config
from entrace.trainer.model.loading import load_pretrained
from entrace.trainer.model.policy import Policy
from entrace.trainer.resources import EMBEDDED, SMOLLM
from entrace.trainer.sampling.sampler import sample
from entrace.trainer.sampling.samples import SamplingParams
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
# Sequences in groups of 8, and the least share of the limit of decoding.
LEAST_OF_LIMIT = {256: 0.3, 32: 0.15}
GROUP, PROMPT_TOKENS, NEW_TOKENS, PROFILED_TOKENS = 8, 160, 128, 32
PARTS = ("statistics", "decoding", "update", "trl-smollm", "trl-qwen")
SMOLLM_NAME, QWEN_NAME = "SmolLM2-135M", "Qwen2.5-0.5B, random weights"


def toss(completion: str, row: dict[str, Any]) -> float:
    """Score a completion 0 or 1 by its hash: random, but equal for equal completions."""
    return float(crc32(completion.encode()) & 1)


def synchronizer(device: str) -> Callable[[], None]:
    """Return a function that waits for all work on the device."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def make_random_model(folder: Path, shape: dict[str, Any]) -> str:
    """Write a random model with the embedded policy's tokenizer; return its folder."""
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
    """Measure samples per second of TRL and of each config.

    The phases of the first config's steps are also measured.
    """
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
    """Measure the bandwidth of a copy, and the share that the statistics reach.

    The statistics read bfloat16 logits.
    """
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
    """Measure the GPU memory of the statistics and their backward pass.

    Gradients themselves do not count.
    """
    case = Case.draw(shape, num_tokens, torch.bfloat16, "cuda")
    work = from_hidden(case)["entrace"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward(work)
    extra = torch.cuda.max_memory_allocated() - before - case.grad_bytes()
    key = f"{name}, bfloat16, {num_tokens:,} tokens: extra memory, both passes"
    return Measurement.of(PART, key, "GB", [extra / 1e9], AT_MOST, MAX_EXTRA_GB)


def copy_bandwidth(num_bytes: int, device: str, rounds: int) -> float:
    """Return the bytes per second, read and written, of a copy."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = time_in_rounds({"copy": lambda: target.copy_(source)}, rounds, synchronizer(device))["copy"]
    return 2 * num_bytes / statistics.median(seconds)


def matmul_rate(size: int, device: str, rounds: int) -> float:
    """Return the operations per second of a dense product in bfloat16."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = time_in_rounds({"product": lambda: left @ right}, rounds, synchronizer(device))["product"]
    return 2 * size**3 / statistics.median(seconds)


def bytes_per_token(policy: Policy, num_sequences: int, context: float) -> float:
    """Return the bytes that a decoding step must read.

    A step reads weights, and keys and values of every sequence.
    """
    model, size = policy.model, policy.dtype.itemsize
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    weights = sum(parameter.numel() for parameter in model.parameters())
    # A separate input embedding is read at single rows only.
    weights -= 0 if head.weight is embedding.weight else embedding.weight.numel()
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    return size * (weights + num_sequences * context * per_position)


def measure_decoding(name: str, path: str, device: str, quick: bool, profile: Path | None) -> list[Measurement]:
    """Measure sampling as a share of the limit.

    If ``profile`` is given, a profile by kernel is appended to this file.
    """
    # Compiled anew, since sizes that another model had would count as dynamic.
    torch.compiler.reset()
    policy = Policy.load(make_config(path, device, quick).policy)
    policy.stop_ids = torch.tensor([], dtype=torch.int64)
    prompt_tokens, new_tokens = (12, 6) if quick else (PROMPT_TOKENS, NEW_TOKENS)
    bandwidth = copy_bandwidth(1 << 16 if quick else 1 << 30, device, 10)
    part = f"Decoding, {name}, prompts of {prompt_tokens} tokens, {new_tokens} new tokens"
    found = []
    for num_sequences, least in LEAST_OF_LIMIT.items():
        count = 1 if quick else num_sequences // GROUP
        prompts = np.random.default_rng(0).integers(policy.vocab_size, size=(count, prompt_tokens)).tolist()

        def draw(tokens: int, prompts: list[list[int]] = prompts) -> None:
            sample(policy, prompts, GROUP, SamplingParams(tokens), np.random.default_rng(0))

        works = {"sample": lambda draw=draw: draw(new_tokens)}
        seconds = time_in_rounds(works, 2 if quick else 10, synchronizer(device))["sample"]
        limit = new_tokens * bytes_per_token(policy, count * GROUP, prompt_tokens + new_tokens / 2) / bandwidth
        shares = [limit / value for value in seconds]
        found += [
            Measurement.of(part, f"{num_sequences} sequences: whole call", "s", seconds),
            Measurement.of(part, f"{num_sequences} sequences: limit", "s", [limit]),
            Measurement.of(part, f"{num_sequences} sequences", "share of the limit", shares, AT_LEAST, least),
        ]
        if profile:
            # The first call captures graphs.
            draw(min(PROFILED_TOKENS, new_tokens))
            with torch.profiler.profile() as profiler:
                draw(min(PROFILED_TOKENS, new_tokens))
                synchronizer(device)()
            key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80)
            with profile.open("a") as file:
                file.write(f"{name}, {num_sequences} sequences, {PROFILED_TOKENS} tokens\n{table}\n")
    return found


def measure_update(name: str, path: str, device: str, quick: bool, rounds: int) -> list[Measurement]:
    """Measure updates as a share of the rate of a dense product."""
    config = make_config(path, device, quick)
    rate = matmul_rate(64 if quick else 8192, device, 10)
    with tempfile.TemporaryDirectory() as folder:
        arm = Ours(config, load_task(config.task, config.seed), Path(folder, "run"), records=True)
        policy, task = arm.learner.policy, arm.source.task
        policy.stop_ids = torch.tensor([], dtype=torch.int64)
        for _ in range(1 + rounds):
            arm.take_step()
    parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    prompts = [policy.encode_prompt(task.train_prompt(i).question) for i in range(arm.source.position)]
    prompt_tokens = sum(map(len, prompts)) / arm.step * config.rollout.group_size
    seconds = arm.phases["update"][1:]
    operations = [6 * parameters * (prompt_tokens + count) for count in arm.num_tokens[1:]]
    shares = [count / value / rate for count, value in zip(operations, seconds, strict=True)]
    part = f"Update, {name}"
    return [
        Measurement.of(part, "dense product in bfloat16", "operations per s", [rate]),
        Measurement.of(part, "update", "s", seconds),
        Measurement.of(part, "update / dense product", "share of throughput", shares),
    ]


def measure(device: str, quick: bool, parts: Sequence[str], profile: Path | None) -> Iterator[list[Measurement]]:
    """Yield the measurements of each part, at toy size if ``quick``."""
    if "statistics" in parts:
        for name, shape in (TOY_SHAPES if quick else SHAPES).items():
            yield measure_bandwidth(name, shape, 64 if quick else COPIED_TOKENS, device, 2 if quick else 20)
            if device == "cuda":
                yield [measure_memory(name, shape, 64 if quick else FULL_TOKENS)]
    with tempfile.TemporaryDirectory() as folder:
        random = make_random_model(Path(folder, "random"), TOY if quick else QWEN)
        models = {SMOLLM_NAME: EMBEDDED if quick else SMOLLM, QWEN_NAME: random}
        for (name, path), part in zip(models.items(), ("trl-smollm", "trl-qwen"), strict=True):
            if "decoding" in parts:
                yield measure_decoding(name, path, device, quick, profile)
            if "update" in parts:
                yield measure_update(name, path, device, quick, 1 if quick else 3)
            if part in parts:
                config = make_config(path, device, quick)
                rollout = config.rollout
                batch = f"{rollout.prompts_per_step * rollout.group_size} responses"
                heading = f"{name}, {batch} of {rollout.max_response_tokens} tokens"
                yield measure_steps(heading, {"entrace": config}, 1 if quick else 5, TRL_MICRO_BATCHES[quick])


def main() -> None:
    """Measure and write the report; exit with code 2 if the device is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="report to write, without file extension")
    parser.add_argument("--part", choices=PARTS, help="measure one part, into a report of its own (default all parts)")
    parser.add_argument("--profile", action="store_true", help="also write the time of each kernel of decoding")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device (default cuda)")
    parser.add_argument("--quick", action="store_true", help="run at toy size, without targets")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU; try the benchmark with --device cpu --quick", file=sys.stderr)
        raise SystemExit(2)
    more = {"gpu": torch.cuda.get_device_name()} if arguments.device == "cuda" else {}
    out = arguments.out.with_name(f"{arguments.out.name}_{arguments.part}") if arguments.part else arguments.out
    profile = out.with_suffix(".profile.txt") if arguments.profile else None
    if profile:
        profile.parent.mkdir(parents=True, exist_ok=True)
        profile.unlink(missing_ok=True)
    measurements: list[Measurement] = []
    parts = [arguments.part] if arguments.part else PARTS
    for found in measure(arguments.device, arguments.quick, parts, profile):
        measurements += (
            [replace(measurement, bound=None, target=None) for measurement in found] if arguments.quick else found
        )
        # After each part, since time on a GPU may end at any moment.
        write_report(out, "make bench-gpu", measurements, **more)


if __name__ == "__main__":
    main()
