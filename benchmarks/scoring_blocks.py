"""How wide the blocks of a scoring run should be, and whether lanes pay: `python benchmarks/scoring_blocks.py BUILD`.

BUILD is a folder made by `slmdeploy build` with the task score, such as work/quickstart/builds/cpu-int8. For each shape
of request the same scores are computed with several numbers of slots, in turn, in one lane; then with the number that
slmdeploy.runtime.blocks.slots_for chooses, in one lane and in lanes. Printed are median milliseconds, and for the last
two also items per second.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from slmdeploy.runtime import scoring
from slmdeploy.runtime.blocks import slots_for
from slmdeploy.runtime.model import Model, load

SHAPES = (
    (20, 10, 22),
    (20, 100, 22),
    (128, 32, 16),
    (256, 16, 16),
    (448, 32, 16),
    (448, 16, 24),
)  # prefix, items, tokens of an item
SLOTS = (16, 24, 32, 48, 64, 128, 256)
ROUNDS = 9


def fixed(slots: int) -> Callable[[int, int, Sequence[int]], int]:
    """A rule that asks for ``slots`` whatever the prefix, as far as the pieces allow."""
    return lambda seen, prefix, sizes: max(*sizes, min(slots, max(prefix, sum(sizes)))) if sizes else min(slots, prefix)


def medians(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each; two calls a turn, of which the second counts."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, call in variants.items():
            call()
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) * 1e3 for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="0: one per physical core")
    options = parser.parse_args()
    opened = load(options.build, threads=options.threads)
    one, lanes = (
        Model(opened.path, replace(opened.runtime, parallel_items=parallel), opened.tokenizer, options.threads)
        for parallel in (False, True)
    )
    random = np.random.default_rng(0)
    print("prefix items tokens | " + " ".join(f"{slots:>7}" for slots in SLOTS) + " | rule, one lane / lanes (items/s)")
    for prefix_tokens, count, item_tokens in SHAPES:
        if prefix_tokens + item_tokens > opened.runtime.max_length:
            continue
        prefix = random.integers(0, opened.runtime.vocab_size, prefix_tokens).tolist()
        items = random.integers(0, opened.runtime.vocab_size, (count, item_tokens)).tolist()

        def score(model: Model, rule: Callable[[int, int, Sequence[int]], int]) -> None:
            scoring.slots_for = rule
            model.score_ids(prefix, items)  # noqa: B023

        found = medians({str(slots): lambda slots=slots: score(one, fixed(slots)) for slots in SLOTS})  # type: ignore[misc]
        both = medians({"one": lambda: score(one, slots_for), "lanes": lambda: score(lanes, slots_for)})
        rate = {name: count / ms * 1e3 for name, ms in both.items()}
        print(
            f"{prefix_tokens:6} {count:5} {item_tokens:6} | "
            + " ".join(f"{ms:7.2f}" for ms in found.values())
            + f" | {both['one']:.2f} / {both['lanes']:.2f} ms ({rate['one']:.0f} / {rate['lanes']:.0f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
