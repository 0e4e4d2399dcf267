"""Random networks, options and gradients, and what must hold for all of them.

`cases` is a hypothesis strategy; `check(case)` raises an error where a property does not hold, and otherwise
says in a word what happened. tests/test_random_cases.py runs some hundred cases, tests/fuzz.py many thousand.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import minifisher

BATCH, WIDTH = 3, 4
SAVED_AFTER = 3  # steps
SCALES = (1.0, 1.0, 1.0, 1e-38, 1e-30, 1e-12, 1e12, 1e18, 1e30)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ---- networks: blocks that map [BATCH, WIDTH] to [BATCH, WIDTH] ----


class Shaped(nn.Module):
    """A module applied to inputs of another shape."""

    def __init__(self, module: nn.Module, *shape: int) -> None:
        super().__init__()
        self.module, self.shape = module, shape

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs.reshape(BATCH, *self.shape)).reshape(BATCH, WIDTH)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, WIDTH, padding_idx=0)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.embedding(torch.arange(BATCH))


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(0, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.linear(inputs[:, :0])


class Loose(nn.Module):
    """A parameter of any shape, which is added to the loss."""

    def __init__(self, shape: tuple[int, ...], transposed: bool) -> None:
        super().__init__()
        values = torch.randn(shape[::-1] if transposed else shape)
        self.weight = nn.Parameter(
            values.permute(tuple(reversed(range(len(shape))))) if transposed else values
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.weight.sin().sum()


def _frozen() -> nn.Module:
    module = nn.Linear(WIDTH, WIDTH)
    module.weight.requires_grad_(False)
    return module


def _channels_last() -> nn.Module:
    return Shaped(nn.Conv2d(2, WIDTH, (1, 2)).to(memory_format=torch.channels_last), 2, 1, 2)


BLOCKS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "sequence": lambda: Shaped(nn.Linear(2, 2), 2, 2),
    "conv1d": lambda: Shaped(nn.Conv1d(2, 2, 1, groups=2), 2, 2),
    "conv2d": lambda: Shaped(nn.Conv2d(1, WIDTH, 2), 1, 2, 2),
    "conv3d": lambda: Shaped(nn.Conv3d(1, WIDTH, (1, 2, 2)), 1, 1, 2, 2),
    "channels last": _channels_last,
    "norm": lambda: nn.LayerNorm(WIDTH),
    "frozen": _frozen,
    "tied": Tied,
    "tokens": Tokens,
    "empty": Empty,
}
READABLE = ("linear", "no bias", "sequence", "conv1d", "conv2d", "conv3d", "channels last", "tied")


# ---- cases ----


@dataclass(frozen=True)
class Step:
    """One step: the size of its loss, what is wrong with its gradients, and what is changed before it."""

    scale: float = 1.0
    bad: str = ""  # a value put into one gradient
    missing: int = 0  # a bit for each parameter that has no gradient
    change: tuple[str, Any] | None = None  # of the first group, or ("add", None), ("freeze", index)


@dataclass(frozen=True)
class Case:
    """A network, an optimizer and its steps."""

    method: str
    options: dict[str, Any]
    blocks: tuple[Any, ...]  # names of BLOCKS, or shapes with whether they are transposed
    later: tuple[Any, ...]  # blocks whose parameters are added by ("add", None)
    dtype: torch.dtype
    bare: bool  # parameters, not the module
    steps: tuple[Step, ...]


NUMBERS = {
    "lr": (1e-3, 0.0, 1e-1, 1.0),
    "momentum": (0.0, 0.5, 0.99),
    "curvature_decay": (0.0, 0.5, 0.999),
    "damping": (0.0, 1e-8, 1e-3, 1.0, 1e3),
    "weight_decay": (0.0, 0.1),
    "power": (0.25, 0.5, 1.0),
    "output_power": (0.0, 0.5, 1.0),
    "exponent": (0.5, 0.25, 0.3, None),
    "kl_clip": (1e-3, None),
    "mu1": (0.0, 0.2, 0.9),
    "statistics_memory": (1, 2**20),
}
INVALID = (-1, 2.5, "wrong", None, float("nan"), float("inf"))
CHANGES = {
    "lr": (0.0, 1e-2, 1.0),
    "momentum": (0.0, 0.5, 0.95),
    "damping": (0.0, 1e-3, 10.0),
    "weight_decay": (0.0, 0.3),
}


def _values(option: Any) -> st.SearchStrategy[Any]:
    if option.choices:
        return st.sampled_from(option.choices)
    if option.name in NUMBERS:
        return st.sampled_from(NUMBERS[option.name])
    return st.sampled_from((*range(1, 6), *([None] if option.optional else [])))


@st.composite
def _options(draw: Any, method: str) -> dict[str, Any]:
    declared = minifisher.METHODS[method].options
    names = [name for name, option in declared.items() if option.init and name not in ("params", "model")]
    chosen = draw(st.lists(st.sampled_from(names), max_size=5, unique=True))
    options = {name: draw(_values(declared[name])) for name in chosen}
    if chosen and draw(st.integers(0, 19)) == 0:
        options[chosen[0]] = draw(st.sampled_from(INVALID))
    return options


SHAPES = st.tuples(st.lists(st.integers(0, 3), max_size=5).map(tuple), st.booleans())
NETWORKS = st.lists(st.one_of(st.sampled_from(list(BLOCKS)), SHAPES), min_size=1, max_size=3).map(tuple)
STEPS = st.builds(
    Step,
    scale=st.sampled_from(SCALES),
    bad=st.sampled_from(("", "", "", "", "nan", "inf")),
    missing=st.one_of(st.just(0), st.integers(0, 255)),
    change=st.one_of(
        st.none(),
        st.none(),
        st.sampled_from([(name, value) for name, values in CHANGES.items() for value in values]),
        st.just(("add", None)),
        st.tuples(st.just("freeze"), st.integers(0, 3)),
    ),
)


@st.composite
def cases(draw: Any) -> Case:
    """A random case; most of those that read samples have a layer whose samples can be read."""
    method = draw(st.sampled_from(sorted(minifisher.METHODS)))
    options, blocks = draw(_options(method)), draw(NETWORKS)
    declared = minifisher.METHODS[method].options["fisher"]
    reads_samples = options.get("fisher", declared.default) != "gradient"
    if reads_samples and draw(st.integers(0, 19)):
        blocks = (draw(st.sampled_from(READABLE)), *blocks)
    return Case(
        method,
        options,
        blocks,
        draw(NETWORKS),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 39 if reads_samples else 3)) == 0,
        tuple(draw(st.lists(STEPS, min_size=SAVED_AFTER, max_size=6))),
    )


# ---- running a case ----


class RefusedError(Exception):
    """The optimizer cannot be made with these options."""


class Run:
    """A network and its optimizer on their way through the steps of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        self.module = nn.ModuleList(_network(blocks, case.dtype) for blocks in (case.blocks, case.later))
        try:
            self.opt = minifisher.METHODS[case.method](self._params(0), **case.options)
        except (TypeError, ValueError) as error:
            _check_message(error)
            raise RefusedError from error

    def _params(self, part: int) -> Any:
        return list(self.module[part].parameters()) if self.case.bare else self.module[part]

    @property
    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.module.parameters()]

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that the optimizer has so far."""
        return [parameter for group in self.opt.param_groups for parameter in group["params"]]

    def prepare(self, step: Step) -> None:
        """Change what the step changes."""
        name, value = step.change or ("", None)
        if name == "add" and len(self.opt.param_groups) == 1:
            self.opt.add_param_group({"params": self._params(1)})
        elif name == "freeze":
            parameters = list(self.module.parameters())
            parameter = parameters[value % len(parameters)]
            parameter.requires_grad_(not parameter.requires_grad)
        elif name in CHANGES:
            self.opt.param_groups[0][name] = value

    def take(self, index: int, step: Step) -> bool:
        """Take a step; returns whether its gradients were finite."""
        torch.manual_seed(index)

        def closure() -> Tensor:
            self.opt.zero_grad()
            self.module.zero_grad()  # also of what is added later
            inputs = torch.randn(BATCH, WIDTH).to(self.case.dtype)
            outputs = self.module[1](self.module[0](inputs))
            if outputs.requires_grad:
                self.opt.observe(outputs)
            loss = nn.functional.cross_entropy(outputs.float(), torch.arange(BATCH)) * step.scale
            if loss.requires_grad:
                loss.backward()
            self._spoil(step)
            return loss.detach()

        self.opt.step(closure)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def _spoil(self, step: Step) -> None:
        for bit, parameter in enumerate(self.trained):
            if step.missing >> bit & 1:
                parameter.grad = None
        present = [p for p in self.trained if p.grad is not None and p.grad.numel()]
        if step.bad and present:
            present[0].grad[(0,) * present[0].ndim] = float(step.bad)

    def resumed(self) -> Run:
        """A new optimizer for a copy of the network, with the saved state."""
        buffer = io.BytesIO()
        torch.save(self.opt.state_dict(), buffer)
        buffer.seek(0)
        twin = Run(self.case)
        if len(self.opt.param_groups) > 1:
            twin.prepare(Step(change=("add", None)))
        for parameter, own in zip(twin.module.parameters(), self.module.parameters(), strict=True):
            parameter.data.copy_(own.data)
            parameter.requires_grad_(own.requires_grad)
        twin.opt.load_state_dict(torch.load(buffer))
        return twin


def _network(blocks: tuple[Any, ...], dtype: torch.dtype) -> nn.Module:
    made = [BLOCKS[block]() if isinstance(block, str) else Loose(*block) for block in blocks]
    return nn.Sequential(*made).to(dtype)


def check(case: Case) -> str:
    """Raise an error where a property does not hold; returns "refused", "trained" or "skipped a step"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(case)


def _check(case: Case) -> str:
    try:
        run = Run(case)
    except RefusedError:
        return "refused"
    for index, step in enumerate(case.steps[:SAVED_AFTER]):
        _take(run, index, step)
    twin = run.resumed()
    for index, step in enumerate((*case.steps[SAVED_AFTER:], Step(), Step()), SAVED_AFTER):
        _take(run, index, step)
        _take(twin, index, step)
        for own, other in zip(run.weights, twin.weights, strict=True):
            assert torch.equal(own, other), f"resumed, step {index} gives other weights"
    assert str(run.opt.describe())
    json.dumps(run.opt.diagnostics())
    return "skipped a step" if run.opt.skipped_steps else "trained"


def _check_message(error: Exception) -> None:
    assert len(str(error)) > 20, f"an error that does not say what to do: {error!r}"


def _take(run: Run, index: int, step: Step) -> None:
    try:
        run.prepare(step)
    except (TypeError, ValueError) as error:  # a group that the method cannot train
        _check_message(error)
    before = copy.deepcopy(run.weights)
    finite = run.take(index, step)
    for old, new in zip(before, run.weights, strict=True):
        assert torch.isfinite(new).all(), f"step {index} made a weight infinite or NaN"
        assert finite or torch.equal(old, new), f"step {index} moved a weight on a bad gradient"
