from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import minifisher
from minifisher_lab.comparison.suite import make_plan
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import train as training
from minifisher_lab.training.batches import load
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.published import PUBLISHED, AdamOfTheMean
from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Budget, Trainer, train

DIGITS = PROBLEMS["autoencoder-digits"]


def test_adam_of_the_mean_follows_its_formula_number_by_number() -> None:
    weight = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = AdamOfTheMean([weight], lr=0.1, eps=1e-3, weight_decay=0.5)
    expected, mean, square = weight.tolist(), [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 8):
        gradient = [math.sin(step), 3.0 / step]
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            mean[i] = 0.9 * mean[i] + 0.1 * g
            corrected = mean[i] / (1 - 0.9**step)
            square[i] = 0.999 * square[i] + 0.001 * corrected**2
            root = math.sqrt(square[i] / (1 - 0.999**step))
            expected[i] = (1 - 0.1 * 0.5) * expected[i] - 0.1 * corrected / (root + 1e-3)
        assert weight.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_row_builds_its_method_with_its_settings(name: str) -> None:
    row, choice = PUBLISHED[name], choose(name)
    network = DIGITS.build(seed=0) if row.problem == "autoencoder" else _image_network()
    group = choice.build(network, lr=choice.rate).param_groups[0]
    settings = {"lr": row.rate, **row.options, **({"damping": row.damping} if row.damping else {})}
    assert {key: group[key] for key in settings} == settings
    assert row.source.startswith("github.com/")
    assert (row.warm_labels is None) == (row.method not in minifisher.METHODS)


def _image_network() -> nn.Module:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)
    return nn.Sequential(*layers)


def test_mbf_as_published_has_one_block_a_layer_kernels_and_adam_for_the_rest() -> None:
    optimizer = choose("mbf-published-vgg16").build(_image_network(), lr=3e-5)
    found = {layer.name: layer for layer in optimizer.describe().layers}
    assert (found["0.weight"].structure, found["0.weight"].blocks) == ("kernel blocks", 12)
    assert found["0.bias"].structure == found["1.weight"].structure == "step of adam"
    dense = found["4.weight"]
    assert (dense.structure, dense.blocks, dense.block_size) == ("blocks of shared columns", 1, 2)
    assert (dense.statistics_every, dense.inverse_every) == (10, 100)


def test_a_published_run_begins_with_a_pass_through_the_data() -> None:
    splits = load(DIGITS, torch.device("cpu"))
    observed = {}
    for name in ("kfac-published", "mbf-published", "kfac", "adam-published"):
        trainer = Trainer(DIGITS, splits, choose(name), 1e-9, seed=0)
        before = [weight.detach().clone() for weight in trainer.model.parameters()]
        trainer.warm_start()
        assert all(map(torch.equal, before, trainer.model.parameters()))
        states = trainer.optimizer.state.values()
        observed[name] = [state["observations"] for state in states if "observations" in state]
    assert len(observed["mbf-published"]) == len(observed["kfac-published"]) == 8
    assert min(observed["mbf-published"] + observed["kfac-published"]) > len(splits.train)
    assert not observed["kfac"]
    assert not observed["adam-published"]


def test_that_pass_ends_where_the_longest_of_the_papers_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MOST_WARM_START_BATCHES", 2)
    splits = load(DIGITS, torch.device("cpu"))
    trainer = Trainer(DIGITS, splits, choose("mbf-published"), 1e-9, seed=0)
    batches = []
    trainer.model.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    trainer.warm_start()
    assert batches == [DIGITS.batch_size] * 2


def test_training_starts_with_that_pass_which_is_not_a_step() -> None:
    splits = load(DIGITS, torch.device("cpu"))
    trainer = Trainer(DIGITS, splits, choose("mbf-published"), 1e-7, seed=0)
    run = Run(DIGITS.name, "mbf-published", 1e-7, seed=0)
    train(run, trainer, splits, Budget(epochs=2 / trainer.steps_per_epoch), points=1)
    assert run.steps == 2
    states = [state for state in trainer.optimizer.state.values() if "observations" in state]
    assert all(state["step"] == 2 and state["observations"] > 1000 for state in states)


def test_the_suite_has_mbf_as_published_and_knows_the_others() -> None:
    names = [entrant.name for entrant in make_plan("small").entrants]
    assert [name for name in names if name.endswith("published")] == ["mbf-published"]
    asked = make_plan("small", optimizers=["kfac-published", "mbf-published"]).entrants
    assert asked[0].space == {"lr": (1e-3, 10.0), "damping": (0.03, 300.0)}
    assert asked[1].space["lr"] == pytest.approx((1e-7, 1e-3))
