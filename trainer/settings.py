"""Define config sections, overrides, and one-line errors that name the key.

Sections are pydantic models, read from TOML and changed by dotted overrides.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from entrace.analysis.trace import InputError, nearest, reason_of
from entrace.analysis.trace.arguments import checked
from entrace.analysis.trace.errors import explained

__all__ = [
    "AboveOne",
    "AboveZero",
    "AfterValidator",
    "AtLeastTwo",
    "BaseConfig",
    "BeforeValidator",
    "BelowOne",
    "Fraction",
    "InputError",
    "Natural",
    "NonNegative",
    "Positive",
    "PositiveFraction",
    "ValidationError",
    "checked",
    "create_model",
    "explained",
    "import_function",
    "keyword_defaults",
    "merge",
    "model_validator",
    "nearest",
    "nest",
    "parse_override",
    "read_toml",
    "section_of",
    "validate_section",
    "with_keys",
]

Fraction = Annotated[float, Field(ge=0, le=1)]
# Whole numbers are recorded in 32 bits.
MAX_INT = 2**31 - 1
Positive = Annotated[int, Field(ge=1, le=MAX_INT)]
Natural = Annotated[int, Field(ge=0, le=MAX_INT)]
NonNegative = Annotated[float, Field(ge=0)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
AboveZero = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(gt=0, lt=1)]
AboveOne = Annotated[float, Field(gt=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]


class BaseConfig(BaseModel):
    """Base class of every section.

    Unknown keys are errors, values keep their TOML types, and JSON can represent all values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# Type of pydantic's error about a key that no field has.
UNKNOWN = "extra_forbidden"
# pydantic includes the tried branch of a union in the path of an error.
UNION_BRANCH = re.compile(r"constrained-|literal\[")

AnyConfig = TypeVar("AnyConfig", bound=BaseConfig)


def validate_section(model: type[AnyConfig], values: Mapping[str, Any], source: str) -> AnyConfig:
    """Build a section from nested values.

    The first validation error becomes a one-line ``InputError``.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {_one_line(model, error)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        InputError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not TOML ({error})") from None


def parse_override(text: str) -> dict[str, Any]:
    """Parse ``a.b=1`` to ``{"a": {"b": 1}}``; a value that is not TOML is a string.

    Raises:
        InputError: not of the form key.path=value.
    """
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f'override "{text}": expected key.path=value')
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    except (ValueError, RecursionError) as error:
        raise InputError(f'override "{text}": {error}') from None
    return nest(key.strip(), parsed)


def nest(key: str, value: Any) -> dict[str, Any]:
    """Nest a value under a dotted key: ``a.b`` gives ``{"a": {"b": value}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; ``change`` wins, and an empty mapping clears a section."""
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping) and value
        merged[key] = merge(merged[key], value) if both else value
    return merged


def with_keys(model: type[BaseConfig], error: ValidationError) -> ValidationError:
    """Add the valid keys to an error about an unknown key.

    ``model`` is generated, and the section above it does not know its keys.
    """
    first = next((e for e in error.errors() if e["type"] == UNKNOWN), None)
    if first is None:
        return error
    keys = PydanticCustomError(UNKNOWN, "unknown key", {"keys": _keys_at(model, [str(p) for p in first["loc"][:-1]])})
    details = InitErrorDetails(type=keys, loc=first["loc"], input=first["input"])
    return ValidationError.from_exception_data(model.__name__, [details])


def _one_line(model: type[BaseConfig], error: ValidationError) -> str:
    # A misspelled key is also a missing one; the spelling is the useful error.
    first = min(error.errors(), key=lambda e: e["type"] != UNKNOWN)
    path = [str(part) for part in first["loc"] if not UNION_BRANCH.match(str(part))]
    key = ".".join(path)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == UNKNOWN:
        keys = first.get("ctx", {}).get("keys") or _keys_at(model, path[:-1])
        return f'unknown key "{key}"{nearest(path[-1], keys)}'
    if first["type"] == "missing":
        return f'key "{key}" is missing'
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if first["type"] == "literal_error":
        options = re.findall(r"'([^']*)'", first.get("ctx", {}).get("expected", ""))
        return f'{key} = "{first["input"]}" is not valid{nearest(str(first["input"]), options)}'
    branches = [e["msg"] for e in error.errors() if e["loc"][: len(path)] == first["loc"][: len(path)]]
    expected = " or ".join(branches).replace("Input should be ", "expected ", 1).replace("Input should be ", "")
    return f"{key}: {expected}, found {first['input']!r}"


def _keys_at(model: type[BaseConfig], path: list[str]) -> list[str]:
    for part in path:
        # The name of an entry, such as a source in task.mix, is not a field.
        if part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseConfig))
    return list(model.model_fields)


def import_function(name: str, kind: str) -> Callable[..., Any]:
    """Import the function that ``module:function`` names.

    Modules of the working directory can be named, too.

    Args:
        name: ``module:function``.
        kind: What the function is, to begin error messages with.

    Raises:
        InputError: no such module or function, or an error in it.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    # Last, so that no file of the working directory stands in for an installed module.
    if here not in sys.path:
        sys.path.append(here)
    try:
        with explained(f"{kind} {name}: cannot be imported", passes=ModuleNotFoundError):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"{kind} {name}: module {module_name} needs {error.name}, not installed") from None
        files = [path.stem for path in Path.cwd().glob("*.py")]
        raise InputError(
            f'{kind} {name}: no module "{error.name}", here or installed{nearest(error.name, files) if files else ""}'
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(
            f'{kind} {name}: no function "{function_name}" in {module_name}{nearest(function_name, functions)}'
        )
    return function


def keyword_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the default of each parameter that has one."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.default is not p.empty}


def section_of(function: Callable[..., Any], base: type[BaseConfig] = BaseConfig, **more: Any) -> type[BaseConfig]:
    """Return a section whose keys are the keyword parameters of a function.

    Types and defaults are those of the parameters.

    Args:
        function: The function; a parameter without an annotation has the type of its default.
        base: Section to inherit further keys from.
        **more: Defaults of inherited keys that differ from those of ``base``.

    Raises:
        TypeError, NameError: an annotation is not a type that a config can hold.
    """
    defaults, annotations = keyword_defaults(function), inspect.get_annotations(function)
    # Tensors need not be importable where a config is read.
    written = SimpleNamespace(__annotations__={name: annotations[name] for name in defaults if name in annotations})
    hints = get_type_hints(written, inspect.unwrap(function).__globals__, include_extras=True)
    keys = {name: (hints.get(name, type(default)), default) for name, default in defaults.items()}
    keys |= {name: (base.model_fields[name].annotation, default) for name, default in more.items()}
    name = function.__name__.title().replace("_", "") + "Config"
    fields: Any = keys
    return create_model(name, __base__=base, __doc__=f"Parameters of ``{function.__name__}``.", **fields)
