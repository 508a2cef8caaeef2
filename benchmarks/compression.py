"""Ways to make a small model of the shipped teacher, compared at equal tokens; writes docs/compression.md.

    .venv/bin/python benchmarks/compression.py --scale quick           about an hour, and the same command goes on
    .venv/bin/python benchmarks/compression.py --scale full            many hours
    .venv/bin/python benchmarks/compression.py --only loss --seeds 1   one group, one seed
    .venv/bin/python benchmarks/compression.py --report-only           the page again from the results
    .venv/bin/python benchmarks/compression.py --report-only --run RUN   its headline from a run of the shipped recipe

Results are JSON lines in benchmarks/results/compression-SCALE.jsonl, one for each cell, keyed by what it depends on.
What is compared is in benchmarks/comparison/cells.py. Rounding of weights is benchmarks/rounding.py's, whose results
the page shows too.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.comparison.cells import SCALES, TEACHER, every_cell  # the path above is what finds it

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=tuple(SCALES), default="quick")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="GROUP", help="these groups and no others")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "compression")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--run", type=Path, help="what `slmdeploy run examples/quickstart.toml` wrote")
    options = parser.parse_args()
    if not options.report_only:
        _run(options)
    from benchmarks.comparison.headline import headline
    from benchmarks.comparison.page import write

    if options.run:
        (RESULTS / "compression-headline.json").write_text(json.dumps(headline(options.run), indent=1) + "\n")
    write(RESULTS)


def _run(options: argparse.Namespace) -> None:
    # What follows brings torch, which writing the page does not need.
    from benchmarks.comparison.quality import Judge
    from benchmarks.comparison.results import append, read
    from benchmarks.comparison.running import run
    from slmdeploy import corpus
    from slmdeploy.artifacts import machine

    scale, results = SCALES[options.scale], RESULTS / f"compression-{options.scale}.jsonl"
    cells = every_cell(scale, options.seeds)
    unknown = set(options.only) - {cell.group for cell in cells}
    if unknown:
        sys.exit(f"no group {', '.join(sorted(unknown))}: there are {', '.join(dict.fromkeys(c.group for c in cells))}")
    data = options.work / "data"
    if not data.exists():
        corpus.prepare(data)
    judge = Judge(TEACHER, data, tokens=scale.test_tokens, score_tokens=scale.score_tokens)
    made = machine() | {"commit": _commit()}
    done = read(results)
    if "teacher" not in done:
        append(results, {"key": "teacher", "group": "teacher", "figures": judge.figures(TEACHER), "made": made})
    for cell in cells:
        key = cell.key(scale)
        if (options.only and cell.group not in options.only) or f"{cell.group}-{key}" in done:
            continue
        same = next((line for name, line in done.items() if name.endswith(key)), None)
        figures = same["figures"] if same else run(cell, scale, data, options.work, judge)
        line = {"key": f"{cell.group}-{key}", "group": cell.group, "name": cell.name, "seed": cell.seed}
        line |= {"figures": figures, "made": made}
        append(results, line)
        done[line["key"]] = line
        print(cell.group, cell.name, cell.seed, json.dumps(figures), flush=True)


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


if __name__ == "__main__":
    main()
