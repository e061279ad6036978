"""Test the page of the powered ablation on simulated runs with a planted gain."""

from pathlib import Path

import pytest

from entrace.analysis.runs import open_runs
from entrace.analysis.trace import InputError, read_manifest, write_manifest
from tests.analysis.synthetic import Planted, write_run
from tests.benchmarks.powered_ablation import Trial, difference_error, write_page

TASK = {"params": {"min_terms": 3, "max_terms": 3}}


def write(folder: Path, arm: str, seed: int, rate: float, accuracy: float, label: str = "") -> None:
    run = write_run(
        folder / f"{arm}{rate:g}-{seed}", arm=arm, seed=seed, planted=Planted(eval_accuracy=accuracy), steps=4, groups=2
    )
    manifest = read_manifest(run)
    config = {**manifest["config"], "optim": {"lr": rate}, "task": TASK}
    write_manifest(run, {**manifest, "config": config, "arm": arm + label, "baseline": f"none{label}"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write both studies, which no test changes.

    ppl and its control learn best at the higher rate, and gain .2 and .1.
    """
    folder = tmp_path_factory.mktemp("powered")
    for seed in (100, 101):
        for rate, ppl in ((0.1, 0.5), (0.2, 0.9)):
            write(folder / "rates", "none", seed, rate, 0.9 if rate == 0.1 else 0.3, f" [optim.lr={rate}]")
            for arm in ("ppl", "ppl_high"):
                write(folder / "rates", arm, seed, rate, ppl, f" [optim.lr={rate}]")
    for seed in range(3):
        write(folder / "study", "none", seed, 0.1, 0.5)
        write(folder / "study", "ppl", seed, 0.2, 0.7)
        write(folder / "study", "ppl_high", seed, 0.2, 0.6)
    return folder


def interval_of(page: str, row: str) -> tuple[float, float, list[str]]:
    """Return the ends of the interval in a row, and the cells behind it."""
    line = next(line for line in page.splitlines() if line.startswith(row))
    estimate, interval, *more = [cell.strip() for cell in line.removeprefix(row).split("|")[:-1]]
    low, high = map(float, interval.strip("[]").split(","))
    assert low < float(estimate) < high
    return low, high, more


def test_the_page_shows_rates_differences_and_power(root: Path):
    trial = Trial("short", open_runs(root / "study"), open_runs(root / "rates"))
    assert trial.chosen() == {"none": 0.1, "ppl": 0.2, "ppl_high": 0.2}
    page = write_page([trial], "powered")
    low, high, (*_, verdict) = interval_of(page, "| ppl − none |")
    assert low < 0.2 < high
    assert verdict == "better"
    assert f"The intervals exclude gains of the methods above {high:.4f} (ppl)." in page
    assert "| short | 3 |" in page
    assert "3 seeds per arm" in page
    assert "[Report](powered/short/report.html)" in page


def test_rates_within_one_standard_error_are_tied():
    """Pairs that are .02 apart have a variance of .0002.

    So has the difference of two means of pairs.
    """
    assert difference_error([(0.50, 0.52), (0.51, 0.53), (0.90, 0.92)]) == pytest.approx(0.0002**0.5)
    assert difference_error([(0.1, 0.2, 0.3), (0.5, 0.6, 0.7)]) == pytest.approx((0.01 * 2 / 3) ** 0.5)


def test_a_tie_goes_to_the_lower_rate(root: Path):
    """The runs of an arm at one rate differ by a few points.

    ppl and its control gain .4 at the higher rate.
    """
    trial = Trial("short", open_runs(root / "study"), open_runs(root / "rates"))
    assert 0 < trial.tie < 0.1
    trial.__dict__["tie"] = 0.6
    with pytest.raises(InputError, match=r"short: ppl(_high)? was trained at 0\.2, chosen: 0\.1"):
        trial.chosen()


def test_the_effect_of_the_rate_is_paired_by_arm_and_seed(root: Path):
    """Evaluations are at steps 0 and 4.

    Gains over training are therefore half of those at the end: -.3, .2, .2.
    """
    trial = Trial("short", open_runs(root / "study"), open_runs(root / "rates"))
    low, high, gain = trial.effect_of_rate()
    assert (low, high) == (0.1, 0.2)
    assert gain.low < 0.1 / 3 < gain.high
    assert gain.value == pytest.approx(0.1 / 3, abs=0.05)
    page = write_page([trial], "powered")
    assert "- short: mean accuracy over training at 0.2 minus that at 0.1: +0.0" in page


def test_one_seed_gives_no_standard_error(root: Path):
    for arm in ("none", "ppl"):
        write(root / "single", arm, 100, 0.1, 0.5)
    with pytest.raises(InputError, match="rates-short: an arm has one seed at a rate"):
        Trial("short", open_runs(root / "study"), open_runs(root / "single")).chosen()


def test_an_arm_at_another_rate_and_seeds_of_both_studies_are_refused(root: Path):
    write(root / "other", "none", 0, 0.2, 0.5)
    with pytest.raises(InputError, match=r"short: none was trained at 0\.2, chosen: 0\.1"):
        Trial("short", open_runs(root / "other"), open_runs(root / "rates")).chosen()
    write(root / "again", "none", 100, 0.1, 0.5)
    with pytest.raises(InputError, match=r"short: seeds \[100\] chose the learning rates and are compared too"):
        Trial("short", open_runs(root / "again"), open_runs(root / "rates")).chosen()


def test_methods_are_compared_with_controls_at_their_rate(root: Path):
    trial = Trial("short", open_runs(root / "study"), open_runs(root / "rates"))
    page = write_page([trial], "powered")
    low, high, _ = interval_of(page, "| ppl − ppl_high | accuracy at the end (avg@k) |")
    assert low < 0.1 < high
    assert "| ppl − ppl_permuted |" not in page
