import torch

from minifisher.linalg.damping import LEAST_SCALE, above_rounding, curvature_scale


def test_the_scale_is_the_average_of_the_mean_of_the_block_and_that_of_the_layer():
    blocks, layer = torch.tensor([[1.0, 3.0], [0.0, 8.0]]), torch.tensor([[2.0], [4.0]])
    assert torch.equal(curvature_scale(blocks, layer), torch.tensor([[1.5, 2.5], [2.0, 6.0]]))


def test_the_scale_of_a_layer_without_curvature_is_positive():
    zeros = torch.zeros(3)
    assert torch.equal(curvature_scale(zeros, zeros), torch.full((3,), LEAST_SCALE))


def test_the_arguments_stay_as_they_are():
    block, layer = torch.ones(2), torch.zeros(1)
    curvature_scale(block, layer)
    assert torch.equal(block, torch.ones(2))
    assert torch.equal(layer, torch.zeros(1))


def test_matrices_kept_in_half_precision_are_damped_above_the_rounding_of_their_largest_entry():
    matrices = torch.diag_embed(torch.tensor([[4.0, 1.0], [0.5, 0.25]]))
    levels = torch.tensor([0.001, 0.1])
    floor = 4 * torch.finfo(torch.bfloat16).eps
    assert torch.equal(above_rounding(levels, matrices, torch.bfloat16), torch.tensor([floor, 0.1]))
    assert above_rounding(levels, matrices, torch.float32) is levels
    assert above_rounding(levels, matrices[..., :1, :1], torch.bfloat16) is levels
