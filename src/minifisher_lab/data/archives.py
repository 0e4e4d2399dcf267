"""Read archives in memory: nothing is unpacked to disk, and nothing in them is executed."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

from minifisher_lab.data.records import Files, WrongData

UNREADABLE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    subprocess.CalledProcessError,
)


def contents(folder: Path, members: str) -> Files:
    """The files in a folder and in its archives whose path ends with the regular expression `members`."""
    found: Files = {}
    wanted = re.compile(f"(?:^|.*/)(?:{members})")
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            try:
                found |= _read(file, wanted)
            except UNREADABLE as error:
                raise WrongData(f"{file.name} cannot be read: {error}") from error
    if not found:
        raise WrongData(f"none of the files needed was found ({members})")
    return found


def _read(file: Path, wanted: re.Pattern[str]) -> Files:
    if file.name.endswith((".tar", ".tgz", ".tar.gz")):
        with tarfile.open(file) as archive:
            return _from_tar(archive, wanted)
    if file.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(file)]
        plain = subprocess.run(command, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
            return _from_tar(archive, wanted)
    if file.suffix in {".zip", ".whl"}:
        with zipfile.ZipFile(file) as packed:
            return {name: packed.read(name) for name in packed.namelist() if wanted.fullmatch(name)}
    return {str(file): file.read_bytes()} if wanted.fullmatch(file.as_posix()) else {}


def _from_tar(archive: tarfile.TarFile, wanted: re.Pattern[str]) -> Files:
    found: Files = {}
    for member in archive:
        stream = archive.extractfile(member) if wanted.fullmatch(member.name) else None
        if stream is not None:
            found[member.name] = stream.read()
    return found


def named(files: Files, name: str) -> bytes:
    """The only file of this name, in any folder."""
    found = [data for path, data in files.items() if path.rpartition("/")[2] == name]
    if len(found) != 1:
        raise WrongData(f"{len(found)} files named {name} instead of one; found {sorted(files)[:20]}")
    return found[0]
