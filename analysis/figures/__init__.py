"""Draw figures, one module per question.

A module has the name of its SQL file, and one function here draws its figure. ``entrace.figures.<stem>(runs, ax=None)``
runs the query, draws on ``ax`` (a new Axes by default), and returns the Axes; it saves nothing. Figures of training
show the baseline runs, which the claims judge; ablation figures show all runs. A module ``<stem>.py`` holds
``draw(frame, ax)``, ``CAPTION``, and, if needed, ``query(runs)``, ``size(frame)``, or ``MEAN_OF`` and ``AT`` (see
``arms.with_means``).

To add a figure, add its module and its function below. The report has the figures in the order of the functions.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from entrace.analysis.figures import arms, style
from entrace.analysis.queries import Questions, headers
from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.errors import InputError, explained, nearest

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from entrace.analysis.runs import Runs

Draws = TypeVar("Draws", bound=Callable[..., object])
# Names of all figures in the order of the report: stage, instance, token, ablation.
STEMS: list[str] = []


def figure_module(stem: str, questions: Questions | None = None) -> ModuleType:
    """Return the module that draws the figure ``stem``.

    The module is built in, or in the folder of ``questions``.

    Raises:
        InputError: no such figure; or a user's module is missing, cannot be imported, or has no ``draw``.
    """
    if questions is None or stem not in questions.own:
        try:
            return import_module(f"{__name__}.{stem}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(__name__):
                raise
            known = [*STEMS, *(questions.figures if questions else ())]
            raise InputError(f'unknown figure "{stem}"{nearest(str(stem), known)}') from None
    if stem not in questions.figures:
        raise InputError(f"{questions.own[stem]}: the question has no figure; write {stem}.py beside it")
    return _import_file(questions.figures[stem])


@cache
def _import_file(path: Path) -> ModuleType:
    spec = spec_from_file_location(f"entrace_questions_{path.stem}", path)
    assert spec, path
    assert spec.loader, path
    module = module_from_spec(spec)
    with explained(f"{path}: cannot be imported"):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "draw", None)):
        raise InputError(f"{path}: expected a function draw(frame, ax)")
    if not isinstance(caption := getattr(module, "CAPTION", ""), str):
        raise InputError(f"{path}: CAPTION: expected a text, found {reprlib.repr(caption)}")
    return module


def _call(runs: Runs, stem: str, name: str, *arguments: Any) -> Any:
    """Call a function of a figure.

    Raises:
        InputError: a user's function failed; the message names its file.
    """
    function = getattr(figure_module(stem, runs.questions), name)
    if stem not in runs.questions.figures:
        return function(*arguments)
    with explained(f"{runs.questions.figures[stem]}: {name} failed"):
        return function(*arguments)


def stems(runs: Runs) -> list[str]:
    """Return the names of all figures of runs in the order of the report.

    Figures of the user's folder come last.
    """
    return [*STEMS, *runs.questions.figures]


def caption(runs: Runs, stem: str) -> str:
    """Return the caption of a figure, with notes on its data.

    If tokens are sampled, a note names the share of the responses. Another note lists the runs left out. The caption of
    a user's figure defaults to the question of its SQL.
    """
    question = headers(runs.questions.read(stem))["question"]
    own = getattr(figure_module(stem, runs.questions), "CAPTION", question) if stem in stems(runs) else question
    shown = _shown(runs)
    notes = []
    if share := runs.token_share(stem, shown):
        notes.append(f"Sampled: {share}.")
    lacking = {run: reason for run, reason in runs.lacking(stem).items() if run in shown}
    if 0 < len(lacking) < len(shown):
        notes.append(f"Left out: {', '.join(f'{run} ({reason})' for run, reason in lacking.items())}.")
    return " ".join([f"{own.rstrip('.')}.", *notes]) if notes else own


def query(runs: Runs, stem: str) -> pl.DataFrame:
    """Return the rows that the figure ``stem`` draws.

    In ablations, the rows include the means over the seeds of each arm.
    """
    module = figure_module(stem, runs.questions)
    if hasattr(module, "query"):
        return _call(runs, stem, "query", runs)
    if hasattr(module, "MEAN_OF"):
        return arms.with_means(runs, runs.ask(stem), module.MEAN_OF, module.AT)
    return rows(runs, stem)


def rows(runs: Runs, stem: str) -> pl.DataFrame:
    """Return the rows of a question about the runs that figures of training show.

    A user's question without the parameter ``$runs`` is about all runs.
    """
    return runs.ask(stem, **({"runs": _shown(runs)} if "runs" in runs.questions.parameter_names(stem) else {}))


def _shown(runs: Runs) -> list[str]:
    """Return the runs that figures of training show."""
    return [run for subject in runs.subjects().values() for run in subject]


def is_drawable(frame: pl.DataFrame) -> bool:
    """Return True if there is something to draw.

    In ablations, a run without evaluations has a row but no mean.
    """
    return frame.height > 0 and ("mean" not in frame.columns or frame["mean"].count() > 0)


def size(runs: Runs, stem: str, frame: pl.DataFrame) -> tuple[float, float]:
    """Return the width and height in inches for ``frame``.

    A figure fills one column of a page; it is taller with many arms.
    """
    has_size = hasattr(figure_module(stem, runs.questions), "size")
    return _call(runs, stem, "size", frame) if has_size else style.SIZE


@checked
def draw(stem: str, runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the figure ``stem`` on ``ax``, or on the Axes of a new figure.

    Raises:
        InputError: the traces hold nothing to draw; the message says what is missing.
    """
    frame = query(runs, stem)
    if not is_drawable(frame):
        raise InputError(f"{stem}: {runs.why_empty(stem)}")
    ax = ax or style.new_axes(size(runs, stem, frame))
    return _call(runs, stem, "draw", frame, ax)


@contextmanager
def drawn(runs: Runs, stem: str, frame: pl.DataFrame) -> Iterator[Figure]:
    """Draw the figure ``stem`` without pyplot, and yield it.

    Save the figure inside the block, under the settings that hold there.
    """
    with style.canvas(size(runs, stem, frame)) as figure:
        _call(runs, stem, "draw", frame, figure.subplots())
        yield figure


def _listed(function: Draws) -> Draws:
    """Append a figure to ``STEMS``."""
    stem = function.__name__
    # The first import of a module binds its name in the package, so it must precede the function.
    import_module(f"{__name__}.{stem}")
    STEMS.append(stem)
    return function


@_listed
def stage_dynamics(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw entropy and accuracy over training with the fitted stages (claim S1)."""
    return draw("stage_dynamics", runs, ax)


@_listed
def exchange_law(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw accuracy against entropy with the fitted exchange law (claim E1)."""
    return draw("exchange_law", runs, ax)


@_listed
def entropy_by_sample_sign(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the entropy of positive and negative samples over training (claim S2)."""
    return draw("entropy_by_sample_sign", runs, ax)


@_listed
def entropy_gap_by_prompt(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the entropy gap of a prompt's negative and positive responses (claim S2)."""
    return draw("entropy_gap_by_prompt", runs, ax)


@_listed
def category_shares(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the share of each token category over training (claim S3)."""
    return draw("category_shares", runs, ax)


@_listed
def word_changes(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the words that rise and fall most in the rising stage (claim S3)."""
    return draw("word_changes", runs, ax)


@_listed
def defects_over_steps(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the share of defective responses over training (claim S4)."""
    return draw("defects_over_steps", runs, ax)


@_listed
def movement_distribution(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the distribution of probability changes by an update (claim S5)."""
    return draw("movement_distribution", runs, ax)


@_listed
def movement_concentration(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the share of movement in the tokens that move most (claim S5)."""
    return draw("movement_concentration", runs, ax)


@_listed
def movement_by_entropy(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the probability change by an update over token entropy (claim S6)."""
    return draw("movement_by_entropy", runs, ax)


@_listed
def movement_by_category(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the probability change by an update per token category (claim S6)."""
    return draw("movement_by_category", runs, ax)


@_listed
def entropy_gradient_density(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the joint distribution of entropy and gradient norm (claim S6)."""
    return draw("entropy_gradient_density", runs, ax)


@_listed
def correctness_by_ppl(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw accuracy over perplexity within the group of a prompt (claim I1)."""
    return draw("correctness_by_ppl", runs, ax)


@_listed
def accuracy_by_ppl_decile(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw accuracy over perplexity across all prompts (claim I1)."""
    return draw("accuracy_by_ppl_decile", runs, ax)


@_listed
def high_entropy_by_ppl(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the functions of high-entropy tokens by perplexity (claim I1)."""
    return draw("high_entropy_by_ppl", runs, ax)


@_listed
def robustness_by_ppl(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the impact of replacing a token by perplexity (claim I2)."""
    return draw("robustness_by_ppl", runs, ax)


@_listed
def entropy_by_position(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw entropy over the relative position in the response (claim T1)."""
    return draw("entropy_by_position", runs, ax)


@_listed
def u_shape(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw entropy at both ends of a response relative to its middle (claim T1)."""
    return draw("u_shape", runs, ax)


@_listed
def impact_by_position(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the impact of replacing a token over its position (claim T2)."""
    return draw("impact_by_position", runs, ax)


@_listed
def potential_by_position(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw probability changes over the position in the response (claim T3)."""
    return draw("potential_by_position", runs, ax)


@_listed
def high_entropy_by_position(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the share of high-entropy tokens over position (claims S6, T3)."""
    return draw("high_entropy_by_position", runs, ax)


@_listed
def entropy_persistence(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the overlap of the high-entropy tokens of policy and reference policy."""
    return draw("entropy_persistence", runs, ax)


@_listed
def high_entropy_words(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the most frequent high-entropy words (claims S6, T3)."""
    return draw("high_entropy_words", runs, ax)


@_listed
def engine_mismatch(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw how far the inference engine's probabilities differ from the trainer's."""
    return draw("engine_mismatch", runs, ax)


@_listed
def entropy_laws(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw how well published formulas predict entropy changes (claims E2 to E4)."""
    return draw("entropy_laws", runs, ax)


@_listed
def entropy_law_calibration(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the measured over the predicted change of entropy (claims E2, E3)."""
    return draw("entropy_law_calibration", runs, ax)


@_listed
def entropy_forecasts(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw how well formulas forecast changes between evaluations (claim E5)."""
    return draw("entropy_forecasts", runs, ax)


@_listed
def entropy_losses(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw which tokens contribute to the change of entropy (claim E2)."""
    return draw("entropy_losses", runs, ax)


@_listed
def entropy_of_clipped(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the change of entropy of clipped tokens and of comparable ones."""
    return draw("entropy_of_clipped", runs, ax)


@_listed
def ablation_curves(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw held-out accuracy of each arm over training (claims M1, M2)."""
    return draw("ablation_curves", runs, ax)


@_listed
def paired_differences(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the paired difference of each arm to its baseline (claims M1 to M3)."""
    return draw("paired_differences", runs, ax)


@_listed
def performance_profile(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw the performance profile of each arm (claims M1, M2)."""
    return draw("performance_profile", runs, ax)


@_listed
def ablation_final(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw avg@k, maj@k, and pass@k at the last evaluation (claims M1 to M3)."""
    return draw("ablation_final", runs, ax)


@_listed
def cost_accuracy(runs: Runs, ax: Axes | None = None) -> Axes:
    """Draw accuracy against training cost for each arm (claims M1, M2)."""
    return draw("cost_accuracy", runs, ax)
