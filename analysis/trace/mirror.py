"""Mirror the tables ``steps`` and ``evals`` of a run to dashboards.

Dashboards are TensorBoard, Weights & Biases, and Trackio. A dashboard gets the rows that a flush has made durable, so
that a resumed run sends no step twice. The trace stays the source: a dashboard that fails is left out with a warning,
and recording continues.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrace.analysis.trace.errors import InputError, in_one_line, nearest
from entrace.analysis.trace.parts import read_part

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger("entrace")

# Means over the responses of an evaluation, by the name that dashboards show.
EVAL_MEANS = {
    "accuracy": "is_correct",
    "reward": "reward",
    "entropy": "entropy_mean",
    "response_length": "response_length",
}
MIRRORED = ("steps", "evals")


class TensorBoard:
    """Write event files to ``tensorboard/`` in the folder of the run."""

    package = "tensorboardX"

    def __init__(self, run_dir: Path, manifest: Mapping[str, Any]) -> None:
        """Start a file of events; values of steps that a resumed run repeats are purged."""
        from tensorboardX import SummaryWriter

        done = manifest["last_durable_step"]
        self._writer = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=done + 1 if done else None, filename_suffix=f".{done}"
        )

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class _Service:
    """Log to a service whose runs belong to a project; a subclass starts the run.

    The project is the study, and the name is the run_id.
    """

    def __init__(self, manifest: Mapping[str, Any], init: Callable[..., Any], **options: Any) -> None:
        """Start a run, or continue the one with the same project and name."""
        project, name = _project(manifest), str(manifest["run_id"])
        identity = {"project": project, "name": name, "resume": "allow"}
        self._run = init(**identity, config=dict(manifest.get("config") or {}), **options)

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left, and end the run."""
        self._run.finish()


def _project(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("study") or "entrace")


class WeightsAndBiases(_Service):
    """Log to Weights & Biases, offline with ``WANDB_MODE=offline``.

    Files go to ``wandb/`` in the folder of the run.
    """

    package = "wandb"

    def __init__(self, run_dir: Path, manifest: Mapping[str, Any]) -> None:
        """Start the run; see ``_Service``."""
        import wandb

        # A run is continued by its id, which may hold few characters.
        identifier = re.sub(r"[^\w-]", "-", f"{_project(manifest)}-{manifest['run_id']}")
        super().__init__(manifest, wandb.init, id=identifier, dir=run_dir)


class Trackio(_Service):
    """Log to Trackio, locally unless ``TRACKIO_SPACE_ID`` names a space."""

    package = "trackio"

    def __init__(self, run_dir: Path, manifest: Mapping[str, Any]) -> None:
        """Start the run; see ``_Service``."""
        # Not among the packages of a contributor: its pillow is older than ours.
        super().__init__(manifest, importlib.import_module("trackio").init, embed=False)


Dashboard = TensorBoard | WeightsAndBiases | Trackio
DASHBOARDS: dict[str, type[Dashboard]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_names(dashboards: Iterable[str]) -> None:
    """Check that dashboards exist and are installed.

    Raises:
        InputError: an unknown name, or a package that is not installed.
    """
    for name in dashboards:
        if name not in DASHBOARDS:
            raise InputError(f'record.log: unknown dashboard "{name}"{nearest(name, DASHBOARDS)}')
        package = DASHBOARDS[name].package
        try:
            importlib.import_module(package)
        except ImportError:
            raise InputError(f"record.log: {name} needs {package}; pip install 'entrace[log]'") from None


class Mirror:
    """Send the rows of a run to its dashboards, if it has any."""

    def __init__(self, dashboards: Sequence[str], run_dir: Path, manifest: Mapping[str, Any]) -> None:
        """Start the dashboards, whose names ``check_names`` has checked."""
        self._dashboards = {name: DASHBOARDS[name](run_dir, manifest) for name in dashboards}

    def send(self, files: Iterable[Path]) -> None:
        """Send the rows of durable files of the tables ``steps`` and ``evals``."""
        if not self._dashboards:
            return
        import polars as pl

        found = [path for path in files if path.parent.name in MIRRORED]
        tables = {name: [read_part(path) for path in found if path.parent.name == name] for name in MIRRORED}
        frames = {name: pl.concat([pl.DataFrame(part) for part in parts]) for name, parts in tables.items() if parts}
        for step, values in scalars(frames.get("steps"), frames.get("evals")).items():
            self._each(lambda dashboard, step=step, values=values: dashboard.send(step, values))

    def close(self) -> None:
        """End the run on all dashboards."""
        self._each(lambda dashboard: dashboard.close())

    def _each(self, act: Callable[[Dashboard], None]) -> None:
        for name, dashboard in list(self._dashboards.items()):
            try:
                act(dashboard)
            # Whatever a service raises, training must continue.
            except Exception as error:
                reason = in_one_line(error)
                log.warning("entrace: %s no longer receives data (%s); the trace is complete", name, reason)
                del self._dashboards[name]


def scalars(steps: pl.DataFrame | None, evals: pl.DataFrame | None) -> dict[int, dict[str, float]]:
    """Return the values that dashboards show, by step in ascending order.

    Args:
        steps: Rows of table ``steps``. Each number or Boolean becomes ``steps/NAME``.
        evals: Rows of table ``evals``. Means over responses become ``evals/BENCHMARK/NAME``.

    Returns:
        Known values by name. The step of an evaluation is the number of updates of the evaluated policy.
    """
    import polars as pl
    import polars.selectors as cs

    found: dict[int, dict[str, float]] = {}
    if steps is not None:
        for row in steps.select("step", (cs.numeric() | cs.boolean()) - cs.by_name("step")).iter_rows(named=True):
            step = row.pop("step")
            found.setdefault(step, {}).update({f"steps/{k}": float(v) for k, v in row.items() if v is not None})
    if evals is not None:
        means = [pl.col(column).cast(pl.Float64).mean().alias(name) for name, column in EVAL_MEANS.items()]
        for row in evals.group_by("step", "benchmark", maintain_order=True).agg(means).iter_rows(named=True):
            place = f"evals/{row['benchmark']}"
            values = {f"{place}/{name}": row[name] for name in EVAL_MEANS if row[name] is not None}
            found.setdefault(row["step"], {}).update(values)
    return dict(sorted(found.items()))
