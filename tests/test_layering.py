"""Test the layers of the package.

The rules are who may import whom, which imports stay lazy, and that no imports form a cycle.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("analysis", "trainer")


def module_of(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(("entrace", *parts) if parts[0] != "entrace" else parts).removesuffix(".__init__")


# The public API, then both folders; links to them in ``entrace`` are not followed.
PATHS = {module_of(path): path for path in sorted((REPOSITORY / "entrace").glob("*.py"))}
PATHS |= {module_of(path): path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))}


def imported(module, *, at_runtime=False):
    """Return full names that a module imports.

    ``at_runtime`` leaves out imports for type checkers.
    """

    def walk(node):
        if at_runtime and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in PATHS else node.module
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return set(walk(ast.parse(PATHS[module].read_text())))


def below(package):
    return [name for name in PATHS if name == package or name.startswith(f"{package}.")]


def is_in(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def foreign(module, *allowed):
    """Return names of the package that a module imports beyond those allowed."""
    return {name for name in imported(module, at_runtime=True) if is_in(name, "entrace") and not is_in(name, *allowed)}


@pytest.mark.parametrize("module", below("entrace.analysis"))
def test_analysis_imports_neither_torch_nor_the_trainer(module):
    forbidden = {"torch", "transformers", "tokenizers", "safetensors", "reasoning_gym"}
    # Inside a function, for --tokenizer.
    forbidden -= {"tokenizers"} if module == "entrace.analysis.importers.tokenizer" else set()
    assert not {name for name in imported(module) if name.partition(".")[0] in forbidden}
    assert not foreign(module, "entrace.analysis", "entrace._lazy")


@pytest.mark.parametrize("module", below("entrace.trainer"))
def test_the_trainer_imports_only_the_trace_contract_and_the_readers_of_analysis(module):
    allowed = ["entrace.trainer", "entrace.analysis.trace", "entrace.analysis.importers"]
    # Both sides meet in the command line.
    if is_in(module, "entrace.trainer.cli"):
        allowed.append("entrace.analysis")
    assert not foreign(module, *allowed)


@pytest.mark.parametrize("module", below("entrace.trainer.algorithm"))
def test_the_algorithm_depends_on_torch_numpy_and_settings(module):
    assert not foreign(module, "entrace.trainer.algorithm", "entrace.trainer.settings")
    third_party = {name.partition(".")[0] for name in imported(module)} - set(sys.stdlib_module_names) - {"entrace"}
    assert third_party <= {"torch", "numpy"}


@pytest.mark.parametrize("module", below("entrace.trainer.kernels"))
def test_kernels_depend_on_nothing_else_of_the_trainer(module):
    assert not foreign(module, "entrace.trainer.kernels")


@pytest.mark.parametrize("module", below("entrace.trainer"))
def test_only_commands_import_the_training_loop(module):
    assert is_in(module, "entrace.trainer.cli") or "entrace.trainer.train" not in imported(module)


def test_no_imports_form_a_cycle():
    """Include imports inside functions."""
    graph = {
        module: {name for name in imported(module, at_runtime=True) if name in PATHS and name != module}
        for module in PATHS
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def loaded_by(statement):
    script = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import entrace", ["torch", "duckdb", "polars", "pyarrow", "matplotlib", "pydantic"]),
        ("import entrace; entrace.open_runs", ["torch", "matplotlib"]),
        ("import entrace.analysis.importers.run", ["torch", "transformers", "tokenizers"]),
        ("import entrace; entrace.figures.stage_dynamics", ["torch", "transformers"]),
        (
            "import entrace.trainer.algorithm.shaping",
            ["transformers", "entrace.trainer.sampling", "entrace.trainer.model", "entrace.trainer.config"],
        ),
    ],
)
def test_imports_stay_light(statement, absent):
    assert not loaded_by(statement) & set(absent)


def test_a_stranger_with_modules_of_the_same_name_is_not_disturbed(tmp_path):
    """A script can use ``trainer.py`` and ``analysis/`` of its own beside entrace.

    A grid, which trains in child processes, is in ``trainer/test_own_methods.py``.
    """
    (tmp_path / "trainer.py").write_text("raise SystemExit('the user\\'s own trainer was imported')\n")
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "__init__.py").write_text("ANSWER = 42\n")
    (tmp_path / "script.py").write_text(
        "import analysis, entrace\n"
        "assert analysis.ANSWER == 42\n"
        "assert entrace.open_runs and entrace.load_config('tiny').steps\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
