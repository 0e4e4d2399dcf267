"""The documentation says what is there: links, paths, names, code, and the page of options."""

from __future__ import annotations

import pkgutil
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from minifisher import MBF

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# A path may begin at the root, in the package, or where benchmarks and their results are.
PUBLISHED = ROOT / "benchmarks" / "results" / "published_autoencoder"
PLACES = (ROOT, ROOT / "src" / "minifisher", ROOT / "benchmarks", PUBLISHED)
OF_THE_READER = {"FILE.py", "my_module.py", "plan.json"}
TO_FILL_IN = "<!-- to fill in"  # a line that speaks of what is not there yet
OWN_URLS = (
    "https://github.com/minifisher/minifisher/blob/main/",
    "https://github.com/minifisher/minifisher/tree/main/",
    "https://raw.githubusercontent.com/minifisher/minifisher/main/",
)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n\Z")


def paragraphs(page):
    """The text without the paragraphs that wait for something."""
    return "\n\n".join(part for part in page.read_text().split("\n\n") if TO_FILL_IN not in part)


def anchor(heading):
    """As GitHub makes it: lower case, without punctuation, hyphens for blanks."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def linked_file(page, target):
    """The file of this repository that a link leads to, with the heading; None where it leads elsewhere."""
    name, _, place = target.partition("#")
    for url in OWN_URLS:
        if target.startswith(url):
            return ROOT / name.removeprefix(url), place
    return None if "://" in target else (page.parent / name if name else page, place)


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        found = linked_file(page, target)
        if found is None:
            continue
        linked, place = found
        assert linked.exists(), target
        if place:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert place in map(anchor, headings), target


@every_page
def test_no_formula_is_taken_for_html(page):
    """A browser shows nothing of <M, x> outside of code."""
    text = re.sub(
        r"```.*?```|^    .*?$|`[^`]*`|<!--.*?-->", "", page.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    assert re.findall(r"<[A-Za-z/][^>]*>?", text) == []


@every_page
def test_paths_exist(page):
    text = re.sub(r"> \S+", "", paragraphs(page))  # what a command would write
    rooted = re.findall(r"(?:src|tests|benchmarks|docs|examples)/[\w./*-]*[\w*]", text)
    short = re.findall(r"[\w./*-]*\w\.(?:py|json|txt|toml)\b", text)
    for path in {*rooted, *short} - OF_THE_READER:
        assert any(list(place.glob(path)) for place in PLACES), path


@every_page
def test_dotted_names_can_be_imported(page):
    for name in set(re.findall(r"\bminifisher(?:_lab)?(?:\.[A-Za-z_]\w*)+", paragraphs(page))):
        if name.startswith("minifisher.integrations."):  # imports its package; tests/frameworks runs these
            assert (ROOT / "src" / name.replace(".", "/")).with_suffix(".py").exists(), name
        elif not name.endswith(".md"):
            pkgutil.resolve_name(name)


@every_page
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if not NOT_RUN.search(text[: block.start()]):
            exec(compile(block.group(1), f"{page.name}: {block.group(1)[:40]!r}", "exec"), given())


def given():
    """What the pages take for granted: a model, batches and a loss."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        loader = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(3)]
    return {"__name__": __name__, "model": model, "loader": loader, "loss_function": nn.CrossEntropyLoss()}


def test_the_bound_on_the_condition_number_is_that_of_the_defaults():
    damping = MBF.options["damping"].default
    bound = f"b = 64 and d = {damping}, the bound is {1 + 2 * 64 / damping:,.0f}."
    assert bound in " ".join((ROOT / "docs" / "numerics.md").read_text().split())


@pytest.mark.parametrize("page", [ROOT / "docs" / "options.md"], ids=lambda page: page.name)
def test_the_page_of_options_is_what_the_declarations_say(page):
    written = runpy.run_path(str(ROOT / "docs" / "write_options.py"))["text"]()
    assert page.read_text() == written, "run `python docs/write_options.py`"


# The command line runs own_problem.py (tests/lab/test_cli.py).
PROGRAMS = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.name != "own_problem.py"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_examples_run(path, capsys):
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("epoch")]
    assert losses[-1] < losses[0] / 2
