"""Every error and warning of the library has an entry on the page of troubleshooting."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "src" / "minifisher"
ENTRIES = re.findall(r"^`(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
GAP = "…"  # what differs from case to case


def template(node, assigned):
    """The text of a message with a gap for every value; a name stands for what was assigned to it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{[^}]*\}", GAP, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, {}) for part in node.values)
    if isinstance(node, ast.Name) and node.id in assigned:
        rest = {name: value for name, value in assigned.items() if name != node.id}
        return template(assigned[node.id], rest)
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".format"):
        return template(node.func.value, assigned)
    return GAP


def assignments(tree):
    """What each name was assigned last, anywhere in the file."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def warners(tree):
    """Functions that warn of a message that they are given."""
    return {
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "warnings.warn"
        if ast.unparse(call.args[0]) in {argument.arg for argument in function.args.args}
    }


def messages():
    """Where a message is -> its template."""
    for path in sorted(CORE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        assigned, warning = assignments(tree), {"warnings.warn", "warn_caller", *warners(tree)}
        for node in ast.walk(tree):
            made = node.exc if isinstance(node, ast.Raise) else node
            is_warning = isinstance(made, ast.Call) and ast.unparse(made.func) in warning
            if isinstance(made, ast.Call) and made.args and (made is not node or is_warning):
                text = template(made.args[0], assigned)
                if text != GAP:  # a function that warns of what it is given: its callers have the text
                    yield pytest.param(text, id=f"{path.relative_to(CORE)}:{node.lineno}")


MESSAGES = list(messages())


def test_the_messages_are_found():
    assert len(MESSAGES) > 50
    found = " ".join(message.values[0] for message in MESSAGES)
    for known in ("the step was skipped", "but no call of its module", "but none were drawn"):
        assert known in found


def matches(entry, message):
    """Whether the entry has the words of the message, as far as it goes."""
    return re.match(".*".join(map(re.escape, entry.split(GAP))), message, re.DOTALL) is not None


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_has_an_entry(message):
    assert any(matches(entry, message) for entry in ENTRIES), "describe it in docs/troubleshooting.md"


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_has_a_message(entry):
    assert any(matches(entry, message.values[0]) for message in MESSAGES), "remove it: nothing says this"
