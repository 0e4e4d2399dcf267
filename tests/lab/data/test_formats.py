"""Each decoder reads small files that the test writes in the real format, and refuses damaged ones."""

from __future__ import annotations

import collections
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csr_matrix

from minifisher_lab.data import pickles
from minifisher_lab.data.archives import contents
from minifisher_lab.data.cifar import CIFAR10, CIFAR10_PNG, CIFAR100
from minifisher_lab.data.faces import HEIGHT, ORL, WIDTH
from minifisher_lab.data.idx import IDX, parse
from minifisher_lab.data.planetoid import planetoid
from minifisher_lab.data.records import WrongData
from minifisher_lab.data.shakespeare import SHAKESPEARE, WORKS, documents
from minifisher_lab.data.svhn import SVHN


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 did: strings and bytes are one type, `str`."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    old = stream.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")
    return old.replace(b"cscipy.sparse._csr\n", b"cscipy.sparse.csr\n")


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def idx_file(array: np.ndarray) -> bytes:
    return (
        struct.pack(">BBBB", 0, 0, 8, array.ndim)
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("dash", ["-", "."])
def test_idx(pack, dash, tmp_path):
    images, labels = random_bytes(3, 5, 4), np.array([2, 0, 1], np.uint8)
    ending = ".gz" if pack is gzip.compress else ""
    for part, count in (("train", 3), ("t10k", 2)):
        (tmp_path / f"{part}-images{dash}idx3-ubyte{ending}").write_bytes(pack(idx_file(images[:count])))
        (tmp_path / f"{part}-labels{dash}idx1-ubyte{ending}").write_bytes(pack(idx_file(labels[:count])))
    arrays = IDX.decode(contents(tmp_path, IDX.members))
    np.testing.assert_array_equal(arrays["train_inputs"], images[:, None])
    np.testing.assert_array_equal(arrays["test_inputs"], images[:2, None])
    np.testing.assert_array_equal(arrays["train_targets"], labels)
    assert arrays["test_targets"].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>not found</html>", "not an IDX file"),
        (b"", "not an IDX file"),
        (idx_file(random_bytes(3, 5, 4))[:-1], "announces"),
        # Without the time, which would give the case another name in each process of the tests.
        (gzip.compress(idx_file(random_bytes(3, 5, 4)), mtime=0)[:-9], "damaged gzip"),
        (b"\0\0\x0d\x01" + struct.pack(">If", 1, 2.0), "not an IDX file"),  # floats
    ],
)
def test_idx_refuses(data, message):
    with pytest.raises(WrongData, match=message):
        parse(data)


def test_idx_names_a_missing_file():
    with pytest.raises(WrongData, match="train-images"):
        IDX.decode({"t10k-labels-idx1-ubyte": idx_file(random_bytes(3))})


def cifar_batch(label_key: str, pixels: np.ndarray, labels: list[int]) -> bytes:
    batch = {
        "batch_label": "training batch",
        label_key: labels,
        "data": pixels,
        "filenames": ["a.png"] * len(labels),
    }
    return python2_pickle(batch)


def tar_gz(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_cifar10_batches(tmp_path):
    pixels = random_bytes(12, 3072)
    files = {"cifar-10-batches-py/readme.html": b"hello", "cifar-10-batches-py/batches.meta": b"no pickle"}
    for number in range(5):
        files[f"cifar-10-batches-py/data_batch_{number + 1}"] = cifar_batch(
            "labels", pixels[2 * number : 2 * number + 2], [number, 9 - number]
        )
    files["cifar-10-batches-py/test_batch"] = cifar_batch("labels", pixels[10:], [7, 8])
    tar_gz(tmp_path / "cifar-10-python.tar.gz", files)
    arrays = CIFAR10.decode(contents(tmp_path, CIFAR10.members))
    assert arrays["train_inputs"].shape == (10, 3, 32, 32)
    assert arrays["train_inputs"][3, 1, 2, 5] == pixels[3, 1024 + 2 * 32 + 5]  # planes, then rows
    np.testing.assert_array_equal(arrays["test_inputs"].reshape(2, -1), pixels[10:])
    assert arrays["train_targets"].tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert arrays["test_targets"].tolist() == [7, 8]


def test_cifar100_takes_the_fine_labels(tmp_path):
    pixels = random_bytes(3, 3072)
    batch = {"data": pixels, "fine_labels": [99, 3, 50], "coarse_labels": [1, 2, 3]}
    test = {"data": pixels[:1], "fine_labels": [42], "coarse_labels": [1]}
    files = {"train": batch, "test": test}
    tar_gz(
        tmp_path / "cifar-100-python.tar.gz",
        {f"cifar-100-python/{name}": python2_pickle(part) for name, part in files.items()},
    )
    arrays = CIFAR100.decode(contents(tmp_path, CIFAR100.members))
    np.testing.assert_array_equal(arrays["train_inputs"].reshape(3, -1), pixels)
    assert (arrays["train_targets"].tolist(), arrays["test_targets"].tolist()) == ([99, 3, 50], [42])


def test_cifar_refuses_other_pickles():
    with pytest.raises(WrongData, match="fine_labels"):
        CIFAR100.decode({"train": python2_pickle({"data": [1]}), "test": python2_pickle([])})
    with pytest.raises(WrongData, match="damaged pickle"):
        CIFAR100.decode({"train": b"\x80\x02}", "test": b""})
    with pytest.raises(WrongData, match="0 files named data_batch_1"):
        CIFAR10.decode({})


def test_cifar10_png(tmp_path):
    images = random_bytes(6, 32, 32, 3)
    folder = tmp_path / "package"
    folder.mkdir()
    for number, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        Image.fromarray(images[number].reshape(1, 1024, 3)).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps([3, 1, 4, 1, 5]))
    (folder / "test_lables.json").write_text("[9]")
    limit = Image.MAX_IMAGE_PIXELS
    arrays = CIFAR10_PNG.decode(contents(tmp_path, CIFAR10_PNG.members))
    np.testing.assert_array_equal(arrays["train_inputs"], images[:5].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(arrays["test_inputs"][0, 2], images[5, :, :, 2])
    assert arrays["train_targets"].tolist() == [3, 1, 4, 1, 5]
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_two_formats_of_cifar10_agree():
    images = random_bytes(6, 32, 32, 3)
    pickled, drawn = {}, {"train_lables.json": b"[0, 1, 2, 3, 4]", "test_lables.json": b"[5]"}
    for number, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        pickled[name] = cifar_batch("labels", images[number].transpose(2, 0, 1).reshape(1, 3072), [number])
        stream = io.BytesIO()
        Image.fromarray(images[number].reshape(1, 1024, 3)).save(stream, "png")
        drawn[f"{name}.png"] = stream.getvalue()
    one, other = CIFAR10.decode(pickled), CIFAR10_PNG.decode(drawn)
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        np.testing.assert_array_equal(one[key], other[key])


def test_svhn(tmp_path):
    pixels = random_bytes(32, 32, 3, 4)
    for part, count in (("train", 4), ("test", 2)):
        labels = np.array([[10], [1], [9], [10]], np.uint8)[:count]
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels[..., :count], "y": labels}, do_compression=True)
    arrays = SVHN.decode(contents(tmp_path, SVHN.members))
    assert arrays["train_inputs"].shape == (4, 3, 32, 32)
    assert arrays["train_inputs"].dtype == np.uint8
    assert arrays["train_inputs"][2, 1, 5, 7] == pixels[5, 7, 1, 2]
    assert (arrays["train_targets"].tolist(), arrays["test_targets"].tolist()) == ([0, 1, 9, 0], [0, 1])


def test_svhn_refuses():
    with pytest.raises(WrongData, match="MATLAB"):
        SVHN.decode({"train_32x32.mat": b"x" * 300})
    stream = io.BytesIO()
    savemat(stream, {"X": np.zeros(3)})
    with pytest.raises(WrongData, match="X and y"):
        SVHN.decode({"train_32x32.mat": stream.getvalue()})


def pgm(pixels: np.ndarray) -> bytes:
    return b"P5\n92 112\n255\n" + pixels.tobytes()


def orl_files() -> tuple[np.ndarray, dict[str, bytes]]:
    ramp = np.add.outer(2 * np.arange(HEIGHT), np.arange(WIDTH)) % 251
    images = (
        np.stack([(ramp + shift) % 251 for shift in range(400)])
        .astype(np.uint8)
        .reshape(40, 10, HEIGHT, WIDTH)
    )
    names = [(person, photograph) for person in range(40) for photograph in range(10)]
    return images, {f"x/s{p + 1}/{q + 1}.pgm": pgm(images[p, q]) for p, q in names}


def test_orl(tmp_path):
    images, files = orl_files()
    with zipfile.ZipFile(tmp_path / "att_faces.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("x/README", b"readme")
    np.testing.assert_array_equal(ORL.decode(contents(tmp_path, ORL.members))["images"], images)


def test_orl_undoes_a_text_transfer():
    images, files = orl_files()
    columns = np.random.default_rng(0).integers(0, 5, WIDTH) * 2
    columns[[0, 40, 41, 42, -1]] = 4, 8, 5, 6, 4
    smooth = np.add.outer(np.arange(HEIGHT), columns).astype(np.uint8)
    images[0, 0], images[3, 4] = smooth, smooth + 20 * (smooth == 13)
    assert smooth.tobytes().count(b"\r\n") == 1  # a pair in the original pixels, among many line feeds
    assert smooth.tobytes().count(b"\n") > 50
    assert images[3, 4].tobytes().count(b"\r\n") == 0
    for key, image in (("x/s4/5.pgm", images[3, 4]), ("x/s1/1.pgm", images[0, 0])):
        # The transfer leaves a line feed alone that already follows a carriage return.
        files[key] = pgm(image).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    np.testing.assert_array_equal(ORL.decode(files)["images"], images)


def test_orl_refuses():
    _, files = orl_files()
    with pytest.raises(WrongData, match=r"s7/3\.pgm is missing; 399"):
        ORL.decode({name: data for name, data in files.items() if not name.endswith("s7/3.pgm")})
    with pytest.raises(WrongData, match="damaged PGM"):
        ORL.decode(files | {"x/s1/1.pgm": pgm(random_bytes(5))})
    with pytest.raises(WrongData, match=r"\(2, 3\) pixels"):
        ORL.decode(files | {"x/s1/1.pgm": b"P5\n3 2\n255\n123456"})


def planetoid_files() -> tuple[np.ndarray, np.ndarray, dict[str, bytes]]:
    """510 nodes with features, three test nodes 512, 510, 513 and a gap at 511."""
    features = np.random.default_rng(0).integers(0, 2, (514, 7)).astype(np.float32)
    labels = np.arange(514) % 3
    features[511], labels[511] = 0, -1
    one_hot = np.eye(3, dtype=np.int32)
    test = [512, 510, 513]
    graph = collections.defaultdict(list, {0: [1, 512, 1], 1: [0], 2: [2, 0], 512: [0]})
    parts = {
        "x": csr_matrix(features[:4]),
        "y": one_hot[labels[:4]],
        "tx": csr_matrix(features[test]),
        "ty": one_hot[labels[test]],
        "allx": csr_matrix(features[:510]),
        "ally": one_hot[labels[:510]],
        "graph": graph,
    }
    files = {f"data/ind.tiny.{key}": python2_pickle(value) for key, value in parts.items()}
    return features, labels, files | {"data/ind.tiny.test.index": b"512\n510\n513\n"}


def test_planetoid():
    features, labels, files = planetoid_files()
    assert b"cscipy.sparse.csr\ncsr_matrix\n" in files["data/ind.tiny.x"]
    arrays = planetoid("tiny").decode(files)
    np.testing.assert_array_equal(arrays["features"], features)
    np.testing.assert_array_equal(arrays["targets"], labels)
    assert arrays["edges"].tolist() == [[0, 0, 0], [1, 2, 512]]  # each edge once, no self-loops
    assert (arrays["train"].tolist(), arrays["test"].tolist()) == ([0, 1, 2, 3], [512, 510, 513])
    assert arrays["validation"].tolist() == list(range(4, 504))


def test_planetoid_refuses_other_pickles():
    _, _, files = planetoid_files()
    with pytest.raises(WrongData, match=r"ind\.tiny\.allx holds a list"):
        planetoid("tiny").decode(files | {"data/ind.tiny.allx": python2_pickle([1])})


def test_planetoid_refuses_an_index_that_disagrees():
    _, _, files = planetoid_files()
    with pytest.raises(WrongData, match="index"):
        planetoid("tiny").decode(files | {"data/ind.tiny.test.index": b"512\n513\n514\n"})


class Malicious:
    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, protocol):
    trace = tmp_path / "trace"
    data = pickle.dumps([1, Malicious(os.mkdir, str(trace))], protocol)
    with pytest.raises(WrongData, match=r"posix\.mkdir|nt\.mkdir"):
        pickles.loads(data)
    assert not trace.exists()
    pickle.loads(data)
    assert trace.exists()  # an ordinary unpickler does execute it


@pytest.mark.parametrize("call", [eval, getattr, np.load, pickle.loads])
def test_no_other_name_gets_through(call):
    with pytest.raises(WrongData, match="refused"):
        pickles.loads(pickle.dumps(Malicious(call, "1"), 2))


def test_shakespeare(tmp_path):
    works = {f"play_{number:02d}": f"Exeunt {number}.\r\n".encode() for number in range(WORKS)}
    files = {f"s-0.6/shksprdata/texts/{name}_gut.txt": text for name, text in works.items()}
    others = {
        "s-0.6/shksprdata/texts/play_01_gut_f.txt": b"Folio",
        "s-0.6/miltondata/texts/comus_gut.txt": b"Milton",
    }
    tar_gz(tmp_path / "s-0.6.tar.gz", files | others)
    arrays = SHAKESPEARE.decode(contents(tmp_path, SHAKESPEARE.members))
    assert documents(arrays) == tuple(text.decode() for text in works.values())
    with pytest.raises(WrongData, match="41 texts"):
        SHAKESPEARE.decode(dict(list(files.items())[1:]))


@pytest.mark.parametrize("name", ["a.zip", "a.whl", "a.tgz", "a.tar.gz"])
def test_a_damaged_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>no archive</html>")
    with pytest.raises(WrongData, match=name):
        contents(tmp_path, ".*")
