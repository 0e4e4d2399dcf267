"""A step on the meta device and on fake tensors, with which planners measure memory before a model exists."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from minifisher import KFAC, MBF, METHODS, Shampoo
from minifisher.without_values import UsualAnswers, has_no_values

MAKERS = {
    **{name: partial(method, inverse_every=1) for name, method in METHODS.items()},
    "mbf defaults": MBF,
    "mbf small blocks": partial(MBF, output_power=0, block_size=4),
    "mbf two-sided": partial(MBF, output_power=1),
    "mbf columns": partial(MBF, linear_blocks="column"),
    "mbf root": partial(MBF, power=0.5),
    "mbf newton-schulz": partial(MBF, inverse="newton-schulz", inverse_every=1),
    "mbf empirical": partial(MBF, fisher="empirical"),
    "mbf exact": partial(MBF, fisher="exact"),
    "mbf descent": partial(MBF, length="descent"),
    "mbf adaptive": partial(MBF, adaptive_damping=True),
    "mbf bfloat16": partial(MBF, curvature_dtype=torch.bfloat16),
    "kfac divergence": partial(KFAC, kl_clip=1e-3),
    "shampoo newton": partial(Shampoo, root="newton"),
}


def train(make, steps):
    """A model and its optimizer after some steps, on the default device and mode."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 3),
    )
    optimizer = make(model, lr=1e-2, statistics_every=1)

    def closure():
        optimizer.zero_grad()
        outputs = model(torch.randn(4, 2, 4, 4))
        optimizer.observe(outputs)
        loss = nn.functional.cross_entropy(outputs, torch.zeros(4, dtype=torch.long))
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer


def form(value):
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("mode", [partial(torch.device, "meta"), FakeTensorMode], ids=["meta", "fake"])
def test_a_step_without_values_makes_the_state_of_a_real_one(mode, name):
    with mode():
        planned, optimizer = train(MAKERS[name], 3)
        optimizer.state_dict()
    real, other = train(MAKERS[name], 3)  # scratch memory of the planned steps is not used again

    for weight, same in zip(planned.parameters(), real.parameters(), strict=True):
        made, expected = optimizer.state[weight], other.state[same]
        assert {key: form(value) for key, value in made.items()} == {
            key: form(value) for key, value in expected.items()
        }
        assert made["step"] == expected["step"] == 3
        assert made.get("observations") == expected.get("observations")  # none where no curvature is kept
        assert all(has_no_values(value) for value in made.values() if isinstance(value, torch.Tensor))
        assert torch.isfinite(same).all()
    assert optimizer.skipped_steps == other.skipped_steps == 0


def test_only_tensors_without_values_get_the_usual_answers():
    numbers = torch.tensor([0.0, float("nan")])
    with UsualAnswers():
        assert not torch.isfinite(numbers).all()
        assert numbers.isnan().any()
        assert numbers[:1].tolist() == [0.0]
        meta = torch.empty(2, 3, device="meta")
        assert torch.isfinite(meta).all()
        assert not meta.isnan().any()
        assert meta.isnan().any(1).shape == (2,)
        assert meta.tolist() == [[1.0, 1.0, 1.0]] * 2
        assert meta.sum().item() == 1.0
    assert not has_no_values(numbers)
    assert has_no_values(meta)


def test_real_weights_beside_those_on_the_meta_device_step_as_alone():
    torch.manual_seed(0)
    alone, beside = nn.Linear(6, 3), nn.Linear(6, 3)
    beside.load_state_dict(alone.state_dict())
    inputs = torch.randn(4, 6)
    optimizers = (
        MBF(alone.parameters()),
        MBF([*beside.parameters(), nn.Parameter(torch.empty(3, device="meta"))]),
    )
    for _ in range(3):
        for layer, optimizer in zip((alone, beside), optimizers, strict=True):
            optimizer.zero_grad()
            layer(inputs).square().mean().backward()
            optimizer.step()
    assert torch.equal(alone.weight, beside.weight)
    assert not isinstance(beside.weight, FakeTensor)
