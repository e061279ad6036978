import numpy as np
import pytest
import torch

from analysis.trace import InputError
from trainer.config import PolicyConfig
from trainer.policy import Policy
from trainer.rollout import SamplingParams, _keep_top_p, invert_cdf, sample, sample_at


class FixedNumbers:
    """Hands out given uniform numbers in place of a generator."""

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


def flat(samples, name):
    return getattr(samples.stats, name)[samples.response_mask]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_values_equal_a_teacher_forced_pass(policy, prompts, temperature):
    samples = sample(policy, prompts, 3, SamplingParams(40, temperature), np.random.default_rng(0))
    scored = policy.score(samples.prompts, samples.responses(), temperature)
    for name in ("logprob", "entropy", "sum_p2"):
        torch.testing.assert_close(flat(samples, name), getattr(scored, name), rtol=1e-4, atol=2e-5)


def test_recorded_values_equal_one_response_at_a_time_in_float64(policy, prompts):
    samples = sample(policy, prompts, 1, SamplingParams(40), np.random.default_rng(1))
    model = policy.model.double()
    for row, (prompt, response) in enumerate(zip(samples.prompts, samples.responses(), strict=True)):
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
            torch.testing.assert_close(getattr(samples.stats, name)[row, :count].double(), wanted, rtol=1e-4, atol=2e-5)
        norms = output.hidden_states[-1][0, len(prompt) - 1 : -1].norm(dim=-1)
        torch.testing.assert_close(samples.hidden_norm[row, :count].double(), norms, rtol=1e-4, atol=1e-5)


def test_bfloat16_arithmetic_records_the_distribution_it_samples_from(prompts):
    """The entropy of rounded logits, near that of exact ones, from float32 weights that stay so."""
    policy = Policy.load(PolicyConfig(device="cpu", dtype="bfloat16"))
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    samples = sample(policy, prompts, 4, SamplingParams(24), np.random.default_rng(5))
    exact = Policy.load(PolicyConfig(device="cpu")).score(samples.prompts, samples.responses(), 1.0)
    entropy = flat(samples, "entropy")
    assert entropy.dtype == torch.float32
    assert not torch.equal(entropy, exact.entropy)
    assert (entropy - exact.entropy).abs().mean() < 0.02
    assert (flat(samples, "logprob") - exact.logprob).abs().mean() < 0.05


def test_a_model_that_scales_its_logits_is_refused(policy):
    original = policy.model.forward

    def scaled(*arguments, **options):
        output = original(*arguments, **options)
        output.logits = output.logits * 0.5
        return output

    policy.model.forward = scaled
    with pytest.raises(InputError, match="scales or caps its logits"):
        policy._check_head()


def test_a_response_depends_on_its_own_random_numbers_alone(policy, prompts):
    numbers = np.random.default_rng(2).random((2 * len(prompts), 24))
    params = SamplingParams(24)
    together = sample(policy, prompts, 2, params, FixedNumbers(numbers))
    for i, prompt in enumerate(prompts):
        alone = sample(policy, [prompt], 2, params, FixedNumbers(numbers[2 * i : 2 * i + 2]))
        for found, wanted in zip(alone.responses(), together.responses()[2 * i : 2 * i + 2], strict=True):
            assert torch.equal(found, wanted)


def test_responses_end_with_the_stop_token_or_at_the_limit(policy, prompts):
    samples = sample(policy, prompts, 8, SamplingParams(30), np.random.default_rng(3))
    assert 0 < samples.is_truncated.sum() < len(samples.is_truncated), "both ends are to be seen"
    for response, is_truncated in zip(samples.responses(), samples.is_truncated, strict=True):
        ended = torch.isin(response, policy.stop_ids)
        assert not ended[:-1].any()
        assert ended[-1] != is_truncated
        assert not is_truncated or len(response) == 30


def test_each_prompt_has_its_own_limit(policy, prompts):
    """What a shorter limit leaves is what the longer one begins with."""
    numbers = np.random.default_rng(7).random((3 * len(prompts), 30), dtype=np.float32)
    limits = [30, 1, 7, 30, 12, 2]
    whole = sample_at(policy, prompts, numbers, [30] * len(prompts), SamplingParams(30)).responses()
    cut = sample_at(policy, prompts, numbers, limits, SamplingParams(30))
    for row, response in enumerate(cut.responses()):
        assert torch.equal(response, whole[row][: limits[row // 3]])
        assert cut.is_truncated[row] != torch.isin(response[-1], policy.stop_ids)


def test_mean_entropy_leaves_out_what_was_sampled_after_the_end(policy, prompts):
    samples = sample(policy, prompts, 8, SamplingParams(40), np.random.default_rng(6))
    assert (samples.stats.entropy[~samples.response_mask] > 0).any(), "nothing stands after an end"
    for row, length in enumerate(samples.lengths.tolist()):
        wanted = samples.stats.entropy[row, :length].mean().item()
        assert samples.entropy_mean[row].item() == pytest.approx(wanted, rel=1e-5)


def test_tokens_are_drawn_with_their_probabilities(policy, prompts):
    draws = sample(policy, prompts[:1], 4000, SamplingParams(1), np.random.default_rng(4))
    hidden = policy.hidden_states(torch.tensor([prompts[0]]), use_cache=False)[0, -1:]
    p = policy.head.logits(hidden).softmax(-1)[0]
    counts = torch.bincount(draws.tokens[:, 0], minlength=len(p)).float()
    likely = p * 4000 >= 10
    chi2 = ((counts - 4000 * p)[likely] ** 2 / (4000 * p)[likely]).sum()
    assert chi2 < 3 * likely.sum() + 20


def test_top_p_keeps_the_smallest_sufficient_set():
    p = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    kept = lambda top_p: (_keep_top_p(p.log(), top_p) > -torch.inf)[0].tolist()  # noqa: E731
    assert kept(0.5) == [True, False, False, False]
    assert kept(0.6) == [True, False, True, False]
    assert kept(0.75) == [True, False, True, False]
    assert kept(1.0) == [True, True, True, True]


def test_no_token_of_probability_zero_is_drawn():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(4, 5)
    uniforms = torch.tensor([0.0, 0.25, 0.9, float(np.nextafter(np.float32(1), np.float32(0)))])
    assert invert_cdf(p, uniforms).tolist() == [1, 3, 3, 3]
