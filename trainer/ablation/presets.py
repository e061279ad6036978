"""Presets: each returns the settings that define a method and differ from the defaults, nested as in TOML.

The defaults hold the four parts of DAPO (clip-higher, token mean, dynamic sampling, overlong penalty), so each preset
``no_...`` ablates one part.
"""

from __future__ import annotations

from entrace.trainer.algorithm.method import Settings, preset


@preset
def none() -> Settings:
    """A' = A: plain GRPO with the settings of the config, no shaping (arXiv 2402.03300)."""
    return {"shaping": {"method": "none"}, "loss": {"method": "grpo"}}


@preset
def dr_grpo() -> Settings:
    """A = r - mean(r), loss = sum / (B L_max): no division by standard deviation or length (arXiv 2503.20783)."""
    return {"loss": {"normalize_std": False, "aggregation": "constant"}}


@preset
def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Settings:
    """rho_i = exp(mean_t ln rho_t), mean over responses: one ratio per response (arXiv 2507.18071)."""
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    return {"loss": {"ratio": "sequence", "aggregation": "sequence_mean", **clip}}


@preset
def no_clip_higher(clip: float = 0.2) -> Settings:
    """1 - clip <= rho <= 1 + clip: DAPO without clip-higher (arXiv 2503.14476)."""
    return {"loss": {"clip_low": clip, "clip_high": clip}}


@preset
def no_token_mean() -> Settings:
    """L = mean_i mean_t L_it: DAPO without its token mean, equal weight per response (arXiv 2503.14476)."""
    return {"loss": {"aggregation": "sequence_mean"}}


@preset
def no_dynamic_sampling() -> Settings:
    """A = 0 in uniform groups, which are kept: DAPO without dynamic sampling or refills (arXiv 2503.14476)."""
    return {"rollout": {"dynamic_sampling": False}}


@preset
def no_overlong_penalty() -> Settings:
    """R_i = score_i: DAPO without its penalty on responses near the length limit (arXiv 2503.14476)."""
    return {"rollout": {"overlong_buffer_tokens": 0}}
