"""What people do to an optimizer, its groups, its state and its model, and that AdamW survives."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.ao import quantization

from minifisher import KFAC, MBF, METHODS, SOAP, Shampoo
from minifisher.kernels import scratch

INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def train(module, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        module(INPUTS).square().mean().backward()
        optimizer.step()


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def copied_state(optimizer):
    return {
        parameter: {name: v.clone() if torch.is_tensor(v) else v for name, v in entry.items()}
        for parameter, entry in optimizer.state.items()
    }


# ---- state that somebody assigns ----


def assign(optimizer):
    for entry in optimizer.state.values():
        entry["momentum"] = torch.zeros_like(entry["momentum"])


def update(optimizer):
    for entry in optimizer.state.values():
        entry.update(momentum=torch.zeros_like(entry["momentum"]))


def exchange_entries(optimizer):
    for parameter, entry in list(optimizer.state.items()):
        optimizer.state[parameter] = {**entry, "momentum": torch.zeros_like(entry["momentum"])}


def exchange_memory(optimizer):
    for entry in optimizer.state.values():
        entry["momentum"].data = torch.zeros_like(entry["momentum"])


@pytest.mark.parametrize("reset", [assign, update, exchange_entries, exchange_memory])
@pytest.mark.parametrize("make", [MBF, SOAP, KFAC])
def test_momentum_that_was_reset_is_the_momentum_of_the_next_step(make, reset):
    module = network()
    optimizer = make(module, **({"fisher": "empirical"} if make is KFAC else {}))
    train(module, optimizer, 5)
    reset(optimizer)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = weights(module)
    optimizer.step()
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("whole", [False, True])
def test_a_roll_back_repeats_the_same_steps(whole):
    module = network()
    optimizer = MBF(module)
    train(module, optimizer, 5)
    start, saved = copy.deepcopy(module.state_dict()), copied_state(optimizer)
    train(module, optimizer, 9)
    first = weights(module)
    module.load_state_dict(start)
    if whole:
        optimizer.state = saved
    else:
        for parameter, entry in saved.items():
            optimizer.state[parameter] = entry
    train(module, optimizer, 9)
    assert torch.equal(weights(module), first)


def test_what_does_not_fit_into_the_state_is_named():
    module = network()
    optimizer = MBF(module)
    train(module, optimizer)
    optimizer.state[module[0].weight]["momentum"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"'momentum' of 0.weight .* must be \(6, 6\)"):
        train(module, optimizer)


def test_foreign_keys_pass_through_regrouping_and_checkpoints():
    module, twin = network(), network()
    optimizer, other = MBF(module), MBF(twin)
    train(module, optimizer)
    optimizer.state[module[2].weight]["mask"] = mask = torch.ones(6, 6, dtype=torch.bool)
    for parameter in module.parameters():
        optimizer.state[parameter]["age"] = 1
    optimizer.state["all"] = {"slow": torch.ones(2)}
    module[0].requires_grad_(False)
    train(module, optimizer)
    assert optimizer.state[module[2].weight]["mask"] is mask
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.state[twin[2].weight]["mask"], mask)
    assert [other.state[parameter]["age"] for parameter in twin.parameters()] == [1] * 6
    assert torch.equal(other.state["all"]["slow"], torch.ones(2))


def test_a_foreign_key_written_in_every_step_forms_no_stack_anew():
    module = network()
    optimizer = MBF(module)
    train(module, optimizer)
    stacks = optimizer._stacks
    optimizer.state[module[0].weight].setdefault("slow", 0)
    optimizer.state[module[0].weight]["slow"] = 1
    train(module, optimizer)
    assert optimizer._stacks is stacks


# ---- groups that somebody exchanges ----


@pytest.mark.parametrize("make", [MBF, SOAP])
def test_the_learning_rate_of_a_group_that_was_exchanged_counts(make):
    module = network()
    optimizer = make(module)
    train(module, optimizer)
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    before = weights(module)
    train(module, optimizer)
    assert torch.equal(weights(module), before)
    optimizer.param_groups[0]["lr"] = 0.1
    train(module, optimizer)
    assert not torch.equal(weights(module), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [("power", 0.7), ("statistics_every", 1), ("inverse_every", 3), ("relative_damping", False)],
)
@pytest.mark.parametrize("make", [MBF, Shampoo, SOAP])
def test_an_option_counts_from_the_next_step_and_the_same_after_a_resume(make, key, value):
    module, untouched, resumed = network(), network(), network()
    optimizer, other = make(module), make(untouched)
    train(module, optimizer, 5)
    train(untouched, other, 5)
    optimizer.param_groups[0][key] = value
    resumed.load_state_dict(module.state_dict())
    fresh = make(resumed)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if key in ("power", "relative_damping"):
        train(module, optimizer)
        train(untouched, other)
        train(resumed, fresh)
        assert not torch.equal(weights(module), weights(untouched))
    else:
        assert getattr(optimizer.describe().layers[0], key) == value
    train(module, optimizer, 9)
    train(resumed, fresh, 9)
    assert torch.equal(weights(module), weights(resumed))


def test_an_option_that_changes_the_form_of_the_state_is_refused_until_it_is_set_back():
    module = network()
    optimizer = MBF(module)
    train(module, optimizer)
    before = weights(module)
    optimizer.param_groups[0]["block_size"] = 2
    for _ in range(2):
        with pytest.raises(ValueError, match=r"block_size from None to 2.*does not fit"):
            train(module, optimizer)
    assert torch.equal(weights(module), before)
    optimizer.param_groups[0]["block_size"] = None
    train(module, optimizer)
    optimizer.param_groups[0]["fold_bias"] = True
    with pytest.raises(ValueError, match=r"fold_bias was changed .* cannot change"):
        train(module, optimizer)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("mbf", "weight_decay", math.nan),
        ("mbf", "weight_decay", math.inf),
        ("mbf", "lr", torch.tensor(math.nan)),
        ("mbf", "lr", 10**400),
        ("mbf", "momentum", 1.0),
        ("shampoo", "curvature_decay", 1.0),
        ("kfac", "damping", -1.0),
        ("soap", "graft", "lion"),
        ("mbf", "fisher", "all"),
    ],
)
def test_what_a_group_must_not_hold_reaches_no_weight(method, key, value):
    module = network()
    optimizer = METHODS[method](module, **({"fisher": "empirical"} if method == "kfac" else {}))
    train(module, optimizer, 2)
    before, state = weights(module), copied_state(optimizer)
    module(INPUTS).square().mean().backward()
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"{key} (of .* )?must be"):
        optimizer.step()
    assert torch.equal(weights(module), before)
    torch.testing.assert_close(copied_state(optimizer), state, rtol=0, atol=0)


def test_a_tensor_that_became_nan_in_place_is_refused():
    module = network()
    optimizer = MBF(module, lr=torch.tensor(0.1))
    train(module, optimizer)
    optimizer.param_groups[0]["lr"].fill_(math.nan)
    with pytest.raises(ValueError, match="lr must be"):
        train(module, optimizer)


# ---- parameters that come, go and change ----


def pairs():
    first, second = nn.Parameter(torch.ones(10, 3)), nn.Parameter(torch.ones(5, 3))
    return first, second, MBF([{"params": [first]}, {"params": [second]}])


def descend(optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(p.square().sum() for group in optimizer.param_groups for p in group["params"]).backward()
        optimizer.step()


def test_a_group_that_was_dropped_stays_as_it_is():
    _, second, optimizer = pairs()
    descend(optimizer, 3)
    optimizer.param_groups.pop()
    before = second.detach().clone()
    descend(optimizer, 3)
    assert torch.equal(second, before)
    assert len(optimizer.describe().layers) == 1


def test_the_state_of_a_dropped_parameter_is_named_where_it_would_be_saved():
    module = network()
    optimizer = MBF(module)
    train(module, optimizer)
    dropped = optimizer.param_groups[0]["params"].pop()
    train(module, optimizer)
    with pytest.raises(ValueError, match=r"shape \(3,\) that is in no parameter group"):
        optimizer.state_dict()
    optimizer.state.pop(dropped)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("takes_state", [False, True])
def test_a_grown_parameter_goes_on(takes_state):
    first, _, optimizer = pairs()
    descend(optimizer, 3)
    grown = nn.Parameter(torch.cat([first.detach(), torch.ones(4, 3)]))
    entry = optimizer.state.pop(first)
    kept = entry["momentum"]
    if takes_state:  # as those who add points to a scene do
        for name in ("momentum", "second_moment"):
            entry[name] = torch.cat([entry[name], torch.zeros(4, 3)])
        optimizer.state[grown] = entry
    optimizer.param_groups[0]["params"][0] = grown
    optimizer.state_dict()
    if takes_state:
        assert torch.equal(optimizer.state[grown]["momentum"][:10], kept)
    before = grown.detach().clone()
    descend(optimizer, 3)
    assert (grown < before).all()


def test_a_weight_whose_data_grew_or_changed_its_dtype_goes_on():
    first, second, optimizer = pairs()
    descend(optimizer, 3)
    first.grad, first.data = None, torch.ones(14, 3)
    second.grad, second.data = None, second.data.double()
    descend(optimizer, 3)
    assert optimizer.state[first]["momentum"].shape == (14, 3)
    assert optimizer.state[second]["momentum"].dtype == torch.float64
    assert optimizer.state[second]["step"] == 6


@pytest.mark.parametrize("make", [MBF, lambda m: KFAC(m, fisher="empirical"), lambda m: MBF(m.parameters())])
def test_lazy_modules_are_planned_when_they_have_a_shape(make):
    module = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    optimizer = make(module)
    described = optimizer.describe()
    assert len(described.waiting) == 4
    assert all(f"{name}  of a lazy module" in str(described) for name in described.waiting)
    assert described.waiting[0] in ("0.weight", "parameter 0 of group 0")
    module(INPUTS)
    before = weights(module)
    train(module, optimizer, 2)
    assert not torch.equal(weights(module), before)
    assert optimizer.describe().parameters == weights(module).numel()
    assert not optimizer.describe().waiting


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
def test_the_default_device_need_not_be_that_of_the_model(method, fisher, monkeypatch):
    monkeypatch.setattr(scratch, "_BUFFERS", scratch._Buffers())  # as in a fresh process
    module = network()
    if fisher not in METHODS[method].estimators:
        pytest.skip(f"{method} has no such estimator")
    chosen = {"fisher": fisher} if METHODS[method].options["fisher"].init else {}
    optimizer = METHODS[method](module, **chosen)

    def closure():
        optimizer.zero_grad()
        loss = module(INPUTS).square().mean()
        loss.backward()
        return loss

    torch.set_default_device("meta")  # stands for a second device
    try:
        for _ in range(3):
            optimizer.step(closure)
    finally:
        torch.set_default_device(None)
    assert optimizer.state[module[0].weight]["observations"] > 0


def test_the_default_device_need_not_be_that_of_blocks_of_kernels():
    module = nn.Conv2d(2, 3, 3)
    optimizer = MBF(module, conv_blocks="kernel")
    inputs, before = torch.randn(4, 2, 5, 5), module.weight.detach().clone()
    torch.set_default_device("meta")
    try:
        for _ in range(2):
            optimizer.zero_grad()
            module(inputs).square().mean().backward()
            optimizer.step()
    finally:
        torch.set_default_device(None)
    assert not torch.equal(module.weight, before)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("method", "chosen"),
    [*((name, {}) for name in METHODS), ("mbf", {"share": "row"}), ("mbf", {"conv_blocks": "kernel"})],
)
def test_the_default_dtype_need_not_be_that_of_the_model(method, chosen, default):
    def trained(dtype):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(45, 70), nn.LayerNorm(70))
        optimizer = METHODS[method](module, lr=0.01, **chosen)
        inputs = torch.randn(6, 2, 5, 5)

        def closure():
            optimizer.zero_grad()
            outputs = module(inputs)
            optimizer.observe(outputs)
            loss = outputs.square().mean()
            loss.backward()
            return loss

        torch.set_default_dtype(dtype)
        try:
            for _ in range(3):
                optimizer.step(closure)
        finally:
            torch.set_default_dtype(torch.float32)
        return [parameter.detach() for parameter in module.parameters()]

    torch.testing.assert_close(trained(default), trained(torch.float32), rtol=0, atol=0)


# ---- checkpoints ----


def test_load_hooks_see_and_change_the_whole_state():
    module = network()
    optimizer, seen = MBF(module), []
    train(module, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(saved)
    broken["param_groups"][0]["params"] = [0]
    other = MBF(network())

    def repair(_, given):
        seen.append(len(given["state"]))
        return {**saved, "param_groups": [{**group, "lr": 0.123} for group in saved["param_groups"]]}

    other.register_load_state_dict_pre_hook(repair)
    other.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)))
    other.load_state_dict(broken)
    assert seen == [6, 6]
    assert other.param_groups[0]["lr"] == 0.123


def test_a_state_of_samples_is_refused_where_samples_cannot_be_read():
    module = network()
    optimizer = MBF(module, fisher="empirical")
    train(module, optimizer)
    with pytest.raises(ValueError, match="looks inside the backward pass"):
        MBF(module.parameters()).load_state_dict(optimizer.state_dict())


def test_momentum_that_was_raised_while_a_layer_was_frozen_is_loaded():
    module = network()
    optimizer = MBF(module, momentum=0.0)
    train(module, optimizer)
    module[0].requires_grad_(False)
    optimizer.param_groups[0]["momentum"] = 0.9
    train(module, optimizer)
    MBF(network(), momentum=0.0).load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_options_of_all_groups_that_were_saved_are_in_force():
    module = network()
    optimizer = KFAC(module, fisher="empirical", kl_clip=1e-8)
    train(module, optimizer)
    twin = network()
    twin.load_state_dict(module.state_dict())
    other = KFAC(twin, fisher="empirical")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(module, optimizer)
    train(twin, other)
    assert torch.equal(weights(module), weights(twin))


def test_the_state_of_another_method_is_refused():
    module = network()
    optimizer = Shampoo(module)
    train(module, optimizer)
    with pytest.raises(ValueError, match="saved by Shampoo, this optimizer is TNT"):
        METHODS["tnt"](network()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("step", -1, "'step' of 0.weight must be a whole number"),
        ("step", 10**400, "'step' of 0.weight must be a whole number"),
        ("step", 1.5, "'step' of 0.weight must be a whole number"),
        ("observations", True, "'observations' of 0.weight must be a whole number"),
        ("momentum", torch.full((6, 6), math.nan), "'momentum' of 0.weight .* not finite"),
        ("second_moment", -torch.ones(6, 6), "'second_moment' of 0.weight .* wrong sign"),
        ("momentum", torch.zeros(4, 9), "'momentum' of 0.weight is .4, 9. and must be .6, 6."),
        ("momentum", torch.zeros(6, 6, dtype=torch.int8), "'momentum' of 0.weight .*int8"),
        ("momentum", torch.zeros(6, 6, dtype=torch.complex64), "'momentum' of 0.weight .*complex"),
        ("momentum", torch.zeros(6, 6).to_sparse(), "'momentum' of 0.weight .*sparse"),
        ("momentum", torch.zeros(6, 6, device="meta"), "'momentum' of 0.weight .*meta"),
    ],
)
def test_a_damaged_entry_is_named(key, value, message):
    module = network()
    optimizer = MBF(module)
    train(module, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


def damage(saved, what):
    group = saved["param_groups"][0]
    if what == "texts":
        saved["state"] = {str(key): entry for key, entry in saved["state"].items()}
    elif what == "no entry":
        del saved["state"][2]
    elif what == "a list":
        saved["state"][2] = [1]
    elif what == "version":
        group["format_version"] = math.nan
    elif what == "no params":
        del group["params"]
    elif what == "twice":
        group["params"] = [0] * len(group["params"])
    elif what == "groups":
        saved["param_groups"] = 3
    return [saved] if what == "no dictionary" else saved


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("texts", "JSON"),
        ("no entry", "no entry for 2.weight"),
        ("a list", "2.weight must be a dictionary"),
        ("version", "format_version of group 0"),
        ("no params", "no list of 'params'"),
        ("twice", "the parameter 0 6 times"),
        ("groups", "'param_groups' of the saved state must be a sequence"),
        ("no dictionary", "is a dictionary, got list"),
    ],
)
def test_a_damaged_file_is_refused(what, message):
    module = network()
    optimizer = MBF(module)
    train(module, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(damage(copy.deepcopy(optimizer.state_dict()), what))
    train(module, optimizer)


# ---- models with hooks ----


def test_a_saved_model_needs_no_minifisher():
    module = network()
    optimizer = KFAC(module)
    script = "import sys; sys.modules['minifisher'] = None; import pickle; pickle.load(sys.stdin.buffer)"
    result = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(module), capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Tanh]):
        torch.load(file, weights_only=True)
    assert not copy.deepcopy(module)[0]._forward_hooks
    del optimizer
    assert "__getstate__" not in vars(module[0])


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_hooks_can_be_quantised():
    module = network()
    optimizer = KFAC(module, fisher="empirical")
    quantization.quantize_dynamic(module, {nn.Linear})(INPUTS)
    module.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(module.train(), inplace=True)
    train(module, optimizer)


@pytest.mark.parametrize("change", [lambda _, a, output: 2 * output, lambda _, a, output: (output, None)])
def test_a_layers_own_output_is_read_before_others_change_it(change):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, inputs):
            hidden = self.first(inputs)
            return self.last(hidden[0] if isinstance(hidden, tuple) else hidden)

    factors = []
    for early in (False, True):
        torch.manual_seed(0)
        module = Network()
        if early:
            module.first.register_forward_hook(change)
        optimizer = KFAC(module, fisher="empirical")
        if not early:
            module.first.register_forward_hook(change)
        train(module, optimizer)
        factors.append(optimizer.state[module.first.weight]["gradient_factor"])
    assert torch.equal(*factors)
    assert factors[0].any()
