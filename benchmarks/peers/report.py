"""docs/performance.md from the committed results: a pure function, so that a test can hold the page to the results.

Our builds come first in every table. A figure has its spread (quartile range over median) and, in brackets, how many
times as good it is as the best peer's: above 1 is ahead. Knows nothing of files.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.peers.cases import CASES, Case
from benchmarks.peers.goals import Verdict, verdicts
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.summary import Results, times_as_good

_GROUPS = (
    ("Prompt and generation", ("ttft_128", "ttft_512", "ttft_2048", "ttft_8000", "decode_1", "decode_8", "balanced")),
    ("Scoring", ("score_cold", "score_hot", "score_hot_one", "score_naive")),
    ("Encoding", ("encode_1", "encode_8", "encode_32")),
    ("Memory, load time and size", ("rss", "load", "size")),
)
_LIMITED = ("ttft_128", "ttft_512", "ttft_2048", "ttft_8000", "decode_1", "encode_1", "encode_8", "encode_32")
CASE = {case.name: case for case in CASES}
_METHOD = """\
Every engine runs the same checkpoint with random weights, converted by the engine's own converter, so this page is
about speed and memory and says nothing of quality, which `docs/quantisation.md` does. Each round starts a fresh process
per engine and model, one after the other, beginning with another engine each time; a figure is the median over rounds
of the median within one. Prompts are random token ids, the same for all engines and new for every repetition, so no
cache of prompts answers; generation is greedy, nothing is turned into text.

- TTFT N: from N tokens in until the first token is known. Decode: tokens per second behind a prompt of 128, 64 new
  tokens for one sequence, 32 for each of 8. The balanced request is one call of 512 tokens in and 64 out.
- Scoring: 32 items of 16 tokens behind a prefix of 512. Cold computes the prefix too, hot has it. Engines that cannot
  pack items run the best loop that their interface offers; the table of engines says which.
- Peak memory: VmHWM of the process after loading and one balanced request (encoders: batches of 1 and 8). Load: from
  opening until the first answer to 8 tokens (encoders: one row of 128). Files: what the engine reads, no tokenizer.
- The share of a limit: operations of the linear layers, the head and attention by the peak of the arithmetic that the
  engine uses, or bytes of weights per token by read bandwidth; both were measured in the same run.
"""


def render(data: dict[str, Any], notes: str, plots: Mapping[str, str], source: str) -> str:
    """The page. ``notes`` is text by hand that goes behind the goals, ``plots`` are files beside the page by model."""
    results = Results(data)
    parts = [
        "# CPU performance beside other engines",
        f"Written by `python benchmarks/cpu_peers.py` from `{source}`; do not edit it by hand.",
        _machine(results),
        "## Goals",
        _goals(list(verdicts(results))),
        notes.strip(),
    ]
    for model in results.models:
        parts += [f"## {model}", _about(results, model)]
        parts += [f"![{model}]({plots[model]})"] if model in plots else []
        for title, names in _GROUPS:
            cases = [case for case in results.cases(model) if case.name in names]
            if cases:
                parts += [f"### {title}", _figures(results, model, cases)]
        scaled = _threads(results, model)
        parts += ["### One thread and two", scaled] if scaled else []
        parts += ["### Share of the physical limit", _shares(results, model)]
    parts += ["## Like for like", _engines(results), "## Not run", _missing(results), "## How it was measured", _METHOD]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _machine(results: Results) -> str:
    data = results.data
    machine, limits, load, steal = data["machine"], data["limits"], data["load"], data["steal"]
    lines = [
        f"- {machine['cpu']}, {machine['threads']} threads, {machine['memory_bytes'] / 1e9:.0f} GB, "
        f"{machine['system']}; instructions: {', '.join(machine['isa'])}",
        f"- {data['made']}, commit {data['commit']}",
    ]
    if load and steal:
        lines.append(
            f"- load average when a process began: median {load['median']:.1f}, highest {load['highest']:.1f}; "
            f"time stolen while it ran: median {steal['median']:.1%}, highest {steal['highest']:.1%}"
        )
    if limits:
        peaks = ", ".join(
            f"{name} {limits[name]['median'] / 1e9:.0f} (± {limits[name]['spread'] / 2:.0%})"
            for name in ("int8", "bf16", "fp32")
        )
        width = limits["bandwidth"]
        lines.append(
            f"- limits measured in the same run: read bandwidth {width['median'] / 1e9:.1f} GB/s "
            f"(± {width['spread'] / 2:.0%}); billion operations per second: {peaks}"
        )
    return "\n".join(lines)


def _goals(found: Sequence[Verdict]) -> str:
    rows = [
        (one.model, one.goal, one.ours, one.against, _figure(one.figure, one.percent), _outcome(one)) for one in found
    ]
    return _table(("model", "goal", "our build", "compared with", "figure", "met"), rows)


def _figure(figure: float | None, percent: bool) -> str:
    if figure is None:
        return "–"
    return f"{figure:.0%}" if percent else f"{figure:.2f}×"


def _outcome(one: Verdict) -> str:
    if one.figure is None:
        return "not judged"
    if one.met:
        return "**yes**"
    wanted = f"{one.wanted:.0%}" if one.percent else f"{one.wanted:.2f}×"
    return f"no: {one.figure / one.wanted - 1:.0%} of {wanted}".replace("-", "−")


def _about(results: Results, model: str) -> str:
    shape, rounds = SHAPES[model], results.rounds(model)
    millions = (shape.linear_parameters + shape.head_parameters) / 1e6
    kind = "decoder, embedding and head tied" if shape.is_decoder else "encoder, sequences of 128"
    return f"{millions:.0f} million weights in linear layers and head; {kind}. {rounds} rounds."


def _ordered(results: Results) -> list[str]:
    return sorted(results.engines, key=lambda name: not results.engines[name]["ours"])


def _figures(results: Results, model: str, cases: Sequence[Case]) -> str:
    head = ["engine", *(f"{case.title} ({case.unit})" for case in cases)]
    rows = []
    for engine in _ordered(results):
        cells = [_cell(results, engine, model, case) for case in cases]
        if any(cell != "" and cell != "–" for cell in cells):
            name = f"**{engine}**" if results.engines[engine]["ours"] else engine
            rows.append([name, *cells])
    return _table(head, rows)


def _cell(results: Results, engine: str, model: str, case: Case) -> str:
    cell = results.cell(engine, model, case.name)
    if cell is None:
        return ""
    if "median" not in cell:
        return "–"
    advantage = results.advantage(engine, model, case)
    around = f" ± {cell['spread'] / 2:.0%}" if cell["rounds"] > 1 else ""
    return f"{_number(cell['median'])}{around}" + (f" ({advantage:.2f}×)" if advantage is not None else "")


def _threads(results: Results, model: str) -> str:
    """Cases that were also measured with one thread, and how many times as fast all threads are; "" without any."""
    pairs = [(CASE[name], CASE[f"{name}_t1"]) for name in ("ttft_512", "decode_1")]
    rows = []
    for engine in _ordered(results):
        cells = [text for wide, narrow in pairs for text in _scaled(results, engine, model, wide, narrow)]
        if any(cell != "" for cell in cells):
            rows.append([engine, *cells])
    head = [text for _, narrow in pairs for text in (f"{narrow.title} ({narrow.unit})", "all threads are")]
    return _table(["engine", *head], rows) if rows else ""


def _scaled(results: Results, engine: str, model: str, wide: Case, narrow: Case) -> tuple[str, str]:
    one, all_ = results.value(engine, model, narrow.name), results.value(engine, model, wide.name)
    if one is None:
        return "", ""
    faster = "" if all_ is None else f"{times_as_good(all_, one, wide):.2f}× as fast"
    return _cell(results, engine, model, narrow), faster


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _shares(results: Results, model: str) -> str:
    cases = [case for case in results.cases(model) if case.name in _LIMITED]
    rows = []
    for engine in _ordered(results):
        shares = [results.share_of_limit(engine, model, case.name) for case in cases]
        if any(share is not None for share in shares):
            limit = results.engines[engine]["form"]["arithmetic"]
            rows.append([engine, limit, *("–" if share is None else f"{share:.0%}" for share in shares)])
    return _table(["engine", "peak of prompts", *(case.title for case in cases)], rows)


def _engines(results: Results) -> str:
    head = (
        "engine",
        "bits: linear layers / head / embedding",
        "KV cache",
        "activations",
        "how it scores items",
        "versions",
    )
    rows = []
    for name in _ordered(results):
        engine = results.engines[name]
        form = engine["form"]
        versions = ", ".join(f"{package} {version}" for package, version in engine["versions"].items())
        scoring = engine["scoring"] or "–"
        rows.append((name, form["bits"], form["cache"], form["activations"], scoring, versions or "–"))
    return _table(head, rows)


def _missing(results: Results) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in results.data["cells"]:
        if "reason" in cell:
            about = f"{cell['model']} {cell['case']}"
            reasons.setdefault((cell["engine"], cell["reason"]), []).append(about)
    if not reasons:
        return "Every cell that was asked for has a figure."
    return "\n".join(f"- {engine}: {reason} ({_shortened(cells)})" for (engine, reason), cells in reasons.items())


def _shortened(cells: Sequence[str]) -> str:
    models = dict.fromkeys(cell.split()[0] for cell in cells)
    if len(cells) > 3:
        return f"{len(cells)} cells of {', '.join(models)}"
    return ", ".join(cells)
