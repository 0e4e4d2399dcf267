"""The house: who imports whom, how long things are, and what is public."""

from __future__ import annotations

import ast
import inspect
import statistics
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minifisher
from minifisher import CurvatureOptimizer

SOURCE = Path(__file__).parent.parent / "src"
CORE, LABORATORY = SOURCE / "minifisher", SOURCE / "minifisher_lab"

# The order of the rooms (docs/architecture.md): a file imports from its own room or from an earlier one.
WALK = [
    ("options", "common_options", "parameters", "callers", "random_bits", "without_values"),
    ("linalg", "statistics"),
    ("kernels", "curvature"),
    ("distributed",),
    ("step",),
    ("state",),
    ("optimizer",),
    ("methods", "decay_groups"),
    ("integrations",),
    ("", "__main__", "public"),
]
# Only compiled kernels import extras; numpy and llvmlite come with numba.
EXTRAS = dict.fromkeys(("llvmlite", "numba", "numpy", "triton"), "kernels")
EXTRAS.update({name: f"integrations.{name}" for name in ("accelerate", "lightning", "transformers")})
EXTRAS["typing_extensions"] = "options"  # for type checkers; torch depends on it


def modules(package):
    return sorted(package.rglob("*.py"))


def short_name(path):
    """statistics.capture; the empty string for the package itself."""
    parts = path.relative_to(CORE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path):
    """Every module that a file imports, under TYPE_CHECKING or inside a function too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: absolute imports only"
            for alias in node.names:
                inside = SOURCE.joinpath(*node.module.split("."), alias.name)
                is_module = inside.with_suffix(".py").exists() or inside.is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def place(module):
    """Where on the walk a module of the core stands."""
    for index, names in enumerate(WALK):
        if any(module == name or (name and module.startswith(f"{name}.")) for name in names):
            return index
    raise AssertionError(f"{module} has no place on the walk: give it one in tests/test_house.py")


@pytest.mark.parametrize("path", modules(CORE), ids=short_name)
def test_no_file_imports_from_a_later_room(path):
    for name in imports(path):
        if name.split(".")[0] == "minifisher":
            assert place(name.partition(".")[2]) <= place(short_name(path)), f"{path.name} imports {name}"


def test_no_circle_of_imports():
    graph = {f"minifisher.{short_name(path)}".rstrip("."): set(imports(path)) for path in modules(CORE)}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", modules(CORE), ids=short_name)
def test_the_core_imports_torch_and_the_standard_library_alone(path):
    for name in imports(path):
        root = name.split(".")[0]
        allowed = root in {"torch", "minifisher", *sys.stdlib_module_names}
        assert allowed or short_name(path).startswith(EXTRAS.get(root, "nothing")), name


@pytest.mark.parametrize("path", modules(CORE), ids=short_name)
def test_only_one_file_knows_of_ranks(path):
    if short_name(path) != "distributed.collectives":
        assert not [name for name in imports(path) if name.startswith("torch.distributed")]
        assert "torch.distributed" not in _code(path)


def _code(path):
    """The names that a file computes with: torch.distributed as an attribute, not in a comment."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", modules(CORE / "methods"), ids=short_name)
def test_a_method_names_no_hook_no_rank_and_no_device(path):
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"register_forward_hook", "register_hook", "cuda", "is_cuda", "get_rank", "all_reduce"}
    assert "minifisher.statistics.capture" not in set(imports(path))


def test_the_engine_never_names_a_method():
    engine = [path for path in modules(CORE) if "methods" not in path.parts and path.parent != CORE]
    for path in (*engine, CORE / "optimizer.py", CORE / "curvature.py"):
        identifiers = {
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Name | ast.Attribute)
        }
        assert not {identifier.lower() for identifier in identifiers} & set(minifisher.METHODS), path


@pytest.mark.parametrize("path", modules(LABORATORY), ids=lambda path: str(path.relative_to(LABORATORY)))
def test_the_laboratory_sees_public_names_only(path):
    tree = ast.parse(path.read_text())
    assert not [name for name in imports(path) if name.startswith("minifisher.")]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "minifisher"
    }
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "minifisher"
        for alias in node.names
    }
    assert used | imported <= public_names()


def public_names():
    """What `minifisher/public.py` hands out: names imported as themselves, and constants."""
    tree = ast.parse((CORE / "public.py").read_text())
    names = {
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assigned = {ast.unparse(node.target) for node in tree.body if isinstance(node, ast.AnnAssign)}
    return names | {name for name in assigned if not name.startswith("_")}


def test_import_minifisher_hands_out_the_public_names_and_imports_torch_at_their_first_use():
    code = """
import sys, minifisher
assert minifisher.__version__ and not hasattr(minifisher, "__wrapped__") and "torch" not in sys.modules
from minifisher import *
assert set(public) <= set(globals()) and set(public) <= set(dir(minifisher))
assert minifisher.optimizer.CurvatureOptimizer is CurvatureOptimizer
assert not hasattr(minifisher, "nonsense")
"""
    names = sorted({*public_names(), "create"})
    command = [sys.executable, "-c", f"public = {names!r}\n{code}"]
    done = subprocess.run(command, env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- sizes ----


def functions(path):
    """Name -> lines, signature included, docstring and decorators not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, length


@pytest.mark.parametrize("package", [CORE, LABORATORY], ids=lambda package: package.name)
def test_functions_are_short(package):
    lengths = {(str(path), name): n for path in modules(package) for name, n in functions(path)}
    assert statistics.median(lengths.values()) <= 9
    assert not {name: length for name, length in lengths.items() if length > 60}


@pytest.mark.parametrize("package", [CORE, LABORATORY], ids=lambda package: package.name)
def test_files_are_short(package):
    """At most 400 lines; one class may take more, because no class is cut in pieces to meet a number."""
    lines = {path: len(path.read_text().splitlines()) for path in modules(package)}
    long = [path for path, count in lines.items() if count > 400]
    assert [path.name for path in long] == ["optimizer.py"][: len(long)]
    assert max(lines.values()) <= 480


# ---- what is public ----


def test_every_public_name_has_a_docstring():
    for name in public_names() - {"METHODS"}:
        public = getattr(minifisher, name)
        assert inspect.getdoc(public), name
        if inspect.isclass(public):
            own = {key: value for key, value in vars(public).items() if not key.startswith("_")}
            methods = {key: value for key, value in own.items() if inspect.isfunction(value)}
            assert not [key for key, value in methods.items() if not inspect.getdoc(value)], name


def test_methods_are_computed_from_the_public_classes():
    classes = [getattr(minifisher, name) for name in public_names() - {"METHODS"}]
    methods = [
        public
        for public in classes
        if inspect.isclass(public)
        and issubclass(public, CurvatureOptimizer)
        and public is not CurvatureOptimizer
    ]
    assert {method.__name__.lower(): method for method in methods} == minifisher.METHODS
    assert minifisher.METHODS["mbf"] is minifisher.MBF


def test_the_first_docstring_line_of_a_method_is_one_sentence_and_its_source_is_named():
    for method in minifisher.METHODS.values():
        assert inspect.getdoc(method).splitlines()[0].endswith(".")
        assert any(year in inspect.getdoc(method) for year in ("201", "202")), f"{method}: which paper?"


def test_the_core_imports_without_the_extras():
    blocked = ["numba", "triton", "matplotlib", "typer", "rich", "sklearn", "scipy", "pooch", "optuna"]
    script = (
        "import sys, torch\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        "import minifisher\n"
        "weight = torch.nn.Parameter(torch.ones(4, 4))\n"
        "opt = minifisher.MBF([weight], lr=0.1)\n"
        "weight.sum().backward()\n"
        "opt.step()\n"
        "assert (weight < 1).all()\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
