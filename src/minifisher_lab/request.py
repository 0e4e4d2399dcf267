"""What a command was asked to do, and the run folder that it works in: a new one, or that of --resume."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import typer

from minifisher_lab.training.runs import PLAN, RunFolder, Unresumable

if TYPE_CHECKING:
    from pathlib import Path

ELSEWHERE = ("resume", "folder", "as_json")
"""Options that do not change what is measured; the run folder does not store them."""


def asked(context: typer.Context) -> SimpleNamespace:
    """The options of a command; with --resume those of the run folder, which the given ones must equal."""
    options = {name: value for name, value in context.params.items() if name not in ELSEWHERE}
    resume = context.params["resume"]
    if resume is None:
        if not (options.get("problem") or options.get("problems")):
            raise typer.BadParameter("give a PROBLEM, one of `minifisher problems`, or --resume RUN")
        return SimpleNamespace(**options)
    stored = _stored(resume, context.info_name)
    for name, value in options.items():
        given = context.get_parameter_source(name)
        if given and given.name == "COMMANDLINE" and value != stored.get(name):
            option = f"{name.replace('_', '-')} {stored.get(name)}"
            raise typer.BadParameter(f"{resume} was begun with {option}, not {value}: leave it out")
    return SimpleNamespace(**stored)


def _stored(resume: Path, command: str | None) -> dict[str, Any]:
    """The options that the run folder was begun with."""
    try:
        record = RunFolder.reopen(resume).read(PLAN)
    except Unresumable as error:
        raise typer.BadParameter(str(error)) from error
    begun = record.get("command") if isinstance(record, dict) else None
    if begun != command:
        raise typer.BadParameter(f"{resume} was begun by `{begun}`, not by `{command}`")
    if not isinstance(record.get("options"), dict):
        raise typer.BadParameter(f"{resume / PLAN} is damaged: it has no options; begin a new run")
    return dict(record["options"])


def run_folder(context: typer.Context, label: str, **options: object) -> RunFolder:
    """The folder of --resume, or a new one that stores the command and its options."""
    if context.params.get("resume"):
        return RunFolder.reopen(context.params["resume"])
    parent = context.params["folder"]
    try:
        return RunFolder.create(parent, label, {"command": context.info_name, "options": options})
    except OSError as error:  # the path is a file, is not writable, or the disk is full
        message = f"cannot create a run folder in --folder {parent}: {error.strerror}"
        raise typer.BadParameter(message) from error
