"""Latency of scoring k items behind one prefix, against k: `python benchmarks/score_latency.py BUILD [--out FOLDER]`.

BUILD is a folder of the shared interface with the tasks generate and score. Side by side, on the same weights, prefixes
and items, each k and round in turn, so that what else the machine does meets all alike:

  naive        k runs over prefix and item, nothing kept
  padded       one right-padded batch of k rows, each with the prefix
  kept         the prefix once, then item after item behind its keys and values
  copied       the prefix once, its keys and values copied into k rows, which then take a token each per step
               (ONNX Runtime refuses several tokens behind a past in a batch)
  multi-item   ours: prefix and items in one sequence, items masked from each other (score.onnx)

Cold means a prefix never seen before, hot one whose keys and values are there. What naive and padded do is the same
either way. Printed are median milliseconds, ratios to multi-item, and how far label logits are apart; with --out also
score_latency.json and score_latency.svg.
"""

import argparse
import itertools
import json
import statistics
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slmdeploy.profiling.hardware import detect
from slmdeploy.reporting import svg
from slmdeploy.runtime.batching import BatchDecoder
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.scoring import Scorer
from slmdeploy.runtime.segments import Segment

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Row = dict[str, float]
NAMES = (
    "naive", "padded", "kept, cold", "kept, hot", "copied, cold", "copied, hot", "multi-item, cold", "multi-item, hot",
)  # fmt: skip
COLOURS = ("#8a8a8a", "#b08a5a", "#2a8a5a", "#2a8a5a", "#a04a8a", "#a04a8a", "#2266aa", "#2266aa")
PADDED_TOKENS = 1 << 15
"""A padded batch of more tokens is left out: its keys and values alone would take gigabytes."""


class Ways:
    """The ways to score. Each returns label logits, float32 [items, labels]."""

    def __init__(self, model: Model, most_items: int) -> None:
        assert model.runtime.score is not None, "a build with the task score has labels"
        scorer = model.scorer
        assert isinstance(scorer, Scorer), "a folder of the shared interface is scored with score.onnx"
        self._scorer, self._decoder = scorer, model.decoder
        self._labels = list(model.runtime.score.label_ids)
        self._row = np.zeros((1, model.runtime.vocab_size), np.float32)
        self._batch = BatchDecoder(model.decoder, most_items)
        self._prefix: Segment = []

    def naive(self, prefix: Ids, items: list[Ids]) -> Floats:
        """Prefix and item anew for each."""
        rows = [self._decoder.prefill(np.concatenate([prefix, item]))[self._labels] for item in items]
        return np.stack(rows)

    def padded(self, prefix: Ids, items: list[Ids]) -> Floats:
        """All rows at once, the prefix in each."""
        rows = self._decoder.batch([np.concatenate([prefix, item]) for item in items])
        return np.stack([row[self._labels] for row in rows])

    def kept(self, prefix: Ids, items: list[Ids], *, hot: bool) -> Floats:
        """The prefix stays in the cache of one sequence, and each item overwrites the one before it."""
        decoder, found = self._decoder, []
        decoder.reserve(prefix.size + max(item.size for item in items))
        if not hot:
            decoder.run_prompt(prefix, None, decoder.cache.bind)
        for item in items:
            decoder.run_prompt(item, self._row, decoder.cache.bind, past=prefix.size)
            found.append(self._row[0, self._labels].copy())
        return np.stack(found)

    def copied(self, prefix: Ids, items: list[Ids], *, hot: bool) -> Floats:
        """The prefix is copied into a row for each item; items of one length, so that rows end together."""
        batch = self._batch
        if not hot:
            batch.begin(prefix.size + items[0].size)
            batch.extend(prefix, last=False)
            batch.join()
            self._prefix = batch.read(0, 0, prefix.size)
            batch.release(0)
        for _ in items:
            batch.begin(prefix.size + items[0].size, [(self._prefix, prefix.size)])
            batch.join()
        for tokens in np.stack(items).T:
            logits = batch.step(np.ascontiguousarray(tokens))
        found = logits[:, self._labels].copy()
        for _ in items:
            batch.release(0)
        return found

    def multi_item(self, prefix: Ids, items: list[Ids], *, hot: bool) -> Floats:
        """score.onnx; cold forgets what earlier requests have left."""
        if not hot:
            self._scorer.keep_prefixes(0)
        return self._scorer.score(prefix, items)

    def variants(self, prefix: Ids, items: list[Ids]) -> Iterator[tuple[str, Callable[[], Floats]]]:
        """Each way by its name; a hot one follows its cold one, which leaves the prefix for it."""
        yield "naive", lambda: self.naive(prefix, items)
        if len(items) * (prefix.size + items[0].size) <= PADDED_TOKENS:
            yield "padded", lambda: self.padded(prefix, items)
        for name, way in (("kept", self.kept), ("copied", self.copied), ("multi-item", self.multi_item)):
            for hot in (False, True):
                temperature = "hot" if hot else "cold"
                yield f"{name}, {temperature}", lambda way=way, hot=hot: way(prefix, items, hot=hot)  # type: ignore[misc]


def measure(model: Model, prefix_tokens: int, item_tokens: int, counts: list[int], rounds: int) -> list[Row]:
    """A row for each number of items: medians in milliseconds by way, and the largest difference of label logits."""
    random = np.random.default_rng(0)
    ways = Ways(model, max(counts))
    times: dict[int, dict[str, list[float]]] = {count: {} for count in counts}
    apart = dict.fromkeys(counts, 0.0)
    for turn, count in itertools.product(range(rounds + 1), counts):
        prefix = random.integers(0, model.runtime.vocab_size, prefix_tokens)
        items = list(random.integers(0, model.runtime.vocab_size, (count, item_tokens)))
        reference: Floats | None = None
        for name, call in ways.variants(prefix, items):
            started = time.perf_counter()
            found = call()
            seconds = time.perf_counter() - started
            reference = found if reference is None else reference
            apart[count] = max(apart[count], float(np.abs(found - reference).max()))
            if turn:  # the first round only warms up
                times[count].setdefault(name, []).append(seconds)
    return [
        {"items": count, "apart": apart[count], **{k: statistics.median(v) * 1e3 for k, v in times[count].items()}}
        for count in counts
    ]


def table(rows: list[Row]) -> str:
    """Milliseconds of each way, and how many times as long as multi-item with the same temperature they take."""
    lines = ["items | " + " | ".join(f"{name:>16}" for name in NAMES) + " | apart"]
    for row in rows:
        cells = []
        for name in NAMES:
            ours = row["multi-item, hot" if name.endswith("hot") else "multi-item, cold"]
            cells.append(f"{row[name]:9.1f} {row[name] / ours:5.1f}x" if name in row else "left out")
        lines.append(f"{row['items']:5} | " + " | ".join(f"{cell:>16}" for cell in cells) + f" | {row['apart']:.1e}")
    return "\n".join(lines)


def chart(rows: list[Row], says: str) -> str:
    """Latency against the number of items, both axes logarithmic; hot ways are dashed. An SVG that stands alone."""
    everything = [row[name] for row in rows for name in NAMES if name in row]
    across = svg.axis("items per request", [row["items"] for row in rows], "log")
    plot = svg.Plot(says, across, svg.axis("latency, median (ms)", everything, "log"))
    rules = [
        "text{font:11px sans-serif;fill:#333}",
        ".middle{text-anchor:middle}.end{text-anchor:end}.rule{stroke:#ddd}",
        ".line{fill:none;stroke-width:2}.dashed{stroke-dasharray:5 3}.hit{fill:none}",
    ]
    for series, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True), start=1):
        points = [(row["items"], row[name]) for row in rows if name in row]
        plot.line(points, series, dashed=name.endswith("hot"))
        for x, y in points:
            plot.mark(x, y, series, f"{name}, {x:g} items: {y:.1f} ms", area=0.3)
        # svg.py has seven colours; the eighth series would take the first one's, so colours go by data-series.
        rules.append(f"[data-series='{series}'].line{{stroke:{colour}}}[data-series='{series}'].mark{{fill:{colour}}}")
        dash = "- -" if name.endswith("hot") else "—"
        legend = svg.text(plot.root, svg.LEFT + 8, svg.TOP + 10 + 13 * (series - 1), f"{dash} {name}", "start")
        legend.set("style", f"fill:{colour}")
    style = ET.Element("style")
    style.text = "".join(rules)
    plot.root.insert(0, style)
    plot.root.insert(1, ET.Element("rect", {"width": "100%", "height": "100%", "fill": "white"}))
    plot.root.set("xmlns", "http://www.w3.org/2000/svg")
    return plot.xml() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--prefix", type=int, default=512, help="tokens of the prefix")
    parser.add_argument("--item", type=int, default=16, help="tokens of an item")
    parser.add_argument("--items", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: one per physical core")
    parser.add_argument("--out", type=Path, help="folder for score_latency.json and score_latency.svg")
    options = parser.parse_args()
    model = load(options.build, threads=options.threads)
    assert isinstance(model, Model)
    rows = measure(model, options.prefix, options.item, options.items, options.rounds)
    print(table(rows))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        says = f"Scoring items of {options.item} tokens behind a prefix of {options.prefix}"
        about = {"build": options.build.name, "precision": model.runtime.precision, "machine": detect(bench=False).cpu}
        figures = {**about, "prefix": options.prefix, "item": options.item, "rounds": options.rounds, "rows": rows}
        (options.out / "score_latency.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (options.out / "score_latency.svg").write_text(chart(rows, says), encoding="utf-8")


if __name__ == "__main__":
    main()
