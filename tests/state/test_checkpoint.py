from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import minifisher

METHODS = sorted(minifisher.METHODS)


class Branching(nn.Module):
    """Equal layers, which are stacked; a convolution, a norm; and a branch that is off at first."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.branch = False
        self.convolution = nn.Conv2d(1, 4, 3, dtype=dtype)
        self.norm = nn.LayerNorm(16, dtype=dtype)
        self.equal = nn.ModuleList(nn.Linear(16, 16, dtype=dtype) for _ in range(3))
        self.late = nn.Linear(16, 16, dtype=dtype)
        self.last = nn.Linear(16, 3, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.convolution(images).flatten(1))
        for layer in self.equal:
            hidden = torch.tanh(layer(hidden))
        if self.branch:
            hidden = hidden + self.late(hidden)
        return self.last(hidden)


def make(method: str = "mbf", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Branching, Any]:
    torch.manual_seed(0)
    network = Branching(dtype)
    return network, minifisher.METHODS[method](network, **options)


def train(network: Branching, optimizer: Any, steps: range) -> None:
    dtype = network.last.weight.dtype
    for step in steps:
        torch.manual_seed(step)  # batch, and the labels drawn from the model
        images, labels = torch.randn(6, 1, 4, 4, dtype=dtype), torch.randint(3, (6,))
        network.branch = step >= 10

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            outputs = network(images)
            optimizer.observe(outputs)
            loss = functional.cross_entropy(outputs.float(), labels)
            loss.backward()
            return loss

        optimizer.step(closure)


def saved(optimizer: Any) -> dict[str, Any]:
    """Through a file, as a restart would see it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def snapshot(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def weights(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [7, 20])  # before and after the first gradient of `late`
def test_resume_is_bit_for_bit(method: str, stop: int) -> None:
    network, optimizer = make(method)
    train(network, optimizer, range(stop))
    resumed_network, resumed = make(method)
    resumed_network.load_state_dict(copy.deepcopy(network.state_dict()))
    resumed.load_state_dict(saved(optimizer))
    train(network, optimizer, range(stop, stop + 50))
    train(resumed_network, resumed, range(stop, stop + 50))
    assert_same(weights(resumed_network), weights(network))


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_resume_with_samples_and_folded_bias(fisher: str) -> None:
    options = {"fisher": fisher, "fold_bias": True, "statistics_every": 3, "weight_decay": 0.1}
    network, optimizer = make(**options)
    train(network, optimizer, range(13))
    resumed_network, resumed = make(**options)
    resumed_network.load_state_dict(copy.deepcopy(network.state_dict()))
    resumed.load_state_dict(saved(optimizer))
    train(network, optimizer, range(13, 63))
    train(resumed_network, resumed, range(13, 63))
    assert_same(weights(resumed_network), weights(network))


def test_resume_in_another_process(tmp_path: Any) -> None:
    network, optimizer = make()
    train(network, optimizer, range(15))
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    program = """
        import sys, torch
        torch.set_num_threads(1)
        sys.path[:0] = [{tests!r}]
        from test_checkpoint import make, train
        network, optimizer = make()
        checkpoint = torch.load({saved!r}, weights_only=True)
        network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        train(network, optimizer, range(15, 65))
        torch.save(network.state_dict(), {resumed!r})
    """
    names = {"tests": str(__file__).rsplit("/", 1)[0], "saved": str(tmp_path / "saved.pt")}
    names["resumed"] = str(tmp_path / "resumed.pt")
    command = [sys.executable, "-c", textwrap.dedent(program).format(**names)]
    train(network, optimizer, range(15, 65))
    subprocess.run(command, check=True)
    assert_same(torch.load(names["resumed"], weights_only=True), dict(network.state_dict()))


@pytest.mark.parametrize("stop", [7, 20])
def test_options_of_the_saved_state_are_taken_over_and_stay_live(stop: int) -> None:
    network, optimizer = make(lr=3e-3, damping=0.3, block_size=4)
    train(network, optimizer, range(stop))
    resumed_network, resumed = make()
    resumed_network.load_state_dict(copy.deepcopy(network.state_dict()))
    resumed.load_state_dict(saved(optimizer))
    assert resumed.param_groups[0]["damping"] == 0.3
    for each in (optimizer, resumed):
        each.param_groups[0]["lr"] = 0.05
    train(network, optimizer, range(stop, 30))
    train(resumed_network, resumed, range(stop, 30))
    assert_same(weights(resumed_network), weights(network))


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_keeps_its_dtype(method: str) -> None:
    network, optimizer = make(method, torch.bfloat16)
    train(network, optimizer, range(3))
    state = saved(optimizer)["state"]
    curvature = {t.dtype for e in state.values() for t in e.values() if isinstance(t, Tensor)}
    curvature -= {torch.int64, torch.bool}  # counts
    assert curvature == {torch.bfloat16, torch.float32}
    _, resumed = make(method, torch.bfloat16)
    resumed.load_state_dict(saved(optimizer))
    assert_same(resumed.state_dict()["state"], state)


def test_curvature_dtype_is_saved() -> None:
    network, optimizer = make(curvature_dtype=torch.bfloat16)
    train(network, optimizer, range(3))
    _, resumed = make(curvature_dtype=torch.bfloat16)
    resumed.load_state_dict(saved(optimizer))
    assert resumed.state[resumed.param_groups[0]["params"][0]]["input_fisher"].dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_alike_and_apart(method: str, way: Any) -> None:
    network, optimizer = make(method)
    train(network, optimizer, range(12))
    other_network, other = way((network, optimizer))
    before = copy.deepcopy(weights(network))
    train(other_network, other, range(12, 30))
    assert_same(weights(network), before)
    train(network, optimizer, range(12, 30))
    assert_same(weights(other_network), weights(network))


def test_a_copy_reads_samples_with_its_own_hooks() -> None:
    network, optimizer = make(fisher="empirical")
    train(network, optimizer, range(3))
    other_network, other = copy.deepcopy((network, optimizer))
    train(other_network, other, range(3, 12))
    train(network, optimizer, range(3, 12))
    assert_same(weights(other_network), weights(network))


@pytest.mark.parametrize(
    "write", [lambda optimizer, file: torch.save(optimizer.state_dict(), file), pickle.dump]
)
def test_files_hold_no_stack_twice(write: Any) -> None:
    network = nn.Sequential(*(nn.Linear(48, 48) for _ in range(8)))
    optimizer = minifisher.MBF(network)
    network(torch.randn(4, 48)).sum().backward()
    optimizer.step()
    assert optimizer.state[network[0].weight]["momentum"]._base is not None  # a slice of a stack
    entries = optimizer.state.values()
    numbers = sum(t.nbytes for entry in entries for t in entry.values() if isinstance(t, Tensor))
    file = io.BytesIO()
    write(optimizer, file)
    assert file.tell() < 1.5 * numbers


def test_a_loaded_state_is_apart_from_the_dictionary() -> None:
    network, optimizer = make()
    train(network, optimizer, range(12))
    state = snapshot(optimizer)
    kept = copy.deepcopy(state)
    other_network, other = make()
    other.load_state_dict(state)
    train(other_network, other, range(12, 15))
    assert_same(state["state"], kept["state"])


def test_every_trainable_parameter_has_an_entry_before_its_first_gradient() -> None:
    network, optimizer = make()
    network.norm.weight.requires_grad_(False)
    state = optimizer.state_dict()["state"]
    without = [key for key, entry in state.items() if not entry]
    trainable = [p.requires_grad for p in optimizer.param_groups[0]["params"]]
    assert without == [key for key, trains in enumerate(trainable) if not trains]
    assert len(state) == len(trainable)


def change(state: dict[str, Any], what: str) -> None:
    index = state["param_groups"][0]["params"][3]
    entry = state["state"][index]
    if what == "newer":
        state["param_groups"][0]["format_version"] = 99
    elif what == "foreign":
        del state["param_groups"][0]["format_version"]
    elif what == "missing":
        del entry["momentum"]
    elif what == "shape":
        entry["fisher"] = entry["fisher"][..., :-1]
    elif what == "not a tensor":
        entry["fisher"] = 3.0
    elif what == "fewer parameters":
        del state["param_groups"][0]["params"][-1]
    elif what == "fewer groups":
        state["param_groups"] = []
    elif what == "out of range":
        state["param_groups"][0]["damping"] = -1.0
    elif what == "fold_bias":
        state["param_groups"][0]["fold_bias"] = True
    elif what == "no state":
        del state["state"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("newer", "format_version 99.*upgrade"),
        ("foreign", "no format_version"),
        ("missing", "norm.bias has no 'momentum'"),
        ("shape", "'fisher' of norm.bias is .* must be"),
        ("not a tensor", "'fisher' of norm.bias is float"),
        ("fewer parameters", "group 0 has 13 parameters .* 14"),
        ("fewer groups", "0 parameter groups"),
        ("out of range", "damping must be"),
        ("fold_bias", "make the optimizer with it"),
        ("no state", "has 'state'"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(what: str, message: str) -> None:
    network, optimizer = make()
    train(network, optimizer, range(12))
    other_network, other = make(lr=0.5)
    train(other_network, other, range(4))
    before = snapshot(other)
    state = snapshot(optimizer)
    change(state, what)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert_same(other.state_dict()["state"], before["state"])
    assert other.state_dict()["param_groups"] == before["param_groups"]
    train(other_network, other, range(4, 6))


def test_another_method_is_refused() -> None:
    network, optimizer = make()
    train(network, optimizer, range(2))
    _, other = make(graft=None)
    state = snapshot(optimizer)
    state["param_groups"][0]["graft"] = None
    with pytest.raises(ValueError, match=r"'second_moment'.*another method or graft"):
        other.load_state_dict(state)


def test_a_state_that_is_saved_under_inference_mode_can_be_trained() -> None:
    network = nn.Linear(3, 2)
    optimizer = minifisher.MBF(network)
    with torch.inference_mode():
        optimizer.state_dict()
    network(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[network.weight]["step"] == 1


def test_schedulers_and_counts_survive() -> None:
    network, optimizer = make()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(network, optimizer, range(4))
    schedule.step()
    _, resumed = make()
    schedule = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.5)
    resumed.load_state_dict(saved(optimizer))
    resumed.step()
    schedule.step()
    assert resumed.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)
    assert resumed.diagnostics()["weights"]["last.weight"]["step"] == 4
