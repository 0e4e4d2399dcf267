from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from minifisher_lab import data
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.problems.graphs import GraphNetwork
from minifisher_lab.problems.transformers import CHARACTERS, Attention
from minifisher_lab.training.samples import Graph, normalised_adjacency

INPUTS = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "curves": (1, 28, 28),
    "faces": (1, 25, 25),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "svhn": (3, 32, 32),
    "breast-cancer": (30,),
    "diabetes": (10,),
}
TEXTS, GRAPHS = {"shakespeare"}, {"cora", "citeseer", "pubmed"}

# The autoencoders' counts are the published ones; the others were added up by hand from the layers.
PARAMETERS = {
    "autoencoder-mnist": 2_837_314,
    "autoencoder-faces": 7_537_655,
    "autoencoder-curves": 842_340,
    # 3x3 convolutions without bias, two numbers a normed channel, the last layer
    "resnet32-cifar10": 9 * (3 * 16 + 10 * 16 * 16 + 16 * 32 + 9 * 32 * 32 + 32 * 64 + 9 * 64 * 64)
    + 2 * (16 + 10 * (16 + 32 + 64))
    + 650,
    "gcn-cora": 1433 * 16 + 16 * 7,
    # embeddings; per block two norms, qkv, projection, MLP; norm and head
    "gpt-shakespeare-small": (84 + 64) * 96
    + 3 * (4 * 96 + 97 * 3 * 96 + 97 * 96 + 97 * 384 + 385 * 96)
    + 2 * 96
    + 96 * 84,
    "mlp-tabular": 31 * 128 + 129 * 128 + 129 * 2,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name: str, count: int) -> None:
    assert PROBLEMS[name].parameters() == count


def test_vgg16_has_thirteen_convolutions_with_bias_and_the_wide_classifier() -> None:
    with torch.device("meta"):
        model = PROBLEMS["vgg16-cifar100"].architecture()
    convolutions = [layer for layer in model if isinstance(layer, torch.nn.Conv2d)]
    linear = [
        (layer.in_features, layer.out_features) for layer in model if isinstance(layer, torch.nn.Linear)
    ]
    assert len(convolutions) == 13
    assert all(layer.bias is not None for layer in convolutions)
    assert linear == [(512, 4096), (4096, 4096), (4096, 100)]


@pytest.mark.parametrize("name", [name for name, p in PROBLEMS.items() if p.data in INPUTS])
def test_outputs_fit_the_inputs_and_the_loss(name: str) -> None:
    problem = PROBLEMS[name]
    shape = INPUTS[problem.data]
    regression = problem.data == "diabetes"
    model = problem.build(seed=0).eval()
    inputs = torch.rand(2, *shape)
    with torch.no_grad():
        outputs = model(inputs)
        loss = problem.loss(outputs, inputs, torch.rand(2, 1) if regression else torch.tensor([0, 1]))
    classes = {"cifar100": 100, "breast-cancer": 2}.get(problem.data, 10)
    targets = 1 if regression else math.prod(shape)
    assert outputs.shape == (2, classes if problem.classifies else targets)
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("name", [name for name, p in PROBLEMS.items() if p.data in TEXTS])
def test_a_model_of_text_predicts_every_next_character_from_the_earlier_ones(name: str) -> None:
    problem = PROBLEMS[name]
    text = torch.randint(CHARACTERS, (2, problem.window), generator=torch.Generator().manual_seed(0))
    changed = text.clone()
    changed[:, 40] = (text[:, 40] + 1) % CHARACTERS
    model = problem.build(seed=0).eval()
    with torch.no_grad():
        outputs, others = model(text), model(changed)
    assert outputs.shape == (2, problem.window, CHARACTERS)
    torch.testing.assert_close(outputs[:, :40], others[:, :40])
    assert not torch.allclose(outputs[:, 40:], others[:, 40:], atol=1e-4)
    loss = problem.loss(outputs, text, text)
    single = torch.stack([-z.log_softmax(0)[c] for z, c in zip(outputs[1], text[1], strict=True)])
    assert problem.loss(outputs[1:], text[1:], text[1:]).item() == pytest.approx(single.mean().item())
    assert loss.item() == pytest.approx(math.log(CHARACTERS), rel=0.3)


def test_attention_is_the_published_formula() -> None:
    torch.manual_seed(0)
    attention = Attention(6, 2, causal=True)
    hidden = torch.randn(1, 4, 6)
    queries, keys, values = attention.queries_keys_values(hidden)[0].split(6, dim=1)
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        scores = queries[:, head] @ keys[:, head].T / 3**0.5
        scores = scores.masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(1) @ values[:, head])
    expected = attention.projection(torch.cat(heads, 1))
    torch.testing.assert_close(attention(hidden)[0], expected)


def test_a_vision_transformer_reads_every_patch_once() -> None:
    model = PROBLEMS["vit-digits"].build(seed=0)
    seen: list[torch.Tensor] = []
    model.patches.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.arange(64.0).view(1, 1, 8, 8)
    model(image)
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 0].tolist() == [0, 1, 8, 9]
    assert sorted(seen[0].flatten().tolist()) == list(range(64))


@pytest.fixture
def small_graph() -> tuple[GraphNetwork, Graph]:
    """Four nodes in a row, three features."""
    torch.manual_seed(0)
    features = torch.tensor([[1.0, 0, 2], [0, 1, 0], [3, 0, 0], [0, 0, 1]])
    adjacency = normalised_adjacency(torch.tensor([[0, 1, 2], [1, 2, 3]]), 4)
    graph = Graph(features, features.flatten().nonzero().flatten(), adjacency)
    model = GraphNetwork(3, 5, 2)
    model.connect(graph)
    return model, graph


def test_the_graph_network_is_the_published_formula(small_graph: tuple[GraphNetwork, Graph]) -> None:
    model, graph = small_graph
    links = torch.eye(4) + torch.diag(torch.ones(3), 1) + torch.diag(torch.ones(3), -1)
    degrees = links.sum(1)
    mean = degrees.rsqrt().diag() @ links @ degrees.rsqrt().diag()
    torch.testing.assert_close(graph.adjacency.to_dense(), mean)
    hidden = (mean @ graph.features @ model.first.weight.T).relu()
    expected = mean @ hidden @ model.second.weight.T
    torch.testing.assert_close(model.eval()(torch.tensor([3, 1])), expected[[3, 1]])


def test_dropout_of_the_features_keeps_half_of_them_doubled(small_graph: tuple[GraphNetwork, Graph]) -> None:
    model, graph = small_graph
    draws = torch.stack([model._features() for _ in range(400)])
    assert set(draws.flatten().tolist()) == {0.0, 2.0, 4.0, 6.0}
    assert (draws[:, graph.features == 0] == 0).all()
    torch.testing.assert_close(draws.mean(0), graph.features, atol=0.5, rtol=0)


def test_the_penalty_is_half_the_square_of_the_named_weight() -> None:
    problem = PROBLEMS["gcn-cora"]
    model = problem.build(seed=0)
    expected = 0.5 * 5e-4 * model.first.weight.square().sum().item()
    assert problem.penalty(model).item() == pytest.approx(expected)
    assert PROBLEMS["cnn-digits"].penalty(model) == 0


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_names_a_dataset(name: str) -> None:
    assert PROBLEMS[name].data in data.NAMES


def test_the_same_seed_builds_the_same_network() -> None:
    first, again, other = (PROBLEMS["autoencoder-digits"].build(seed) for seed in (3, 3, 4))
    assert all(torch.equal(w, v) for w, v in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_pixel_losses_are_summed_over_pixels_and_averaged_over_the_batch() -> None:
    outputs, inputs = torch.randn(3, 64), torch.rand(3, 1, 8, 8)
    targets = torch.zeros(3, dtype=torch.long)
    p = torch.sigmoid(outputs)
    x = inputs.flatten(1)
    entropy = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / 3
    square = 0.5 * (outputs - x).square().sum() / 3
    assert PROBLEMS["autoencoder-mnist"].loss(outputs, inputs, targets).item() == pytest.approx(
        entropy.item()
    )
    assert PROBLEMS["autoencoder-faces"].loss(outputs, inputs, targets).item() == pytest.approx(square.item())
    assert PROBLEMS["cnn-digits"].loss(outputs, inputs, targets) == functional.cross_entropy(outputs, targets)


def test_code_and_output_of_an_autoencoder_are_linear() -> None:
    kinds = [type(layer).__name__ for layer in PROBLEMS["autoencoder-fashion"].build(seed=0)]
    half = ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert kinds == ["Flatten", *half, *half]


def test_the_plain_vgg11_has_no_norms_and_starts_as_its_authors_say() -> None:
    model = PROBLEMS["vgg11-plain-svhn"].build(seed=0)
    layers = [layer for layer in model if list(layer.parameters())]
    assert [type(layer).__name__ for layer in layers] == ["Conv2d"] * 8 + ["Linear"] * 3
    assert [layer.out_features for layer in layers[8:]] == [4096, 4096, 10]
    for layer in layers[1:8]:
        expected = (2 / (9 * layer.out_channels)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert layer.weight.mean().item() == pytest.approx(0, abs=0.02 * expected)
        assert not layer.bias.any()
    assert layers[8].bias.any()


def test_the_authors_start_is_an_option_of_every_problem() -> None:
    problem = replace(PROBLEMS["cnn-digits"], initialisation="fan-out")
    assert not problem.build(0)[0].bias.any()
    assert PROBLEMS["cnn-digits"].build(0)[0].bias.any()


@pytest.mark.parametrize("field", ["likelihood", "schedule", "augmentation", "initialisation"])
def test_a_value_that_a_field_does_not_have_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} of cnn-digits must be one of .*, got 'typo'"):
        replace(PROBLEMS["cnn-digits"], **{field: "typo"})  # type: ignore[arg-type]
