"""The optimizers by name: torch.optim's own, and every method of `minifisher.METHODS`."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

import minifisher
from minifisher_lab.names import UnknownNameError, look_up
from minifisher_lab.training.published import PUBLISHED, AdamOfTheMean, Published

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon's authors give to Muon: matrices and kernels of hidden layers.

    Not among them are embeddings, the first and the last weight of the network, in the order in which it
    declares them, and vectors (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).
    """
    wide = [weight for weight in model.parameters() if weight.ndim > 1]
    embeddings = [layer.weight for layer in model.modules() if isinstance(layer, nn.Embedding)]
    others = {id(weight) for weight in (wide[:1] + wide[-1:] + embeddings)}
    return [weight for weight in wide if id(weight) not in others]


class MuonWithAdamW:
    """torch.optim.Muon for the hidden weights, torch.optim.AdamW for the rest, one learning rate for both.

    A kernel [out, in, k1, k2] is a matrix [out, in k1 k2] to Muon, as its authors read it.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        hidden = hidden_weights(model)
        # torch.optim.Muon takes matrices alone: these share the memory of the weights.
        self._matrices = [(w, nn.Parameter(w.detach().view(len(w), -1))) for w in hidden]
        # adjust_lr_fn gives Muon's steps the root mean square of AdamW's, so that one rate serves both.
        muon = partial(torch.optim.Muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        known = set(map(id, hidden))
        pairs = (
            (muon, [matrix for _, matrix in self._matrices]),
            (torch.optim.AdamW, [w for w in model.parameters() if id(w) not in known]),
        )
        self.optimizers: list[torch.optim.Optimizer] = [kind(part, lr=lr) for kind, part in pairs if part]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Both optimizers' groups; load_state_dict makes new ones."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """Both optimizers' states."""
        return {weight: state for optimizer in self.optimizers for weight, state in optimizer.state.items()}

    def step(self, closure: Callable[[], Any]) -> Any:
        """Evaluate the closure once, then take one step with each optimizer."""
        loss = closure()
        for weight, matrix in self._matrices:
            matrix.grad = None if weight.grad is None else weight.grad.view(len(weight), -1)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' checkpoints."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


Optimizer: TypeAlias = "torch.optim.Optimizer | MuonWithAdamW"


@dataclass(frozen=True)
class Choice:
    """An optimizer by name: how to build it, its default learning rate and its tuning grid."""

    name: str
    description: str
    build: Callable[..., Optimizer]  # build(model, lr=..., **options)
    rate: float
    grid: tuple[float, ...]
    method: Callable[..., Optimizer]
    """The class that it makes, whose arguments `minifisher optimizers NAME` lists."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """What `minifisher tune` searches in addition to the learning rate, on a logarithmic scale."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """The default of each of them, which is tried first."""
    warm_labels: Literal["data", "model"] | None = None
    """The labels of the pass through the data with which a run begins; None: it begins without one."""


def _first_order(
    name: str,
    description: str,
    kind: Callable[..., Optimizer],
    rate: float,
    grid: tuple[float, ...] = (),
    **fixed: Any,
) -> Choice:
    def build(model: nn.Module, **options: Any) -> Optimizer:
        return kind(model.parameters(), **{**fixed, **options})

    return Choice(name, description, build, rate, grid or grid_around(rate), kind)


LADDER = tuple(float(f"{digit}e{power}") for power in range(-9, 4) for digit in (1, 3))
"""The learning rates that are tried: {1, 3} x 10^p."""
ADAM_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""One grid for all optimizers whose learning rate is in step lengths of Adam."""


def grid_around(rate: float) -> tuple[float, ...]:
    """Five learning rates of the ladder with `rate` in the middle."""
    middle = _nearest(rate)
    return LADDER[middle - 2 : middle + 3]


def next_rate(rate: float, *, up: bool) -> float:
    """The neighbour of the rate on the ladder."""
    return LADDER[_nearest(rate) + (1 if up else -1)]


def _nearest(rate: float) -> int:
    return min(range(len(LADDER)), key=lambda index: abs(LADDER[index] / rate - 1))


_OPTIM = torch.optim
FIRST_ORDER = (
    _first_order("adamw", "Adam with decoupled decay 0.01", _OPTIM.AdamW, 1e-3, ADAM_GRID),
    _first_order("adam", "Adam", _OPTIM.Adam, 1e-3, ADAM_GRID),
    _first_order("adam-of-the-mean", "Adam whose V averages the square of the mean", AdamOfTheMean, 1e-4),
    _first_order("adagrad", "AdaGrad", _OPTIM.Adagrad, 1e-2),
    _first_order("rmsprop", "RMSprop", _OPTIM.RMSprop, 1e-3),
    _first_order("sgd", "SGD with momentum 0.9", _OPTIM.SGD, 1e-3, momentum=0.9),
    Choice(
        "muon", "Muon for hidden weights, AdamW for the rest", MuonWithAdamW, 1e-3, ADAM_GRID, MuonWithAdamW
    ),
)

# A name for a method with some arguments fixed, written as on the command line: NAME:ARGUMENT=VALUE:...
ALIASES = {
    "mbf-empirical": "mbf:fisher=empirical",
    "mbf-sampled": "mbf:fisher=sampled",
}


def _method(name: str, method: type[minifisher.CurvatureOptimizer]) -> Choice:
    rate = float(inspect.signature(method).parameters["lr"].default)
    description = (inspect.getdoc(method) or name).splitlines()[0].partition(":")[0].rstrip(".")
    damping = float(method.options["damping"].default)
    searched, default = {"damping": (damping / 100, damping * 100)}, {"damping": damping}
    return Choice(name, description, method, rate, ADAM_GRID, method, searched, default)


def _published(name: str, row: Published, choice: Choice) -> Choice:
    """A method with the settings of its authors."""
    damping = {} if row.damping is None else {"damping": row.damping}
    return replace(
        choice,
        name=name,
        description=f"{choice.description}, as published for {row.problem}",
        build=partial(choice.build, **row.options, **damping),
        rate=row.rate,
        grid=grid_around(row.rate),
        ranges={key: (value / 100, value * 100) for key, value in damping.items()},
        defaults=damping,
        warm_labels=row.warm_labels,
    )


def optimizers() -> dict[str, Choice]:
    """Every optimizer by name: first-order optimizers, minifisher's methods, aliases, published settings."""
    table = {choice.name: choice for choice in FIRST_ORDER}
    table |= {name: _method(name, method) for name, method in minifisher.METHODS.items()}
    aliases = {name: spec for name, spec in ALIASES.items() if spec.partition(":")[0] in table}
    named = {name: replace(_with_options(spec, table), name=name) for name, spec in aliases.items()}
    published = {name: _published(name, row, table[row.method]) for name, row in PUBLISHED.items()}
    return table | named | published


def choose(spec: str) -> Choice:
    """The optimizer that `spec` names, with its fixed arguments: mbf, or mbf:power=0.5:graft=None."""
    return _with_options(spec, optimizers())


def split_names(names: str) -> list[str]:
    """The names in a text, separated by commas; a comma within brackets separates nothing."""
    return re.split(r",(?![^(\[{]*[)\]}])", names)


def _with_options(spec: str, table: Mapping[str, Choice]) -> Choice:
    name, *pairs = spec.strip().split(":")
    choice = look_up("optimizer", name, table)
    if not pairs:
        return choice
    options = dict(map(_option, pairs))
    if "lr" in options:  # the lr that `build` receives would override it
        rate = options["lr"]
        raise ValueError(
            f"{spec.strip()!r} sets lr, but a name cannot set the learning rate: "
            f"use compare --lr NAME={rate} or train --lr {rate} instead"
        )
    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    return replace(
        choice,
        name=spec.strip(),
        description=f"{choice.description}; {shown}",
        build=partial(choice.build, **options),
        ranges={argument: ends for argument, ends in choice.ranges.items() if argument not in options},
    )


NOT_A_VALUE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
"""What ast.literal_eval raises for a text that is no Python value."""


def _option(pair: str) -> tuple[str, object]:
    key, equals, text = pair.partition("=")
    if not equals:
        raise UnknownNameError(f"{pair!r} is not ARGUMENT=VALUE, as in mbf:power=0.5")
    try:
        return key, ast.literal_eval(text)
    except NOT_A_VALUE:  # a bare word is a string: fisher=empirical
        return key, text
