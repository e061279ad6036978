import numpy as np
import pytest
import torch

from entrace.analysis.trace import InputError
from entrace.trainer.config import PolicyConfig
from entrace.trainer.kernels.token_stats import WHOLE, Softmax, Truncation
from entrace.trainer.learner import Learner, make_objectives
from entrace.trainer.model.policy import Policy
from entrace.trainer.rollouts import PromptSource, collect_batch
from entrace.trainer.sampling.backend import backend_of
from entrace.trainer.sampling.decoder import Decoder
from entrace.trainer.sampling.sampler import sample, sample_at
from entrace.trainer.sampling.samples import SamplingParams
from entrace.trainer.sampling.token_sampler import invert_cdf

from .conftest import token_advantages


class FixedNumbers:
    """Return given uniform numbers in place of a generator."""

    def __init__(self, numbers):
        self.numbers = numbers

    def random(self, shape, dtype):
        assert self.numbers.shape == shape
        return self.numbers.astype(dtype)


@pytest.fixture
def prompts(policy, task):
    encoded = [policy.encode_prompt(prompt.text) for prompt in task.heldout]
    assert len({len(prompt) for prompt in encoded}) > 1, "left padding is not exercised"
    return encoded


def flat(rollouts, name):
    return getattr(rollouts.stats, name)[rollouts.response_mask]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("truncation", [WHOLE, Truncation(top_p=0.8), Truncation(top_k=3), Truncation(0.8, 5)])
def test_recorded_values_equal_a_teacher_forced_pass(policy, prompts, temperature, truncation):
    params = SamplingParams(40, temperature, truncation)
    rollouts = sample(policy, prompts, 3, params, np.random.default_rng(0))
    scored = policy.token_stats(rollouts.prompt_ids, rollouts.responses(), temperature, truncation)
    for name in ("logprob", "entropy", "sum_p2"):
        torch.testing.assert_close(flat(rollouts, name), getattr(scored, name), rtol=1e-4, atol=2e-5)


def naive_distribution(logits, params):
    """Apply temperature, top-k, and top-p in float64, token by token."""
    p = torch.softmax(logits.double() / params.temperature, -1)
    order = p.argsort(descending=True).tolist()[: params.truncation.top_k]
    total, before, kept = float(p[order].sum()), 0.0, []
    for token in order:
        if before / total < params.truncation.top_p:
            kept.append(token)
        before += float(p[token])
    left = torch.zeros_like(p)
    left[kept] = p[kept] / p[kept].sum()
    return left


@pytest.mark.parametrize("truncation", [Truncation(top_p=0.8), Truncation(top_k=3), Truncation(0.8, 5)])
def test_truncated_sampling_records_the_truncated_distribution(policy, prompts, truncation):
    params = SamplingParams(30, 1.3, truncation)
    rollouts = sample(policy, prompts, 2, params, np.random.default_rng(0))
    left_out = 0.0
    for row, (prompt, response) in enumerate(zip(rollouts.prompt_ids, rollouts.responses(), strict=True)):
        with torch.no_grad():
            logits = policy.model(torch.cat((torch.tensor(prompt), response))[None]).logits[0, len(prompt) - 1 : -1]
        for t, token in enumerate(response):
            p = naive_distribution(logits[t], params)
            assert rollouts.old_logprobs[row, t].item() == pytest.approx(p[token].log().item(), rel=1e-4, abs=2e-5)
            assert rollouts.entropies[row, t].item() == pytest.approx(-p.xlogy(p).sum().item(), rel=1e-4, abs=2e-5)
            assert rollouts.stats.sum_p2[row, t].item() == pytest.approx(p.square().sum().item(), rel=1e-4)
            left_out += float((logits[t] / params.temperature).softmax(-1)[p == 0].sum())
    assert left_out > 1, "truncation excluded nothing"


def test_a_token_that_current_weights_would_exclude_keeps_a_probability(policy, prompts):
    """A token sampled under old weights must have a finite ratio under the new ones."""
    whole = sample(policy, prompts, 4, SamplingParams(30), np.random.default_rng(0))
    wide = policy.token_stats(whole.prompt_ids, whole.responses(), 1.0).logprob
    narrow = policy.token_stats(whole.prompt_ids, whole.responses(), 1.0, Truncation(top_k=1))
    assert narrow.logprob.isfinite().all()
    assert (narrow.logprob > wide).all()
    is_likeliest = narrow.logprob == 0
    assert 0 < is_likeliest.sum() < len(is_likeliest), "no token was excluded"
    narrow.logprob.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.model.parameters())


def test_an_update_uses_the_sampling_distribution(policy, task, small_config):
    """Under the sampling policy all ratios are 1, so nothing is clipped.

    The loss is minus the mean advantage.
    """
    rollout = small_config.rollout.model_copy(update={"top_p": 0.8, "top_k": 20})
    config = small_config.model_copy(update={"rollout": rollout})
    batch = collect_batch(config, policy, PromptSource(task), step=1)
    advantages = token_advantages(config, batch)
    metrics = Learner(config, policy).update(batch, make_objectives(config, batch, advantages, step=1), step=1)
    is_kept = batch.is_kept[:, None] & batch.rollouts.response_mask
    assert not metrics.is_clipped.any()
    assert metrics.loss == pytest.approx(-advantages[is_kept].mean().item(), abs=1e-5)


def test_the_token_that_completes_a_stop_text_ends_the_response(policy, prompts):
    stop = ("</answer>", "so ", "= 1")
    numbers = np.random.default_rng(3).random((8 * len(prompts), 40), dtype=np.float32)
    limits = [40] * len(prompts)
    free = sample_at(policy, prompts, numbers, limits, SamplingParams(40))
    stopped = sample_at(policy, prompts, numbers, limits, SamplingParams(40, stop=stop))
    ends = set()
    for row, (response, whole) in enumerate(zip(stopped.responses(), free.responses(), strict=True)):
        assert torch.equal(response, whole[: len(response)])
        texts = [policy.decode([whole[:length].tolist()])[0] for length in range(1, len(whole) + 1)]
        complete = [any(text in beginning for text in stop) for beginning in texts]
        assert len(response) == (complete.index(True) + 1 if any(complete) else len(whole))
        assert stopped.is_truncated[row] == (not any(complete) and free.is_truncated[row])
        ends |= {text for text in stop if text in texts[len(response) - 1]}
    assert ends == set(stop), "a stop text ended no response"
    scored = policy.token_stats(stopped.prompt_ids, stopped.responses(), 1.0)
    torch.testing.assert_close(flat(stopped, "logprob"), scored.logprob, rtol=1e-4, atol=2e-5)


def test_recorded_values_equal_one_response_at_a_time_in_float64(policy, prompts):
    rollouts = sample(policy, prompts, 1, SamplingParams(40), np.random.default_rng(1))
    model = policy.model.double()
    for row, (prompt, response) in enumerate(zip(rollouts.prompt_ids, rollouts.responses(), strict=True)):
        with torch.no_grad():
            output = model(torch.cat((torch.tensor(prompt), response))[None], output_hidden_states=True)
        logp = torch.log_softmax(output.logits[0, len(prompt) - 1 : -1], -1)
        count = len(response)
        values = {
            "logprob": logp.gather(1, response[:, None]).squeeze(1),
            "entropy": -(logp.exp() * logp).sum(-1),
            "sum_p2": logp.exp().square().sum(-1),
        }
        for name, wanted in values.items():
            torch.testing.assert_close(
                getattr(rollouts.stats, name)[row, :count].double(), wanted, rtol=1e-4, atol=2e-5
            )
        norms = output.hidden_states[-1][0, len(prompt) - 1 : -1].norm(dim=-1)
        torch.testing.assert_close(rollouts.hidden_norm[row, :count].double(), norms, rtol=1e-4, atol=1e-5)


def test_bfloat16_arithmetic_records_the_distribution_it_samples_from(prompts):
    """Entropies of rounded logits are close to exact ones; weights stay float32."""
    policy = Policy.load(PolicyConfig(device="cpu", dtype="bfloat16"))
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    rollouts = sample(policy, prompts, 4, SamplingParams(24), np.random.default_rng(5))
    exact = Policy.load(PolicyConfig(device="cpu")).token_stats(rollouts.prompt_ids, rollouts.responses(), 1.0)
    entropy = flat(rollouts, "entropy")
    assert entropy.dtype == torch.float32
    assert not torch.equal(entropy, exact.entropy)
    assert (entropy - exact.entropy).abs().mean() < 0.02
    assert (flat(rollouts, "logprob") - exact.logprob).abs().mean() < 0.05


def test_a_model_that_scales_its_logits_is_rejected(policy):
    original = policy.model.forward

    def scaled(*arguments, **options):
        output = original(*arguments, **options)
        output.logits = output.logits * 0.5
        return output

    policy.model.forward = scaled
    with pytest.raises(InputError, match="scales or caps its logits"):
        policy._check_head()


def test_a_response_depends_only_on_its_own_random_numbers(policy, prompts):
    numbers = np.random.default_rng(2).random((2 * len(prompts), 24))
    params = SamplingParams(24)
    together = sample(policy, prompts, 2, params, FixedNumbers(numbers))
    for i, prompt in enumerate(prompts):
        alone = sample(policy, [prompt], 2, params, FixedNumbers(numbers[2 * i : 2 * i + 2]))
        for found, wanted in zip(alone.responses(), together.responses()[2 * i : 2 * i + 2], strict=True):
            assert torch.equal(found, wanted)


def test_shared_prefixes_of_responses_are_computed_once(policy, prompts, monkeypatch):
    backend_of(policy)  # Selected before steps are counted.
    read, append = [], Decoder.append
    monkeypatch.setattr(
        Decoder, "append", lambda self, tokens, parents: read.append(len(tokens)) or append(self, tokens, parents)
    )
    rollouts = sample(policy, prompts, 8, SamplingParams(24), np.random.default_rng(2))
    texts = [
        (prompt, response.tolist()) for prompt, response in zip(rollouts.prompt_ids, rollouts.responses(), strict=True)
    ]
    # Nothing is computed after the last token.
    beginnings = {(*prompt, *response[:end]) for prompt, response in texts for end in range(1, len(response))}
    assert sum(read) == len(beginnings) < 0.95 * sum(len(response) - 1 for _, response in texts)


def test_prompts_that_exceed_the_cache_are_sampled_in_parts(policy, prompts):
    longest = max(map(len, prompts)) + 24
    together, apart = (
        sample(policy, prompts, 2, SamplingParams(24, cache_tokens=tokens), np.random.default_rng(2))
        for tokens in (10**6, 2 * 2 * longest)
    )
    mask = together.response_mask
    assert torch.equal(apart.response_mask, mask)
    assert torch.equal(apart.response_ids[mask], together.response_ids[mask])
    assert torch.equal(apart.is_truncated, together.is_truncated)
    for name, values in vars(apart.stats).items():
        torch.testing.assert_close(values[mask], getattr(together.stats, name)[mask], rtol=1e-4, atol=1e-5)


def test_responses_end_with_the_stop_token_or_at_the_limit(policy, prompts):
    rollouts = sample(policy, prompts, 8, SamplingParams(30), np.random.default_rng(3))
    assert 0 < rollouts.is_truncated.sum() < len(rollouts.is_truncated), "one of the two ends is missing"
    for response, is_truncated in zip(rollouts.responses(), rollouts.is_truncated, strict=True):
        ended = torch.isin(response, policy.stop_ids)
        assert not ended[:-1].any()
        assert ended[-1] != is_truncated
        assert not is_truncated or len(response) == 30


def test_each_prompt_has_its_own_limit(policy, prompts):
    """A response with a shorter limit is a prefix of that with a longer one."""
    numbers = np.random.default_rng(7).random((3 * len(prompts), 30), dtype=np.float32)
    limits = [30, 1, 7, 30, 12, 2]
    whole = sample_at(policy, prompts, numbers, [30] * len(prompts), SamplingParams(30)).responses()
    cut = sample_at(policy, prompts, numbers, limits, SamplingParams(30))
    for row, response in enumerate(cut.responses()):
        assert torch.equal(response, whole[row][: limits[row // 3]])
        assert cut.is_truncated[row] != torch.isin(response[-1], policy.stop_ids)


def test_mean_entropy_excludes_padding(policy, prompts):
    rollouts = sample(policy, prompts, 8, SamplingParams(40), np.random.default_rng(6))
    assert (~rollouts.response_mask).any(), "no response ends early"
    rollouts.entropies[~rollouts.response_mask] = 1.0
    for row, length in enumerate(rollouts.lengths.tolist()):
        wanted = rollouts.entropies[row, :length].mean().item()
        assert rollouts.entropy_mean[row].item() == pytest.approx(wanted, rel=1e-5)


def test_tokens_are_drawn_with_their_probabilities(policy, prompts):
    draws = sample(policy, prompts[:1], 4000, SamplingParams(1), np.random.default_rng(4))
    hidden = policy.hidden_states(torch.tensor([prompts[0]]), use_cache=False)[0, -1:]
    p = policy.head.logits(hidden).softmax(-1)[0]
    counts = torch.bincount(draws.response_ids[:, 0], minlength=len(p)).float()
    likely = p * 4000 >= 10
    chi2 = ((counts - 4000 * p)[likely] ** 2 / (4000 * p)[likely]).sum()
    assert chi2 < 3 * likely.sum() + 20


def test_truncation_keeps_the_smallest_sufficient_set():
    p = torch.tensor([[0.5, 0.1, 0.3, 0.1]])

    def kept(top_p=1.0, top_k=None):
        return Softmax.of(Truncation(top_p, top_k).apply(p.log(), 1.0)).weights[0].gt(0).tolist()

    assert kept(0.5) == [True, False, False, False]
    assert kept(0.6) == [True, False, True, False]
    assert kept(0.75) == [True, False, True, False]
    assert kept(1.0) == [True, True, True, True]
    assert kept(top_k=1) == [True, False, False, False]
    assert kept(top_k=2) == [True, False, True, False]
    assert kept(top_k=9) == [True, True, True, True]
    # Top-p applies to the distribution after top-k: .5 of .8 is more than .6.
    assert kept(0.6, top_k=2) == [True, False, False, False]


def test_no_token_of_probability_zero_is_drawn():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(4, 5)
    uniforms = torch.tensor([0.0, 0.25, 0.9, float(np.nextafter(np.float32(1), np.float32(0)))])
    assert invert_cdf(p, torch.arange(4), uniforms).tolist() == [1, 3, 3, 3]
