"""Damaged, foreign and enormous files: one clear error, and no more memory than the real data needs."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
from scipy.io import savemat

from minifisher_lab import data, files
from minifisher_lab.data import pickles, store, table
from minifisher_lab.data.archives import contents
from minifisher_lab.data.idx import IDX, parse
from minifisher_lab.data.planetoid import PARTS, planetoid
from minifisher_lab.data.records import MIB, Format, WrongData
from minifisher_lab.data.sources import Official
from minifisher_lab.data.svhn import SVHN
from minifisher_lab.data.table import Counts, Entry, Route


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIFISHER_DATA", str(tmp_path / "cache"))


def tiny(monkeypatch, *sources) -> None:
    """A dataset `tiny` of two classes with two training images and a test image of each."""
    sources = sources or (Official(("http://127.0.0.1:9/",), (("payload.bin", None),)),)
    routes = tuple(Route(source, IDX) for source in sources)
    entry = Entry("tiny", "", "", classes=2, routes=routes, check=Counts((1, 2, 2), (2, 2), (1, 1)))
    monkeypatch.setattr(table, "ENTRIES", (entry,))


def good() -> dict[str, np.ndarray]:
    return {
        "train_inputs": np.zeros((4, 1, 2, 2), np.uint8),
        "train_targets": np.array([0, 1, 0, 1], np.uint8),
        "test_inputs": np.zeros((2, 1, 2, 2), np.uint8),
        "test_targets": np.array([1, 0], np.uint8),
    }


# ---- the cache is proven again ----


@pytest.mark.parametrize(
    "change",
    [
        {"train_targets": np.array([0, 99, 0, 1], np.uint8)},
        {"train_targets": np.array([0, -5, 0, 1])},
        {"train_targets": np.array([0, 10**12, 0, 1])},
        {"test_targets": np.array([0, np.nan])},
        {"test_targets": np.array(["a", "b"])},
        {"test_inputs": np.zeros((2, 1, 2, 3), np.uint8)},
        {"train_inputs": np.full((4, 1, 2, 2), np.nan)},
        {"test_targets": None},
    ],
    ids=["99", "-5", "huge", "nan", "text", "shape", "floats", "missing"],
)
def test_arrays_are_checked_again_when_they_are_loaded(change, monkeypatch):
    tiny(monkeypatch)
    store.write("tiny", good())
    assert data.load("tiny").train_targets.tolist() == [0, 1, 0, 1]
    store.write("tiny", {name: array for name, array in (good() | change).items() if array is not None})
    with pytest.raises(data.DataMissing, match=r"tiny\.npz is damaged.*minifisher data get tiny"):
        data.load("tiny")


def test_a_digest_is_compared_again_when_arrays_are_loaded():
    store.write("mnist", good())
    with pytest.raises(data.DataMissing, match="sha256"):
        data.load("mnist")
    store.write("cora", {"targets": np.array([99, -5])})
    with pytest.raises(data.DataMissing, match="sha256"):
        data.load_graph("cora")


def test_a_damaged_stored_file_is_fetched_again(monkeypatch):
    tiny(monkeypatch)
    store.write("tiny", good() | {"test_targets": np.array([1, 5], np.uint8)})
    folder = data.by_hand("tiny")
    folder.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = good()[f"{part}_inputs"][:, 0], good()[f"{part}_targets"]
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    data.get("tiny", progress=lambda *_: None)
    assert data.load("tiny").test_targets.tolist() == [1, 0]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


# ---- damaged and foreign files ----


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def zipped(content: bytes, method: int = zipfile.ZIP_DEFLATED, name: str = "x.npy") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def tarred(content: bytes, name: str = "x.npy") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


FOREIGN = {
    "empty": b"",
    "text": b"<html>not found</html>",
    "a cut file": npz(x=np.arange(3))[30:],
    "a pickle": pickle.dumps([1, 2]),
    "no header": zipped(b"no array"),
    "an unfinished header": zipped(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (3,")),
    "a header without keys": zipped(npy("{}")),
    "a header of brackets": zipped(npy("[" * 9000)),
    "an impossible shape": zipped(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-3, 2**70)}")),
    "a shape beyond memory": zipped(npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10**16,)}")),
    "objects": npz(x=np.array([{}, None], object)),
    "another compression": zipped(b"no array", zipfile.ZIP_BZIP2),
    "a spreadsheet": zipped(b"<xml/>", name="xl/workbook.xml"),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_npz_is_reported(content, monkeypatch):
    tiny(monkeypatch)
    path = store.write("tiny", good())
    path.write_bytes(content)
    with pytest.raises(data.DataMissing, match=r"tiny\.npz is damaged.*minifisher data get tiny"):
        data.load("tiny")


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    """Cut it, overwrite some bytes, or repeat a part."""
    changed = bytearray(content)
    kind = generator.integers(3)
    if kind == 0:
        return bytes(changed[: generator.integers(len(changed))])
    start, length = generator.integers(len(changed)), generator.integers(1, 9)
    if kind == 1:
        changed[start : start + length] = generator.bytes(len(changed[start : start + length]))
    else:
        changed[start:start] = changed[start : start + 40]
    return bytes(changed)


def test_no_damage_to_a_stored_file_raises_anything_else(monkeypatch):
    tiny(monkeypatch)
    path, generator = store.write("tiny", good()), np.random.default_rng(0)
    content = path.read_bytes()
    for _ in range(300):
        path.write_bytes(damaged(content, generator))
        try:
            loaded = data.load("tiny")
        except data.DataMissing:
            continue
        assert loaded.train_targets.tolist() == [0, 1, 0, 1]  # the damage hit a byte without meaning


def mat() -> bytes:
    stream = io.BytesIO()
    savemat(
        stream, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((2, 1), np.uint8)}, do_compression=True
    )
    return stream.getvalue()


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar"])
def test_no_damage_to_an_archive_raises_anything_else(name, tmp_path):
    payload, generator = np.random.default_rng(1).bytes(500) * 3, np.random.default_rng(0)
    content = zipped(payload) if name == "a.zip" else tarred(payload)
    content = gzip.decompress(content) if name == "a.tar" else content
    for _ in range(200):
        (tmp_path / name).write_bytes(damaged(content, generator))
        try:
            contents(tmp_path, ".*")
        except WrongData:
            continue


@pytest.mark.parametrize("kind", ["gzip", "pickle", "matlab", "planetoid"])
def test_no_damage_to_a_file_raises_anything_else(kind):
    generator = np.random.default_rng(0)
    batch = pickle.dumps({"data": np.arange(60, dtype=np.uint8), "labels": list(range(300))}, 2)
    content = {"gzip": gzip.compress(idx(np.arange(64, dtype=np.uint8).reshape(4, 4, 4))), "matlab": mat()}
    decode = {
        "gzip": parse,
        "pickle": pickles.loads,
        "matlab": lambda part: SVHN.decode({"train_32x32.mat": part, "test_32x32.mat": part}),
        "planetoid": lambda part: planetoid("t").decode({f"ind.t.{name}": part for name in PARTS}),
    }[kind]
    for _ in range(200):
        try:
            decode(damaged(content.get(kind, batch), generator))
        except WrongData:
            continue


def test_whatever_a_decoder_raises_becomes_wrong_data():
    def deep(_files):
        return deep(_files)

    for decoder in (deep, {}.popitem, lambda _: 1 / 0, lambda _: {}["x"]):
        with pytest.raises(WrongData, match="another format than expected"):
            Format("x", decoder).decode({})


def test_a_place_in_the_memo_of_a_pickle_takes_no_memory():
    with pytest.raises(WrongData, match="memo"):
        pickles.loads(b"\x80\x02]r" + struct.pack("<I", 2**31) + b".")


# ---- small files with much inside ----


MANY_ZEROS = gzip.compress(bytes(MIB)) * 300  # gzip files in a row are one gzip file


def member_of_a_tar(kind: bytes, name: str) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, 300 * MIB
    return gzip.compress(member.tobuf()) + MANY_ZEROS


def bombs() -> dict[str, bytes]:
    """Small files that hold 200 MiB of zeros or more, each in a folder of its own."""
    header = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({200 * MIB},)}}")
    image = struct.pack(">BBBBIII", 0, 0, 8, 3, 300 * 1024, 32, 32)
    name = "train-images-idx3-ubyte"
    return {
        f"1/{name}.gz": gzip.compress(image) + MANY_ZEROS,
        "2/deflate.zip": zipped(image + bytes(200 * MIB), name=name),
        "3/bzip2.zip": zipped(image, zipfile.ZIP_BZIP2, name),
        "4/member.tgz": member_of_a_tar(tarfile.REGTYPE, name),
        "5/header.tgz": member_of_a_tar(tarfile.XHDTYPE, "header"),
        "6/tiny.npz": zipped(header + bytes(200 * MIB)),
    }


SCRIPT = """
import os, pathlib, resource, sys
from minifisher_lab.data import store
from minifisher_lab.data.archives import contents
from minifisher_lab.data.idx import IDX

def open_it(folder):
    os.environ["MINIFISHER_DATA"] = str(folder)
    if (folder / "tiny.npz").exists():
        return store.read("tiny", limit=IDX.limit)
    return IDX.decode(contents(folder, IDX.members, IDX.limit))

for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        open_it(folder)
    except (ValueError, LookupError) as error:
        print(type(error).__name__, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_small_file_with_much_inside_is_refused_and_takes_little_memory(tmp_path):
    for name, content in bombs().items():
        assert len(content) < 4 * MIB
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    outcomes = [line.split() for line in done.stdout.splitlines()]
    assert [error for error, _ in outcomes] == ["WrongData"] * 5 + ["DataMissing"], done.stderr
    assert max(int(kilobytes) for _, kilobytes in outcomes) < 150 * 1024


def test_a_matlab_file_with_much_inside_is_refused():
    stream = io.BytesIO()
    savemat(stream, {"X": np.zeros(9), "y": np.ones(2, np.uint8)}, do_compression=True)
    with pytest.raises(WrongData, match="variable X of shape"):
        SVHN.decode({"train_32x32.mat": stream.getvalue()})


# ---- what a killed process leaves behind ----

KILLED = """
import time
from minifisher_lab import data, files
from minifisher_lab.data import table
from minifisher_lab.data.idx import IDX

class Endless:
    label = "endless"
    def fetch(self, folder, progress):
        (folder / "half a file").write_bytes(bytes(1000))
        print("downloading", flush=True)
        time.sleep(60)

table.ENTRIES = (table.Entry("tiny", "", "", routes=(table.Route(Endless(), IDX),)),)
data.get("tiny")
"""


def test_the_next_fetch_deletes_what_a_killed_download_left(tmp_path, monkeypatch):
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        process.stdout.readline()
        tiny(monkeypatch)
        with pytest.raises(data.DataUnavailable):
            data.get("tiny", progress=lambda *_: None)
        assert len(list((tmp_path / "cache").glob("*.part"))) == 1  # its process still works on it
        process.kill()
    (tmp_path / "cache" / f"tiny.{process.pid}.part").write_bytes(b"as an earlier release named it")
    with pytest.raises(data.DataUnavailable):
        data.get("tiny", progress=lambda *_: None)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "age", "kept"),
    [
        ("x~another-machine~1.part", 10, True),
        ("x~another-machine~1.part", 7200, False),
        ("x.part", 10, True),
        ("x.part", 7200, False),
        pytest.param(f"x{files.part_ending()}", 7200, True, id="of this process"),
    ],
)
def test_a_part_whose_process_cannot_be_asked_is_deleted_after_an_hour(name, age, kept, tmp_path):
    (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / name, (time.time() - age,) * 2)
    files.remove_abandoned(tmp_path)
    assert (tmp_path / name).exists() == kept


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    tiny(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIFISHER_DATA", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        data.DataUnavailable, match=r"cannot store tiny in .*Not a directory.*MINIFISHER_DATA"
    ):
        data.get("tiny", progress=lambda *_: None)
