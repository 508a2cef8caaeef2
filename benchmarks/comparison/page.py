"""docs/compression.md and its chart from the results, and nothing else: the same results give the same page.

A figure is the mean over the seeds that ran, with half the distance between the largest and the smallest; what did not
run says so. Knows no torch.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.comparison.cells import SCALES, Scale, every_cell
from benchmarks.comparison.headline import saved_against_teacher
from benchmarks.comparison.plots import Bar, panels
from benchmarks.comparison.results import read

DOCS = Path(__file__).parents[2] / "docs"
PAGE, CHART = DOCS / "compression.md", DOCS / "compression.svg"
SEEDS = 3
GROUPS = {
    "pruned": ("Pruning methods, before any training", "Shares of the MLP neurons of every layer."),
    "recovered": ("Pruning methods, after distillation", "Half of the neurons and groups, then a cell's tokens."),
    "schedule": ("At once or in two rounds", "The same shape and tokens: half of them behind each round."),
    "loss": ("Losses of distillation", "The shipped recipe's shape, everything else alike."),
    "objective": ("With a teacher or without", "The same student, tokens and learning rate."),
    "stages": ("One stage or two", "A third of the tokens in the second stage."),
    "scratch": (
        "From nothing",
        "The student's shape with random weights, trained on the data alone, at multiples of the compute that "
        "distilling a cell's student takes, teacher included.",
    ),
}
Line = dict[str, Any]
Row = tuple[str, list[Line]]


def write(results: Path) -> None:
    """The page of the largest scale that has results."""
    for scale in reversed(SCALES.values()):
        lines = read(results / f"compression-{scale.name}.jsonl")
        if lines:
            break
    headline = results / "compression-headline.json"
    found = json.loads(headline.read_text(encoding="utf-8")) if headline.exists() else None
    PAGE.write_text(page(scale, lines, found), encoding="utf-8")
    CHART.write_text(chart(scale, lines), encoding="utf-8")


def page(scale: Scale, lines: dict[str, Line], headline: Line | None) -> str:
    """The whole page."""
    teacher = lines["teacher"]
    made = teacher["made"]
    parts = [
        "# Compression compared",
        "Written by `benchmarks/compression.py`; do not edit. What it compares is one choice at a time on the shipped "
        "teacher (10.5M parameters): every cell of a group gets the same tokens, and differs from its neighbours in "
        "one thing.",
        "## The claims, and the shipped recipe",
        _headline(headline, scale, lines),
        "## How the rest was measured",
        f"Scale `{scale.name}`: {scale.tokens:,} training tokens a cell, AdamW at 5e-4 unless said, calibration on "
        f"{scale.calibration_tokens:,} tokens. {_said(scale)} Quality is on the test split, on records of up to "
        f"{scale.test_tokens:,} tokens of text and {scale.score_tokens:,} of queries: **KL** to the teacher in nats "
        "per token, share of equal **top** tokens, **bits per byte**, **AUC**. Figures are means over seeds ± half the "
        "range; one seed has none, and gaps below the ranges of others are ties. The same command goes on where it "
        f"was stopped: `python benchmarks/compression.py --scale {scale.name}`. Made with {made['cores']} cores, "
        f"{made['arch']}, Python {made['python']}, from commit {made['commit']} on.",
        f"The teacher: {_bits(teacher)} bits per byte, AUC {teacher['figures']['auc']:.4f}.",
        "![KL to the teacher](compression.svg)",
    ]
    for group in GROUPS:
        title, says = GROUPS[group]
        parts += [f"## {title}", says, _table(list(rows(group, scale, lines)))]
    if said := _from_nothing(scale, lines):
        parts.append(said)
    parts += [
        "## Rounding of weights",
        "INT8, INT4 and FP8, rounded to the nearest, by GPTQ and by QuantEase, smoothed and rotated, with and without "
        "outliers: [quantisation.md](quantisation.md#outliers).",
    ]
    return "\n\n".join(parts) + "\n"


def _said(scale: Scale) -> str:
    if scale.name == "full":
        return "Long enough for methods to settle."
    return "That is short: it shows which way a choice points, not where it would end; `--scale full` takes many hours."


def rows(group: str, scale: Scale, lines: dict[str, Line]) -> Iterator[Row]:
    """The members of a group with the results of the seeds that ran."""
    cells = [cell for cell in every_cell(scale, SEEDS) if cell.group == group]
    for name in dict.fromkeys(cell.name for cell in cells):
        keys = [f"{group}-{cell.key(scale)}" for cell in cells if cell.name == name]
        yield name, [lines[key] for key in keys if key in lines]


def _from_nothing(scale: Scale, lines: dict[str, Line]) -> str:
    """What the students from nothing say of the compute that a teacher saves; empty where they did not run."""
    distilled = next((found for name, found in rows("loss", scale, lines) if name == "forward KL"), [])
    members = [(times, found) for times, (_, found) in zip(scale.scratch, rows("scratch", scale, lines), strict=True)]
    ran = [(times, _figure(found, "bits_per_byte")[0]) for times, found in members if found]
    if not ran or not distilled:
        return ""
    bits = _figure(distilled, "bits_per_byte")[0]
    behind = [times for times, own in ran if own > bits]
    if not behind:
        return f"The student from nothing is ahead at {ran[0][0]} x the compute: at this scale a teacher saves nothing."
    most = max(behind)
    return (
        f"At {most} x the compute the student from nothing is still behind the distilled one ({bits:.4f} bits per "
        f"byte), so at least {1 - 1 / most:.0%} of the compute of equal quality is saved at this scale."
    )


def _table(members: Sequence[Row]) -> str:
    table = ["| | seeds | KL | top | bits per byte | AUC | tokens |", "|" + "---|" * 7]
    for name, found in members:
        if not found:
            table.append(f"| {name} | 0 | not run | | | | |")
            continue
        figures = " | ".join(_spread(found, key) for key in ("kl", "top1", "bits_per_byte", "auc"))
        table.append(f"| {name} | {len(found)} | {figures} | {found[0]['figures']['tokens']:,} |")
    return "\n".join(table)


def _spread(found: Sequence[Line], key: str) -> str:
    middle, reach = _figure(found, key)
    return f"{middle:.4f}" + (f" ± {reach:.4f}" if len(found) > 1 else "")


def _figure(found: Sequence[Line], key: str) -> tuple[float, float]:
    values = [line["figures"][key] for line in found]
    return mean(values), (max(values) - min(values)) / 2


def _bits(line: Line) -> str:
    return f"{line['figures']['bits_per_byte']:.4f}"


def chart(scale: Scale, lines: dict[str, Line]) -> str:
    """KL to the teacher of every member that ran, a panel for each group."""
    charts: list[tuple[str, list[Bar]]] = []
    for group, (title, _) in GROUPS.items():
        bars = [(name, *_figure(found, "kl")) for name, found in rows(group, scale, lines) if found]
        if bars:
            charts.append((f"{title}: KL to the teacher, lower is better", bars))
    return panels(charts)


def _headline(headline: Line | None, scale: Scale, lines: dict[str, Line]) -> str:
    """The paper's claims (arXiv 2502.14305) beside what the shipped recipe reaches."""
    if headline is None:
        return "Not measured: `slmdeploy run examples/quickstart.toml -o RUN`, then `--run RUN` here."
    chosen, builds = headline["chosen"], headline["builds"]
    own, smallest = builds[chosen], min(builds, key=lambda name: float(builds[name]["size_bytes"]))
    share = mean(line["figures"]["parameters"] for _, found in rows("objective", scale, lines) for line in found)
    student = share / lines["teacher"]["figures"]["parameters"]
    saved = saved_against_teacher(headline["distilled_tokens"], student)
    claims = [
        ("quality kept, scores (AUC)", "≥ 92 %", "≥ 97 %", own["auc"], "{:.1%}", 0.97),
        ("quality kept, text (teacher's bits per byte / student's)", "≥ 92 %", "≥ 97 %", 1 / own["bits_per_byte"],
         "{:.1%}", 0.97),
        ("latency of a scoring request", "5.3 x lower", "≥ 5.3 x", 1 / own["score_ms_p50"], "{:.1f} x", 5.3),
        ("time per output token", "5.3 x lower", "≥ 5.3 x", 1 / own["tpot_ms_p50"], "{:.1f} x", 5.3),
        ("time to the first token", "5.3 x lower", "≥ 5.3 x", 1 / own["ttft_ms_p50"], "{:.1f} x", 5.3),
        ("throughput, items/s", "4.1 x higher", "≥ 4.1 x", own["items_per_s"], "{:.1f} x", 4.1),
        ("throughput, tokens/s", "4.1 x higher", "≥ 4.1 x", own["tokens_per_s"], "{:.1f} x", 4.1),
        ("compute of training saved, against the teacher's own training", "76 %", "≥ 76 %", saved, "{:.1%}", 0.76),
        ("size, against the teacher in bfloat16", "> 5 x smaller", "> 5 x", 1 / own["size_bytes"], "{:.1f} x", 5.0),
    ]  # fmt: skip
    table = ["| claim of the paper | theirs | goal | ours | |", "|---|---|---|---|---|"]
    for title, theirs, goal, value, form, limit in claims:
        table.append(f"| {title} | {theirs} | {goal} | {form.format(value)} | {_verdict(value, limit)} |")
    machine = headline["machine"]
    says = (
        f"One build, `{chosen}`, which `slmdeploy run examples/quickstart.toml -o RUN` chose on "
        f"{headline['created'][:10]} ({machine['cores']} cores, {machine['arch']}). Ratios of time are to the teacher "
        "in torch, fp32, eager, on the same machine in the same rounds; the paper's are to its own serving. Their data "
        "is not public: directions and ratios can be compared, absolute figures cannot. "
        f"`{smallest}` of the same run is {1 / builds[smallest]['size_bytes']:.1f} x smaller. Compute is counted "
        "(2 operations forward, 4 backward for each weight and token), pruning and the choice of settings left out."
    )
    return "\n".join(table) + "\n\n" + says


def _verdict(value: float, limit: float) -> str:
    return "met" if value >= limit else f"**short**: {value / limit:.0%} of the goal"
