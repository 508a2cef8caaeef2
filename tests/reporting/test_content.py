"""Content: the answer, the notes and the tables say what the files say."""

from pathlib import Path

import pytest

from slmdeploy.reporting import content
from slmdeploy.reporting.reading import read_run
from slmdeploy.reporting.records import Run


def test_the_answer_names_build_target_and_source(run: Run) -> None:
    found = content.answer(run)
    assert found.headline == "cpu-int8-split on x86-64-avx512-vnni"
    assert found.badge == "measured"
    assert run.selection is not None
    assert found.reason == f"F{run.selection.reason[1:]}."


def test_an_infeasible_budget_says_what_would_have_to_give(infeasible_folder: Path) -> None:
    found = content.answer(read_run(infeasible_folder))
    assert found.headline == "No build meets the budget"
    assert found.moves == ("Moving size_bytes <= 1e+06 alone to 4.13e+06 would admit cpu-int4 on x86-64-avx512-vnni.",)
    assert content.tiles(read_run(infeasible_folder)) == []


def test_a_measurement_alone_has_no_choice(run_folder: Path) -> None:
    found = content.answer(read_run(run_folder / "measurement"))
    assert found.headline == "4 builds on x86-64-avx512-vnni"


def test_notes_tell_estimates_noise_and_wide_intervals(run: Run) -> None:
    estimated, noisy, unsettled = content.notes(run)
    assert estimated == "Estimated, not measured: cpu-int8-split@x86-64-amx. Drawn at random."
    assert noisy.startswith("Noisy: while cpu-int8 ran")
    assert unsettled.startswith("Not settled: cpu-int8 in search.")


def test_verdicts_are_those_of_the_selection(run: Run) -> None:
    lines = {line["limit"]: line["cells"] for line in content.verdicts(run)}
    size = {run.labels[cell["at"]]: cell["result"] for cell in lines["size_bytes <= 2e+07"]}
    assert size["cpu-fp32"] == "missed"
    assert size["cpu-int4"] == "met"
    assert "baseline" not in size


def test_every_metric_of_every_row_is_in_the_table_exactly(run: Run) -> None:
    shown = {
        (line["metric"], at): float(cell["exact"])
        for group in content.all_figures(run)
        for line in group
        for at, cell in enumerate(line["cells"])
        if cell
    }
    held = {(name, at): value for at, row in enumerate(run.rows) for name, value in row.metrics.items()}
    assert shown == {key: value for key, value in held.items() if not key[0].endswith("_ratio")}


@pytest.mark.parametrize(
    ("metric", "ratio", "said"),
    [
        ("tpot_ms_p50", 0.0434, "23× faster than the baseline"),
        ("score_ms_p50", 2.0, "2× slower than the baseline"),
        ("tokens_per_s", 5.0, "5× faster than the baseline"),
        ("size_bytes", 0.25, "4× smaller than the baseline"),
        ("auc", 0.989, "-1.1 % against the baseline"),
        ("size_bytes", 1.05, "+5.0 % against the baseline"),
    ],
)
def test_ratios_are_said_as_people_say_them(metric: str, ratio: float, said: str) -> None:
    assert content.compared(metric, ratio) == said


def test_settings_are_flat_and_what_is_empty_is_left_out() -> None:
    nested = {"stage": {"steps": 240, "beta": None, "on": True}, "labels": [" no", " yes"], "empty": [], "rate": 0.25}
    assert content.facts(nested) == [
        ("stage steps", "240"),
        ("stage on", "yes"),
        ("labels", " no;  yes"),
        ("rate", "0.25"),
    ]


def test_workloads_have_tables_of_their_own(run: Run) -> None:
    found = {workload["name"]: workload for workload in content.workloads(run)}
    assert list(found) == ["continue", "search", "search-hot", "search-server"]
    assert found["search-hot"]["about"] == "score, single-stream, hot, 240 requests"
