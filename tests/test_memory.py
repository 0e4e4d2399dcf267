"""Curvature state against its weight, over the shapes of real networks: nothing is allocated."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minifisher import MBF

LIMIT, MOSTLY = 16, 5  # bytes of curvature a byte of the weight


def resnet50():
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(count):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, inputs, 1, 1)] if block == 0 else []
            for shape in convolutions:
                shapes += [shape, (shape[0],), (shape[0],)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vgg16():
    shapes, inputs = [], 3
    for width in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        shapes += [(width, inputs, 3, 3), (width,)]
        inputs = width
    for outputs, width in ((4096, 25088), (4096, 4096), (1000, 4096)):
        shapes += [(outputs, width), (outputs,)]
    return shapes


def transformer(width, blocks):
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return blocks * (norm + attention + norm + feed_forward) + norm


def vit_b16():
    start = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)]
    return [*start, *transformer(768, 12), (1000, 768), (1000,)]


def gpt2_small():
    return [(50257, 768), (1024, 768), *transformer(768, 12)]


# name -> shapes, the number of parameters that is published
MODELS = {
    "ResNet-50": (resnet50(), 25_557_032),
    "VGG-16": (vgg16(), 138_357_544),
    "ViT-B/16": (vit_b16(), 86_567_656),
    "GPT-2 small": (gpt2_small(), 124_439_808),
}

ODD = [
    (1, 4096),
    (4096, 1),
    (2, 4096),
    (7, 4093),
    (8, 67),
    (13, 131),
    (127, 8191),
    (50257, 768),
    (1, 197, 768),
    (1, 1, 768),
    (768, 3, 16, 16),
    (64, 3, 7, 7),
    (8, 3, 11, 11),
    (2, 3, 5, 5, 5),
    (512, 1, 3, 3),
    (512, 1, 31),
    (3, 1, 1, 1),
    (10,),
    (1,),
    (),
    (1, 1),
]


def weights(shapes, dtype=torch.float32):
    return [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]


def multiples(shapes, dtype=torch.float32, **options):
    """Curvature bytes a byte of the weight, and the weight's share of all parameters, for every weight."""
    parameters = weights(shapes, dtype)
    description = MBF(parameters, **options).describe()
    return [
        (layer.state_bytes / parameter.nbytes, layer.parameters / description.parameters, layer)
        for parameter, layer in zip(parameters, description.layers, strict=True)
    ]


@pytest.mark.parametrize("model", MODELS)
def test_the_table_has_the_shapes_of_the_model(model):
    shapes, published = MODELS[model]
    assert sum(parameter.numel() for parameter in weights(shapes)) == published


@pytest.mark.parametrize("model", MODELS)
def test_no_weight_of_a_real_network_takes_more_than_the_limit(model):
    for multiple, _, layer in multiples(MODELS[model][0]):
        assert multiple <= LIMIT, layer


@pytest.mark.parametrize("model", MODELS)
def test_most_of_a_real_network_takes_little(model):
    measured = multiples(MODELS[model][0])
    share = sum(share for multiple, share, _ in measured if multiple <= MOSTLY)
    assert share >= 0.95, f"{share:.1%} of the parameters take {MOSTLY} x or less"
    assert sum(multiple * share for multiple, share, _ in measured) <= MOSTLY


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes_keep_the_limit(shape):
    ((multiple, _, layer),) = multiples([shape])
    assert multiple <= LIMIT, layer


@given(shape=st.lists(st.integers(1, 300), max_size=4))
def test_any_shape_keeps_the_limit(shape):
    ((multiple, _, layer),) = multiples([shape])
    assert multiple <= LIMIT, layer


@given(
    shape=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    options=st.sampled_from(
        [
            {"share": "row"},
            {"share": "layer"},
            {"conv_blocks": "row"},
            {"conv_blocks": "row", "share": "row"},
            {"output_power": 0.5},
        ]
    ),
)
def test_choosing_the_structure_but_not_the_width_keeps_the_limit(shape, options):
    ((multiple, _, layer),) = multiples([shape], **options)
    assert multiple <= LIMIT, layer


@pytest.mark.parametrize("model", MODELS)
def test_two_sided_blocks_take_two_matrices_a_block_of_each_side(model):
    shapes = [shape for shape in MODELS[model][0] if len(shape) > 1]
    options = {"block_size": 8, "output_power": 0.5}
    for shape, (multiple, _, _) in zip(shapes, multiples(shapes, **options), strict=True):
        outputs, inputs = shape[0], math.prod(shape[1:])
        numbers = 2 * 8 * (outputs + inputs)
        if outputs % 8 == 0 and inputs % 8 == 0:
            assert multiple * outputs * inputs == pytest.approx(numbers)
    for multiple, _, layer in multiples(MODELS[model][0], output_power=0.5):
        assert multiple <= LIMIT, layer


@given(size=st.integers(1, 10**6), rows=st.integers(1, 400))
def test_kernel_blocks_are_never_wider_than_a_kernel(size, rows):
    plain = multiples([(rows, 3, 3, 3)], conv_blocks="kernel")[0][0]
    assert multiples([(rows, 3, 3, 3)], conv_blocks="kernel", block_size=size)[0][0] <= plain


@pytest.mark.parametrize("model", MODELS)
def test_half_precision_weights_keep_the_limit_in_numbers_and_in_bytes_where_asked(model):
    shapes = MODELS[model][0]
    for multiple, _, layer in multiples(shapes, torch.bfloat16):
        assert multiple <= 2 * LIMIT, layer  # float32 curvature of bfloat16 weights
    for multiple, _, layer in multiples(shapes, torch.bfloat16, curvature_dtype=torch.bfloat16):
        assert multiple <= LIMIT, layer


def test_describe_counts_the_bytes_that_are_allocated():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 70), nn.LayerNorm(70))
    opt = MBF(module, graft=None, momentum=0.0)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    opt.step()
    for layer, parameter in zip(opt.describe().layers, module.parameters(), strict=True):
        tensors = [value for value in opt.state[parameter].values() if isinstance(value, torch.Tensor)]
        assert layer.state_bytes == sum(tensor.nbytes for tensor in tensors)
