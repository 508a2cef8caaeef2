"""What drafting brings: speed, guesses kept and tokens per run of the target, beside plain decoding, interleaved.

    python benchmarks/speculative.py TARGET [--draft BUILD ...] --data DATA [--prompts 24] [--new 96] [--temperature 0]

Every prompt of the data folder's test split is continued by each way in turn (plain, prompt lookup, each draft), in an
order that rotates, so that a slow moment of the machine falls on all; the first prompt warms up and does not count.
Printed for each way: the median over prompts of plain's time per token over its own, with the 10th and 90th percentile,
guesses kept, tokens per run of the target, and in how many prompts the tokens are those of plain (all of them must be,
where temperature is 0, but for logits that are equal to rounding). Below: what a run over k tokens takes in steps, from
which ROW_COST of runtime/speculative.py comes, and what a step of each draft takes. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from slmdeploy.runtime.model import Model, load

PLAIN, LOOKUP = "plain", "prompt lookup"
ROWS = (1, 2, 3, 5, 9)
_REPEATS = 15


@dataclass
class Way:
    """One way to decode, and what came of each prompt."""

    name: str
    model: Model
    seconds: list[float] = field(default_factory=list)
    tokens: list[tuple[int, ...]] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    runs: int = 0
    behind_first: int = 0


@dataclass(frozen=True)
class Line:
    """A way beside plain decoding; speed-ups are of the time from the first token to the last."""

    way: str
    speedup_p10: float
    speedup_p50: float
    speedup_p90: float
    tokens_per_s: float
    acceptance: float | None
    tokens_per_run: float | None
    same: int
    prompts: int


def prompts_of(data: Path, count: int) -> list[str]:
    """The first prompts of the test split."""
    lines = (data / "generate.test.jsonl").read_text(encoding="utf-8").splitlines()
    return [str(json.loads(line)["prompt"]) for line in lines[:count]]


def decode(way: Way, ids: Sequence[int], new: int, temperature: float, counts: bool) -> None:
    """Continue a prompt once; the clock runs from the first token, since the prompt is the same work for all."""
    stream = way.model.generate_ids(ids, max_new_tokens=new, ignore_eos=True, temperature=temperature, seed=0)
    made = [next(stream)]
    started = time.perf_counter()
    made += stream
    elapsed = time.perf_counter() - started
    if not counts:
        return
    way.seconds.append(elapsed / max(1, len(made) - 1))
    way.tokens.append(tuple(made))
    if way.model.draft_counts is not None:
        one = way.model.draft_counts
        way.drafted, way.accepted = way.drafted + one.drafted, way.accepted + one.accepted
        way.runs, way.behind_first = way.runs + one.target_runs, way.behind_first + one.tokens


def line_of(way: Way, plain: Way) -> Line:
    """What a way comes to beside plain decoding of the same prompts."""
    ratios = [one / own for one, own in zip(plain.seconds, way.seconds, strict=True)]
    low, middle, high = np.percentile(ratios, [10, 50, 90]).tolist()
    return Line(
        way.name,
        low,
        middle,
        high,
        1 / statistics.median(way.seconds),
        way.accepted / way.drafted if way.drafted else None,
        way.behind_first / way.runs if way.runs else None,
        sum(one == two for one, two in zip(way.tokens, plain.tokens, strict=True)),
        len(way.tokens),
    )


def run_costs(model: Model, ids: Sequence[int]) -> dict[int, float]:
    """Median time of a run over k tokens behind a prompt, in steps of one token; the sizes take turns."""
    decoder = model.decoder
    decoder.reserve(len(ids) + max(ROWS))
    decoder.prefill(np.array(ids))
    held = decoder.cache.length
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(_REPEATS):
        for rows in ROWS:
            tokens = np.array(ids[:rows])
            started = time.perf_counter()
            decoder.step(int(tokens[0])) if rows == 1 else decoder.extend(tokens)
            times[rows].append(time.perf_counter() - started)
            decoder.cache.truncate(held)
    step = statistics.median(times[1])
    return {rows: statistics.median(found) / step for rows, found in times.items()}


def step_ratio(target: Model, draft: Model, ids: Sequence[int]) -> float:
    """Median time of a draft's step over that of the target's, in turns."""
    seconds: dict[str, list[float]] = {"target": [], "draft": []}
    pair = {"target": target.decoder, "draft": draft.decoder}
    for decoder in pair.values():
        decoder.prefill(np.array(ids))
    for _ in range(_REPEATS):
        for name, decoder in pair.items():
            held = decoder.cache.length
            started = time.perf_counter()
            decoder.step(ids[0])
            seconds[name].append(time.perf_counter() - started)
            decoder.cache.truncate(held)
    return statistics.median(seconds["draft"]) / statistics.median(seconds["target"])


def shown(value: float | None) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    """Measure every way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--draft", type=Path, nargs="*", default=[])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    target = load(options.target, threads=options.threads)
    ways = [Way(PLAIN, target), Way(LOOKUP, load(options.target, threads=options.threads, prompt_lookup=True))]
    for draft in options.draft:
        ways.append(Way(f"draft {draft.name}", load(options.target, threads=options.threads, draft=draft)))
    longest = target.runtime.max_length - options.new
    texts = prompts_of(options.data, options.prompts + 1)
    prompts = [target.tokenizer.encode(text).ids[:longest] for text in texts]
    for number, ids in enumerate(prompts):
        for place in range(len(ways)):
            decode(ways[(place + number) % len(ways)], ids, options.new, options.temperature, counts=number > 0)
    lines = [line_of(way, ways[0]) for way in ways]
    print(f"{'way':28} {'speed-up':>16} {'tok/s':>8} {'kept':>6} {'per run':>8} {'same':>9}")
    for line in lines:
        spread = f"{line.speedup_p50:.2f} ({line.speedup_p10:.2f}–{line.speedup_p90:.2f})"
        same = f"{line.same} of {line.prompts}"
        kept, per_run = shown(line.acceptance), shown(line.tokens_per_run)
        print(f"{line.way:28} {spread:>16} {line.tokens_per_s:8.1f} {kept:>6} {per_run:>8} {same:>9}")
    costs = run_costs(target, prompts[0])
    print("a run over k tokens, in steps: " + ", ".join(f"{rows}: {cost:.2f}" for rows, cost in costs.items()))
    steps = {}
    for draft in options.draft:
        steps[draft.name] = step_ratio(target, load(draft, threads=options.threads), prompts[0])
        print(f"a step of {draft.name}, in steps of the target: {steps[draft.name]:.2f}")
    found = {"threads": options.threads, "new": options.new, "temperature": options.temperature}
    print(json.dumps({**found, "ways": [asdict(line) for line in lines], "runs": costs, "steps": steps}))


if __name__ == "__main__":
    main()
