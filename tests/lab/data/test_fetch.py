"""Fetching: every source against a local server or a fake command, and what files a failure leaves."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress as RichProgress

from minifisher_lab import data
from minifisher_lab.data import sources, store, table
from minifisher_lab.data.progress import _reporter, shown
from minifisher_lab.data.records import Format, WrongData
from minifisher_lab.data.sources import Apt, Npm, Official, PipFile, PipWheel, SourceFailed
from minifisher_lab.data.table import Entry, Route, Sha256

PAYLOAD = bytes(range(256)) * 2000


def decode(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    return {"x": np.frombuffer(next(iter(files.values())), np.uint8)}


PLAIN = Format(r"payload\.bin", decode)
CHECK = Sha256(store.digest({"x": np.frombuffer(PAYLOAD, np.uint8)}))


def quiet(_step: str, _done: int, _total: int | None) -> None:
    pass


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """An empty cache, an empty folder for temporary files, and no network beyond this machine."""
    monkeypatch.setenv("MINIFISHER_DATA", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    resolve = socket.getaddrinfo

    def local_only(host, *arguments, **options):
        if host not in ("127.0.0.1", "localhost"):
            raise socket.gaierror(socket.EAI_NONAME, "the tests stay on this machine")
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local_only)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def left_behind(tmp_path: Path) -> list[str]:
    return [
        str(path)
        for name in ("cache", "temporary")
        for path in (tmp_path / name).rglob("*")
        if path.is_file()
    ]


class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body, length = self.server.pages.get(self.path, (None, 0))
        self.send_response(404 if body is None else 200)
        self.send_header(
            "Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream"
        )
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as running:
        running.pages = {}
        running.address = f"http://127.0.0.1:{running.server_address[1]}/"
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def serve(server, path: str, body: bytes, length: int | None = None) -> None:
    server.pages[path] = body, len(body) if length is None else length


def official(address: str, known: str | None = None) -> Official:
    return Official((address,), (("payload.bin", known),))


def enrol(monkeypatch, *fetched, check=CHECK) -> None:
    routes = tuple(Route(source, PLAIN) for source in fetched)
    monkeypatch.setattr(table, "ENTRIES", (Entry("tiny", "bytes", "none", routes=routes, check=check),))


def test_official_files(server, monkeypatch, cache, tmp_path):
    serve(server, "/payload.bin", PAYLOAD)
    enrol(monkeypatch, official(server.address, f"md5:{hashlib.md5(PAYLOAD).hexdigest()}"))
    seen = []
    path = data.get("tiny", progress=lambda step, done, total: seen.append((step, done, total)))
    assert path == cache / "tiny.npz"
    np.testing.assert_array_equal(store.read("tiny")["x"], np.frombuffer(PAYLOAD, np.uint8))
    assert seen[0] == ("payload.bin", 0, None)
    assert seen[-1] == ("payload.bin", len(PAYLOAD), len(PAYLOAD))
    assert len(seen) > 4
    assert left_behind(tmp_path) == [str(path)]


def test_a_stored_dataset_is_not_fetched_again(server, monkeypatch):
    serve(server, "/payload.bin", PAYLOAD)
    enrol(monkeypatch, official(server.address))
    first = data.get("tiny", progress=quiet).stat()
    server.pages.clear()
    again = data.get("tiny", progress=quiet).stat()
    assert (first.st_ino, first.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)


def test_the_second_address_is_used_if_the_first_fails(server, monkeypatch, cache):
    serve(server, "/mirror/payload.bin", PAYLOAD)
    addresses = server.address + "gone/", server.address + "mirror/"
    enrol(monkeypatch, Official(addresses, (("payload.bin", None),)))
    assert data.get("tiny", progress=quiet) == cache / "tiny.npz"


@pytest.mark.parametrize("trouble", ["cut short", "wrong bytes", "wrong hash", "not there"])
def test_a_broken_download_leaves_nothing(server, monkeypatch, tmp_path, trouble):
    wrong = PAYLOAD[:-1] + b"!"
    if trouble != "not there":
        body = {"cut short": PAYLOAD[:1000], "wrong bytes": wrong, "wrong hash": PAYLOAD}[trouble]
        serve(server, "/payload.bin", body, len(PAYLOAD))
    known = f"md5:{hashlib.md5(wrong).hexdigest()}" if trouble == "wrong hash" else None
    enrol(monkeypatch, official(server.address, known))
    expected = {"cut short": "bytes", "wrong bytes": "sha256", "wrong hash": "hash", "not there": "404"}[
        trouble
    ]
    with pytest.raises(data.DataUnavailable, match=expected):
        data.get("tiny", progress=quiet)
    assert left_behind(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(server, monkeypatch, tmp_path):
    serve(server, "/payload.bin", PAYLOAD)
    enrol(monkeypatch, official(server.address))

    def interrupt(_step, done, _total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.get("tiny", progress=interrupt)
    assert left_behind(tmp_path) == []


def test_an_interrupted_write_keeps_the_old_file(monkeypatch, tmp_path):
    path = store.write("tiny", {"x": np.arange(3)})

    def fail(file, **_):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space"):
        store.write("tiny", {"x": np.arange(5)})
    assert left_behind(tmp_path) == [str(path)]
    assert store.read("tiny")["x"].tolist() == [0, 1, 2]


def test_a_reader_sees_the_old_file_or_the_new_one():
    with store.write("tiny", {"x": np.arange(3)}).open("rb") as old:
        store.write("tiny", {"x": np.arange(5)})
        assert np.load(old)["x"].tolist() == [0, 1, 2]
    assert store.read("tiny")["x"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_damaged_cache_file_is_reported(harm):
    path = store.write("tiny", {"x": np.arange(1000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content[:-100] if harm == "cut" else content)
    with pytest.raises(data.DataMissing, match=r"damaged.*delete it"):
        store.read("tiny")


def test_the_digest_tells_arrays_apart():
    plain = {"x": np.arange(6), "y": np.zeros(2)}
    digests = {
        store.digest(arrays)
        for arrays in (
            plain,
            plain | {"x": np.arange(6).reshape(2, 3)},
            plain | {"x": np.arange(6, dtype=np.int32)},
            plain | {"x": np.array([0, 1, 2, 3, 4, 6])},
            {"z": plain["x"], "y": plain["y"]},
        )
    }
    assert len(digests) == 5
    strided = np.arange(12)[::2] // 2
    assert store.digest({"y": plain["y"], "x": strided}) == store.digest(plain)


def test_the_message_lists_what_was_tried_and_what_to_do(server, monkeypatch, cache):
    monkeypatch.setenv("PATH", "")
    unreachable = Official(("http://nowhere.invalid/data/", server.address), (("payload.bin", None),))
    enrol(monkeypatch, unreachable, Npm("some-package", "1.0"), Apt("other-package"))
    with pytest.raises(data.DataUnavailable) as caught:
        data.get("tiny", progress=quiet)
    for part in (
        "no source delivered tiny",
        "http://nowhere.invalid/data/payload.bin",
        "the tests stay on this machine",
        "404",
        "npm package some-package 1.0: npm is not installed",
        "apt package other-package: dpkg-deb is not installed",
        "put payload.bin (from http://nowhere.invalid/data/)",
        str(data.by_hand("tiny")),
        "minifisher data get tiny",
        str(cache / "tiny.npz"),
    ):
        assert part in str(caught.value)


def test_files_in_the_by_hand_folder(monkeypatch):
    enrol(monkeypatch, official("http://nowhere.invalid/"))
    data.by_hand("tiny").mkdir(parents=True)
    (data.by_hand("tiny") / "payload.bin").write_bytes(b"wrong")
    with pytest.raises(data.DataUnavailable, match=r"files in .*by-hand.*sha256"):
        data.get("tiny", progress=quiet)
    with zipfile.ZipFile(data.by_hand("tiny") / "all.zip", "w") as archive:
        archive.writestr("inside/payload.bin", PAYLOAD)
    (data.by_hand("tiny") / "payload.bin").unlink()
    assert data.get("tiny", progress=quiet).exists()


def client(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """A folder of fake commands, first on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "bin"


def test_npm(clients, monkeypatch, tmp_path):
    packed = tmp_path / "packed.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        member = tarfile.TarInfo("package/payload.bin")
        member.size = len(PAYLOAD)
        archive.addfile(member, io.BytesIO(PAYLOAD))
    client(clients, "npm", f'test "$1 $2" = "pack some-package@1.0" && cp {packed} some-package-1.0.tgz')
    enrol(monkeypatch, Npm("some-package", "1.0"))
    assert data.get("tiny", progress=quiet).exists()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'npm error code E404' >&2; echo 'A complete log is in x' >&2; exit 1", "npm error code E404"),
        ("echo plain words; exit 3", "plain words"),
        ("exit 3", "exit status 3"),
        ("exit 0", "none of the files"),
    ],
)
def test_npm_failing(clients, monkeypatch, tmp_path, script, reason):
    client(clients, "npm", script)
    enrol(monkeypatch, Npm("some-package", "1.0"))
    with pytest.raises(data.DataUnavailable, match=f"npm package some-package 1.0: .*{reason}"):
        data.get("tiny", progress=quiet)
    assert left_behind(tmp_path) == []


def test_a_client_that_hangs(clients, monkeypatch, tmp_path):
    client(clients, "npm", "exec sleep 60")
    monkeypatch.setattr(sources, "LIMIT", 0.2)
    with pytest.raises(SourceFailed, match="longer than"):
        Npm("some-package", "1.0").fetch(tmp_path, quiet)


@pytest.mark.skipif(
    subprocess.run(["sh", "-c", "command -v dpkg-deb"], capture_output=True).returncode != 0,
    reason="dpkg-deb is not installed",
)
def test_apt(clients, monkeypatch, tmp_path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr/share").mkdir(parents=True)
    (tree / "usr/share/payload.bin").write_bytes(PAYLOAD)
    (tree / "DEBIAN/control").write_text(
        "Package: some-data\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    )
    package = tmp_path / "some-data_1_all.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "-Znone", str(tree), str(package)], check=True, capture_output=True
    )
    client(clients, "apt-get", f'test "$1 $2" = "download some-data" && cp {package} .')
    enrol(monkeypatch, Apt("some-data"))
    assert data.get("tiny", progress=quiet).exists()
    package.write_bytes(b"no archive")
    data.get("tiny", progress=quiet).unlink()
    with pytest.raises(data.DataUnavailable, match=r"some-data_1_all\.deb cannot be read"):
        data.get("tiny", progress=quiet)


def wheel(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("pkg/payload.bin", PAYLOAD)
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return stream.getvalue()


@pytest.fixture
def index(server, monkeypatch):
    """A package index on this machine, which the real pip is told to use."""
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.address}simple/")
    return server


def offer(index, package: str, file: str, content: bytes) -> None:
    serve(
        index, f"/simple/{package}/", f'<html><body><a href="/files/{file}">{file}</a></body></html>'.encode()
    )
    serve(index, f"/files/{file}", content)


def test_pip_wheel(index, monkeypatch):
    offer(index, "tinydata", "tinydata-1.0-py3-none-any.whl", wheel("tinydata"))
    enrol(monkeypatch, PipWheel("tinydata", "1.0"))
    assert data.get("tiny", progress=quiet).exists()


def test_pip_source_archive_is_read_and_not_executed(index, monkeypatch, tmp_path):
    stream = io.BytesIO()
    trace = tmp_path / "trace"
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in (("payload.bin", PAYLOAD), ("setup.py", f"open({str(trace)!r}, 'w')".encode())):
            member = tarfile.TarInfo(f"tinydata-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    offer(index, "tinydata", "tinydata-1.0.tar.gz", stream.getvalue())
    enrol(monkeypatch, PipFile("tinydata", "tinydata-1.0.tar.gz"))
    assert data.get("tiny", progress=quiet).exists()
    assert not trace.exists()


def test_pip_failing(index, monkeypatch):
    offer(index, "tinydata", "tinydata-2.0-py3-none-any.whl", wheel("tinydata"))
    enrol(monkeypatch, PipWheel("tinydata", "1.0"), PipFile("tinydata", "tinydata-1.0.tar.gz"))
    with pytest.raises(data.DataUnavailable) as caught:
        data.get("tiny", progress=quiet)
    assert "tinydata==1.0" in str(caught.value)
    assert "pip found no tinydata-1.0.tar.gz" in str(caught.value)


def test_without_a_callback_the_steps_are_shown_on_standard_error(capsys):
    with shown(None) as report:
        report("some file", 0, None)
        report("some file", 50, 100)
        report("other file", 1, 2)
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.splitlines() == ["fetching some file", "fetching other file"]  # no terminal: no bar


def test_the_bar_follows_the_steps():
    with RichProgress(console=Console(file=io.StringIO())) as bar:
        report = _reporter(bar)
        report("some file", 50, None)
        report("some file", 60, 100)
        assert [(task.description, task.completed, task.total) for task in bar.tasks] == [
            ("some file", 60, 100)
        ]
        report("other file", 1, 2)
        assert [(task.description, task.completed, task.total) for task in bar.tasks] == [
            ("other file", 1, 2)
        ]


def test_wrong_data_from_one_source_moves_on_to_the_next(server, monkeypatch):
    serve(server, "/bad/payload.bin", b"something else")
    serve(server, "/good/payload.bin", PAYLOAD)
    enrol(monkeypatch, official(server.address + "bad/"), official(server.address + "good/"))
    assert data.get("tiny", progress=quiet).exists()


def test_the_check_names_both_digests():
    with pytest.raises(WrongData, match=f"not {CHECK.expected}"):
        CHECK({"x": np.zeros(1)})


def test_pip_runs_in_this_python_if_it_has_pip():
    assert sources._pip() in ([sys.executable, "-m", "pip"], ["pip"])
