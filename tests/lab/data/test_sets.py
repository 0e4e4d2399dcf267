"""Loading datasets: embedded, generated, and really fetched if a source answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sklearn.datasets

from minifisher_lab import data
from minifisher_lab.data import curves, faces, store, table
from minifisher_lab.data.records import WrongData
from minifisher_lab.data.table import ENTRIES, Counts, Sha256


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIFISHER_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_digits_need_no_download(empty_cache):
    digits = data.load("digits")
    assert digits.train_inputs.shape == (1437, 1, 8, 8)
    assert digits.test_inputs.shape == (360, 1, 8, 8)
    assert digits.train_inputs.dtype == np.float32
    assert digits.train_targets.dtype == np.int64
    assert (digits.train_inputs.min(), digits.train_inputs.max()) == (0, 1)
    assert np.bincount(np.concatenate([digits.train_targets, digits.test_targets])).min() >= 174
    assert (digits.classes, digits.name) == (10, "digits")
    assert data.get("digits") == empty_cache
    assert not empty_cache.exists()


def test_curves_are_seeded_and_anti_aliased(monkeypatch):
    monkeypatch.setattr(curves, "TRAINING", 300)
    monkeypatch.setattr(curves, "TEST", 100)
    one, again, other = data.load("curves"), data.load("curves", seed=0), data.load("curves", seed=1)
    assert one.train_inputs.shape == (300, 1, 28, 28)
    assert one.test_inputs.shape == (100, 1, 28, 28)
    np.testing.assert_array_equal(one.train_inputs, again.train_inputs)
    assert not np.array_equal(one.train_inputs, other.train_inputs)
    assert len(np.unique(one.train_inputs.reshape(300, -1), axis=0)) == 300
    assert ((one.train_inputs > 0) & (one.train_inputs < 1)).any((1, 2, 3)).all()
    assert (one.train_inputs.max((1, 2, 3)) > 0.9).all()
    assert one.train_inputs[:, :, 0].max() == 0  # the margin
    assert (one.classes, one.train_targets.max()) == (0, 0)


def test_ink_depends_on_the_distance_to_the_curve():
    """Compare a few images with the plain formula over all pixels."""
    generator = np.random.default_rng(3)
    images = curves._images(4, np.random.default_rng(3))
    control = generator.uniform(3, 24, (3, 4, 2)).astype(np.float32).astype(float)
    t = np.linspace(0, 1, 2000)[:, None, None]
    points = (1 - t) ** 2 * control[0] + 2 * t * (1 - t) * control[1] + t**2 * control[2]
    pixels = np.stack(np.meshgrid(np.arange(28), np.arange(28), indexing="ij"), -1)
    for number in range(4):
        distance = np.linalg.norm(pixels[None] - points[:, number, None, None], axis=-1).min(0)
        np.testing.assert_allclose(images[number, 0] / 255, (1.25 - distance).clip(0, 1), atol=0.1)


def test_faces_views(monkeypatch):
    monkeypatch.setattr(faces, "VIEWS", 3)
    images = np.zeros((40, 10, 112, 92), np.uint8) + np.arange(40, dtype=np.uint8)[:, None, None, None] * 6
    views = faces.draw({"images": images}, seed=0)
    assert views["train_inputs"].shape == (750, 1, 25, 25)
    assert views["test_inputs"].shape == (300, 1, 25, 25)
    assert not set(views["train_targets"]) & set(views["test_targets"])  # other people
    for part in ("train", "test"):  # a flat photograph stays flat, so each view shows the person it names
        shown = views[f"{part}_inputs"].reshape(len(views[f"{part}_targets"]), -1)
        np.testing.assert_array_equal(shown, np.repeat(views[f"{part}_targets"][:, None] * 6, 625, 1))


def test_faces_are_seeded_and_rotated_both_ways(monkeypatch):
    monkeypatch.setattr(faces, "VIEWS", 40)
    ramp = np.broadcast_to(np.arange(92, dtype=np.uint8) + 60, (40, 10, 112, 92))
    one, again, other = (faces.draw({"images": ramp}, seed)["test_inputs"].astype(int) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    across, down = (np.diff(one, axis=axis).mean((1, 2, 3)) for axis in (3, 2))
    assert across.min() > -0.1  # by at most 90 degrees: never mirrored or upside down
    assert (down > 0.5).any()
    assert (down < -0.5).any()
    steps = np.hypot(across, down)  # pixels of the photograph to a pixel of the view, times contrast
    assert 0.7 * 92 / 1.8 / 25 - 0.2 < steps.min() < steps.max() < 1.3 * 92 / 1.4 / 25 + 0.2


def test_bilinear_is_exact_on_a_plane():
    rows, columns = np.meshgrid(np.arange(112.0), np.arange(92.0), indexing="ij")
    plane = (2 * rows + 3 * columns).astype(np.float32)
    generator = np.random.default_rng(0)
    at = generator.uniform(0, 111, 500).astype(np.float32), generator.uniform(0, 91, 500).astype(np.float32)
    np.testing.assert_allclose(faces._bilinear(plane, *at), 2 * at[0] + 3 * at[1], rtol=1e-5)


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES if entry.kind == "images" and entry.routes])
def test_the_message_for_missing_data_says_how_to_get_it(empty_cache, name):
    with pytest.raises(data.DataMissing, match=f"minifisher data get {name}"):
        data.load(name)


def test_an_unknown_name_lists_similar_ones():
    with pytest.raises(ValueError, match="did you mean fashion-mnist"):
        data.load("fasion-mnist")
    with pytest.raises(ValueError, match="known are digits, mnist"):
        data.get("qqq")


def test_the_wrong_loader_names_the_right_one():
    with pytest.raises(ValueError, match="load_graph"):
        data.load("cora")
    with pytest.raises(ValueError, match="load_text"):
        data.load_graph("shakespeare")
    with pytest.raises(ValueError, match=r"data\.load\('mnist'\)"):
        data.load_text("mnist")


def test_graph_and_text_from_the_cache(empty_cache, monkeypatch):
    graph = {
        "features": np.ones((2, 3), np.float32),
        "edges": np.array([[0], [1]]),
        "targets": np.array([0, 1]),
    }
    graph |= {part: np.array([number]) for number, part in enumerate(("train", "validation", "test"))}
    store.write("cora", graph)
    store.write("shakespeare", {"text": np.frombuffer(b"abcde", np.uint8), "lengths": np.array([2, 3])})
    accepting = [replace(entry, check=store.unchecked) for entry in ENTRIES]
    monkeypatch.setattr(table, "ENTRIES", accepting)
    assert data.load_graph("cora").edges.tolist() == [[0], [1]]
    assert data.load_graph("cora").classes == 7
    assert data.load_text("shakespeare").documents == ("ab", "cde")


EMBEDDED = {"digits", "curves", "breast-cancer", "diabetes"}


def test_the_catalogue_shows_which_datasets_are_present(empty_cache):
    before = {row.name: row.present for row in data.catalogue()}
    assert tuple(before) == data.NAMES
    assert {name for name, present in before.items() if present} == EMBEDDED
    store.write("mnist", {"x": np.zeros(1)})
    assert {row.name for row in data.catalogue() if row.present} == EMBEDDED | {"mnist"}
    assert all(row.holds and row.source and row.licence for row in data.catalogue())


def test_every_fetched_dataset_has_a_check():
    for entry in ENTRIES:
        if entry.routes:
            assert isinstance(entry.check, Sha256 | Counts)
            assert not isinstance(entry.check, Sha256) or len(bytes.fromhex(entry.check.expected)) == 32


def test_counts_check_shapes_and_labels():
    counts = Counts((1, 2, 2), (2, 1), (1, 1))
    good = {
        "train_inputs": np.zeros((3, 1, 2, 2), np.uint8),
        "train_targets": np.array([0, 1, 0], np.uint8),
        "test_inputs": np.zeros((2, 1, 2, 2), np.uint8),
        "test_targets": np.array([1, 0], np.uint8),
    }
    counts(good)
    for wrong in (
        {"train_targets": np.array([0, 1, 1], np.uint8)},
        {"test_inputs": np.zeros((2, 1, 2, 3), np.uint8)},
        {"test_inputs": np.zeros((2, 1, 2, 2), np.float32)},
    ):
        with pytest.raises(WrongData, match=next(iter(wrong)).split("_")[0]):
            counts(good | wrong)


@pytest.mark.parametrize(
    ("name", "mean", "deviation", "counts"),
    [
        ("mnist", 0.1307, 0.3081, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("fashion-mnist", 0.2860, 0.3530, [6000] * 10),
    ],
)
def test_real_data(name, mean, deviation, counts):
    """Uses the user's own cache, so that the data is fetched only once."""
    try:
        data.get(name)
    except data.DataUnavailable as error:
        pytest.skip(str(error))
    real = data.load(name)
    assert real.train_inputs.shape == (60_000, 1, 28, 28)
    assert real.test_inputs.shape == (10_000, 1, 28, 28)
    assert real.train_inputs.mean(dtype=np.float64) == pytest.approx(mean, abs=5e-5)
    assert real.train_inputs.std(dtype=np.float64) == pytest.approx(deviation, abs=5e-5)
    assert np.bincount(real.train_targets).tolist() == counts


@pytest.mark.parametrize(
    ("name", "classes", "columns", "rows"),
    [("breast-cancer", 2, 30, (455, 114)), ("diabetes", 0, 10, (353, 89))],
)
def test_tables_split_the_rows_of_scikit_learn(name, classes, columns, rows):
    table = data.load_table(name)
    assert table.classes == classes
    assert table.train_inputs.shape == (rows[0], columns)
    assert table.test_inputs.shape == (rows[1], columns)
    assert (len(table.train_targets), len(table.test_targets)) == rows
    joined = np.concatenate((table.train_inputs, table.test_inputs))
    bunch = getattr(sklearn.datasets, f"load_{name.replace('-', '_')}")()
    assert sorted(map(tuple, joined.tolist())) == sorted(map(tuple, bunch.data.astype(np.float32).tolist()))
    labels = dict(zip(map(tuple, bunch.data.astype(np.float32).tolist()), bunch.target, strict=True))
    wanted = np.array([labels[tuple(row)] for row in table.test_inputs.tolist()])
    found = table.test_targets.reshape(-1)
    assert np.corrcoef(found, wanted)[0, 1] == pytest.approx(1)


def test_a_dataset_of_another_kind_names_its_loader():
    with pytest.raises(ValueError, match=r"the kind of diabetes is table: use data.load_table\('diabetes'\)"):
        data.load("diabetes")
    assert data.kind_of("cora") == "graph"
