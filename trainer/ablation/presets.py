"""Methods that are settings of the config: each returns those that differ from its defaults, nested as in TOML.

The defaults hold the four parts of DAPO (clip-higher, token mean, dynamic sampling, overlong penalty); a part is judged
by what is lost without it.
"""

from __future__ import annotations

from entrace.trainer.algorithm.method import Settings, preset


@preset
def none() -> Settings:
    """A' = A: GRPO as the config has it, no shaping (arXiv 2402.03300)."""
    return {"shaping": {"method": "none"}, "loss": {"method": "grpo"}}


@preset
def dr_grpo() -> Settings:
    """A = r - mean(r), loss = sum / (B L_max): neither spread nor length divides (arXiv 2503.20783)."""
    return {"loss": {"normalize_std": False, "aggregation": "constant"}}


@preset
def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Settings:
    """rho_i = exp(mean_t ln rho_t), mean over responses: one ratio a response (arXiv 2507.18071)."""
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    return {"loss": {"ratio": "sequence", "aggregation": "sequence_mean", **clip}}


@preset
def no_clip_higher(clip: float = 0.2) -> Settings:
    """1 - clip <= rho <= 1 + clip: DAPO without clip-higher (arXiv 2503.14476)."""
    return {"loss": {"clip_low": clip, "clip_high": clip}}


@preset
def no_token_mean() -> Settings:
    """L = mean_i mean_t L_it: DAPO without its token mean, each response counts the same (arXiv 2503.14476)."""
    return {"loss": {"aggregation": "sequence_mean"}}


@preset
def no_dynamic_sampling() -> Settings:
    """A = 0 in uniform groups, which stay: DAPO without dynamic sampling, no refills (arXiv 2503.14476)."""
    return {"rollout": {"dynamic_sampling": False}}


@preset
def no_overlong_penalty() -> Settings:
    """R_i = score_i: DAPO without its penalty on responses near the length limit (arXiv 2503.14476)."""
    return {"rollout": {"overlong_buffer_tokens": 0}}
