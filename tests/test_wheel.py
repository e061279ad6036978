"""The wheel in an empty environment, without extras: analysis works and torch is not there."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FROZEN = REPOSITORY / "tests" / "fixtures" / "frozen"

pytestmark = pytest.mark.slow


def call(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    built = call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Folder of the executables of a fresh environment that holds the wheel and its core dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    installed = call(folder / "bin/python", "-m", "pip", "install", "-q", "-c", REPOSITORY / "constraints.txt", wheel)
    assert installed.returncode == 0, installed.stderr
    return folder / "bin"


def test_the_report_needs_no_torch(environment, tmp_path):
    assert call(environment / "python", "-c", "import torch").returncode != 0
    done = call(environment / "entrace", "report", FROZEN, "--out", tmp_path / "report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "report" / "report.html"
    assert f"report: {page}" in done.stdout
    assert "data:image/png;base64," in page.read_text()
    assert (tmp_path / "report" / "claims.json").exists()


def test_training_says_what_to_install(environment, tmp_path):
    done = call(environment / "entrace", "train", "tiny", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr == "entrace: this command needs the train extra: pip install 'entrace[train]'\n"
    assert not (tmp_path / "run").exists()


def test_the_wheel_carries_policy_configs_and_queries(environment, tmp_path):
    script = (
        "from trainer.resources import find_base_policy, resolve_config; import analysis.queries as q;"
        "assert (find_base_policy() / 'model.safetensors').exists();"
        "assert resolve_config('tiny').exists(); assert resolve_config('base-policy').exists();"
        "assert 'select' in q.read('stage_dynamics')"
    )
    done = call(environment / "python", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
