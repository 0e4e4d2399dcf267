"""Kill commands at random moments, go on with --resume, and compare with a command that nobody killed.

    python benchmarks/kills.py --kills 100

Every second command kills itself in the middle of writing a file; the others are killed from outside at any
moment. The weights, the points and the settings must be the same to the last bit; only seconds may differ.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import optuna  # noqa: F401 - imported here, so that no child has to
import torch

from minifisher_lab import cli

COMMANDS = {
    "train": "autoencoder-digits --optimizer mbf --checkpoint-every 2 --points 7 --epochs 3 --folder",
    "compare": "cnn-digits --optimizers sgd,mbf-sampled,muon --points 4 --epochs 0.7 --folder",
    "tune": "autoencoder-digits --optimizer kfac --trials 4 --epochs 1 --folder",
}
SECONDS = {"seconds", "step_seconds", "machine", "started"}


def main() -> None:
    """Kill each command as often as asked, and exit with 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("commands", nargs="*", default=list(COMMANDS), metavar="COMMAND")
    arguments = parser.parse_args()
    for command in arguments.commands:
        with tempfile.TemporaryDirectory() as folder:
            print(command, examine(command, arguments.kills, Path(folder), random.Random(arguments.seed)))


def examine(command: str, kills: int, folder: Path, chance: random.Random) -> str:
    """Run the command once in peace, then under kills; the result of every finished run must be the same."""
    torch.set_num_threads(1)  # threads do not survive a fork
    start = (command, *COMMANDS[command].split())
    began = time.monotonic()
    assert wait(child((*start, str(folder / "whole")), folder)) == 0, (folder / "log").read_text()
    usual = time.monotonic() - began
    whole, killed, halves, finished = results(folder / "whole"), 0, 0, 0
    while killed < kills:
        place = folder / f"cut{finished}"
        status = None
        while status != 0:
            again = begun(place)
            arguments = (command, "--resume", str(again)) if again else (*start, str(place))
            status = attempt(arguments, folder, usual, chance if killed < kills else None)
            assert status in (0, -signal.SIGKILL), (status, (folder / "log").read_text()[-3000:])
            killed += status == -signal.SIGKILL
            halves += bool(list(place.glob("*/*.part")))
        differing = differences(whole, results(place))
        assert not differing, f"{command}: after {killed} kills other results in {differing}"
        assert not list(begun(place).glob("*.part"))
        finished += 1
    return f"{killed} kills, {halves} of them inside a write; {finished} runs, all as without kills"


def begun(place: Path) -> Path | None:
    """The run folder to go on with; without a plan nothing has begun."""
    return next((plan.parent for plan in place.glob("*/plan.json")), None)


def attempt(arguments: tuple[str, ...], folder: Path, usual: float, chance: random.Random | None) -> int:
    """Run a command until it ends or is killed: by itself while it writes, or from outside."""
    if chance is None:
        return wait(child(arguments, folder))
    if chance.random() < 0.5:
        return wait(child(arguments, folder, fatal_write=chance.randint(1, 12)))
    process = child(arguments, folder)
    time.sleep(chance.uniform(0, usual))
    os.kill(process, signal.SIGKILL)
    return wait(process)


def child(arguments: tuple[str, ...], folder: Path, fatal_write: int | None = None) -> int:
    """Start the command in a copy of this process, which spares its imports."""
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        with (folder / "log").open("a") as log, contextlib.redirect_stdout(log):
            os.dup2(log.fileno(), sys.stderr.fileno())
            cli.console.file = log
            if fatal_write:
                kill_in_write(fatal_write)
            cli.app(list(arguments))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_in_write(number: int) -> None:
    """Kill this process when it has written the file of that number and not yet renamed it."""
    numbers = iter(range(1, number + 1))

    def sync(_: int) -> None:
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = sync


def wait(process: int) -> int:
    """The exit status, or the negative signal, as subprocess has it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def results(place: Path) -> dict[str, object]:
    """Everything in the newest run folder but the seconds."""
    run = begun(place)
    assert run is not None
    found: dict[str, object] = {}
    for file in sorted(run.iterdir()):
        if file.suffix == ".jsonl":
            found[file.name] = [timeless(json.loads(line)) for line in file.read_text().splitlines()]
        elif file.suffix == ".json":
            found[file.name] = timeless(json.loads(file.read_text()))
        elif file.suffix == ".pt":
            found[file.name] = exact(torch.load(file)["processes"])
        else:
            found[file.name] = None  # plots show seconds
    return found


def differences(one: object, other: object, place: str = "") -> list[str]:
    """Where two results differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        pairs = [(f"{place}/{key}", one.get(key, "absent"), other.get(key, "absent")) for key in keys]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{place}/{index}", *pair) for index, pair in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [f"{place}: {str(one)[:60]} and {str(other)[:60]}"]
    return [found for where, first, second in pairs for found in differences(first, second, where)]


def timeless(value: object) -> object:
    """The same without seconds and whatever is computed from them."""
    if isinstance(value, dict):
        kept = {key: timeless(entry) for key, entry in value.items() if key not in SECONDS}
        return {key: entry for key, entry in kept.items() if not key.startswith("seconds_to")}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def exact(value: object) -> object:
    """The same with the bytes of every tensor in its place."""
    if isinstance(value, torch.Tensor):
        stream = io.BytesIO()
        stream.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return str(value.dtype), tuple(value.shape), stream.getvalue()
    if isinstance(value, dict):
        return {key: exact(entry) for key, entry in value.items() if key not in SECONDS}
    return [exact(entry) for entry in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    main()
