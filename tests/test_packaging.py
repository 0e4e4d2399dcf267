"""What is published: an sdist and a wheel that are valid, complete, and run in a clean environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import minifisher

ROOT = Path(__file__).parents[1]
VERSION = minifisher.__version__


def run(*command, cwd="/", **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**kept, **environment}, cwd=cwd
    )
    assert printed.returncode == 0, printed.stdout + printed.stderr
    return printed.stdout


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """Where Python finds what builds and checks packages; pip's index must have it."""
    folder = tmp_path_factory.mktemp("tools")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "hatchling", "twine"]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("pip cannot install hatchling and twine: no package index can be reached")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def built(tools, tmp_path_factory):
    """The sdist, and the wheel that is built from what the sdist holds."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "hatchling", "build", "-d", folder, "-t")
    run(*build, "sdist", cwd=ROOT, **tools)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    run(*build, "wheel", cwd=folder / sdist.name.removesuffix(".tar.gz"), **tools)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_both_are_valid_and_of_this_version(built, tools):
    assert all(VERSION in path.name for path in built)
    printed = run(sys.executable, "-m", "twine", "check", "--strict", *built, **tools)
    assert printed.count("PASSED") == 2


def test_the_wheel_holds_every_file_of_both_packages(built):
    inside = set(zipfile.ZipFile(built[1]).namelist())
    for package in ("minifisher", "minifisher_lab"):
        for path in (ROOT / "src" / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT / "src")) in inside


def test_the_wheel_runs_in_a_clean_environment(built, tmp_path):
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[1])
    (site,) = tmp_path.glob("lib/python*/site-packages")
    beside = {"PYTHONPATH": os.pathsep.join([str(site), str(Path(torch.__file__).parents[1])])}
    code = "import minifisher; print(minifisher.__file__, minifisher.__version__)"
    path, version = run(python, "-c", code, **beside).split()
    assert path.startswith(str(site))
    assert version == VERSION
    assert "compare" in run(tmp_path / "bin" / "minifisher", "--help", **beside)


def test_the_citation_and_the_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION
    assert VERSION in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_works_on_the_package_index():
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert all(link.startswith("https://") for link in links)
