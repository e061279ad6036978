"""Define, register, and load methods, and generate their config sections.

A method is one function. Its docstring begins with ``equation: summary (source).``, which ``entrace methods`` prints.
Its keyword parameters are the keys of its config section. A method of your own, in ``my_methods.py``, can be short::

    def confident(advantages, rollouts, beta: float = 0.5):
        return advantages * (beta * rollouts.logprobs).exp()

``shaping.method = "my_methods:confident"`` selects it, and ``shaping.confident.beta = 1.0`` sets its parameter.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import torch

from entrace.trainer.settings import (
    BaseConfig,
    InputError,
    Positive,
    ValidationError,
    checked,
    create_model,
    explained,
    import_function,
    keyword_defaults,
    nearest,
    section_of,
    with_keys,
)

if TYPE_CHECKING:
    from torch import Tensor

HEADLINE = re.compile(r"(?P<equation>.+?): (?P<summary>.+) \((?P<source>[^()]+)\)\.")
OWN = re.compile(r"[\w.]+:\w+")

Kind = Literal["preset", "shaping", "loss"]
Settings = dict[str, Any]
StartStep = Positive | Literal["plateau"]
Function = TypeVar("Function", bound=Callable[..., Any])


class NotRecordedError(Exception):
    """A value that a method needs is missing from the trace."""


@dataclass(frozen=True)
class RolloutView:
    """Everything that a method may depend on; nothing in it carries a gradient.

    Attributes:
        logprobs: Log-probabilities of the sampled tokens under the policy that sampled them, nats, (B, T).
        entropy: Entropies of the distributions sampled from, nats, (B, T).
        is_correct: (B,) bool; False without a verdict.
        response_mask: (B, T) bool, True at the first |o_i| positions of each row.
        group_ids: Group (prompt) of each response, (B,), integers from 0.
        rewards: Reward of each response plus its length penalty, (B,); NaN without a verdict.
        rng: Random numbers, for methods that draw.
        past_entropy: Mean token entropy of each earlier step of the run, nats.
    """

    logprobs: Tensor
    entropy: Tensor
    is_correct: Tensor
    response_mask: Tensor
    group_ids: Tensor
    rewards: Tensor
    rng: np.random.Generator
    past_entropy: tuple[float, ...] = ()

    def take(self, rows: Tensor) -> RolloutView:
        """Return the responses at ``rows``, with the same random generator."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: part[rows] for name, part in parts.items() if isinstance(part, torch.Tensor)})


class Window(BaseConfig):
    """Steps at which a shaping method is on, first and last included.

    ``plateau`` is the step at which the plateau is detected.
    """

    start_step: StartStep = 1
    end_step: Positive | None = None

    def model_post_init(self, _: Any) -> None:
        """Refuse a window that ends before it starts."""
        if self.end_step and isinstance(self.start_step, int) and self.end_step < self.start_step:
            raise ValueError("end_step comes before start_step")


@dataclass(frozen=True)
class MethodSpec:
    """A registered method.

    Attributes:
        name: Name in a config, ``module:function`` for a user's own.
        kind: Where it acts.
        function: The method; a preset returns the settings that define it.
        section: Config section of its parameters, below that of its kind; None if it has none.
        settings: Other settings that its source uses, as nested config values.
        start_step: Default of its window, for shaping.
        replaces: Whether the shaped advantage does not depend on the advantage.
        needs: Values that keys of section ``loss`` must have.
    """

    name: str
    kind: Kind
    function: Callable[..., Any]
    section: str | None = None
    settings: Settings = field(default_factory=dict)
    start_step: int | Literal["plateau"] = 1
    replaces: bool = False
    needs: Settings = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Parameters and their defaults."""
        return keyword_defaults(self.function)

    def parameters(self, config: BaseConfig) -> dict[str, Any]:
        """Return the keyword arguments of the function, from the section of its kind."""
        return {name: getattr(getattr(config, self.section), name) for name in self.defaults} if self.section else {}

    def build_section(self) -> type[BaseConfig]:
        """Return the config section generated from the function's parameters."""
        if self.kind == "shaping":
            return section_of(self.function, Window, start_step=self.start_step)
        return section_of(self.function)

    def describe(self) -> dict[str, Any]:
        """Return equation, summary, source, and parameters with their defaults.

        All but the parameters come from the first line of the docstring.
        """
        first = (inspect.getdoc(self.function) or "").partition("\n")[0]
        headline = HEADLINE.fullmatch(first)
        found = headline.groupdict() if headline else {"equation": "", "summary": first, "source": self.name}
        return {**found, "parameters": self.defaults}


REGISTRY: dict[Kind, dict[str, MethodSpec]] = {"preset": {}, "shaping": {}, "loss": {}}


@overload
def shaping(function: Function, /) -> Function: ...
@overload
def shaping(
    *, section: str | None = None, start_step: int | Literal["plateau"] = 1, replaces: bool = False
) -> Callable[[Function], Function]: ...
@checked
def shaping(
    function: Callable[..., Any] | None = None,
    /,
    *,
    section: str | None = None,
    start_step: int | Literal["plateau"] = 1,
    replaces: bool = False,
) -> Any:
    """Register a shaping method.

    Its signature is ``(advantages (B, T), RolloutView, **parameters) -> (B, T)``.

    Args:
        function: The method, where the decorator is used without parentheses.
        section: Config section; that of another method to share its parameters (default: the function's name).
        start_step: Default first step of its window.
        replaces: The result does not depend on the advantages, so that no method can precede it.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        _register(MethodSpec(name, "shaping", function, section or name, start_step=start_step, replaces=replaces))
        return function

    return register(function) if function else register


@overload
def objective(function: Function, /) -> Function: ...
@overload
def objective(
    *,
    section: str | None = None,
    settings: Mapping[str, Any] | None = None,
    needs: Mapping[str, Any] | None = None,
) -> Callable[[Function], Function]: ...
@checked
def objective(
    function: Callable[..., Any] | None = None,
    /,
    *,
    section: str | None = None,
    settings: Mapping[str, Any] | None = None,
    needs: Mapping[str, Any] | None = None,
) -> Any:
    """Register a loss variant.

    Its signature is ``(advantages (B, T), RolloutView, **parameters) -> TokenWeights``. A variant that takes several
    optimizer steps per mini-batch returns a tuple, one ``TokenWeights`` per step.

    Args:
        function: The method, where the decorator is used without parentheses.
        section: Config section; that of another method to share its parameters (default: the function's name).
        settings: Other keys of section ``loss`` that its source sets.
        needs: Values that keys of section ``loss`` must have; others are rejected.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        own = (section or name) if keyword_defaults(function) else None
        _register(MethodSpec(name, "loss", function, own, dict(settings or {}), needs=dict(needs or {})))
        return function

    return register(function) if function else register


def preset(function: Callable[..., Settings]) -> Callable[..., Settings]:
    """Register a function that returns the settings of a method, nested as in TOML."""
    name = function.__name__
    _register(MethodSpec(name, "preset", function))
    return function


def find_method(name: str, kind: Kind) -> MethodSpec:
    """Return the method that a config names; ``module:function`` is imported.

    Raises:
        InputError: no such method, or a function that cannot be one.
    """
    if name in REGISTRY[kind]:
        return REGISTRY[kind][name]
    if not OWN.fullmatch(name):
        raise InputError(f'unknown {kind} method "{name}"{nearest(name, REGISTRY[kind])} (see `entrace methods`)')
    return _own_spec(name, kind, import_function(name, f"{kind} method"))


@cache
def _own_spec(name: str, kind: Kind, function: Callable[..., Any]) -> MethodSpec:
    """Return the entry of a user's function; cached, since every step asks for it."""
    acts_in = _kind_of(function)
    if kind != acts_in and (acts_in == "loss" or any(s.function is function for s in REGISTRY["shaping"].values())):
        raise InputError(f"{kind} method {name}: it is a {acts_in} method; name it in {acts_in}.method")
    # Importing may have registered it, with a section or a window of its own.
    found = next((spec for spec in REGISTRY[kind].values() if spec.function is function), None)
    spec = found or MethodSpec(name, kind, function, function.__name__)
    _check_signature(name, spec)
    return spec


def own_kind(name: str) -> Kind:
    """Return where the user's function ``module:function`` acts.

    A function acts in the loss if ``@objective`` registered it or if it is annotated to return ``TokenWeights``, and in
    shaping otherwise.

    Raises:
        InputError: no such module or function.
    """
    return _kind_of(import_function(name, "method"))


def _kind_of(function: Callable[..., Any]) -> Kind:
    is_registered = any(spec.function is function for spec in REGISTRY["loss"].values())
    returned = inspect.get_annotations(function).get("return")
    returns_weights = re.search(r"\bTokenWeights\b", str(returned)) is not None
    return "loss" if is_registered or returns_weights else "shaping"


def split_methods(method: Any) -> list[str]:
    """Return the names in a list of methods, or in one string joined by ``+``.

    Any other value gives an empty list.
    """
    if isinstance(method, str):
        return method.split("+")
    is_list = isinstance(method, list | tuple) and all(isinstance(name, str) for name in method)
    return list(method) if is_list else []


def with_sections(kind: Kind, specs: Iterable[MethodSpec], base: type[BaseConfig] = BaseConfig) -> type[BaseConfig]:
    """Return ``base`` with a key for the section of each method.

    Methods that share a section get that of the first.
    """
    sections: dict[str, Any] = {}
    for spec in specs:
        if spec.section and spec.section not in sections:
            model = spec.build_section()
            sections[spec.section] = (model, model())
    name = f"{kind.title()}Sections" if base is BaseConfig else base.__name__
    return create_model(name, __base__=base, **sections)


def validate_with_own(
    model: type[BaseConfig], kind: Kind, names: Iterable[str], values: Mapping[str, Any], handler: Callable[[Any], Any]
) -> Any:
    """Validate ``values``, with sections for the user's own methods in ``names``.

    Otherwise, validation is that of ``handler``. A method that cannot be loaded adds no section; the validator of the
    key that names it reports why.
    """
    specs = []
    for name in names:
        if OWN.fullmatch(name):
            with suppress(InputError):
                specs.append(find_method(name, kind))
    new = [spec for spec in specs if spec.section not in model.model_fields]
    extended = with_sections(kind, new, model)
    for spec in specs:
        _check_section(spec, extended.model_fields[spec.section].annotation if spec.section else None)
    if not new:
        return handler(values)
    try:
        return extended.model_validate(values)
    except ValidationError as error:
        raise with_keys(extended, error) from None


def call_method(spec: MethodSpec, advantages: Tensor, rollouts: RolloutView, parameters: Settings) -> Any:
    """Call a method, and return its result.

    Raises:
        InputError: a user's method failed, or a method changed the tensors that it was given.
        NotRecordedError: ``rollouts`` lacks a value that the method needs.
    """
    given = {"advantages": advantages, **vars(rollouts)}
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    # Tensors made in inference mode have no version.
    versions = {name: value._version for name, value in tensors.items() if not value.is_inference()}
    passes = (InputError, NotRecordedError) if OWN.fullmatch(spec.name) else Exception
    with explained(f"{spec.kind} method {spec.name} failed", passes):
        result = spec.function(advantages, rollouts, **parameters)
    if changed := [name for name, version in versions.items() if tensors[name]._version != version]:
        raise InputError(f"{spec.kind} method {spec.name} changed {changed[0]} in place; return a new tensor")
    return result


def check_result(spec: MethodSpec, result: Any, advantages: Tensor) -> Tensor:
    """Return the result of a shaping method.

    Raises:
        InputError: the result is not a finite real tensor of the advantages' shape.
    """
    if not isinstance(result, torch.Tensor) or result.shape != advantages.shape:
        found = f"shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise InputError(f"shaping method {spec.name} returned {found}, expected shape {tuple(advantages.shape)}")
    if result.dtype == torch.bool or result.is_complex():
        raise InputError(f"shaping method {spec.name} returned {result.dtype}, expected real numbers")
    # Nothing is learned through a method, and its numbers are recorded as they act.
    result = result.detach().to(advantages.dtype)
    if not torch.isfinite(result).all():
        raise InputError(f"shaping method {spec.name} returned NaN or infinity")
    return result


def _register(spec: MethodSpec) -> None:
    """Add a method to the registry; a module that is loaded again replaces its own."""
    other = REGISTRY[spec.kind].get(spec.name)
    if other and other.function.__module__ != spec.function.__module__:
        raise InputError(
            f"{spec.kind} method {spec.name} is already defined in {other.function.__module__}; rename one"
        )
    REGISTRY[spec.kind][spec.name] = spec


def _check_section(spec: MethodSpec, section: Any) -> None:
    """Refuse a method whose section belongs to something with other parameters.

    The section is named by the method's function.
    """
    if not spec.section:
        return
    is_section = isinstance(section, type) and issubclass(section, Window if spec.kind == "shaping" else BaseConfig)
    if not is_section or not spec.defaults.keys() <= section.model_fields.keys():
        raise ValueError(
            f"{spec.kind} method {spec.name}: section {spec.kind}.{spec.section} already exists with other keys; "
            "rename the function"
        )


def _check_signature(name: str, spec: MethodSpec) -> None:
    parameters = list(inspect.signature(spec.function).parameters.values())
    positional, keyword = parameters[:2], parameters[2:]
    fits = (
        len(positional) == 2
        and all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in positional)
        and all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is not p.empty for p in keyword)
    )
    if not fits:
        raise InputError(
            f"{spec.kind} method {name}: expected (advantages, rollouts, parameter=default, ...), "
            f"found {inspect.signature(spec.function)}"
        )
    if any(p.name in Window.model_fields for p in keyword):
        raise InputError(f"{spec.kind} method {name}: start_step and end_step are keys of every shaping section")
    try:
        spec.build_section()()
    except Exception as error:
        raise InputError(f"{spec.kind} method {name}: a parameter has no type that TOML can hold ({error})") from None
