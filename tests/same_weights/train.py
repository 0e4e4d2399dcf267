"""Train a small network in many ways and write down what it becomes, to the last bit.

    PYTHONPATH=<source tree> python tests/same_weights/train.py OUTPUT.json [--only NAME ...]

Two versions of minifisher behave the same where they write the same file. The script uses public names only,
so it runs unchanged on old and new versions. One row of CASES is one run; add a row to add a run.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import hashlib
import io
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import minifisher

STEPS, HALF = 20, 10
SAMPLES, CLASSES = 12, 4
WORLD = 2  # processes of the distributed cases
NAN_AT = 7  # the step whose gradient is spoilt, where a case wants that

# ---- networks and data ----


class Network(nn.Module):
    """One layer of each kind that the library treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 16, 3, groups=2)
        self.wide = nn.Linear(256, 300)  # above 65,536 weights: not stacked
        self.narrow = nn.Linear(300, 16)
        self.embedding = nn.Embedding(5, 16)
        self.equal = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))  # stacked
        self.late = nn.Linear(16, 16)  # stacked with them, while it takes part
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(16, CLASSES, bias=False)
        self.uses_late = True

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Images [samples, 1, 6, 6] and tokens [samples, 3] to logits."""
        hidden = torch.tanh(self.norm(self.image(images)))
        hidden = torch.tanh(self.wide(torch.tanh(self.grouped(hidden)).flatten(1)))
        hidden = self.narrow(hidden)[:, None] + self.embedding(tokens)  # [samples, 3, 16]
        for layer in self.equal:
            hidden = torch.tanh(layer(hidden))
        if self.uses_late:
            hidden = hidden + self.late(hidden)
        return self.last(self.scale * hidden.mean(1))


class Tiny(nn.Module):
    """Few weights, so that the file of checkpoints stays small."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 2, 3, stride=2)
        self.equal = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.last = nn.Linear(8, CLASSES, bias=False)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Images [samples, 1, 6, 6] to logits; the tokens are not used."""
        hidden = torch.tanh(self.image(images)).flatten(1)
        for layer in self.equal:
            hidden = torch.tanh(layer(hidden))
        return self.last(hidden)


def batch(index: int, dtype: torch.dtype) -> list[Tensor]:
    """Images, tokens and labels of one step: this process's share of them."""
    generator = torch.Generator().manual_seed(index)
    images = torch.randn(SAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randint(5, (SAMPLES, 3), generator=generator)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return [tensor.chunk(ranks)[rank] for tensor in (images, tokens, labels)]


# ---- one training run ----


@dataclass
class Run:
    """What trains. `model` is what is called: the network itself, or what wraps it."""

    case: Case
    network: nn.Module
    model: nn.Module
    optimizer: Any
    scaler: Any = field(default_factory=lambda: torch.amp.GradScaler("cpu", 2.0**9, growth_interval=3))
    loss: float = math.nan

    def batch(self, index: int) -> list[Tensor]:
        """The batch of one step in the network's dtype."""
        return batch(index, self.case.dtype)

    def forward(self, images: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, after the optimizer saw the outputs."""
        outputs = self.model(images, tokens)
        self.optimizer.observe(outputs, self.case.likelihood)
        loss = functional.cross_entropy(outputs, labels)
        self.loss = loss.item()
        return loss


def with_closure(run: Run, index: int, nan: bool = False) -> None:
    """A step with a closure, as every method takes it."""
    data = run.batch(index)

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = run.forward(*data)
        loss.backward()
        if nan:
            gradient = next(run.network.parameters()).grad
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            local.view(-1)[:1] = math.nan  # of one process, where the others hold no piece
        return loss.detach()

    run.optimizer.step(closure)


def with_a_nan(run: Run, index: int) -> None:
    """As `with_closure`, with a gradient in one step that is not a number."""
    with_closure(run, index, nan=index == NAN_AT)


def now_and_then(run: Run, index: int) -> None:
    """As `with_closure`, with a layer that gets no gradient in every fourth step."""
    run.network.uses_late = index % 4 != 1
    with_closure(run, index)


def without_closure(run: Run, index: int) -> None:
    """The usual loop of torch."""
    run.optimizer.zero_grad()
    run.forward(*run.batch(index)).backward()
    run.optimizer.step()


def accumulated(run: Run, index: int) -> None:
    """Two micro-batches make one step."""
    run.optimizer.zero_grad()
    for data in zip(*(tensor.chunk(2) for tensor in run.batch(index)), strict=True):
        (run.forward(*data) / 2).backward()
    run.optimizer.step()


def scaled(run: Run, index: int) -> None:
    """With a GradScaler that leaves it to the optimizer to unscale."""
    run.optimizer.zero_grad()
    run.scaler.scale(run.forward(*run.batch(index))).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()


def scaled_and_clipped(run: Run, index: int) -> None:
    """With a GradScaler that unscales, so that the optimizer must be told the scale."""
    run.optimizer.loss_scale = run.scaler.get_scale
    run.optimizer.zero_grad()
    run.scaler.scale(run.forward(*run.batch(index))).backward()
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.network.parameters(), 0.5)
    run.scaler.step(run.optimizer)
    run.scaler.update()


def warm(run: Run) -> None:
    """Statistics of three batches before the first step."""
    loader = [(data[:2], data[2]) for data in map(run.batch, range(100, 103))]
    run.optimizer.warm_start(lambda inputs: run.model(*inputs), loader, functional.cross_entropy)


def resumed(run: Run) -> None:
    """Everything anew, then what was saved is loaded."""
    file = io.BytesIO()
    torch.save((run.network.state_dict(), run.optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh = start(run.case)
    fresh.network.load_state_dict(weights)
    fresh.optimizer.load_state_dict(state)
    run.network, run.model, run.optimizer = fresh.network, fresh.model, fresh.optimizer


def copied(run: Run) -> None:
    """A deep copy of network and optimizer goes on in their place."""
    run.network, run.optimizer = copy.deepcopy((run.network, run.optimizer))
    run.model = run.network


def nothing(run: Run) -> None:
    """The default of what happens before the first step and half way."""


# ---- what the optimizer is given, and what wraps the network ----


def module(network: nn.Module) -> Any:
    """The network itself."""
    return network


def tensors(network: nn.Module) -> Any:
    """Bare parameters."""
    return list(network.parameters())


def named(network: nn.Module) -> Any:
    """Parameters with their names."""
    return list(network.named_parameters())


def two_groups(network: Any) -> Any:
    """Two groups with options of their own: modules in the one, tensors in the other."""
    first = nn.ModuleList([network.image, network.grouped, network.equal])
    inside = set(map(id, first.parameters()))
    others = [parameter for parameter in network.parameters() if id(parameter) not in inside]
    return [
        {"params": first, "lr": 2e-3, "conv_blocks": "kernel", "share": "row", "damping": 0.3},
        {"params": others, "graft": "sgd", "lr": 1e-2, "weight_decay": 0.1, "block_size": 32},
    ]


def replicas(network: nn.Module) -> nn.Module:
    """Every process holds all weights."""
    return DistributedDataParallel(network)


def pieces(network: nn.Module) -> nn.Module:
    """Every process holds a piece of every weight (FSDP2)."""
    return fully_shard(network, mesh=init_device_mesh("cpu", (WORLD,)))


# ---- the table ----


@dataclass(frozen=True)
class Case:
    """One run: a method with options, and the way in which it trains."""

    method: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    network: type[nn.Module] = Network
    params: Callable[[Any], Any] = module
    wrap: Callable[[nn.Module], nn.Module] | None = None  # in two processes
    likelihood: str = "categorical"
    before: Callable[[Run], None] = nothing
    step: Callable[[Run, int], None] = with_closure
    half_way: Callable[[Run], None] = nothing


def case(method: str = "mbf", **given: Any) -> Case:
    """A row of the table: fields of Case by their names, everything else is an option of the method."""
    ways = {name: given.pop(name) for name in list(given) if name in Case.__dataclass_fields__}
    return Case(method, given, **ways)


EVERY_STEP = {"statistics_every": 1, "inverse_every": 1}
KERNELS = {"conv_blocks": "kernel", "share": "row"}
BFLOAT16 = torch.bfloat16
ADAPTIVE = {"adaptive_damping": True, "graft": None, "relative_damping": False, "damping": 1.0, "lr": 0.1}

CASES: dict[str, Case] = {name: case(name) for name in minifisher.METHODS}
CASES |= {f"{name}, resumed": case(name, half_way=resumed) for name in minifisher.METHODS}
CASES |= {f"{name}, copied": case(name, half_way=copied) for name in minifisher.METHODS}
CASES |= {f"{name}, a NaN": case(name, step=with_a_nan) for name in minifisher.METHODS}
CASES |= {f"{name}, now and then": case(name, step=now_and_then) for name in minifisher.METHODS}
CASES |= {
    "mbf rows": case(share="row"),
    "mbf kernels packed": case(conv_blocks="kernel"),
    "mbf kernels packed, resumed": case(conv_blocks="kernel", half_way=resumed),
    "mbf kernels packed, bfloat16 curvature": case(conv_blocks="kernel", curvature_dtype=BFLOAT16),
    "mbf kernels packed, empirical": case(**KERNELS, fisher="empirical"),
    "mbf kernels packed, sgd": case(conv_blocks="kernel", graft="sgd", relative_damping=False),
    "mbf kernels inverted": case(conv_blocks="kernel", statistics_every=2, inverse_every=4),
    "mbf kernels, float64": case(conv_blocks="kernel", dtype=torch.float64),
    "mbf rows of 7, packed": case(share="row", block_size=7),
    "mbf power": case(power=0.5),
    "mbf empirical": case(fisher="empirical"),
    "mbf empirical, rows": case(fisher="empirical", share="row", block_size=16, statistics_every=2),
    "mbf sampled": case(fisher="sampled"),
    "mbf exact": case(fisher="exact"),
    "mbf bernoulli": case(fisher="sampled", likelihood="bernoulli"),
    "mbf gaussian": case(fisher="exact", likelihood="gaussian"),
    "mbf bias folded": case(fold_bias=True),
    "mbf bias folded, empirical": case(fold_bias=True, fisher="empirical", statistics_every=2),
    "mbf no graft": case(graft=None, relative_damping=False, damping=0.5, lr=1e-2),
    "mbf no graft, relative damping": case(graft=None, **EVERY_STEP),
    "mbf sgd": case(graft="sgd"),
    "mbf lengths by row": case(graft="adam-rows"),
    "mbf absolute damping": case(relative_damping=False),
    "mbf decay decoupled": case(weight_decay=0.1),
    "mbf decay coupled": case(weight_decay=0.1, decoupled_weight_decay=False),
    "mbf maximize": case(maximize=True),
    "mbf no momentum": case(momentum=0.0),
    "mbf blocks of 16": case(block_size=16),
    "mbf blocks of 24, padded": case(block_size=24),
    "mbf bfloat16 curvature": case(curvature_dtype=BFLOAT16),
    "mbf newton-schulz": case(inverse="newton-schulz", statistics_every=2),
    "mbf cholesky": case(**KERNELS, inverse="cholesky"),
    "mbf capturable": case(capturable=True, **EVERY_STEP),
    "mbf capturable kernels, no graft": case(capturable=True, graft=None, conv_blocks="kernel", **EVERY_STEP),
    "mbf adaptive damping": case(**ADAPTIVE),
    "mbf one-sided": case(output_power=0.0),
    "mbf two-sided": case(output_power=0.5),
    "mbf two-sided, resumed": case(output_power=0.5, half_way=resumed),
    "mbf two-sided, copied": case(output_power=0.5, half_way=copied),
    "mbf two-sided, empirical": case(output_power=1.0, fisher="empirical", fold_bias=True),
    "mbf two-sided, bfloat16 curvature": case(output_power=0.5, curvature_dtype=BFLOAT16),
    "mbf two-sided, capturable": case(output_power=1.0, capturable=True, **EVERY_STEP),
    "mbf bare parameters": case(params=tensors, step=without_closure),
    "mbf named parameters": case(params=named, step=without_closure),
    "mbf two groups": case(params=two_groups),
    "mbf two groups, resumed": case(params=two_groups, half_way=resumed),
    "mbf float64": case(dtype=torch.float64),
    "mbf bfloat16": case(dtype=BFLOAT16),
    "mbf bfloat16, resumed": case(dtype=BFLOAT16, half_way=resumed),
    "mbf micro-batches": case(fisher="empirical", step=accumulated, statistics_every=2),
    "mbf scaled": case(fisher="empirical", step=scaled, statistics_every=2),
    "mbf scaled and clipped": case(fisher="empirical", step=scaled_and_clipped, statistics_every=2),
    "mbf warm start": case(fisher="empirical", before=warm),
    "mbf kernels packed, a NaN": case(conv_blocks="kernel", step=with_a_nan),
    "kfac empirical": case("kfac", fisher="empirical"),
    "kfac exact": case("kfac", fisher="exact"),
    "kfac eigenvalues": case("kfac", eigenvalue_correction=True),
    "kfac clipped": case("kfac", kl_clip=1e-8),
    "kfac no pi": case("kfac", pi_correction=False),
    "kfac reduce": case("kfac", weight_sharing="reduce"),
    "kfac bfloat16 curvature": case("kfac", curvature_dtype=BFLOAT16),
    "kfac bfloat16": case("kfac", dtype=BFLOAT16),
    "kfac float64": case("kfac", dtype=torch.float64),
    "kfac no graft, absolute damping": case("kfac", graft=None, relative_damping=False, damping=1.0),
    "kfac bias apart, power": case("kfac", fold_bias=False, power=0.5),
    "kfac adaptive damping": case("kfac", **ADAPTIVE),
    "kfac micro-batches": case("kfac", fisher="empirical", step=accumulated),
    "kbfgs mean input": case("kbfgs", bias_input="mean"),
    "kbfgs absolute damping": case("kbfgs", relative_damping=False, damping=0.3),
    "kbfgs adaptive damping": case("kbfgs", adaptive_damping=True),
    "kbfgs warm start": case("kbfgs", before=warm),
    "kbfgs often": case("kbfgs", **EVERY_STEP),
    "kbfgsl three pairs": case("kbfgsl", pairs=3, **EVERY_STEP),
    "shampoo newton": case("shampoo", root="newton"),
    "shampoo exponent": case("shampoo", exponent=0.5),
    "shampoo every dimension": case("shampoo", merge_dims=1),
    "shampoo eigenbasis": case("shampoo", eigenbasis=True),
    "shampoo empirical": case("shampoo", fisher="empirical"),
    "shampoo blocks of 24": case("shampoo", max_dim=24),
    "shampoo bfloat16": case("shampoo", dtype=BFLOAT16),
    "soap adam": case("soap", graft="adam"),
    "soap bfloat16 curvature": case("soap", curvature_dtype=BFLOAT16),
    "tnt by sample": case("tnt", per_sample=True),
    "tnt exact": case("tnt", per_sample=True, fisher="exact"),
    "tnt gradient": case("tnt", fisher="gradient"),
    "tnt warm start": case("tnt", before=warm),
    "tnt absolute damping, power": case("tnt", relative_damping=False, power=0.5),
}
CASES |= {f"{name}, replicas": case(name, wrap=replicas) for name in minifisher.METHODS}
CASES |= {
    f"{name}, replicas, shared out": case(name, wrap=replicas, shard_curvature=True)
    for name in minifisher.METHODS
}
CASES |= {
    "mbf kernels, replicas": case(**KERNELS, wrap=replicas),
    "mbf empirical, replicas": case(fisher="empirical", statistics_every=2, wrap=replicas),
    "mbf a NaN, replicas": case(step=with_a_nan, wrap=replicas),
    "kfac clipped, replicas": case("kfac", kl_clip=1e-8, wrap=replicas),
    "kfac adaptive damping, replicas": case("kfac", **ADAPTIVE, wrap=replicas),
    "mbf, pieces": case(wrap=pieces),
    "mbf kernels, pieces": case(**KERNELS, wrap=pieces),
    "mbf rows, pieces": case(share="row", block_size=16, power=0.5, wrap=pieces),
    "mbf no graft, pieces": case(graft=None, damping=1.0, relative_damping=False, wrap=pieces),
    "mbf lengths by row, pieces": case(graft="adam-rows", weight_decay=0.1, wrap=pieces),
    "mbf adaptive damping, pieces": case(**ADAPTIVE, wrap=pieces),
    "mbf a NaN, pieces": case(step=with_a_nan, wrap=pieces),
}

# ---- from a case to its record ----


def start(case: Case) -> Run:
    """Network and optimizer before the first step."""
    torch.manual_seed(0)
    network = case.network().to(case.dtype)
    model = case.wrap(network) if case.wrap else network
    optimizer = minifisher.METHODS[case.method](case.params(network), **case.options)
    return Run(case, network, model, optimizer)


def advance(run: Run, steps: Sequence[int]) -> None:
    """So many steps, each with its own batch and its own random numbers."""
    for index in steps:
        torch.manual_seed(index)
        run.case.step(run, index)


def trained(case: Case) -> dict[str, Any]:
    """The record of a whole run."""
    run = start(case)
    case.before(run)
    advance(run, range(HALF))
    case.half_way(run)
    advance(run, range(HALF, STEPS))
    return record(run)


def record(run: Run) -> dict[str, Any]:
    """What must not change: hashes of weights and state, and the names and options in the state_dict."""
    weights, saved = run.network.state_dict(), run.optimizer.state_dict()
    assert run.loss < 10, f"{run.case} diverges, and proves little"
    assert all(whole(tensor).isfinite().all() for tensor in weights.values())
    entries = saved["state"].items()
    state = {f"{index} {name}": value for index, entry in entries for name, value in entry.items()}
    groups = [{name: repr(value) for name, value in group.items()} for group in saved["param_groups"]]
    return {
        "weights": digest(weights),
        "state": digest(state),
        "state names": sorted({name for entry in saved["state"].values() for name in entry}),
        "keys": sorted(saved),
        "groups": groups,
        "skipped steps": int(run.optimizer.skipped_steps),
        "loss": run.loss,
    }


def digest(values: dict[str, Any]) -> str:
    """One hash of all names, dtypes, shapes and bytes."""
    hashed = hashlib.sha256()
    for name, value in sorted(values.items()):
        if isinstance(value, Tensor):
            tensor = whole(value)
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            hashed.update(f"{name} {value!r}".encode())
    return hashed.hexdigest()


def whole(tensor: Any) -> Tensor:
    """A tensor that may be in pieces on several processes, whole on this one."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def train_all(names: Sequence[str], timed: bool = False) -> dict[str, Any]:
    """Name -> record, for the cases that this version of minifisher has: an older one lacks new options."""
    records = {}
    for name in names:
        begun = time.perf_counter()
        try:
            records[name] = trained(CASES[name])
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            print(f"left out: {name}: {error}", flush=True)
        if timed:
            print(f"{time.perf_counter() - begun:6.2f} s  {name}", flush=True)
    return records


def train_together(names: Sequence[str], timed: bool = False) -> dict[str, Any]:
    """The records that the first of several processes writes."""
    if not names:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_as_one_process, (folder, names, timed), nprocs=WORLD)
        return json.loads((Path(folder) / "records.json").read_text())


def _as_one_process(rank: int, folder: str, names: Sequence[str], timed: bool) -> None:
    prepare()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meeting", limit, WORLD, rank)
    try:
        records = train_all(names, timed and rank == 0)
        if rank == 0:
            (Path(folder) / "records.json").write_text(json.dumps(records))
        dist.barrier()
    finally:
        gc.collect()  # what is left of models and optimizers holds process groups
        dist.destroy_process_group()


COMPILED = ("mbf", "mbf rows", "mbf kernels packed, sgd", "mbf kernels packed, bfloat16 curvature")


def compile_loops(folder: str) -> None:
    """Let another process compile numba's loops into a cache of this run's own.

    The compiled loops round otherwise in the process that compiles them than in those that read the cache.
    Here every result comes from a process that reads it.
    """
    os.environ["NUMBA_CACHE_DIR"] = folder  # numba reads it when it is imported, at the first use of a loop
    torch.multiprocessing.spawn(_compile, nprocs=1)


def _compile(rank: int) -> None:
    prepare()
    train_all(COMPILED)


# ---- checkpoints of today for the versions of tomorrow ----

SAVED_AT, GOES_ON = range(39), range(39, 42)  # step 40 renews statistics and inverses of most methods

CHECKPOINTS: dict[str, Case] = {
    name: case(network=Tiny, dtype=torch.float64, lr=1e-2, jitter=False, **options)
    for name, options in {
        "mbf": {"method": "mbf"},
        "mbf kernels": {"method": "mbf", "conv_blocks": "kernel"},
        "kfac": {"method": "kfac"},
        "kbfgs": {"method": "kbfgs"},
        "kbfgsl": {"method": "kbfgsl", "pairs": 3},
        "shampoo": {"method": "shampoo"},
        "soap": {"method": "soap"},
        "tnt": {"method": "tnt"},
    }.items()
}


def write_checkpoints(path: str) -> None:
    """Train every row of CHECKPOINTS and save it, with the weights that three more steps lead to."""
    file = {}
    for name, row in CHECKPOINTS.items():
        run = start(row)
        advance(run, SAVED_AT)
        saved = {"model": run.network.state_dict(), "optimizer": run.optimizer.state_dict()}
        saved = copy.deepcopy(saved)
        advance(run, GOES_ON)
        file[name] = {**saved, "weights": flat(run.network)}
    torch.save(file, path)


def gone_on(case: Case, saved: dict[str, Any]) -> Tensor:
    """The weights that three more steps lead to from a checkpoint."""
    run = start(case)
    run.network.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    advance(run, GOES_ON)
    return flat(run.network)


def flat(network: nn.Module) -> Tensor:
    """All weights in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def prepare() -> None:
    """One thread, so that sums have one order; and no word on the steps that are skipped on purpose."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", help="the JSON file to write")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(CASES), help="cases; else all")
    parser.add_argument("--times", action="store_true", help="print how long each case took")
    parser.add_argument("--write-checkpoints", metavar="FILE", help="write the file of checkpoints instead")
    given = parser.parse_args()
    prepare()
    if given.write_checkpoints:
        write_checkpoints(given.write_checkpoints)
        return
    for name in set(given.only).difference(CASES):
        print(f"left out: {name}: no such case")
    names = [name for name in given.only if name in CASES]
    alone, together = ([n for n in names if bool(CASES[n].wrap) is wraps] for wraps in (False, True))
    with tempfile.TemporaryDirectory() as folder:
        compile_loops(folder)
        records = {**train_all(alone, given.times), **train_together(together, given.times)}
    told = {"source": minifisher.__file__, "torch": torch.__version__, "cases": records}
    Path(given.output).write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
