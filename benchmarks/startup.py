"""How long `slmdeploy --help` takes, against `python -c pass` in the same interpreter.

    .venv/bin/python benchmarks/startup.py

The two commands take turns, so that a slow moment of the machine falls on both; the number that counts is the median
of `--help`, which the CLI promises to keep under 400 ms. The last line on stdout is one JSON object, times in ms.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 10
COMMANDS = {
    "help_ms": [str(Path(sys.executable).parent / "slmdeploy"), "--help"],
    "interpreter_ms": [sys.executable, "-c", "pass"],
}


def elapsed_ms(command: list[str]) -> float:
    """Wall time of one process from start to exit, in milliseconds."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Warm the file cache once, then time the commands in turn."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        elapsed_ms(command)
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times[name].append(elapsed_ms(command))
    print(
        json.dumps({name: round(statistics.median(values), 1) for name, values in times.items()} | {"rounds": ROUNDS})
    )


if __name__ == "__main__":
    main()
