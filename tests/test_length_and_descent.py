"""benchmarks/length_and_descent.py: its identities against the library's steps, and a run of tiny size."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import length_and_descent as script

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.train import Trainer

RATE, STEPS, MOMENTUM = 1e-3, 6, 0.9


def test_the_drawn_steps_have_the_length_or_the_promise_that_their_names_say():
    hessian, point = script.quadratic()
    momentum, found = hessian @ point, script.directions()
    for name in ("M", "equal length"):
        torch.testing.assert_close(found[name].norm(), found["s"].norm())
    torch.testing.assert_close(momentum @ found["equal descent"], momentum @ found["s"])
    assert momentum @ found["equal length"] < 0.6 * momentum @ found["s"]
    # What the picture shows: at equal promise the step along P M brings more than that of Adam.
    brought = {name: momentum @ step - 0.5 * step @ hessian @ step for name, step in found.items()}
    assert max(brought, key=brought.__getitem__) == "equal descent"


@pytest.mark.parametrize("limit", [1.2, 4.0])
def test_the_ratio_of_the_cosines_is_the_length_of_the_step_in_steps_of_adam(limit):
    splits = batches.load(PROBLEMS["mlp-tabular"], torch.device("cpu"))
    choice = choose(f"mbf:length_limit={limit}")
    trainer = Trainer(PROBLEMS["mlp-tabular"], splits, choice, RATE, seed=0)
    for _ in range(STEPS - 1):
        trainer.step(spent=0.0)
    matrices = [weight for weight in trainer.model.parameters() if weight.ndim > 1]
    before = [weight.detach().clone() for weight in matrices]
    trainer.step(spent=0.0)
    rate = trainer.optimizer.param_groups[0]["lr"]
    for weight, old in zip(matrices, before, strict=True):
        state, change = trainer.optimizer.state[weight], (old - weight.detach()).flatten(1)
        step = script.adam_step(state, STEPS) * (1 - MOMENTUM) / (1 - MOMENTUM**STEPS)
        ratio = script.cosines(state["momentum"], step) / script.cosines(state["momentum"], change)
        newest = weight.grad.square().sum(1)
        growth = newest / (state["second_moment"].sum(1) / (1 - 0.999**STEPS))
        highest = torch.where(growth > 3, (3 * limit / growth).clamp(min=1), limit)
        # A row of P M may ascend, because blocks over outputs mix rows.
        lengths = torch.where(ratio > 0, ratio.minimum(highest), 1)
        expected = rate * step.flatten(1).norm(dim=1) * lengths
        alive = step.flatten(1).norm(dim=1) > 0
        torch.testing.assert_close(change.norm(dim=1)[alive], expected[alive], rtol=2e-3, atol=0)


def test_a_tiny_run_prints_numbers_and_draws(tmp_path, capsys):
    tiny = ["--problems", "mlp-tabular", "--cosines-of", "mlp-tabular", "--rates", "1e-3", "1e-2"]
    script.main([*tiny, "--seeds", "2", "--steps", "3", "--every", "2"])
    printed = capsys.readouterr().out
    result = json.loads(printed)
    assert [point["step"] for point in result["cosines"]["at"]] == [1, 3]
    for layer in result["cosines"]["at"][-1]["layers"].values():
        assert 0 < layer["cosine of P M"] < layer["cosine of s"] <= 1
    for spec in script.OPTIMIZERS:
        assert len(result["losses"]["mlp-tabular"][spec]["mean"]) == 2
    (tmp_path / "measured.json").write_text(printed)
    script.main(["--results", str(tmp_path / "measured.json"), "--plot", str(tmp_path)])
    assert capsys.readouterr().out == ""
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        "why_directions.svg",
        "why_cosines.svg",
        "why_losses.svg",
    }
