"""Where the time of a build goes: share of each ONNX Runtime operator in prompts, steps or scores.

    python benchmarks/operators.py BUILD --phase prompt --tokens 512
    python benchmarks/operators.py BUILD --phase steps --tokens 128
    python benchmarks/operators.py BUILD --phase score --tokens 512      32 items of 16 tokens behind a prefix

Tracing costs some microseconds per operator, so shares of small ones are too large: the sum is printed beside the time
without tracing. Matrix products are told apart by the width of their result. Runs the build as it says (threads).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from slmdeploy.runtime import session
from slmdeploy.runtime.model import Model, load

_RUNS, _STEPS = 8, 64
_GRAPH = {"prompt": ("prefill.onnx", "model.onnx"), "steps": ("model.onnx",), "score": ("score.onnx",)}


def work(model: Model, phase: str, tokens: int) -> Callable[[], float]:
    """Does the phase once with tokens of its own and gives its seconds; steps: of each."""
    random = np.random.default_rng(0)
    draw = lambda count: random.integers(0, model.runtime.vocab_size, count).tolist()  # noqa: E731

    def once() -> float:
        started = time.perf_counter()
        if phase == "prompt":
            model.prefill(draw(tokens))
            return time.perf_counter() - started
        if phase == "score":
            prefix, items = draw(tokens), [draw(16) for _ in range(32)]
            started = time.perf_counter()
            model.score_ids(prefix, items)
            return time.perf_counter() - started
        stream = model.generate_ids(draw(tokens), max_new_tokens=_STEPS + 1, ignore_eos=True)
        next(stream)
        started = time.perf_counter()
        for _ in stream:
            pass
        return (time.perf_counter() - started) / _STEPS

    return once


def median_of(build: Path, phase: str, tokens: int) -> float:
    """Seconds of the phase, the first run left out."""
    once = work(load(build), phase, tokens)
    return statistics.median([once() for _ in range(_RUNS)][1:])


def traced(build: Path, phase: str, tokens: int, folder: Path) -> list[dict[str, Any]]:
    """The operators' events of the phase's graph, the first runs left out."""
    opened: list[tuple[str, ort.InferenceSession]] = []
    plain = ort.InferenceSession

    def tracing(path: str, options: ort.SessionOptions, **more: Any) -> ort.InferenceSession:
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / Path(path).stem)
        opened.append((Path(path).name, plain(path, options, **more)))
        return opened[-1][1]

    session.ort.InferenceSession = tracing
    median_of(build, phase, tokens)
    files = {name: one.end_profiling() for name, one in opened}
    file = next(files[name] for name in _GRAPH[phase] if name in files)
    events = json.loads(Path(file).read_text())
    found = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    return found[len(found) // 4 :]


def label(event: dict[str, Any]) -> str:
    """The operator; of a matrix product the width of its result too."""
    operator = str(event["args"]["op_name"])
    if not operator.startswith("MatMul"):
        return operator
    (shape,) = next(iter(event["args"]["output_type_shape"][0].items()))[1:]
    return f"{operator} to {shape[-1]}"


def main() -> None:
    """Measure without tracing, then trace, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--phase", choices=list(_GRAPH), default="prompt")
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    seconds = median_of(given.build, given.phase, given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        events = traced(given.build, given.phase, given.tokens, Path(folder))
    spent: Counter[str] = Counter()
    for event in events:
        spent[label(event)] += event["dur"]
    calls = Counter(label(event) for event in events)
    print(f"{given.phase} of {given.tokens} tokens: {seconds * 1e3:.2f} ms without tracing")
    for name, total in spent.most_common():
        print(f"{name:36} {total / sum(spent.values()):6.1%}  {total / calls[name]:9.1f} us each")


if __name__ == "__main__":
    main()
