from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

import minifisher
from minifisher.distributed import collectives
from tests.distributed import training
from tests.distributed.processes import run

Log = list[tuple[str, int]]  # each call with its numbers
NORM = {"graft": "adam", "length": "norm"}
SHARED = {"block_size": 4, "statistics_every": 2, "output_power": 0.0, **NORM}
OWN_ROWS = {"share": "row", "conv_blocks": "kernel", "block_size": 4, "statistics_every": 2, **NORM}
RAW = {**OWN_ROWS, "relative_damping": False}
CUT: dict[str, dict[str, Any]] = {
    "shared": SHARED,
    "own rows": OWN_ROWS,
    "own rows, raw": RAW,
    "shared, lengths by row": {**SHARED, "graft": "adam-rows"},
    "two-sided": {**SHARED, "output_power": 0.5},
    "own rows, raw, lengths by row": {**RAW, "graft": "adam-rows"},
    "shared, descent": {**SHARED, "length": "descent"},
    "own rows, raw, descent by row": {**RAW, "graft": "adam-rows", "length": "descent"},
}
PARALLEL: dict[str, dict[str, Any]] = {
    "own rows": {"block_size": 3, "share": "row"},
    "shared": {"block_size": 3},
    "lengths by row": {"block_size": 3, "graft": "adam-rows"},
    "two-sided": {"block_size": 3, "output_power": 0.5},
    "descent": {"block_size": 3, "length": "descent"},
    "descent by row": {"block_size": 3, "graft": "adam-rows", "length": "descent"},
}
STEPS = (0, 2, 3)  # the first; one with statistics, one without


METHOD_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in minifisher.METHODS},
    "kfac, eigenvalues corrected": ("kfac", {"eigenvalue_correction": True}),
    "tnt by sample": ("tnt", {"per_sample": True}),
    "shampoo by sample": ("shampoo", {"fisher": "empirical"}),
}


@contextmanager
def listening(witness: Any = None) -> Iterator[Log]:
    """What the optimizer sends; for a collective of any other kind CommDebugMode, the witness, fails."""
    log: Log = []
    originals = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        log.append(("all_reduce", tensor.numel()))
        return originals[0](tensor, *arguments, **options)

    def all_gather(received: list[Tensor], tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        log.append(("all_gather", tensor.numel()))
        return originals[1](received, tensor, *arguments, **options)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        with witness or CommDebugMode() as mode:
            yield log
        assert mode is None or mode.get_total_counts() == len(log)
    finally:
        dist.all_reduce, dist.all_gather = originals


def logs(model: nn.Module, optimizer: Any, steps: int = 2) -> list[Log]:
    found = []
    for step in range(steps):
        images, labels = training.batch(step)
        functional.cross_entropy(model(images), labels).backward()
        with listening() if dist.is_initialized() else nullcontext([]) as log:
            optimizer.step()
        found.append(log)
        optimizer.zero_grad()
    return found


def cut_logs(options: dict[str, Any]) -> list[Log]:
    torch.manual_seed(0)
    network = training.Network().double()
    fully_shard(network, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return logs(network, minifisher.MBF(network, **options))


def copied_logs(options: dict[str, Any]) -> list[Log]:
    network, optimizer = training.make("mbf", options)
    return logs(training.replicated(network), optimizer)


def in_columns_and_rows(options: dict[str, Any], mesh: Any = None) -> list[Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    if mesh is not None:
        parallelize_module(network, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    optimizer = minifisher.MBF(network, lr=1e-2, **options)
    for step in range(10):
        torch.manual_seed(step)
        images, labels = torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.randint(5, (8,))
        functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in network.parameters()]


def message_of(method: str, **options: Any) -> str:
    network = training.Network().double()
    fully_shard(network, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(ValueError, match=r"MBF|gradient") as caught:
        minifisher.METHODS[method](network, **options)
    return str(caught.value)


def one_rank_overflows() -> bool:
    """Whether all weights stay as they were when one rank alone sees infinite samples."""
    network, optimizer = training.make("mbf", {"fisher": "empirical", "statistics_every": 1})
    model = training.replicated(network)
    training.train(model, optimizer, range(2))
    before = training.weights(network)
    images, labels = training.batch(2)
    # Samples whose squares overflow in one process, while the mean gradient is finite in all.
    functional.cross_entropy(model(images), labels).backward()
    if dist.get_rank() == 1:
        capture = optimizer._captures.by_estimator["empirical"]
        calls = next(iter(capture._calls.values()))
        calls._with_gradient[0].output_gradients[0].fill_(torch.inf)
    optimizer.step()
    same = all(torch.equal(old, new) for old, new in zip(before.values(), network.parameters(), strict=True))
    training.train(model, optimizer, range(3, 5))
    return same and optimizer.skipped_steps == 1


def without_trace(options: dict[str, Any], step: int) -> bool:
    """Whether a run goes on, to the last bit, as if no rank had tried a step that one of them could not."""
    runs = []
    for fails in (False, True):
        torch.manual_seed(0)
        network = training.Network().double()
        fully_shard(network, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = minifisher.MBF(network, **options)
        training.train(network, optimizer, range(step))
        if fails:
            images, labels = training.batch(99)
            functional.cross_entropy(network(images), labels).backward()
            if dist.get_rank() == 1:
                network.last.weight.grad.to_local().view(-1)[0] = torch.inf
            optimizer.step()
            assert optimizer.skipped_steps == 1
        training.train(network, optimizer, range(step, step + 3))
        runs.append([parameter.to_local().clone() for parameter in network.parameters()])
    return all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def method_logs(method: str, options: dict[str, Any]) -> list[Log]:
    """Two steps with a closure, so that every method can take them, of replicas without DDP's own calls.

    The closure runs the network inside the step, which CommDebugMode cannot witness.
    """
    network, optimizer = training.make(method, options)
    found = []
    for step in range(2):
        with listening(witness=nullcontext()) as log:
            training.train(network, optimizer, range(step, step + 1))
        found.append(log)
    return found


def one_layer_of_four_ranks(options: dict[str, Any]) -> tuple[list[Log], list[Tensor]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 5, bias=False)).double()
    optimizer = minifisher.MBF(network, **options)
    return logs(training.replicated(network), optimizer), [p.detach() for p in network.parameters()]


def everything() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        **{f"cut, {name}": cut_logs(options) for name, options in CUT.items()},
        "copied, gradient": copied_logs(SHARED),
        "copied, empirical": copied_logs({**SHARED, "fisher": "empirical"}),
        "copied, owned": copied_logs({**SHARED, "shard_curvature": True}),
        **{f"replicas, {name}": method_logs(*case) for name, case in METHOD_CASES.items()},
        "tensor parallel": {name: in_columns_and_rows(options, mesh) for name, options in PARALLEL.items()},
        "messages": {method: message_of(method) for method in minifisher.METHODS if method != "mbf"},
        "empirical": message_of("mbf", fisher="empirical"),
        "overflow": one_rank_overflows(),
        "without trace": {
            (name, step): without_trace(options, step) for name, options in CUT.items() for step in STEPS
        },
    }


@pytest.fixture(scope="module")
def all_found() -> list[dict[str, Any]]:
    return run(2, everything)


@pytest.fixture(scope="module")
def found(all_found: list[dict[str, Any]]) -> dict[str, Any]:
    return all_found[0]


def weight_sizes(folded: int) -> list[tuple[int, int]]:
    """Outputs and inputs of every layer that samples are read of; with a folded bias one input more."""
    parameters = training.Network().parameters()
    return [(len(p), p[0].numel() + folded) for p in parameters if p.ndim > 1]


def replicas_exchange() -> dict[str, list[int]]:
    """The numbers of every all-reduce of a statistics step, by the formulas of docs/scaling.md."""
    folded, plain = weight_sizes(1), weight_sizes(0)
    factors = [n**2 + m**2 for n, m in folded]
    secants = [sum(m**2 + m + 1 for _, m in folded), sum(2 * n for n, _ in folded)]
    by_sample = [sum(n**2 + m**2 for n, m in plain)]
    return {
        **{method: [] for method in ("mbf", "shampoo", "soap")},
        "kfac": [sum(factors)],
        "kfac, eigenvalues corrected": [sum(factors) + sum(n * m for n, m in folded)],
        "kbfgs": secants,
        "kbfgsl": secants,
        "tnt": [sum(n * m for n, m in plain)],
        "tnt by sample": by_sample,
        "shampoo by sample": by_sample,
    }


@pytest.mark.parametrize("name", METHOD_CASES)
def test_replicas_exchange_what_the_formulas_say(found: dict[str, Any], name: str) -> None:
    expected = [("all_reduce", numbers) for numbers in replicas_exchange()[name]]
    assert found[f"replicas, {name}"] == [expected, []]


def test_with_more_ranks_than_layers_owners_send_no_more_than_twice_the_directions() -> None:
    for log, weights in run(4, one_layer_of_four_ranks, {"shard_curvature": True}):
        assert log == [[("all_reduce", 80)]] * 2
        torch.testing.assert_close(weights, one_layer_of_four_ranks({})[1], rtol=1e-9, atol=1e-9)


WEIGHTS = 12  # convolution, norm, three equal layers and the last: weight and bias each


def fisher_numbers(network: nn.Module, block: int = 4) -> int:
    """in x block_size of every matrix whose rows share (9 inputs of the convolution make 3 blocks)."""
    shared = sum(
        -(-parameter[0].numel() // block) * block * block
        for parameter in network.parameters()
        if parameter.ndim > 1
    )
    return shared


def test_gradients_need_nothing_but_what_replicas_average_anyway(found: dict[str, Any]) -> None:
    assert found["copied, gradient"] == [[], []]


def test_samples_need_one_sum_a_statistics_step(found: dict[str, Any]) -> None:
    fisher = fisher_numbers(training.Network())
    diagonals = sum(p.numel() for p in training.Network().parameters() if p.ndim == 1)
    ((call,), nothing) = found["copied, empirical"]
    assert call == ("all_reduce", fisher)
    assert nothing == []
    assert diagonals  # they follow the gradient, which replicas share


def test_owners_gather_directions_alone(found: dict[str, Any]) -> None:
    parameters = sum(p.numel() for p in training.Network().parameters())
    for log in found["copied, owned"]:
        ((name, numbers),) = log
        assert name == "all_gather"
        assert parameters / 2 <= numbers <= 0.75 * parameters


VOTE = 1  # is every gradient finite?
LENGTHS = ("all_reduce", 2 * WEIGHTS + VOTE)


def test_a_cut_weight_needs_lengths_and_its_shared_matrices(found: dict[str, Any]) -> None:
    matrices_and_means = ("all_reduce", fisher_numbers(training.Network()) + WEIGHTS + VOTE)
    lengths_alone = ("all_reduce", 2 * WEIGHTS)
    assert found["cut, shared"] == [[matrices_and_means, lengths_alone], [LENGTHS]]
    assert found["cut, two-sided"] == found["cut, shared"]  # blocks over outputs stay with their rows


def test_rows_and_kernels_of_a_cut_weight_need_one_number_each(found: dict[str, Any]) -> None:
    means, lengths_alone = ("all_reduce", WEIGHTS + VOTE), ("all_reduce", 2 * WEIGHTS)
    assert found["cut, own rows"] == [[means, lengths_alone], [LENGTHS]]


def test_with_absolute_damping_their_curvature_needs_nothing(found: dict[str, Any]) -> None:
    assert found["cut, own rows, raw"] == [[LENGTHS], [LENGTHS]]


def test_lengths_borrowed_row_by_row_need_nothing(found: dict[str, Any]) -> None:
    matrices_and_means = ("all_reduce", fisher_numbers(training.Network()) + WEIGHTS + VOTE)
    vote = ("all_reduce", VOTE)
    assert found["cut, shared, lengths by row"] == [[matrices_and_means], [vote]]
    assert found["cut, own rows, raw, lengths by row"] == [[vote], [vote]]
    assert found["cut, own rows, raw, descent by row"] == [[vote], [vote]]


def test_slopes_and_squares_are_summed_in_the_call_that_sums_norms(found: dict[str, Any]) -> None:
    matrices_and_means = ("all_reduce", fisher_numbers(training.Network()) + WEIGHTS + VOTE)
    first, later = [("all_reduce", 6 * WEIGHTS + vote) for vote in (0, VOTE)]
    assert found["cut, shared, descent"] == [[matrices_and_means, first], [later]]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", CUT)
def test_a_step_that_one_rank_cannot_take_leaves_no_trace_on_any(
    all_found: list[dict[str, Any]], name: str, step: int
) -> None:
    assert [found["without trace"][name, step] for found in all_found] == [True, True]


@pytest.mark.parametrize("name", PARALLEL)
def test_columns_and_rows_of_a_layer_take_the_whole_layers_steps(found: dict[str, Any], name: str) -> None:
    whole = in_columns_and_rows(PARALLEL[name])
    torch.testing.assert_close(found["tensor parallel"][name], whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [method for method in minifisher.METHODS if method != "mbf"])
def test_who_needs_whole_weights_says_what_to_do(found: dict[str, Any], method: str) -> None:
    message, name = found["messages"][method], minifisher.METHODS[method].__name__
    assert f"{name} cannot precondition the piece" in message or f"is not enough for {name}" in message
    assert "MBF" in message
    assert "for every method there is DistributedDataParallel, where shard_curvature=True" in message


def test_samples_of_one_rank_are_not_enough_for_a_piece(found: dict[str, Any]) -> None:
    assert "not enough for MBF: under fully_shard" in found["empirical"]
    assert 'MBF with fisher="gradient"' in found["empirical"]


def test_what_one_rank_cannot_use_no_rank_uses(all_found: list[dict[str, Any]]) -> None:
    assert [found["overflow"] for found in all_found] == [True, True]


def test_what_another_rank_owns_adds_nothing_to_a_sum(monkeypatch):
    sent = []
    monkeypatch.setattr(collectives, "rank", lambda: 0)
    monkeypatch.setattr(collectives, "sum_over_ranks", lambda sums: sent.extend(t.clone() for t, _ in sums))
    collectives._sum_with_zeros([(torch.ones(3), 0), (torch.ones(3), 1)])
    assert [tensor.tolist() for tensor in sent] == [[1, 1, 1], [0, 0, 0]]
