"""Test that archives hold one package and that the wheel works.

The environment of the wheel is empty, without extras and without torch.
"""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FROZEN = REPOSITORY / "tests" / "fixtures" / "frozen"

pytestmark = pytest.mark.slow


def call(*command, **options):
    # Where PYTHONPATH is set, it would provide what the environments below must have installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, **options)


def build(folder, *options):
    built = call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, *options, REPOSITORY)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Return the folder of executables of a fresh environment.

    The environment holds the wheel and its core dependencies.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    installed = call(folder / "bin/python", "-m", "pip", "install", "-q", "-c", REPOSITORY / "constraints.txt", wheel)
    assert installed.returncode == 0, installed.stderr
    return folder / "bin"


def test_both_wheels_hold_one_package_and_the_same_files(wheel, tmp_path):
    """Build from the checkout and from the source archive."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"entrace"}
    assert sorted(zipfile.ZipFile(build(tmp_path)).namelist()) == sorted(names)
    for name in (
        "py.typed",
        "analysis/claims.toml",
        "analysis/sql/stage/stage_dynamics.sql",
        "analysis/sql/viewer/responses.sql",
        "analysis/viewer/static/index.html",
        "analysis/viewer/vendor/codemirror.js",
        "analysis/viewer/vendor/LICENSES.txt",
        "trainer/configs/tiny.toml",
    ):
        assert f"entrace/{name}" in names


def test_an_editable_install_exposes_one_package(tmp_path):
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=True, system_site_packages=False)
    python = folder / "bin" / "python"
    tools = ("hatchling", "editables", "-c", REPOSITORY / "constraints.txt")
    assert call(python, "-m", "pip", "install", "-q", *tools).returncode == 0
    command = ("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--editable", REPOSITORY)
    installed = call(python, *command)
    assert installed.returncode == 0, installed.stderr
    script = (
        "import entrace; from importlib.util import find_spec; import entrace.analysis, entrace.trainer;"
        "print(entrace.__version__, find_spec('analysis'), find_spec('trainer'))"
    )
    done = call(python, "-c", script, cwd=tmp_path)
    assert done.stdout.split()[1:] == ["None", "None"], done.stderr


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
        "from entrace.trainer.resources import find_base_policy, resolve_config; import entrace.analysis.queries as q;"
        "assert (find_base_policy() / 'model.safetensors').exists();"
        "assert resolve_config('tiny').exists(); assert resolve_config('base-policy').exists();"
        "assert 'select' in q.BUILT_IN.read('stage_dynamics')"
    )
    done = call(environment / "python", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
