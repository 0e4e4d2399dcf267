from __future__ import annotations

import math
import re
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from minifisher_lab.comparison import results
from minifisher_lab.comparison.results import interval, time_to_target
from minifisher_lab.comparison.study import Record, StudyFile, Unit, now
from minifisher_lab.comparison.suite import make_plan, open_study
from minifisher_lab.comparison.summary import Spread
from minifisher_lab.presentation import suite_plots, suite_report
from minifisher_lab.training.runs import Point, Run

if TYPE_CHECKING:
    from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIMIZERS = ("adamw", "mbf", "mbf-default", "sgd")


def _record(unit: Unit, place: int, *, error: str | None = None) -> Record:
    """A run whose loss falls the faster, the smaller `place` is."""
    seed = 0 if unit.kind == "trial" else 1 + unit.number
    accurate = unit.problem.startswith("cnn")
    points = [
        Point(
            s, s / 10, s / 50, 1.0, 2 * math.exp(-s / (10 + 5 * place)), 2.0, 10.0 + s if accurate else None
        )
        for s in range(0, 50, 5)
    ]
    run = Run(unit.problem, unit.entrant, 1e-3, seed, "finished", 45, 0.9, 9282, 4 * 9282, points=points)
    run.test_loss, run.test_accuracy = 0.5 + 0.01 * seed, 60.0 + seed if accurate else None
    setting = {"lr": 10.0 ** -(1 + unit.number) if unit.kind == "trial" else 0.1}
    if unit.entrant == "mbf":
        setting["damping"] = 0.1
    return Record(unit, setting, run, run.best_loss, now(), now(), {"cores": 2}, 1, 0.5, error)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFile:
    plan = make_plan("small", ["autoencoder-digits", "cnn-digits"], OPTIMIZERS, trials=3, seeds=3)
    path = tmp_path_factory.mktemp("report") / "tiny.sqlite"
    opened, _ = open_study(path, plan, torch.device("cpu"))
    for unit in plan.units():
        broken = "RuntimeError: no | kernel" if unit.entrant == "sgd" and unit.kind == "seed" else None
        opened.finish(_record(unit, OPTIMIZERS.index(unit.entrant), error=broken), {})
    return opened


@pytest.fixture(scope="module")
def page(study: StudyFile) -> str:
    return suite_report.write(study, study.path.with_suffix(""))[0].read_text()


def test_the_page_needs_no_other_file(page: str) -> None:
    references = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^")\s>]+)', page)
    assert references
    assert all(reference.startswith("#") for reference in references)
    assert "@import" not in page


def test_the_page_shows_every_part(page: str, study: StudyFile) -> None:
    for name in ("autoencoder-digits", "cnn-digits", *OPTIMIZERS):
        assert name in page
    assert page.count("<svg") == 2 + 4 + 4
    for text in (
        "test accuracy against training seconds",
        "prefers-color-scheme: dark",
        "not tuned",
        "hit edge: lr is the highest tried",
        "RuntimeError: no | kernel",
        "The machine was shared during 42 of 42 runs (42 beside another run",
    ):
        assert text in page


def test_every_colour_of_a_plot_follows_the_theme(page: str) -> None:
    plots = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--series-0)" in plots
    assert not re.findall(r"(?:fill|stroke): #\w+", plots)


def test_markdown_has_the_tables_and_its_plots(page: str, study: StudyFile) -> None:
    folder = study.path.with_suffix("")
    text = (folder / "report.md").read_text()
    plots = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(plots) == 10
    assert all((folder / plot).read_text().startswith("<svg") for plot in plots)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "| mbf-default | " in text
    assert (
        len({line.replace("\\|", "").count("|") for line in lines if "accuracy" in line or "±" in line}) == 2
    )


def test_the_same_study_gives_the_same_page(page: str, study: StudyFile, tmp_path: Path) -> None:
    assert suite_report.write(study, tmp_path)[0].read_text() == page


def test_no_two_of_thirteen_optimizers_look_alike() -> None:
    looks = suite_plots.styles([str(index) for index in range(13)]).values()
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 13


def test_time_to_target_is_the_time_to_the_references_best_loss(study: StudyFile) -> None:
    found = results.read(study)
    by_name = {result.entrant.name: result for result in found.of("cnn-digits")}
    assert time_to_target(by_name["adamw"], by_name["adamw"], "seconds") == pytest.approx(0.9)
    assert time_to_target(by_name["mbf"], by_name["adamw"], "epoch") == math.inf
    assert time_to_target(by_name["adamw"], by_name["mbf"], "epoch") == pytest.approx(3.0)
    ratios = results.profile(found, "seconds")
    assert ratios["adamw"] == [1.0, 1.0]
    assert ratios["mbf"] == [math.inf, math.inf]
    assert [result.entrant.name for result in found.of("cnn-digits")][-1] == "sgd"  # its runs failed


def test_losses_are_compared_at_equal_time(study: StudyFile) -> None:
    found = results.read(study).of("cnn-digits")
    by_name = {result.entrant.name: result for result in found}
    assert results.equal_time(found) == pytest.approx(0.9)
    # Five steps and a tenth of a second lie between two points.
    assert results.loss_within(by_name["adamw"], 0.55).mean == pytest.approx(2 * math.exp(-25 / 10))
    assert results.loss_within(by_name["adamw"], 0.9).mean == by_name["adamw"].row.best_loss.mean


def test_an_optimizer_with_a_diverged_seed_is_not_first(study: StudyFile) -> None:
    found = results.read(study)
    diverging = tuple(
        replace(result, row=replace(result.row, runs=(diverged(result.row.runs[0]), *result.row.runs[1:])))
        if result.entrant.name == "adamw"
        else result
        for result in found.results
    )
    findings = replace(found, results=diverging)
    names = [result.entrant.name for result in findings.of("cnn-digits")]
    assert names[0] == "mbf"
    assert names[-1] == "adamw"  # after all without a diverged seed
    standings = results.standings(findings)
    assert standings["mbf"] == (2, 2)
    assert standings["adamw"] == (0, 0)


def diverged(run: Run) -> Run:
    return replace(run, status="diverged")


def test_standings_count_the_problems_on_which_an_optimizer_is_level_with_the_first(
    study: StudyFile, page: str
) -> None:
    found = results.read(study)
    assert results.standings(found) == {"adamw": (2, 2), "mbf": (0, 0), "mbf-default": (0, 0), "sgd": (0, 0)}
    assert "first or level in equal time" in page
    first, second, third, _ = found.of("cnn-digits")
    # Three seeds: an interval of 2.48 deviations to either side.
    losses = [(first, Spread(1.0, 0.1)), (second, Spread(1.2, 0.05)), (third, Spread(1.4, 0.05))]
    assert results._level(losses) == {first.entrant.name, second.entrant.name}


def test_the_interval_is_students() -> None:
    assert interval(Spread(1.0, 0.5), 3) == pytest.approx(4.302653 * 0.5 / math.sqrt(3))
    assert suite_report.with_interval(Spread(12.3456, 0.1), 3) == "12.35 ± 0.25"
    assert suite_report.with_interval(Spread(12.3456, math.nan), 1) == "12.35"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to take a screenshot with")
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_the_page_is_not_blank_in_a_browser(page: str, study: StudyFile, tmp_path: Path, scheme: int) -> None:
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1200"]
    options += [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}"]
    target = (study.path.with_suffix("") / "report.html").as_uri()
    subprocess.run([str(CHROMIUM), *options, target], check=True, capture_output=True, timeout=60)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    brightness = pixels.mean(axis=2)
    assert np.median(brightness) > 200 if scheme else np.median(brightness) < 60
    assert brightness.std() > 5
    coloured = np.ptp(pixels.astype(int), axis=2) > 60  # the lines of the plots
    assert coloured[600:].sum() > 500
