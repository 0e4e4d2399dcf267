"""What cannot be used is refused with the value and the cure, and leaves things as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minifisher import MBF

OUT_OF_RANGE = [
    ({"lr": -0.1}, "lr must be .*>= 0, got -0.1"),
    ({"lr": float("nan")}, "lr must be .*got nan"),
    ({"lr": float("inf")}, "lr must be finite.*got inf"),
    ({"damping": -1.0}, "damping must be .*>= 0, got -1.0"),
    ({"damping": float("nan")}, "damping must be .*got nan"),
    ({"weight_decay": -0.1}, "weight_decay must be .*>= 0, got -0.1"),
    ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0.1"),
    ({"curvature_decay": 1.0}, r"curvature_decay must be in \[0, 1\), got 1.0"),
    ({"power": 0.0}, "power must be > 0.*got 0.0"),
    ({"power": -1.0}, "power must be > 0.*got -1.0"),
    ({"length": "descent", "graft": None}, 'length="descent" promises the decrease of a first-order step'),
    ({"length": "newton"}, "length must be one of 'norm', 'descent', None, got 'newton'"),
    ({"length_limit": 0.5}, "length_limit must be finite and >= 1, got 0.5"),
    ({"graft": "lion"}, "graft must be one of 'adam', 'adam-rows', 'sgd', None, got 'lion'"),
    ({"fisher": "true"}, "fisher .*must be one of .*'empirical'.*got 'true'"),
    ({"conv_blocks": "channel"}, "conv_blocks must be one of .*'kernel'.*got 'channel'"),
    ({"share": "all"}, "share must be one of .*'layer'.*got 'all'"),
    ({"block_size": 0}, "block_size must be a whole number >= 1.*got 0"),
    ({"block_size": 2.5}, "block_size must be a whole number >= 1.*got 2.5"),
    ({"statistics_every": 0}, "statistics_every must be a whole number >= 1.*got 0"),
    ({"inverse_every": -3}, "inverse_every must be a whole number >= 1.*got -3"),
    ({"statistics_memory": 0}, "statistics_memory must be a whole number >= 1.*got 0"),
    ({"curvature_dtype": torch.int64}, "curvature_dtype must be one of .*torch.float32.*got torch.int64"),
]


def weight(dtype=torch.float32):
    return nn.Parameter(torch.zeros(2, 3, dtype=dtype), requires_grad=dtype.is_floating_point)


@pytest.mark.parametrize(("options", "message"), OUT_OF_RANGE, ids=lambda value: str(value))
def test_an_option_out_of_range_names_value_and_range(options, message):
    with pytest.raises(ValueError, match=message):
        MBF([weight()], **options)


@pytest.mark.parametrize(("options", "message"), OUT_OF_RANGE, ids=lambda value: str(value))
def test_an_option_of_a_group_is_checked_too(options, message):
    if "statistics_memory" in options:
        pytest.skip("one bound for all groups")
    with pytest.raises(ValueError, match=message):
        MBF([{"params": [weight()]}, {"params": [weight()], **options}])


@pytest.mark.parametrize("value", ["0.1", None, [0.1]])
def test_a_learning_rate_that_is_no_number_is_refused_by_name(value):
    with pytest.raises((TypeError, ValueError), match="lr"):
        MBF([weight()], lr=value)


def test_a_generator_that_was_used_up_is_recognised():
    parameters = nn.Linear(2, 2).parameters()
    list(parameters)
    with pytest.raises(ValueError, match=r"used up.*list\(model.parameters\(\)\)"):
        MBF(parameters)


@pytest.mark.parametrize("empty", [[], {}, (), nn.ReLU(), nn.Sequential()], ids=str)
def test_no_parameters_are_an_error(empty):
    with pytest.raises(ValueError, match="no parameters"):
        MBF(empty)


def test_one_tensor_is_asked_into_a_list():
    with pytest.raises(TypeError, match="one tensor: put it in a list"):
        MBF(weight())


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_a_module_where_no_layer_can_serve_says_what_was_looked_for(fisher):
    with pytest.raises(ValueError, match=r"Linear and convolution.*Embedding.*fisher=\"gradient\""):
        MBF(nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2)), fisher=fisher)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_bare_tensors_where_the_module_is_needed_ask_for_it(fisher):
    with pytest.raises(ValueError, match=r"nn.Module.*fisher=\"gradient\""):
        MBF(nn.Linear(2, 2).parameters(), fisher=fisher)


@pytest.mark.parametrize("norms_first", [False, True])
def test_a_group_of_norms_alone_may_stand_beside_the_layers_that_are_read(norms_first):
    matrices, norms = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.LayerNorm(2)])
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": list(norms.parameters())}]
    opt = MBF(groups[::-1] if norms_first else groups, fisher="empirical")
    opt.add_param_group({"params": nn.LayerNorm(2)})
    reasons = [layer.reason for layer in opt.describe().layers if layer.shape == (2,)]
    assert sum("only its gradient is read" in reason for reason in reasons) == 5
    with pytest.raises(ValueError, match=r"fisher='sampled'.*LayerNorm.*nn.Module that holds them"):
        opt.add_param_group({"params": nn.LayerNorm(2), "fisher": "sampled"})
    assert len(opt.param_groups) == 3


def test_complex_parameters_are_sent_elsewhere():
    with pytest.raises(TypeError, match=r"complex.*view_as_real"):
        MBF([nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_parameters_without_gradients_of_their_kind_are_left_out(dtype):
    with pytest.raises(TypeError, match=rf"{dtype}.*leave it out"):
        MBF([weight(), weight(dtype)])


def test_a_model_that_holds_none_of_the_parameters_is_refused():
    network, another = nn.Linear(2, 2), nn.Linear(2, 2)
    for params in (network, list(network.parameters())):
        with pytest.raises(ValueError, match="model, a Linear, holds none of the parameters"):
            MBF(params, model=another)
        with pytest.raises(TypeError, match=r"model must be the nn.Module .*, got 3"):
            MBF(params, model=3)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="str"):
        MBF(["weight"])
    with pytest.raises(TypeError):
        MBF(3)


def test_a_tensor_inside_a_graph_is_no_parameter():
    with pytest.raises(ValueError, match="non-leaf"):
        MBF([weight() * 2])


def test_a_parameter_belongs_to_one_group():
    shared = weight()
    with pytest.raises(ValueError, match="more than one parameter group"):
        MBF([{"params": [shared]}, {"params": [shared]}])


def test_sparse_gradients_are_sent_elsewhere_and_touch_nothing():
    embedding = nn.Embedding(4, 3, sparse=True)
    before = embedding.weight.detach().clone()
    opt = MBF(embedding)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"weight has a sparse gradient.*sparse=False.*SparseAdam"):
        opt.step()
    assert torch.equal(embedding.weight, before)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="dampening"):
        MBF([weight()], dampening=0.1)


def test_outputs_that_are_no_tensor_are_refused():
    layer = nn.Linear(2, 3)
    opt = MBF(layer, fisher="sampled")
    with pytest.raises(TypeError, match="one tensor, got tuple"):
        opt.observe((layer(torch.ones(1, 2)),))


def test_an_unknown_likelihood_is_refused():
    layer = nn.Linear(2, 2)
    opt = MBF(layer, fisher="sampled")
    with pytest.raises(ValueError, match=r"likelihood must be one of .*'categorical'.*got 'poisson'"):
        opt.observe(layer(torch.ones(1, 2)), "poisson")


def test_a_group_that_was_refused_is_not_added():
    opt = MBF([weight()])
    for bad in ({"lr": -1.0}, {"fisher": "empirical"}):
        with pytest.raises(ValueError, match=r"lr must|fisher='empirical'"):
            opt.add_param_group({"params": [weight()], **bad})
    with pytest.raises(TypeError, match="complex"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert len(opt.param_groups) == len(opt.describe().layers) == 1


def test_a_group_without_parameters_is_refused():
    with pytest.raises((KeyError, ValueError, TypeError), match="params"):
        MBF([{"lr": 0.1}])
