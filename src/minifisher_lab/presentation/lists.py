"""The lists: problems by kind, optimizers and their arguments, datasets; as tables or as JSON."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from minifisher_lab.names import look_up
from minifisher_lab.terminal import console, print_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from minifisher_lab.training.optimizers import Choice

ARGUMENTS_HINT = (
    "Arguments follow the name: mbf:power=0.5:graft=None. `minifisher optimizers NAME` lists them."
)
PROBLEMS_HINT = (
    "offline: needs no download; yes: fetched to this machine; -: minifisher data get DATA. suite: the "
    "smallest one that measures it. an epoch: what the last run of that optimizer took here."
)
COLUMNS = ("data", "here", "suite", "batch", "epochs", "parameters", "an epoch")

WRITTEN = Path(__file__).with_name("lists.json")
"""What the lists say of problems and optimizers, so that they need not import torch; see `write_lists`."""


def _written(name: str) -> Any:
    return json.loads(WRITTEN.read_text())[name]


def names(of: Literal["problem", "optimizer"]) -> list[str]:
    """The names of all problems or optimizers."""
    key = {"problem": "problem", "optimizer": "name"}[of]
    return [row[key] for row in _written(f"{of}s")]


def problems(as_json: bool) -> None:
    """The problems by kind: their data, whether it is here, their suite, and what an epoch took here."""
    from minifisher_lab import data
    from minifisher_lab.training import epoch_times

    datasets, times = {row.name: row for row in data.catalogue()}, epoch_times.known()
    rows = [
        {
            **row,
            "here": datasets[row["data"]].present,
            "offline": datasets[row["data"]].offline,
            "epoch seconds": times.get(row["problem"], {}),
        }
        for row in _written("problems")
    ]
    if as_json:
        print_json(rows)
        return
    _print_problems(rows)
    console.print(f"\n{PROBLEMS_HINT}", highlight=False)
    console.print("A problem of your own: minifisher compare MODULE:FUNCTION", highlight=False)


def _print_problems(rows: Sequence[dict[str, Any]]) -> None:
    """Aligned columns beside the names where the terminal is wide enough, else below each name."""
    lines = [_cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
    indent = max(len(row["problem"]) for row in rows)
    beside = indent + sum(widths) + 2 * len(widths) <= console.width
    title = "problem".ljust(indent + 2) if beside else "problem\n    "
    console.print(f"[bold]{title}{_aligned(COLUMNS, widths)}[/]", highlight=False)
    kind = ""
    for row, cells in zip(rows, lines, strict=True):
        if row["kind"] != kind:
            kind = row["kind"]
            console.print(f"[bold italic]{kind}[/]")
        numbers, about = _aligned(cells, widths), f"[dim]{row['what it is']}[/]"
        if beside:
            console.print(f"{row['problem'].ljust(indent)}  {numbers}", highlight=False)
            console.print(Padding(about, (0, 0, 0, 2)), highlight=False)
        else:
            console.print(f"{row['problem']}  {about}", highlight=False)
            console.print(f"    {numbers}", highlight=False)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    here = "offline" if row["offline"] else _mark(row["here"])
    numbers = str(row["batch"]), f"{row['epochs']:g}", f"{row['parameters']:,}"
    return row["data"], here, row["suite"], *numbers, _epoch(row["epoch seconds"])


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    words = 3
    pairs = list(zip(cells, widths, strict=True))
    left = [cell.ljust(width) for cell, width in pairs[:words]]
    return "  ".join([*left, *(cell.rjust(width) for cell, width in pairs[words:])])


def _epoch(times: dict[str, float]) -> str:
    """The seconds or minutes of an epoch, and the optimizer; a dash where nothing was measured."""
    from minifisher_lab.training import epoch_times

    known = epoch_times.shown(times)
    if known is None:
        return "-"
    name, seconds = known
    time = (
        f"{seconds / 60:.0f} min"
        if seconds >= 120
        else f"{seconds:.2g} s"
        if seconds < 10
        else f"{seconds:.0f} s"
    )
    return f"{time} {name}"


def all_optimizers(as_json: bool) -> None:
    """The optimizers with their default learning rate and the rates that --tune tries."""
    rows = _written("optimizers")
    if as_json:
        print_json(rows)
        return
    table = _table(("optimizer", "lr", "--tune tries"), ("what it is",))
    for row in rows:
        tried = f"{row['grid'][0]:g} to {row['grid'][-1]:g}"
        table.add_row(row["name"], f"{row['lr']:g}", tried, row["description"])
    console.print(table)
    console.print(f"\n{ARGUMENTS_HINT}", highlight=False)


def optimizer(spec: str, as_json: bool) -> None:
    """The arguments of one optimizer: default, values, meaning."""
    try:
        row = _described(spec)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    arguments = _written("arguments")[row["class"]]
    if as_json:
        print_json({**row, "arguments": arguments})
        return
    console.print(f"{row['name']}: {row['description']}. Learning rate {row['lr']:g}.\n", highlight=False)
    for argument in arguments:
        values = escape(argument["values"])
        console.print(f"[bold]{argument['argument']}[/] = {argument['default']}  [dim]{values}[/]")
        console.print(Padding(escape(argument["meaning"]), (0, 0, 0, 4)))


def _described(spec: str) -> dict[str, Any]:
    """The row of that name; one with arguments, as mbf:power=0.5, is made, and that imports torch."""
    if ":" in spec:
        from minifisher_lab.training.optimizers import choose

        return choice_record(choose(spec))
    return look_up("optimizer", spec, {row["name"]: row for row in _written("optimizers")})


def choice_record(choice: Choice) -> dict[str, Any]:
    """What the list of optimizers says of one of them."""
    return {
        "name": choice.name,
        "description": choice.description,
        "lr": choice.rate,
        "grid": list(choice.grid),
        "class": choice.method.__name__,
    }


def arguments_of(method: Any) -> list[dict[str, str]]:
    """minifisher's methods declare ranges and meanings; of torch's optimizers the signature tells less."""
    options = getattr(method, "options", None)
    if options:
        return [
            _argument(option.name, option.default, option.range, option.meaning)
            for option in options.values()
            if option.init and option.name not in ("params", "model", "lr")
        ]
    return [
        _argument(name, parameter.default, "", f"see torch.optim.{method.__name__}")
        for name, parameter in inspect.signature(method).parameters.items()
        if name not in ("params", "model", "lr") and parameter.default is not inspect.Parameter.empty
    ]


def _argument(name: str, default: object, values: str, meaning: str) -> dict[str, str]:
    return {"argument": name, "default": repr(default), "values": values, "meaning": meaning}


def datasets(as_json: bool) -> None:
    """The datasets: what each holds, where it comes from, and whether it is on this machine."""
    from minifisher_lab import data

    names = ("name", "present", "holds", "source", "licence")
    rows = [{name: getattr(row, name) for name in names} for row in data.catalogue()]
    if as_json:
        print_json(rows)
        return
    table = _table(("dataset", "here"), ("what it holds", "where it comes from", "licence"))
    for row in rows:
        table.add_row(row["name"], _mark(row["present"]), row["holds"], row["source"], row["licence"])
    console.print(table)


def fetch(name: str) -> None:
    """Download a dataset, check it and store it."""
    from minifisher_lab import data

    try:
        look_up("dataset", name, dict.fromkeys(data.NAMES))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        data.get(name)
    except data.DataUnavailable as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error
    console.print(f"{name} is ready.")


def _table(fixed: Iterable[str], wrapped: Iterable[str]) -> Table:
    """A table whose first columns are never cut, and whose last ones wrap."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in fixed:
        table.add_column(name, no_wrap=True, justify="right" if name == "lr" else "left")
    for name in wrapped:
        table.add_column(name, overflow="fold")
    return table


def _mark(present: bool) -> str:
    return "yes" if present else "-"
