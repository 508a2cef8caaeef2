"""The comparison of compression: cells that can be compared, results that survive a kill, a page that says no more."""

import json
from pathlib import Path

import pytest

from benchmarks.comparison import headline, page
from benchmarks.comparison.cells import QUICK, SCALES, SHAPE, every_cell, teacher_share
from benchmarks.comparison.plots import panels
from benchmarks.comparison.results import append, read
from slmdeploy.errors import InputError
from slmdeploy.reporting.records import Run
from slmdeploy.specs import distill_stage

CELLS = every_cell(QUICK, 2)


def trained(cell) -> int:
    return sum(s["steps"] * s["batch_rows"] * s["length"] for s in cell.steps if s["verb"] == "distill")


def test_the_page_and_its_chart_are_those_of_the_results() -> None:
    results = Path(page.__file__).parents[1] / "results"
    scale = next(scale for scale in reversed(SCALES.values()) if (results / f"compression-{scale.name}.jsonl").exists())
    lines = read(results / f"compression-{scale.name}.jsonl")
    found = json.loads((results / "compression-headline.json").read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.page(scale, lines, found)
    assert page.CHART.read_text(encoding="utf-8") == page.chart(scale, lines)


def test_members_of_a_group_get_the_same_tokens_and_every_seed_all_of_them() -> None:
    for group in ("recovered", "schedule", "loss", "objective", "stages"):
        tokens = [trained(cell) for cell in CELLS if cell.group == group]
        assert max(tokens) - min(tokens) <= QUICK.batch_rows * QUICK.length, group
        assert abs(tokens[0] - QUICK.tokens) <= QUICK.batch_rows * QUICK.length
    names = [{cell.name for cell in CELLS if cell.seed == seed and cell.group != "scratch"} for seed in (0, 1)]
    assert names[0] == names[1]


def test_stages_are_such_as_distill_takes() -> None:
    for scale in SCALES.values():
        for cell in every_cell(scale, 1):
            for step in cell.steps:
                if step["verb"] == "distill":
                    distill_stage(**{name: value for name, value in step.items() if name != "verb"})


def test_two_rounds_end_at_the_shape_that_one_makes() -> None:
    cell = next(cell for cell in CELLS if cell.name == "in two rounds")
    shares = [step for step in cell.steps if step["verb"] == "prune"]
    left = (1 - shares[0]["ratio"]) * (1 - shares[1]["ratio"])
    assert left == pytest.approx(1 - SHAPE["ratio"])
    layers = (1 - shares[0]["layer_ratio"]) * (1 - shares[1]["layer_ratio"])
    assert layers == pytest.approx(8 / 12)


def test_a_key_changes_with_all_that_a_result_depends_on() -> None:
    keys = {f"{cell.group}-{cell.key(QUICK)}" for cell in CELLS}
    assert len(keys) == len(CELLS)
    cell = CELLS[0]
    assert cell.key(QUICK) != cell.key(SCALES["full"])
    assert cell.key(QUICK, 1) != cell.key(QUICK)
    same = {other.key(QUICK, 1) for other in CELLS if other.seed == 0 and other.steps[0] == cell.steps[0]}
    assert len(same) == 1, "cells that begin alike share the beginning"


def test_compute_of_a_distilled_token_is_that_of_both_models() -> None:
    assert 1 < teacher_share() < 2
    assert headline.saved_against_teacher(headline.TEACHER_TOKENS, 1.0) == pytest.approx(1 - teacher_share())


def test_a_line_that_a_kill_cut_short_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert read(file) == {}
    append(file, {"key": "a", "figures": 1})
    file.write_text(file.read_text(encoding="utf-8") + '{"key": "b", "fig', encoding="utf-8")
    append(file, {"key": "c"})
    assert list(read(file)) == ["a", "c"]


def line(kl: float, tokens: int = 10) -> dict[str, object]:
    figures = {"kl": kl, "top1": 0.5, "bits_per_byte": 1.0, "auc": 0.8, "tokens": tokens, "parameters": 5}
    return {"figures": figures, "made": {"cores": 2, "arch": "a", "python": "3", "commit": "c"}}


def test_the_page_has_means_with_ranges_and_says_what_did_not_run() -> None:
    losses = [cell for cell in every_cell(QUICK, 3) if cell.group == "loss" and cell.name == "forward KL"]
    found = {f"loss-{cell.key(QUICK)}": line(0.1 * (cell.seed + 1)) for cell in losses[:2]}
    text = page.page(QUICK, {"teacher": line(0.0)} | found, None)
    assert "| forward KL | 2 | 0.1500 ± 0.0500 |" in text
    assert "| reverse KL | 0 | not run |" in text
    assert "Not measured: `slmdeploy run examples/quickstart.toml" in text
    assert page.chart(QUICK, found).count("<rect") == 2, "the ground and one bar"


def test_the_headline_holds_the_chosen_build_to_every_claim(run_folder: Path, run: Run) -> None:
    found = headline.headline(run_folder)
    assert run.selection is not None
    assert found["chosen"] == run.selection.chosen
    builds = found["builds"]
    assert set(builds) == {row.build for row in run.rows if row.role == "candidate"}
    assert json.loads(json.dumps(found)) == found


def test_a_run_without_a_choice_has_no_headline(infeasible_folder: Path) -> None:
    with pytest.raises(InputError, match="chose no build"):
        headline.headline(infeasible_folder)


def test_what_falls_short_is_called_so() -> None:
    assert page._verdict(5.3, 5.3) == "met"
    assert page._verdict(2.65, 5.3) == "**short**: 50% of the goal"


def test_bars_are_sorted_and_names_are_escaped() -> None:
    drawn = panels([("a < b", [("long", 2.0, 0.5), ("short", 1.0, 0.0)])])
    assert drawn.index("short") < drawn.index("long")
    assert "a &lt; b" in drawn


def test_what_a_teacher_saves_follows_from_the_students_from_nothing() -> None:
    cells = every_cell(QUICK, 1)
    keys = {cell.name: f"{cell.group}-{cell.key(QUICK)}" for cell in cells if cell.group in ("loss", "scratch")}

    def found(*bits: float) -> dict[str, page.Line]:
        names = ("forward KL", *(f"from nothing, {times} x the compute" for times in QUICK.scratch))
        made = {}
        for name, value in zip(names, bits, strict=False):
            one = line(0.1)
            made[keys[name]] = one | {"figures": one["figures"] | {"bits_per_byte": value}}
        return made

    assert page._from_nothing(QUICK, found(1.1)) == ""
    assert "at least 75%" in page._from_nothing(QUICK, found(1.1, 3.0, 2.0))
    assert "ahead at 1 x" in page._from_nothing(QUICK, found(1.1, 1.0, 0.9))
