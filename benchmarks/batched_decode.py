"""How fast a build decodes 1 to 16 sequences of unequal lengths together.

    python benchmarks/batched_decode.py BUILD [BUILD ...] [--rows 1 2 4 8 16] [--steps 32] [--threads 2] [--tokens 128]

Sequence i of a batch begins with `tokens` + 5 i random tokens. The sizes of batch take turns, one step each, so that a
slow moment of the machine falls on all; printed are the median step in milliseconds of wall time and of CPU time (with
one thread, what a busy machine does not change much), tokens per second by wall time, and by both the ratio to the
first size. The last line on stdout is one JSON object.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from slmdeploy.runtime.batching import BatchDecoder
from slmdeploy.runtime.decoding import Decoder
from slmdeploy.runtime.model import load


def measure(build: Path, rows: list[int], steps: int, threads: int, tokens: int) -> list[dict[str, float]]:
    """One line per size of batch."""
    model = load(build, threads=threads, verify=False)
    random = np.random.default_rng(0)
    decoder = Decoder(build, model.runtime, threads)
    batches = {}
    for count in rows:
        batch = batches[count] = BatchDecoder(decoder, count)
        batch.reserve(tokens + 5 * count + steps + 1)
        for i in range(count):
            batch.admit(random.integers(0, model.runtime.vocab_size, tokens + 5 * i))
        batch.step(np.zeros(count, np.int64))
    times: dict[int, list[tuple[float, float]]] = {count: [] for count in rows}
    for _ in range(steps):
        for count, batch in batches.items():
            wall, cpu = time.perf_counter(), time.process_time()
            batch.step(np.zeros(count, np.int64))
            times[count].append((time.perf_counter() - wall, time.process_time() - cpu))
    found = []
    for count in rows:
        wall_s, cpu_s = (statistics.median(values) for values in zip(*times[count], strict=True))
        found.append({"rows": count, "wall_ms": wall_s * 1e3, "cpu_ms": cpu_s * 1e3, "tokens_per_s": count / wall_s})
    return found


def main() -> None:
    """Measure every build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("builds", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    everything = {}
    print(f"{'build':24} {'rows':>4} {'wall ms':>8} {'cpu ms':>8} {'tok/s':>8} {'ratio':>6} {'by cpu':>6}")
    for build in options.builds:
        found = measure(build, options.rows, options.steps, options.threads, options.tokens)
        everything[build.name] = found
        for line in found:
            more = line["rows"] / found[0]["rows"]
            by_wall, by_cpu = (more * found[0][name] / line[name] for name in ("wall_ms", "cpu_ms"))
            print(
                f"{build.name:24} {line['rows']:4} {line['wall_ms']:8.1f} {line['cpu_ms']:8.1f} "
                f"{line['tokens_per_s']:8.1f} {by_wall:6.2f} {by_cpu:6.2f}"
            )
    print(json.dumps({"threads": options.threads, "tokens": options.tokens, "builds": everything}))


if __name__ == "__main__":
    main()
