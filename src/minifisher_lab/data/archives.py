"""Read archives in memory: nothing is unpacked to disk, and nothing in them is executed.

A small archive can hold gigabytes of zeros. So nothing is decompressed beyond a limit that the caller sets.
"""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from minifisher_lab.data.records import MIB, Files, WrongData, refusing

ARCHIVE = 2048 * MIB  # bytes of a whole decompressed archive, with the files that are not needed
GZIP = b"\x1f\x8b"


class Readable(Protocol):
    """An open file, whatever it is compressed with."""

    def read(self, size: int = ..., /) -> bytes:
        """The next `size` bytes."""


def contents(folder: Path, members: str, limit: int = 512 * MIB) -> Files:
    """The files in a folder and in its archives whose path ends with the regular expression `members`.

    Together they hold at most `limit` bytes.
    """
    found: Files = {}
    wanted = re.compile(f"(?:^|.*/)(?:{members})")
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with refusing(f"{file.name} cannot be read"):
                for path, stream in _streams(file, wanted, limit):
                    found[path] = bounded(stream, limit - sum(map(len, found.values())))
    if not found:
        raise WrongData(f"none of the files needed was found ({members})")
    return found


def bounded(stream: Readable, limit: int) -> bytes:
    """The rest of the stream; ValueError if it holds more than `limit` bytes."""
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(
            f"more than {limit / MIB:.0f} MiB when decompressed, which no file needed here holds"
        )
    return data


def unzipped(data: bytes, limit: int) -> bytes:
    """The content of a gzip file, or the data as it is."""
    return bounded(gzip.GzipFile(fileobj=io.BytesIO(data)), limit) if data[:2] == GZIP else data


def check_zip(packed: zipfile.ZipFile, limit: int) -> None:
    """ValueError unless all files together are within the limit, and compressed so that this can be enforced.

    zipfile decompresses bzip2 and LZMA in large pieces, whatever length is asked for.
    """
    entries = packed.infolist()
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise ValueError("a zip file compressed neither with deflate nor not at all")
    if (size := sum(entry.file_size for entry in entries)) > limit:
        raise ValueError(f"{size / MIB:.0f} MiB when decompressed, more than {limit / MIB:.0f} MiB")


def _streams(file: Path, wanted: re.Pattern[str], limit: int) -> Iterator[tuple[str, IO[bytes]]]:
    """The needed files in an archive, or the file itself if it is needed."""
    if file.name.endswith((".tar", ".tgz", ".tar.gz")):
        with file.open("rb") as plain:
            yield from _in_tar(_Guarded(plain, limit) if _is_gzip(plain) else plain, wanted)
    elif file.suffix == ".deb":
        yield from _in_tar(io.BytesIO(_data_of_deb(file, limit)), wanted)
    elif file.suffix in {".zip", ".whl"}:
        with zipfile.ZipFile(file) as packed:
            check_zip(packed, ARCHIVE)
            for name in filter(wanted.fullmatch, packed.namelist()):
                with packed.open(name) as stream:
                    yield name, stream
    elif wanted.fullmatch(file.as_posix()):
        with file.open("rb") as stream:
            yield str(file), stream


def _is_gzip(file: IO[bytes]) -> bool:
    start = file.read(2)
    file.seek(0)
    return start == GZIP


class _Guarded(gzip.GzipFile):
    """A gzip file that gives at most `limit` bytes at once; tarfile asks for a header of any size."""

    def __init__(self, packed: IO[bytes], limit: int) -> None:
        super().__init__(fileobj=packed)
        self.limit = limit

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= self.limit + 1:
            raise ValueError(f"a part of {size} bytes in a tar file")
        return super().read(size)


def _in_tar(file: gzip.GzipFile | IO[bytes], wanted: re.Pattern[str]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.offset_data + member.size > ARCHIVE:
                raise ValueError(f"more than {ARCHIVE / MIB:.0f} MiB when decompressed")
            stream = archive.extractfile(member) if wanted.fullmatch(member.name) else None
            if stream is not None:
                yield member.name, stream


def _data_of_deb(file: Path, limit: int) -> bytes:
    command = ["dpkg-deb", "--fsys-tarfile", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            plain = bounded(process.stdout, 2 * limit)  # the other files in a package are small
        except ValueError:
            process.kill()
            raise
        _, complaint = process.communicate()
    if process.returncode:
        raise ValueError(complaint.decode(errors="replace").strip())
    return plain


def named(files: Files, name: str) -> bytes:
    """The only file of this name, in any folder."""
    found = [data for path, data in files.items() if path.rpartition("/")[2] == name]
    if len(found) != 1:
        raise WrongData(f"{len(found)} files named {name} instead of one; found {sorted(files)[:20]}")
    return found[0]
