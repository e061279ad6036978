"""Compare the GPU sampler, without a graph, with the CPU sampler.

Naive references are a second comparison.
"""

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from entrace.trainer.config import LoraConfig, PolicyConfig, load_config
from entrace.trainer.faults import TrainingError, memory_advice
from entrace.trainer.kernels import decoding, token_stats
from entrace.trainer.kernels.decoding import LayerCache, Rows, attend, tile_size
from entrace.trainer.kernels.token_stats import WHOLE, LMHead, Truncation
from entrace.trainer.model.policy import Policy
from entrace.trainer.sampling import backend, batched, draws
from entrace.trainer.sampling.backend import BATCHED, COMPILED, CUDA_GRAPH, ON, backend_of, can_sample
from entrace.trainer.sampling.batched import BatchedSampler, tile_rows
from entrace.trainer.sampling.draws import Draws
from entrace.trainer.sampling.sampler import sample, sample_at
from entrace.trainer.sampling.samples import SamplingParams
from tests.trainer.test_policy import ARCHITECTURES, load, write_model

LIMITS, SAMPLES = [40, 30, 3, 1], 12
# Architectures with the parts of Llama; Qwen3 adds norms of queries and keys.
LLAMA_LIKE = {"llama", "llama-tied", "qwen2", "qwen3"}


@pytest.fixture(scope="module")
def shared():
    return Policy.load(PolicyConfig(device="cpu"))


@pytest.fixture(scope="module")
def prompts(shared):
    return [shared.encode_prompt(text) for text in ("1 + 2 =", "12 + 3 - 4 =", "7 =", "5 - 4 =")]


@pytest.fixture(scope="module")
def uniforms():
    return np.random.default_rng(0).random((len(LIMITS) * SAMPLES, 40), dtype=np.float32)


def batched_sampler(policy, **options):
    return BatchedSampler(policy, **{"captures": False, "compiles": False, "note": pytest.fail, **options})


def assert_equal(found, expected):
    for name in ("response_ids", "response_mask", "is_truncated"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    mask = expected.response_mask
    for name, values in vars(expected.stats).items():
        torch.testing.assert_close(getattr(found.stats, name)[mask], values[mask], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found.hidden_norm[mask], expected.hidden_norm[mask], rtol=1e-4, atol=1e-5)
    assert found.prompt_ids == expected.prompt_ids


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(40),
        SamplingParams(40, 0.7, Truncation(top_p=0.8)),
        SamplingParams(40, 1.3, Truncation(0.9, 5), stop=("</answer>",)),
        SamplingParams(40, stop=("</answer>", "so ", "= 1")),
    ],
    ids=lambda params: f"{params.temperature}-{params.truncation}-{len(params.stop)}",
)
def test_equal_random_numbers_draw_equal_tokens(shared, prompts, uniforms, params, monkeypatch):
    """Prompts differ in length and limit; responses end for all reasons.

    Their lengths differ.
    """
    monkeypatch.setattr(batched, "CHECK_EVERY", 3)
    monkeypatch.setattr(batched, "PLACES", 8)
    sampler = batched_sampler(shared)
    expected = sample_at(shared, prompts, uniforms, LIMITS, params)
    found = sampler.sample_at(prompts, uniforms, LIMITS, params)
    assert_equal(found, expected)
    assert len(found.lengths.unique()) > 5
    # Ended responses left the batch more than once.
    assert len(sampler._memory.rows) > 2


def test_recorded_values_equal_one_response_at_a_time_in_float64(prompts, uniforms):
    policy = Policy.load(PolicyConfig(device="cpu"))
    rollouts = batched_sampler(policy).sample_at(prompts, uniforms[::SAMPLES], [40] * 4, SamplingParams(40, 0.8))
    model = policy.model.double()
    for row, (prompt, response) in enumerate(zip(rollouts.prompt_ids, rollouts.responses(), strict=True)):
        with torch.no_grad():
            logits = model(torch.cat((torch.tensor(prompt), response))[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        logp = torch.log_softmax(logits, -1)
        values = {
            "logprob": logp.gather(1, response[:, None]).squeeze(1),
            "entropy": -(logp.exp() * logp).sum(-1),
            "sum_p2": logp.exp().square().sum(-1),
        }
        for name, wanted in values.items():
            found = getattr(rollouts.stats, name)[row, : len(response)].double()
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("cache_tokens", [1, 100, 1500])
def test_batches_that_fit_draw_equal_tokens(shared, prompts, uniforms, cache_tokens, monkeypatch):
    """A batch may end within a group, whose prompt is then read twice."""
    counts, inner = [], BatchedSampler._sample

    def counted(self, prompts, widest, of_rows, *arguments):
        counts.append(len(of_rows))
        return inner(self, prompts, widest, of_rows, *arguments)

    monkeypatch.setattr(BatchedSampler, "_sample", counted)
    monkeypatch.setattr(batched, "PLACES", 8)
    expected = sample_at(shared, prompts, uniforms[:, :6], [6] * 4, SamplingParams(6))
    params = SamplingParams(6, cache_tokens=cache_tokens)
    assert_equal(batched_sampler(shared).sample_at(prompts, uniforms[:, :6], [6] * 4, params), expected)
    assert sum(counts) == len(uniforms)
    assert {1: counts == [1] * 48, 100: 1 < len(counts) < 10, 1500: counts == [48]}[cache_tokens]


def test_a_batch_that_does_not_fit_is_halved(shared, prompts, uniforms, monkeypatch, caplog):
    allocate, most = batched._Memory.allocate, [13]

    def limited(model, shape, *arguments):
        if shape[2] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(model, shape, *arguments)

    monkeypatch.setattr(batched._Memory, "allocate", limited)
    arguments = (prompts, uniforms[:, :6], [6] * 4, SamplingParams(6))
    sampler = batched_sampler(shared)
    assert_equal(sampler.sample_at(*arguments), sample_at(shared, *arguments))
    assert [record.args[0] for record in caplog.records] == [24, 12]
    # Even one response does not fit.
    most[0] = 0
    config = load_config("tiny")
    sampler = batched_sampler(shared)
    with (
        pytest.raises(TrainingError, match=r"out of memory while sampling; lower rollout\.cache_tokens"),
        memory_advice(config, "sampling", "rollout.cache_tokens"),
    ):
        sampler.sample_at(*arguments)


def test_memory_and_weights_are_reused_until_they_change(prompts, uniforms, monkeypatch):
    policy = Policy.load(PolicyConfig(device="cpu"))
    sampler = batched_sampler(policy)
    arguments = (prompts, uniforms[:, :9], [9] * 4, SamplingParams(9))
    sampler.sample_at(*arguments)
    memory = sampler._memory
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.01, fused=True)
    policy.token_stats(prompts, [torch.tensor([5, 6])] * 4, 1.0).logprob.mean().backward()
    optimizer.step()
    assert_equal(sampler.sample_at(*arguments), sample_at(policy, *arguments))
    assert sampler._memory is memory
    fewer = (prompts[2:], uniforms[24:, :5], [5] * 2, SamplingParams(5))
    assert_equal(sampler.sample_at(*fewer), sample_at(policy, *fewer))
    assert sampler._memory is memory
    # A large batch is freed at the end, and its weights.
    monkeypatch.setattr(batched, "_total_bytes", lambda device: 1e6)
    assert_equal(sampler.sample_at(*fewer), sample_at(policy, *fewer))
    assert sampler._memory is None
    assert sampler._model.nbytes() == policy.head.weight.nbytes
    monkeypatch.undo()
    more = (prompts, np.tile(uniforms, (2, 1)), [40] * 4, SamplingParams(40))
    assert_equal(sampler.sample_at(*more), sample_at(policy, *more))
    assert sampler._memory is not None


def test_an_adapter_is_merged(tmp_path, uniforms):
    pytest.importorskip("peft")
    folder = write_model(tmp_path, *ARCHITECTURES["qwen2"])
    policy = load(folder, lora=LoraConfig(r=2))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    arguments = ([[5, 6], [7, 8, 9]], uniforms[:8, :6], [6] * 2, SamplingParams(6))
    assert_equal(batched_sampler(policy).sample_at(*arguments), sample_at(policy, *arguments))
    assert not torch.equal(sample_at(policy, *arguments).response_ids, sample_at(load(folder), *arguments).response_ids)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_only_models_with_the_parts_of_llama_are_taken(tmp_path, name):
    policy = load(write_model(tmp_path, *ARCHITECTURES[name]))
    if name in LLAMA_LIKE:
        assert can_sample(policy)
    else:
        with pytest.raises(ValueError, match="needs"):
            can_sample(policy)


def test_a_model_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    policy = load(write_model(tmp_path, *ARCHITECTURES["llama"]))
    inner = policy.model.base_model.layers[0].forward
    policy.model.base_model.layers[0].forward = lambda x, *args, **kwargs: inner(x, *args, **kwargs) * 1.5
    assert not can_sample(policy)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_records_the_distribution_it_samples_from(prompts, uniforms, dtype):
    policy = Policy.load(PolicyConfig(device="cpu", dtype=dtype))
    rollouts = batched_sampler(policy).sample_at(prompts, uniforms, [12] * 4, SamplingParams(12))
    scored = policy.token_stats(rollouts.prompt_ids, rollouts.responses(), 1.0)
    difference = rollouts.old_logprobs[rollouts.response_mask] - scored.logprob
    assert difference.abs().mean() < 0.02


def test_a_failed_capture_is_logged_once_and_changes_nothing(shared, prompts, uniforms, monkeypatch, caplog):
    class Failing:
        def __call__(self, work):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(batched, "CudaGraph", Failing)
    reasons = []
    sampler = batched_sampler(shared, captures=True, note=reasons.append)
    arguments = (prompts, uniforms[:, :6], [6] * 4, SamplingParams(6))
    assert_equal(sampler.sample_at(*arguments), sample_at(shared, *arguments))
    assert len(reasons) == 1
    assert [record.message for record in caplog.records] == [
        f"CUDA graph: off from here on ({reasons[0]}); sampling is slower"
    ]


def test_what_fails_is_left_out_with_its_reason(shared, monkeypatch):
    """The case is a GPU without a C compiler; here, captured work runs plainly."""

    def failing(*arguments, **options):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", failing)
    states = {}
    sampler = backend._try_batched(shared, shared, states)
    assert sampler.captures
    assert states == {BATCHED: ON, COMPILED: "Failed to find C compiler", CUDA_GRAPH: ON}
    monkeypatch.setattr(backend, "BatchedSampler", failing)
    assert backend._try_batched(shared, shared, states) is None
    assert states[BATCHED] == "Failed to find C compiler"


def test_the_backend_of_a_gpu_is_used_for_all_sampling(policy, prompts, monkeypatch):
    selected = backend_of(policy)
    expected = sample(policy, prompts, 6, SamplingParams(20), np.random.default_rng(1), slice(1, 3))
    gpu = replace(selected, batched=batched_sampler(policy))
    monkeypatch.setitem(backend._BACKENDS, policy, gpu)
    few = SamplingParams(20, cache_tokens=200)
    assert_equal(sample(policy, prompts, 6, few, np.random.default_rng(1), slice(1, 3)), expected)
    assert gpu.for_sharded().batched is None


def test_a_sampler_does_not_keep_its_policy(prompts, uniforms):
    policy = Policy.load(PolicyConfig(device="cpu"))
    sampler = batched_sampler(policy)
    sampler.sample_at(prompts, uniforms[:, :3], [3] * 4, SamplingParams(3))
    found = weakref.ref(policy)
    del policy
    gc.collect()
    assert found() is None


@pytest.mark.parametrize("width", [1, 2, 4])
def test_tiles_hold_rows_of_one_prompt(width):
    prompts = np.array([0, 0, 0, 0, 0, 2, 3, 3])
    tiles = tile_rows(prompts, 12, width)
    assert tiles.shape == (12, width)
    assert sorted(tiles[tiles >= 0]) == list(range(8))
    for tile in tiles:
        assert len({prompts[row] for row in tile if row >= 0}) <= 1
    assert sum(tiles[:, 0] >= 0) == {1: 8, 2: 5, 4: 4}[width]
    assert (tile_rows(np.array([], dtype=int), 8, width) == -1).all()


# The interpreter warns about values beyond the last column.
with_interpreter = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def kernels(monkeypatch):
    """Return a function that switches to the kernels.

    tests/conftest.py selects the interpreter.
    """
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tests/trainer/test_cuda.py runs them")
    from entrace.trainer.kernels import decoding_triton, token_stats_triton

    monkeypatch.setattr(decoding_triton, "KEYS", 16)
    monkeypatch.setattr(decoding_triton, "LOGITS", 64)

    def switch():
        for module in (decoding, draws, token_stats):
            monkeypatch.setattr(module, "triton_kernels", lambda device: token_stats_triton)

    return switch


def random_step(group, width, dtype):
    """Return arguments of ``attend``: three prompts and seven rows.

    One of the rows is the empty last slot.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    key_heads, slots, prompts = 2, torch.tensor([0, 1, 2, 4, 5, 6, 8, 9]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 0])
    cache = LayerCache(*(draw(n, key_heads, size, width) for n, size in ((3, 24), (3, 24), (10, 40), (10, 40))))
    tiles = torch.from_numpy(tile_rows(prompts[slots[:7]].numpy(), 8, tile_size(group)))
    lengths = torch.tensor([1, 2, 19, 0, 17, 33, 40, 0, 5, 1])
    rows = Rows(slots, tiles, prompts, torch.tensor([24, 3, 17]), lengths)
    angles = torch.rand(64, width // 2, generator=generator).repeat(1, 2) * 3
    return draw(8, (group + 2) * key_heads * width), angles.cos(), angles.sin(), rows, cache, width**-0.5


@with_interpreter
@pytest.mark.parametrize(("group", "width"), [(3, 16), (7, 8), (1, 24)])
def test_attention_kernel(kernels, group, width):
    *arguments, cache, scale = random_step(group, width, torch.float32)
    caches = [LayerCache(*(tensor.clone() for tensor in vars(cache).values())) for _ in range(2)]
    expected = attend(*arguments, caches[0], scale, 40)
    kernels()
    found = attend(*arguments, caches[1], scale, 40)
    # The last row has no tile, since its slot is empty.
    torch.testing.assert_close(found[:7], expected[:7], rtol=1e-5, atol=1e-5)
    used = arguments[-1].slots[:7]
    for name in ("own_keys", "own_values"):
        own = [getattr(one, name)[used] for one in caches]
        torch.testing.assert_close(own[1], own[0], rtol=1e-6, atol=1e-6)


def test_attention_equals_a_naive_reference():
    qkv, cos, sin, rows, cache, scale = random_step(3, 16, torch.float64)
    found = attend(qkv, cos.double(), sin.double(), rows, cache, scale, 40)
    for row, slot in enumerate(rows.slots[:7].tolist()):
        prompt, length = int(rows.prompts[slot]), int(rows.lengths[slot])
        num_prompt = int(rows.prompt_lengths[prompt])
        heads = qkv[row].view(-1, 16)
        at = num_prompt + length - 1
        turned = heads.float() * cos[at] + torch.cat((-heads[:, 8:], heads[:, :8]), 1).float() * sin[at]
        for head in range(6):
            keys = [*cache.prompt_keys[prompt, head // 3, :num_prompt], *cache.own_keys[slot, head // 3, : length - 1]]
            values = [
                *cache.prompt_values[prompt, head // 3, :num_prompt],
                *cache.own_values[slot, head // 3, : length - 1],
            ]
            keys, values = torch.stack([*keys, turned[6 + head // 3]]), torch.stack([*values, heads[8 + head // 3]])
            weights = (keys.double() @ turned[head].double() * scale).softmax(0)
            torch.testing.assert_close(found[row].view(6, 16)[head], weights @ values, rtol=1e-5, atol=1e-5)


@with_interpreter
@pytest.mark.parametrize("truncation", [WHOLE, Truncation(0.8, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draw_kernel(kernels, truncation, dtype):
    """Include tokens that are almost certain, whose statistics must not cancel."""
    # Each hidden state selects a column, so that logits are not rounded.
    hidden = torch.eye(8).to(dtype)
    weight = (3 * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    weight[100, 2] = 40
    head, params = LMHead(weight, None), SamplingParams(5, 0.9, truncation)
    slots = torch.tensor([0, 1, 2, 3, 4, 5, 7, 7])
    results = []
    for switch in (lambda: None, kernels):
        switch()
        state = Draws.empty(8, 5, 2, torch.device("cpu"))
        uniforms = torch.rand(7, 5, generator=torch.Generator().manual_seed(1))
        uniforms[3, 0], uniforms[4, 0] = 0.0, 1 - 2**-24
        state.begin(uniforms, torch.tensor([5, 5, 5, 1, 2, 2, 2]), torch.tensor([100, 3]))
        state.draw(hidden, hidden.float().norm(dim=-1), slots, head, params)
        state.draw(hidden.flip(0), hidden.flip(0).float().norm(dim=-1), slots, head, params)
        results.append(state)
    expected, found = results
    assert expected.has_stopped[2]
    for name in ("ids", "tokens", "lengths", "is_open", "has_stopped"):
        # The last slot receives what is not kept.
        assert torch.equal(getattr(found, name)[:-1], getattr(expected, name)[:-1]), name
    mask = torch.arange(5) < expected.lengths[:-1, None]
    for one, other in zip(*(state.token_stats(mask, 0.9) for state in (found, expected)), strict=True):
        parts = [x if isinstance(x, torch.Tensor) else torch.stack(list(vars(x).values())) for x in (one, other)]
        torch.testing.assert_close(*parts, rtol=3e-5, atol=1e-30)


@with_interpreter
def test_sampling_with_kernels(kernels, tmp_path, uniforms, monkeypatch):
    monkeypatch.setattr("entrace.trainer.kernels.decoding_triton.LOGITS", 512)
    policy = load(write_model(tmp_path, *ARCHITECTURES["qwen2"]))
    arguments = ([[5, 6, 7], [8]], uniforms[:4, :3], [3, 2], SamplingParams(3))
    expected = sample_at(policy, *arguments)
    kernels()
    assert_equal(batched_sampler(policy).sample_at(*arguments), expected)


@pytest.mark.slow
def test_compiled_norms_and_activations(shared, prompts, uniforms):
    arguments = (prompts, uniforms[:, :6], [6] * 4, SamplingParams(6))
    assert_equal(batched_sampler(shared, compiles=True).sample_at(*arguments), sample_at(shared, *arguments))


@pytest.mark.slow
def test_kernels_compile_for_a_gpu():
    """Use a new process, because the interpreter replaces the compiler in this one."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.trainer.compile_decoding"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["_attend", "_sums", "_draw"], done.stderr
