"""Options of a method: each is declared once, as a typed field of its class.

    class MBF(CurvatureOptimizer):
        damping: float = option(default=0.1, at_least=0)

From the declarations come the signature, the checks, the defaults of a parameter group, the list of options
that a checkpoint must not change, and the table in the documentation.
"""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:  # a type checker reads it; at run time it would do nothing

    def dataclass_transform(**_: Any) -> Any:  # noqa: D103
        return lambda decorated: decorated


Params = nn.Module | Iterable[Any]
"""What torch.optim takes (tensors, named tensors, groups), a module, or groups whose "params" is a module."""

NOT_IN_GROUPS = ("params", "model")
"""Arguments whose values are not kept in the parameter groups."""

_UNSET: Any = object()  # an override keeps what it does not set
# A schedule that ends at 0 may end a rounding error below it; so does torch's LinearLR.
_ROUNDING = 1e-9

# Arguments of torch.optim.AdamW that have another name here, or none.
_OF_ADAMW = {
    "betas": "pass momentum for beta_1; beta_2 is 0.999, and curvature_decay averages the curvature",
    "eps": "epsilon is 1e-8 in the length of Adam's step; damping does its work in the direction",
    "amsgrad": "there is no such variant",
    "foreach": "equal layers always step together",
    "fused": "compiled kernels are used where they fit, see the extra minifisher[fast]",
    "differentiable": "a step cannot be differentiated",
    "capturable": "only MBF can be recorded in a CUDA graph",
}


@dataclass(frozen=True)
class Option:
    """The declaration of one option; read it as `MBF.damping`, and its value as `optimizer.damping`."""

    name: str = ""
    default: Any = _UNSET
    annotation: Any = _UNSET
    at_least: float | None = _UNSET
    above: float | None = _UNSET
    below: float | None = _UNSET
    choices: tuple[Any, ...] = _UNSET
    """Derived from the annotation where it is a Literal or bool."""
    note: str = _UNSET
    """What an error message adds to the range."""
    per_group: bool = _UNSET
    """Whether parameter groups may differ in it."""
    fixed: bool = _UNSET
    """Whether it cannot change once the optimizer is made."""
    every_step: bool = _UNSET
    """Whether each step reads it, and nothing was planned by it: a schedule may change it at no cost."""
    kw_only: bool = _UNSET
    init: bool = _UNSET
    """Whether it is an argument; otherwise the method sets it, to the default."""
    meaning: str = _UNSET
    """One sentence for the documentation."""

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        values = [group[self.name] for group in optimizer.param_groups]
        if any(value is not values[0] and value != values[0] for value in values):
            raise AttributeError(f"{self.name} differs between the parameter groups: read it from a group")
        return values[0]

    def __set__(self, optimizer: Any, value: Any) -> None:
        raise AttributeError(
            f"set {self.name} where torch.optim has it: for group in optimizer.param_groups: "
            f'group["{self.name}"] = {value!r}'
        )

    def check(self, value: Any) -> None:
        """Raise ValueError, with the range and the value, where the value is out of the range."""
        if not self._holds(value):
            raise ValueError(f"{self.name} must be {self.range}, got {value!r}")

    def _holds(self, value: Any) -> bool:
        if self.choices:
            return any(value is choice or (value == choice) is True for choice in self.choices)
        if value is None:
            return self.optional
        if self.is_count:
            return isinstance(value, Integral) and (self.at_least or 0) <= int(value) <= sys.maxsize
        number = _as_float(value)
        return number < (math.inf if self.below is None else self.below) and (
            number > self.above if self.above is not None else number >= (self.at_least or 0) - _ROUNDING
        )

    @property
    def optional(self) -> bool:
        """Whether None is a value."""
        return NoneType in _members(self.annotation)

    @property
    def is_count(self) -> bool:
        """Whether it is a whole number."""
        return int in _members(self.annotation)

    @property
    def range(self) -> str:
        """Its values in words."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        none = ", or None" if self.optional else ""
        if self.is_count:
            wanted = f"a whole number >= {self.at_least or 0:g}"
        elif self.below is not None:
            wanted = f"in [{self.at_least or 0:g}, {self.below:g})"
        elif self.above is not None:
            wanted = f"> {self.above:g}" if self.note else f"finite and > {self.above:g}"
        else:
            wanted = f"finite and >= {self.at_least or 0:g}"
        return wanted + none + (f": {self.note}" if self.note else "")


_UNLESS_SET: dict[str, Any] = {
    "at_least": None,
    "above": None,
    "below": None,
    "choices": (),
    "note": "",
    "per_group": True,
    "fixed": False,
    "every_step": False,
    "kw_only": True,
    "init": True,
    "meaning": "",
}


def option(
    *,
    default: Any = _UNSET,
    at_least: float | None = _UNSET,
    above: float | None = _UNSET,
    below: float | None = _UNSET,
    choices: tuple[Any, ...] = _UNSET,
    note: str = _UNSET,
    per_group: bool = _UNSET,
    fixed: bool = _UNSET,
    every_step: bool = _UNSET,
    kw_only: bool = _UNSET,
    init: bool = _UNSET,
    meaning: str = _UNSET,
) -> Any:
    """Declare an option; a subclass that declares it again changes only what it sets."""
    return Option(
        default=default,
        at_least=at_least,
        above=above,
        below=below,
        choices=choices,
        note=note,
        per_group=per_group,
        fixed=fixed,
        every_step=every_step,
        kw_only=kw_only,
        init=init,
        meaning=meaning,
    )


@dataclass_transform(eq_default=False, kw_only_default=True, field_specifiers=(option,))
class HasOptions:
    """Collects the options that a class and its bases declare."""

    options: ClassVar[dict[str, Option]] = {}
    """Every option by its name."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        collected = dict(cls.options)
        for name, declared in list(vars(cls).items()):
            if isinstance(declared, Option):
                annotation = _evaluated(cls.__annotations__[name], cls.__module__)
                collected[name] = _completed(declared, name, annotation, cls.options.get(name))
                setattr(cls, name, collected[name])
        cls.options = collected
        if "__init__" not in vars(cls):
            signature = _signature(collected.values())
            setattr(cls, "__signature__", signature)  # noqa: B010 - mypy knows no such name
            setattr(cls, "__init__", _constructor(cls, signature))  # noqa: B010 - mypy would object

    @classmethod
    def bind(cls, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
        """The value of every option of a call; TypeError, which names the way out, where one is unknown."""
        names = {name for name, declared in cls.options.items() if declared.init}
        for unknown in sorted(options.keys() - names):
            raise TypeError(f"{cls.__name__} has no argument {unknown!r}{_way_out(unknown, names)}")
        bound = _signature(cls.options.values()).bind(*arguments, **options)
        bound.apply_defaults()
        hidden = {name: o.default for name, o in cls.options.items() if not o.init}
        return {**hidden, **bound.arguments}

    @classmethod
    def check(cls, group: Mapping[str, Any]) -> None:
        """Raise ValueError for the first option of a parameter group that is out of its range."""
        check_options(cls.options, group)

    @classmethod
    def check_shared(cls, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Raise ValueError where one parameter group sets what all groups share."""
        for name, declared in cls.options.items():
            if not declared.per_group and name in group and group[name] != defaults[name]:
                raise ValueError(
                    f"{name} is one for all parameter groups, {defaults[name]!r}, and a group asked for "
                    f"{group[name]!r}: pass it to the optimizer"
                )


def check_options(options: Mapping[str, Option], group: Mapping[str, Any]) -> None:
    """Raise ValueError for the first option of a parameter group that is out of its range."""
    for name, declared in options.items():
        if name in group and name not in NOT_IN_GROUPS:
            declared.check(group[name])


def options_table(options: Iterable[Option]) -> str:
    """The options as a table in Markdown: name, default, values, meaning."""
    rows = ["| option | default | values | meaning |", "|---|---|---|---|"]
    for declared in options:
        if declared.init and declared.name not in NOT_IN_GROUPS:
            values = declared.range.replace("|", "\\|")
            rows.append(f"| `{declared.name}` | `{declared.default!r}` | {values} | {declared.meaning} |")
    return "\n".join(rows) + "\n"


# ---- from a declaration ----


def _evaluated(annotation: Any, module: str) -> Any:
    return eval(annotation, vars(sys.modules[module])) if isinstance(annotation, str) else annotation


def _completed(declared: Option, name: str, annotation: Any, base: Option | None) -> Option:
    """The declaration with its name, and with what it does not set as in the base class or by default."""
    keys = [*_UNLESS_SET, *(["default"] if base is not None else [])]
    unset: dict[str, Any] = {
        key: _UNLESS_SET[key] if base is None else getattr(base, key)
        for key in keys
        if getattr(declared, key) is _UNSET
    }
    completed = replace(declared, name=name, annotation=annotation, **unset)
    return completed if completed.choices else replace(completed, choices=_choices(annotation))


def _choices(annotation: Any) -> tuple[Any, ...]:
    members = _members(annotation)
    if bool in members:
        return (False, True)
    literals = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    return (*literals, *([None] if literals and NoneType in members else []))


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _signature(options: Iterable[Option]) -> inspect.Signature:
    return inspect.Signature(
        [
            inspect.Parameter(
                o.name,
                inspect.Parameter.KEYWORD_ONLY if o.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if o.default is _UNSET else o.default,
                annotation=o.annotation,
            )
            for o in sorted(options, key=lambda o: o.kw_only)
            if o.init
        ],
        return_annotation=None,
    )


def _constructor(cls: Any, signature: inspect.Signature) -> Callable[..., None]:
    """The `__init__` of the base class with a signature of its own: LightningCLI reads that of `__init__`."""

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        super(cls, self).__init__(*arguments, **options)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    setattr(  # noqa: B010 - mypy knows no such name
        __init__, "__signature__", signature.replace(parameters=[own, *signature.parameters.values()])
    )
    return __init__


def _way_out(name: str, names: Iterable[str]) -> str:
    if name in _OF_ADAMW:
        return f": {_OF_ADAMW[name]}"
    near = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(names))}"


def _as_float(value: Any) -> float:
    """NaN, which is in no range, for what is no number or beyond any float."""
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
        try:
            return float(value)
        except (OverflowError, RuntimeError):
            return math.nan
    return math.nan
