"""The documentation site builds without a warning, its commands run, and so does the notebook."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minifisher_lab.cli import app
from minifisher_lab.problems import PROBLEMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"
LONG = {"demo", "suite", "report", "inspect"}  # tests/lab runs these
SMALL = {
    "train": ("--epochs", "0.1", "--points", "1"),
    "compare": ("--epochs", "0.1", "--points", "1"),
    "tune": ("--epochs", "0.1", "--trials", "2"),
}


def commands(text):
    """The commands `minifisher ...` in blocks of code, without their line breaks."""
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    for block in (*fenced, *indented):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(";"):
                if command.strip().startswith("minifisher "):
                    yield " ".join(command.split())


COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text())})


def small(words):
    """The same command with a short budget and a small network; the names are checked as they stand."""
    command, *arguments = words
    if command not in SMALL:
        return words
    named = [word for word in arguments if word in PROBLEMS or ":make" in word]
    assert named, f"{words} names no problem"
    arguments = [word for word in arguments if word not in PROBLEMS]
    own = [] if ":make" in " ".join(arguments) else ["autoencoder-digits"]
    for option in ("--epochs", "--seconds", "--seeds", "--trials", "--points", "--tune"):
        while option in arguments:
            at = arguments.index(option)
            del arguments[at : at + (1 if option == "--tune" else 2)]
    return [command, *own, *arguments, *SMALL[command]]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path, monkeypatch):
    words = shlex.split(command)[1:]
    if words[0] in LONG or "--resume" in words or words[:2] == ["data", "get"]:
        assert not CliRunner().invoke(app, [*words[:1], "--help"]).exit_code
        return
    source = (ROOT / "examples" / "own_problem.py").read_text()
    (tmp_path / "examples").mkdir()
    for name in ("my_module.py", "resnet32_bfloat16.py", "examples/own_problem.py"):
        (tmp_path / name).write_text(source)
    monkeypatch.chdir(tmp_path)
    for module in ("my_module", "resnet32_bfloat16"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    result = CliRunner().invoke(app, small(words))
    assert result.exit_code == 0, result.output


def test_there_are_commands():
    assert len(COMMANDS) > 10


def test_the_site_builds_without_a_warning(tmp_path):
    missing = [name for name in ("mkdocs", "material", "mkdocstrings") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'minifisher[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text()
    fetched = re.findall(r"<(?:script|link|img)[^>]*?(?:src|href)=\"(https?:[^\"]+)", home)
    assert not [url for url in fetched if "minifisher.github.io" not in url]  # its own canonical address


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}" in listed, page.name


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    if importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel"):
        import nbformat
        from nbclient import NotebookClient

        NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=120).execute(cwd=str(tmp_path))
        return
    import matplotlib as mpl

    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
