"""Who may import whom: analysis stands alone, the trainer knows the trace contract and nothing else of it."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def modules(package):
    return [pytest.param(path, id=str(path.relative_to(REPOSITORY))) for path in (REPOSITORY / package).rglob("*.py")]


@pytest.mark.parametrize("path", modules("analysis"))
def test_analysis_imports_neither_torch_nor_the_trainer(path):
    forbidden = {"torch", "transformers", "tokenizers", "safetensors", "reasoning_gym", "trainer"}
    assert not forbidden & {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", modules("trainer"))
def test_the_trainer_imports_the_trace_contract_alone(path):
    names = {name for name in imported(path) if name.partition(".")[0] == "analysis"}
    # The command line is where both meet.
    if path.parent != REPOSITORY / "trainer" / "cli":
        assert all(name == "entrace.analysis.trace" or name.startswith("entrace.analysis.trace.") for name in names), (
            names
        )
