from __future__ import annotations

import pytest
from torch import nn

import minifisher
from tests.helpers import train_on_batches
from tests.test_groups import network


@pytest.mark.parametrize("method", minifisher.METHODS)
def test_words_of_no_decay_are_looked_for_in_names_and_classes(method: str) -> None:
    model = network()
    optimizer = minifisher.create(model, method, lr=1e-2, weight_decay=0.1, no_decay=("bias", "Norm"))
    assert type(optimizer) is minifisher.METHODS[method]
    decayed, spared = optimizer.param_groups
    assert decayed["param_names"] == ["0.weight", "3.weight"]
    assert spared["param_names"] == ["0.bias", "1.weight", "1.bias", "3.bias"]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    train_on_batches(model, optimizer, range(2))
    if optimizer.estimators != ("gradient",):
        assert optimizer.diagnostics()["weights"]["3.weight"]["observations"] > 0


def test_a_group_that_would_be_empty_is_left_out() -> None:
    (group,) = minifisher.create(nn.Linear(3, 2), no_decay=("linear",), weight_decay=0.1).param_groups
    assert group["weight_decay"] == 0


def test_without_no_decay_the_method_gets_the_module() -> None:
    optimizer = minifisher.create(nn.Linear(3, 2), "kfac", lr=1e-2)
    assert isinstance(optimizer, minifisher.KFAC)
    assert len(optimizer.param_groups) == 1


def test_bad_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method must be one of 'mbf'.*got 'adamw'"):
        minifisher.create(nn.Linear(3, 2), "adamw")
    with pytest.raises(TypeError, match="no_decay is a collection of words"):
        minifisher.create(nn.Linear(3, 2), no_decay="bias")


@pytest.mark.parametrize("word", ["betas", "eps", "fused", "foreach", "amsgrad"])
def test_a_keyword_of_adamw_is_answered(word: str) -> None:
    with pytest.raises(TypeError, match=f"MBF has no argument '{word}': .+"):
        minifisher.create(nn.Linear(3, 2), "mbf", **{word: True})
