"""A step that asks nothing of the host: recorded once, replayed on new gradients, the same as eager steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import minifisher
from minifisher import MBF

EVERY_STEP = {"statistics_every": 1, "inverse_every": 1}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
    {"graft": "sgd"},
    {"graft": None, "damping": 1.0, "relative_damping": False},
    {"momentum": 0.0},
    {"length": "descent", "length_limit": 1.8},
    {"length": "descent", "graft": "sgd", "weight_decay": 0.1, "decoupled_weight_decay": False},
    {"share": "row", "block_size": 3},
    {"conv_blocks": "kernel"},
    {"output_power": 1.0},
    {"maximize": True},
    {"curvature_dtype": torch.float32},
]


def network(device="cpu"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (
            nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8),
            nn.LayerNorm(8),
        )  # fmt: skip
        return nn.Sequential(*layers).to(device, torch.float64)


def gradients(module, seed):
    """Random gradients; those of one seed are far longer than the others."""
    generator, size = torch.Generator().manual_seed(seed), 10.0 if seed == 9 else 1.0
    return [size * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in module.parameters()]


def spoilt(seed):
    return seed in (0, 7)


def fill(module, seed):
    """New gradients in the same memory, as a recorded step needs them; some of them not finite."""
    for parameter, gradient in zip(module.parameters(), gradients(module, seed), strict=True):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(gradient)
    if spoilt(seed):
        next(module.parameters()).grad.view(-1)[0] = float("nan") if seed else float("inf")


def flat(module):
    return torch.cat([parameter.detach().flatten().cpu() for parameter in module.parameters()])


@pytest.mark.filterwarnings("ignore:a gradient was NaN")
def eager(options, steps, module=None):
    """The weights after the ordinary steps."""
    module = module or network()
    opt = MBF(module, lr=1e-2, **EVERY_STEP, **{"output_power": 0.0, **options})
    for seed in range(steps):
        fill(module, seed)
        opt.step()
    return flat(module)


def capturable(options, **more):
    module = network(more.pop("device", "cpu"))
    return module, MBF(module, lr=1e-2, capturable=True, **EVERY_STEP, **options, **more)


class AsksNothing(TorchDispatchMode):
    """Fails where a number is read from a tensor, as `.item()`, `bool()` and shapes by values do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {
            "_local_scalar_dense",
            "item",
            "nonzero",
            "is_nonzero",
            "equal",
            "masked_select",
        }, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:a gradient was NaN")
def test_a_capturable_step_is_the_ordinary_one_and_asks_the_host_nothing(options):
    module, opt = capturable(options)
    for seed in range(10):
        fill(module, seed)
        if seed:
            with AsksNothing():
                opt.step()
        else:
            opt.step()  # makes the state
    close = {"rtol": 1e-5, "atol": 1e-6} if "curvature_dtype" in options else CLOSE
    torch.testing.assert_close(flat(module), eager(options, 10), **close)
    assert opt.skipped_steps == 2
    assert opt.diagnostics()["weights"]["2.weight"] == {"step": 8, "observations": 8}
    assert opt.diagnostics()["fallbacks"] == 0


def test_the_ordinary_step_does_ask():
    module = network()
    opt = MBF(module, **EVERY_STEP)
    fill(module, 1)
    with pytest.raises(AssertionError), AsksNothing():
        opt.step()


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
@pytest.mark.filterwarnings("ignore:a gradient was NaN")
def test_a_traced_step_is_replayed_on_new_gradients(options):
    module, opt = capturable(options)
    fill(module, 0)
    opt.step()  # makes the state
    fill(module, 1)
    twin = copy.deepcopy(opt.state_dict()), flat(module)

    def step():
        opt.step()

    with torch.no_grad():
        graph = make_fx(step)()  # traces by taking the step
    assert len(list(graph.graph.nodes)) > 50
    assert not torch.equal(twin[1], flat(module))
    for seed in range(2, 21):
        fill(module, seed)
        with torch.no_grad():
            graph()
    torch.testing.assert_close(flat(module), eager(options, 21), **CLOSE)
    assert opt.skipped_steps == 2


def test_a_learning_rate_in_a_tensor_changes_from_replay_to_replay():
    module = network()
    rate = torch.tensor(1e-2, dtype=torch.float64)
    opt = MBF(module, lr=rate, capturable=True, **EVERY_STEP)
    plain = network()
    other = MBF(plain, lr=1e-2, output_power=0.0, **EVERY_STEP)
    fill(module, 1)
    opt.step()
    fill(module, 2)
    with torch.no_grad():
        graph = make_fx(lambda: opt.step())()
    for seed in (3, 4):
        rate.mul_(0.1)
        fill(module, seed)
        with torch.no_grad():
            graph()
    for seed in (1, 2, 3, 4):
        other.param_groups[0]["lr"] = 1e-2 * 0.1 ** max(0, seed - 2)
        fill(plain, seed)
        other.step()
    torch.testing.assert_close(flat(module), flat(plain), **CLOSE)


@pytest.mark.parametrize("change", ["nothing", "weight decay"])
def test_a_step_that_is_not_finite_changes_no_bit(change):
    module, opt = capturable({"weight_decay": 0.1 if change == "weight decay" else 0.0})
    for seed in (1, 2, 7):
        before = copy.deepcopy(opt.state_dict()["state"]), flat(module)
        fill(module, seed)
        opt.step()
    assert torch.equal(flat(module), before[1])
    for index, entry in opt.state_dict()["state"].items():
        assert all(
            torch.equal(*map(torch.as_tensor, (value, before[0][index][name])))
            for name, value in entry.items()
        )


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
@pytest.mark.parametrize("graft", ["adam", "adam-rows"])
def test_parameters_without_entries_stop_nothing(graft, shape):
    moved = []
    for capturable in (False, True):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(2, 3))]
        options = {"graft": graft, "output_power": 0.0, "capturable": capturable, **EVERY_STEP}
        opt = MBF(parameters, lr=1e-2, **options)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            opt.step()
        assert opt.diagnostics()["fallbacks"] == 0
        moved.append(parameters[1].detach())
    torch.testing.assert_close(*moved)


def test_a_matrix_without_an_inverse_takes_the_first_order_step():
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    options = {"damping": 0.0, "relative_damping": False, "momentum": 0.0, "share": "row", "block_size": 2}
    opt = MBF([weight], lr=0.1, capturable=True, graft="sgd", **EVERY_STEP, **options)
    weight.grad = torch.tensor([[1.0, -2.0], [3.0, 5.0]], dtype=torch.float64)
    opt.step()
    torch.testing.assert_close(weight.detach(), -0.1 * weight.grad, **CLOSE)
    assert opt.diagnostics()["fallbacks"] == 1


def test_a_grad_scaler_stays_on_the_device():
    module, opt = capturable({})
    plain = network()
    other = MBF(plain, lr=1e-2, output_power=0.0, **EVERY_STEP)
    for seed, overflow in ((1, 0.0), (2, 0.0), (3, 1.0), (4, 0.0)):
        fill(module, seed)
        opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor([overflow])
        opt.step()
        if not overflow:
            fill(plain, seed)
            for parameter in plain.parameters():
                parameter.grad /= 4
            other.step()
    torch.testing.assert_close(flat(module), flat(plain), **CLOSE)
    assert opt.skipped_steps == 0  # as in the ordinary step: the scaler searches for its scale


def test_it_resumes_from_a_checkpoint():
    module, opt = capturable({})
    other = copy.deepcopy(module)
    resumed = MBF(other, lr=1e-2, capturable=True, **EVERY_STEP)
    for seed in (1, 2):
        fill(module, seed)
        opt.step()
    other.load_state_dict(module.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in (3, 4):
        for each, optimizer in ((module, opt), (other, resumed)):
            fill(each, seed)
            optimizer.step()
    assert torch.equal(flat(module), flat(other))
    with pytest.raises(ValueError, match="capturable=True"):
        MBF(network(), **EVERY_STEP).load_state_dict(opt.state_dict())


def test_layers_that_part_company_count_on_their_own():
    module, opt = capturable({})
    fill(module, 1)
    opt.step()
    module[5].weight.grad = None
    opt.step()
    counts = opt.diagnostics()["weights"]
    assert counts["4.weight"]["step"] == 2
    assert counts["5.weight"]["step"] == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"statistics_every": 2}, "has no schedule, got statistics_every=2"),
        ({"inverse_every": 3}, "inverse_every=3: set both to 1"),
        ({"power": 0.5}, "MBF with power=1"),
        ({"output_power": 0.5}, "where output_power is 0 or 1"),
        ({"inverse": "newton-schulz"}, "MBF with power=1 and Cholesky"),
        ({"fisher": "empirical"}, "got fisher='empirical'"),
        ({"adaptive_damping": True}, "adaptive_damping=True"),
    ],
    ids=str,
)
def test_what_cannot_be_recorded_is_refused(options, why):
    with pytest.raises(ValueError, match=why):
        MBF(network(), capturable=True, **{**EVERY_STEP, **options})


def test_a_group_cannot_be_recorded_alone():
    with pytest.raises(ValueError, match="capturable is one for all"):
        MBF([{"params": network(), "capturable": True}])


# ---- torch.compile(opt.step) ----


@pytest.mark.filterwarnings("ignore:a gradient was NaN")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_capturable_step_is_compiled_to_one_graph(backend, closure):
    torch.compiler.reset()
    module, opt = capturable({"weight_decay": 0.1})
    counter = CompileCounterWithBackend(backend)
    step, compilations = torch.compile(opt.step, backend=counter), []
    for seed in range(10):
        module.zero_grad()
        if closure:
            step(lambda seed=seed: fill(module, seed))
        else:
            fill(module, seed)
            step()
        compilations.append(counter.frame_count)
    torch.testing.assert_close(flat(module), eager({"weight_decay": 0.1}, 10), **CLOSE)
    assert compilations[1:] == [compilations[1]] * 9
    assert closure or compilations[-1] == 1


@pytest.mark.parametrize("name", minifisher.METHODS)
def test_a_compiled_ordinary_step_is_the_ordinary_step(name):
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        module, counter = network(), CompileCounterWithBackend("eager")
        torch.manual_seed(0)  # the seed of the labels that are drawn is made of it
        opt = minifisher.METHODS[name](module, lr=1e-2)
        step = torch.compile(opt.step, backend=counter) if compiled else opt.step
        compilations = []
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            images = torch.randn(6, 1, 4, 4, generator=generator, dtype=torch.float64)

            def closure(images=images, module=module, opt=opt):
                opt.zero_grad()
                outputs = module(images)
                opt.observe(outputs, "gaussian")
                loss = outputs.square().sum(1).mean()
                loss.backward()
                return loss

            torch.manual_seed(seed)
            step(closure)
            compilations.append(counter.frame_count)
        results.append(flat(module))
        assert compilations == [compilations[0]] * 8
    assert torch.equal(*results)


# ---- CUDA ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_a_cuda_graph_records_the_step(options):
    module, opt = capturable(options, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for seed in range(3):  # makes the state, and whatever libraries set up at first use
            fill(module, seed)
            opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for seed in range(3, 20):
        fill(module, seed)
        graph.replay()
    torch.testing.assert_close(flat(module), eager(options, 20, network("cuda")), rtol=1e-7, atol=1e-9)
    assert opt.skipped_steps == 2
