"""Presets: settings that define a method, nested as in TOML.

Each function returns the settings that differ from the defaults. The defaults hold the four parts of DAPO (clip-higher,
token mean, dynamic sampling, overlong penalty), so each preset ``no_...`` ablates one part.
"""

from __future__ import annotations

from entrace.trainer.algorithm.method import Settings, preset


@preset
def none() -> Settings:
    """A' = A: plain GRPO with the config's settings, no shaping (arXiv 2402.03300)."""
    return {"shaping": {"method": "none"}, "loss": {"method": "grpo"}}


@preset
def dr_grpo() -> Settings:
    """A = r - mean(r), loss = sum / (B L_max): unnormalized GRPO (arXiv 2503.20783).

    Advantages are not divided by the standard deviation, and losses are not divided by the length.
    """
    return {"loss": {"normalize_std": False, "aggregation": "constant"}}


@preset
def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Settings:
    """rho_i = exp(mean_t ln rho_t): one ratio per response (arXiv 2507.18071).

    The loss is the mean over responses.
    """
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    return {"loss": {"ratio": "sequence", "aggregation": "sequence_mean", **clip}}


@preset
def no_clip_higher(clip: float = 0.2) -> Settings:
    """1 - clip <= rho <= 1 + clip: DAPO without clip-higher (arXiv 2503.14476)."""
    return {"loss": {"clip_low": clip, "clip_high": clip}}


@preset
def no_token_mean() -> Settings:
    """L = mean_i mean_t L_it: DAPO without its token mean (arXiv 2503.14476).

    Every response has equal weight.
    """
    return {"loss": {"aggregation": "sequence_mean"}}


@preset
def no_dynamic_sampling() -> Settings:
    """A = 0 in uniform groups: DAPO without dynamic sampling (arXiv 2503.14476).

    Uniform groups are kept and not refilled.
    """
    return {"rollout": {"dynamic_sampling": False}}


@preset
def no_overlong_penalty() -> Settings:
    """R_i = score_i: DAPO without its overlong penalty (arXiv 2503.14476).

    The penalty lowers the reward of responses near the length limit.
    """
    return {"rollout": {"overlong_buffer_tokens": 0}}
