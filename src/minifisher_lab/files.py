"""Write whole files: a reader sees the old file or the new one, even if the writing process is killed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
import weakref
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOUR = 3600.0


def part_ending() -> str:
    """The ending of a file or folder that this process has begun: ~machine~process.part."""
    return f"~{platform.node()[:60]}~{os.getpid()}.part"


@contextmanager
def replaced(target: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `target` at the end; if anything fails, `target` stays as it is."""
    part = target.with_name(target.name[:150] + part_ending())
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write(target: Path, content: bytes | memoryview) -> Path:
    """Write a whole file."""
    with replaced(target) as file:
        file.write(content)
    return target


def remove_abandoned(folder: Path) -> None:
    """Delete the files and folders in `folder` that a killed process began and did not finish."""
    for part in folder.glob("*.part"):
        if _abandoned(part):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)  # another process may be deleting it too
            else:
                part.unlink(missing_ok=True)


def _abandoned(part: Path) -> bool:
    """Whether its process has ended. One that cannot be asked has ended if nothing changed for an hour."""
    owner = re.search(r"(?:~(?P<machine>[^~]*)~|\.)(?P<process>\d+)\.part$", part.name)
    if owner and os.name == "posix" and owner["machine"] in (None, platform.node()[:60]):
        return not _running(int(owner["process"]))
    return _last_change(part) < time.time() - HOUR


def _running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs under another user's name
        return True
    return True


def _last_change(part: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (part, *part.rglob("*")))
    except FileNotFoundError:  # its process has just finished it
        return time.time()


# ---- one process for one folder ----


class Lock:
    """The lock of a folder. It is given back when this object or the process ends, however that ends."""

    def __init__(self, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)


_HELD: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()


def lock(folder: Path) -> Lock | None:
    """The lock of a folder, or the one that this process has already; None if another process has it.

    No file is written: it is the folder itself that is locked. Where the system or the file system has no
    locks, everybody gets one.
    """
    folder = folder.resolve()
    held = _HELD.get(folder)
    if held is not None:
        return held
    descriptor = os.open(os.devnull if fcntl is None else folder, os.O_RDONLY)
    _HELD[folder] = held = Lock(descriptor)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            del _HELD[folder]
            return None
        except OSError:  # a file system without locks
            return held
    return held
