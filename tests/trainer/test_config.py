import pytest

from entrace.analysis.trace import InputError
from entrace.trainer.config import Config, load_config
from entrace.trainer.settings import parse_override

BAD_OVERRIDES = [
    ("optim.learning_rate=1", ['"optim.learning_rate"', "lr"]),
    ("rolout.group_size=4", ['"rolout"', 'did you mean "rollout"']),
    ("shaping.position.gama=1", ['"shaping.position.gama"', 'did you mean "gamma"']),
    ("steps=many", ["steps", "integer", "'many'"]),
    ("loss.clip_low=1.5", ["loss.clip_low", "less than or equal to 1"]),
    ("shaping.method=pll", ["shaping.method", 'did you mean "ppl"']),
    ("rollout.overlong_buffer_tokens=65", ["overlong_buffer_tokens must not exceed max_response_tokens"]),
    ("optim.mini_batches=33", ["optim.mini_batches must not exceed rollout.prompts_per_step"]),
    ("record.checkpoint_every=15", ["checkpoint_every must be a multiple of flush_every"]),
    ("record.mantissa_bits=12", ["record.mantissa_bits = 12 is no longer supported", "leave the key out"]),
    ("rollout.engine=continuous", ['rollout.engine = "continuous" is no longer supported', "leave the key out"]),
    ("shaping.ppl={start_step=5, end_step=3}", ["shaping.ppl", "end_step comes before start_step"]),
    ("shaping.position.start_step=soon", ["shaping.position.start_step", "'soon'"]),
    ("steps", ['"steps"', "key.path=value"]),
]


@pytest.mark.parametrize(("override", "expected"), BAD_OVERRIDES)
def test_a_bad_override_is_one_line_that_names_the_key(override, expected):
    with pytest.raises(InputError) as error:
        load_config("tiny", [override])
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_the_shipped_config_spells_out_the_defaults_it_keeps():
    config = load_config("tiny")
    assert config.loss.clip_high == 0.28
    assert config.shaping.position.start_step == "plateau"


def test_overrides_are_applied_in_order_and_typed():
    config = load_config("tiny", ["optim.lr=3e-4", "task.params.max_terms=5", "seed=1", "seed=2"])
    assert (config.optim.lr, config.task.params["max_terms"], config.seed) == (3e-4, 5, 2)
    assert config.task.params["min_terms"] == 3


def test_a_start_step_replaces_the_plateau():
    config = load_config("tiny", ["shaping.position.start_step=10"])
    assert config.shaping.position.start_step == 10


def test_an_override_that_is_no_toml_is_a_string():
    assert parse_override("policy.path=/models/my model") == {"policy": {"path": "/models/my model"}}


def test_not_toml(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("steps = = 3")
    with pytest.raises(InputError, match="not TOML"):
        load_config(str(path))


def test_missing_file():
    with pytest.raises(InputError, match=r"nowhere\.toml: no such file"):
        load_config("configs/nowhere.toml")


def test_configs_round_trip_through_json():
    config = load_config("tiny")
    assert Config.model_validate(config.model_dump(mode="json")) == config
