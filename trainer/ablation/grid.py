"""Read a grid in TOML: arms x seeds x sweep axes.

Every run is validated before any starts.

A key that is set several times takes its value from the last of: config, ``[base]``, the arm's method, the arm's own
keys, the sweep, the seed, the command line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import Field

from entrace.analysis.trace import InputError, flatten, nearest
from entrace.trainer.ablation.arms import load_own, method_settings
from entrace.trainer.algorithm.method import OWN, MethodSpec
from entrace.trainer.config import Config, build_config
from entrace.trainer.resources import resolve_config
from entrace.trainer.runs.run_folder import common_random_numbers
from entrace.trainer.settings import BaseConfig, Natural, merge, nest, parse_override, read_toml, validate_section

Scalar = str | int | float | bool

# Characters that a folder name cannot hold on every file system.
UNSAFE = re.compile(r"[^\w.+=-]", re.ASCII)
KEY_TWICE = re.compile(r"(?:overwrite a value|twice|Duplicate inline table key|redefine|mutate).*at line (\d+)")


class Grid(BaseConfig):
    """The file of a grid; the arms are compared with arm ``baseline``."""

    config: str
    baseline: str
    seeds: list[Natural]
    base: dict[str, Any] = Field(default_factory=dict)
    arms: dict[str, dict[str, Any]]
    sweep: dict[str, Any] = Field(default_factory=dict)


class ArmKeys(BaseConfig):
    """Keys of an arm besides config keys: method or list of methods, and seeds."""

    method: str | list[str] | None = None
    seeds: list[Natural] | None = None


@dataclass(frozen=True)
class Arm:
    """A parsed arm: nested config values and seeds."""

    name: str
    values: dict[str, Any]
    seeds: list[int]


@dataclass(frozen=True)
class RunSpec:
    """One run of the grid.

    ``axes`` holds its sweep values by key, and ``arm`` and ``baseline`` include them.
    """

    run_id: str
    arm: str
    baseline: str
    config: Config
    axes: dict[str, Scalar] = field(default_factory=dict)

    def labels(self, out: Path) -> dict[str, Any]:
        """Return what the run's manifest says about its place in the study."""
        return {
            "study": out.resolve().name,
            "arm": self.arm,
            "baseline": self.baseline,
            "axes": self.axes,
            "common_random_numbers": common_random_numbers(self.config),
        }


def load_grid(path: str, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> list[RunSpec]:
    """Read a grid and validate the configuration of every run.

    Args:
        path: A grid file, or the name of a shipped one.
        overrides: ``key.path=value``, applied last to every run.
        seeds: Replace the seeds of the grid and of its arms.

    Returns:
        Runs in starting order: all arms of a seed before the next seed.

    Raises:
        InputError: the file does not exist, a key, method, or axis is unknown, the grid is empty, a name or seed is
            repeated, or a run is invalid.
    """
    grid = validate_section(Grid, _read_grid(resolve_config(path)), path)
    arms = [_read_arm(name, table, grid.seeds, seeds, path) for name, table in grid.arms.items()]
    if not arms:
        raise InputError(f"{path}: the grid is empty; add arms under [arms]")
    if grid.baseline not in grid.arms:
        raise InputError(f'{path}: baseline: unknown arm "{grid.baseline}"{nearest(grid.baseline, grid.arms)}')
    _refuse_seed(grid.base, f"{path}, [base]")
    base = merge(read_toml(resolve_config(grid.config)), grid.base)
    own = [spec for arm in arms for spec in load_own(merge(base, arm.values))]
    axes = _read_axes(grid.sweep, own, path)
    changes = _read_overrides(overrides, axes)
    order = dict.fromkeys([*(grid.seeds if seeds is None else seeds), *(seed for arm in arms for seed in arm.seeds)])
    specs = []
    for seed in order:
        for values in product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            for arm in (arm for arm in arms if seed in arm.seeds):
                config = merge(base, arm.values)
                for key, value in (*point.items(), ("seed", seed)):
                    config = merge(config, nest(key, value))
                label = _label(arm.name, point)
                specs.append(
                    RunSpec(
                        _run_id(arm.name, point, seed),
                        label,
                        _label(grid.baseline, point),
                        build_config(_drop_unused_sections(merge(config, changes), own), source=f"{path}, arm {label}"),
                        point,
                    )
                )
    _refuse_equal_ids(specs, path)
    return specs


def _read_grid(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except InputError as error:
        if found := KEY_TWICE.search(str(error)):
            line = path.read_text().splitlines()[int(found[1]) - 1].strip()
            raise InputError(f"{path}: line {found[1]} repeats a name defined above it: {line}") from None
        raise


def _read_arm(
    name: str, table: Mapping[str, Any], grid_seeds: Sequence[int], given: Sequence[int] | None, path: str
) -> Arm:
    source = f"{path}, arm {name}"
    keys = validate_section(ArmKeys, {key: table[key] for key in ArmKeys.model_fields if key in table}, source)
    own = {key: value for key, value in table.items() if key not in ArmKeys.model_fields}
    _refuse_seed(own, source)
    try:
        settings = method_settings(keys.method or name)
    except InputError as error:
        # An arm without a method may have any name if it sets config keys.
        if keys.method or not own or OWN.search(name):
            raise InputError(f'{path}: arm "{name}": {error}') from None
        settings = {}
    seeds = list(given if given is not None else grid_seeds if keys.seeds is None else keys.seeds)
    if not seeds:
        raise InputError(f"{source}: the grid is empty; add seeds")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{source}: seeds {seeds} repeat a seed; remove one")
    return Arm(name, merge(settings, own), seeds)


def _drop_unused_sections(values: Mapping[str, Any], own: Sequence[MethodSpec]) -> dict[str, Any]:
    """Remove parameters of own methods that the run does not use.

    ``[base]`` and ``[sweep]`` set them for all arms.
    """
    used = {(spec.kind, spec.section) for spec in load_own(values)}
    unused = {(spec.kind, spec.section) for spec in own} - used
    return {
        kind: {key: value for key, value in table.items() if (kind, key) not in unused}
        if isinstance(table, Mapping)
        else table
        for kind, table in values.items()
    }


def _read_axes(sweep: Mapping[str, Any], own: Sequence[MethodSpec], path: str) -> dict[str, list[Scalar]]:
    axes = flatten(sweep)
    for key, values in axes.items():
        source = f"{path}, [sweep] {key}"
        if key == "seed":
            raise InputError(f"{source}: seeds are not an axis; list them in seeds = [...]")
        _check_key(key, own, f"{path}, [sweep]")
        if not isinstance(values, list):
            raise InputError(f"{source}: expected a list of values, found {values!r}")
        if not values:
            raise InputError(f"{source}: the grid is empty; add values to this axis")
        for value in values:
            if not isinstance(value, Scalar):
                raise InputError(f"{source}: expected single numbers, strings or booleans, found {value!r}")
            if values.count(value) > 1:
                raise InputError(f"{source}: {value!r} is repeated; remove one")
    return axes


def _check_key(key: str, own: Sequence[MethodSpec], source: str) -> None:
    """Refuse a key that the config does not have."""
    known = dict(_config_keys(Config))
    for spec in own:
        if spec.section:
            known |= _config_keys(spec.build_section(), f"{spec.kind}.{spec.section}.")
    if known.get(key) is False or any(is_open and key.startswith(f"{name}.") for name, is_open in known.items()):
        return
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        raise InputError(f'{source}: "{key}" is a section; name one of its keys, such as "{inside[0]}"')
    same_end = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    raise InputError(f'{source}: unknown key "{key}"{nearest(key, same_end or known)}')


def _config_keys(model: type[BaseConfig], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yield every dotted config key, and whether it is a table of arbitrary keys."""
    for name, info in model.model_fields.items():
        is_open = get_origin(info.annotation) is dict
        options = [] if is_open else [info.annotation, *get_args(info.annotation)]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseConfig)), None)
        if section:
            yield from _config_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", is_open


def _read_overrides(overrides: Sequence[str], axes: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for override in overrides:
        change = parse_override(override)
        _refuse_seed(change, f'override "{override}"')
        for key in flatten(change):
            if key in axes:
                raise InputError(f'override "{override}": the grid already sweeps {key}; remove one of them')
        changes = merge(changes, change)
    return changes


def _refuse_seed(values: Mapping[str, Any], source: str) -> None:
    if "seed" in values:
        raise InputError(f"{source}: a grid takes its seeds from seeds = [...] or --seeds; remove this one")


def _refuse_equal_ids(specs: Sequence[RunSpec], path: str) -> None:
    run_id, times = Counter(spec.run_id for spec in specs).most_common(1)[0]
    if times > 1:
        arms = dict.fromkeys(f'"{spec.arm}"' for spec in specs if spec.run_id == run_id)
        raise InputError(f"{path}: arms {' and '.join(arms)} would both write to the folder {run_id}; rename one")


def _label(arm: str, point: Mapping[str, Scalar]) -> str:
    values = ", ".join(f"{key}={_text(value)}" for key, value in point.items())
    return f"{arm} [{values}]" if point else arm


def _run_id(arm: str, point: Mapping[str, Scalar], seed: int) -> str:
    parts = [arm, *(f"{key}={_text(value)}" for key, value in point.items()), f"seed{seed}"]
    return UNSAFE.sub("_", "-".join(parts))


def _text(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
