"""Builds of the engine openvino beside what optimum-intel exports: CPU time of one thread, in turns.

    python benchmarks/openvino_peers.py work/cpu_peers/models/smollm2-135m [--rounds 3] [--lengths 128,512,2048]
    python benchmarks/openvino_peers.py work/cpu_peers/models/minilm-6-384

The folder is one that `benchmarks/cpu_peers.py --prepare-only` makes. Of decoders the exported graph runs as OpenVINO
GenAI runs it, its attention paged by the same transformation, and with states, prompts whole; in bfloat16 where the
build is. Of encoders both run through the adapters of benchmarks/peers/. CPU time because other work on the machine
lengthens the wall clock's; the least of the rounds. docs/openvino.md has the tables.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.engines import openvino_, ours
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.openvino_session import page_attention

BUILD, DECODER, ENCODER = "slmdeploy-openvino-int8", "openvino-genai-int8", "openvino-int8"
PAGE, STEPS, BATCH = 32, 12, 8
PREFIX, ITEMS, ITEM = 512, 32, 16
TEXT, TEXTS = 128, (1, 8, 32)


class Paged:
    """The exported graph with paged attention, one sequence."""

    def __init__(self, path: Path, options: dict[str, str], tokens: int) -> None:
        model = openvino.Core().read_model(path)
        page_attention(model)
        compiled = openvino.Core().compile_model(model, "CPU", options)
        self._request = compiled.create_infer_request()
        for value in compiled.inputs:
            if "cache" in value.any_name:
                sizes = [size.get_length() for size in list(value.partial_shape)[1:]]
                self._request.set_tensor(
                    value.any_name, openvino.Tensor(value.element_type, [tokens // PAGE + 2, *sizes])
                )

    def run(self, ids: Any, past: int) -> None:
        """All logits of ids behind `past` tokens."""
        total = past + ids.size
        pages = np.arange(-(-total // PAGE), dtype=np.int32)
        self._request.infer(
            {
                "input_ids": ids,
                "position_ids": np.arange(past, total),
                "max_context_len": np.array(total, np.int32),
                "past_lens": np.array([past], np.int32),
                "subsequence_begins": np.array([0, ids.size], np.int32),
                "block_indices": pages,
                "block_indices_begins": np.array([0, pages.size], np.int32),
            },
            share_outputs=True,
        )


class Stateful:
    """The exported graph with states, one sequence."""

    def __init__(self, path: Path, options: dict[str, str]) -> None:
        self._request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def run(self, ids: Any, past: int) -> None:
        """All logits of ids behind `past` tokens."""
        if not past:
            self._request.reset_state()
        total = past + ids.size
        feed = {"input_ids": ids[None], "attention_mask": np.ones((1, total), np.int64)}
        feed |= {"position_ids": np.arange(past, total)[None], "beam_idx": np.zeros(1, np.int32)}
        self._request.infer(feed, share_outputs=True)


def least(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least CPU milliseconds of each, in turns."""
    found = dict.fromkeys(calls, np.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.process_time()
            call()
            found[name] = min(found[name], (time.process_time() - started) * 1e3)
    return found


def show(what: str, found: dict[str, float]) -> None:
    """One line, with what the others take over the build."""
    own = found[BUILD]
    print(f"{what}: " + ", ".join(f"{name} {ms:.1f} ms ({ms / own:.2f})" for name, ms in found.items()), flush=True)


def decoders(folder: Path, lengths: list[int], rounds: int) -> None:
    """Prompts, a step behind the first of them; of the build also steps of a batch, and scores."""
    model = load(folder / BUILD, threads=1)
    assert isinstance(model, Model)
    precision = str(model.runtime.inference_precision)
    options = {
        "INFERENCE_NUM_THREADS": "1",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
    }
    graph = folder / DECODER / "openvino_model.xml"
    paged, stateful = Paged(graph, options, max(lengths)), Stateful(graph, options)
    random = np.random.default_rng(0)
    for length in lengths:
        ids = random.integers(0, model.runtime.vocab_size, length)
        calls: dict[str, Callable[[], object]] = {
            BUILD: lambda ids=ids: model.prefill(ids),
            f"{DECODER}, paged": lambda ids=ids: paged.run(ids, 0),
            f"{DECODER}, states": lambda ids=ids: stateful.run(ids, 0),
        }
        show(f"prompt of {length}", least(calls, rounds))
        after: dict[str, Callable[[], object]] = {
            BUILD: lambda: model.decode(5),
            f"{DECODER}, paged": lambda ids=ids: paged.run(ids[:1], ids.size),
            f"{DECODER}, states": lambda ids=ids: stateful.run(ids[:1], ids.size),
        }
        show(f"step behind {length}", least(after, STEPS))
    _together(model, random, lengths[0], rounds)


def _together(model: Model, random: np.random.Generator, length: int, rounds: int) -> None:
    batch = model.open_batch(BATCH)
    for _ in range(BATCH):
        batch.admit(random.integers(0, model.runtime.vocab_size, length))
    show(f"step of {BATCH} behind {length}", least({BUILD: lambda: batch.step(np.arange(BATCH))}, STEPS))
    if "score" in model.tasks:
        prefix = random.integers(0, model.runtime.vocab_size, PREFIX).tolist()
        items = random.integers(0, model.runtime.vocab_size, (ITEMS, ITEM)).tolist()
        model.score_ids(prefix, items)
        for count in (ITEMS, 1):
            known: dict[str, Callable[[], object]] = {BUILD: lambda n=count: model.score_ids(prefix, items[:n])}
            show(f"{count} x {ITEM} behind {PREFIX} known", least(known, rounds))


def encoders(folder: Path, rounds: int) -> None:
    """Texts of 128 tokens at once, vectors pooled."""
    engines: dict[str, Any] = {
        BUILD: ours.open_engine(folder / BUILD, 1, "openvino-int8"),
        ENCODER: openvino_.open_engine(folder / ENCODER, 1),
    }
    for count in TEXTS:
        rows = np.random.default_rng(0).integers(2, 900, (count, TEXT)).tolist()
        calls: dict[str, Callable[[], object]] = {
            name: lambda engine=engine, rows=rows: engine.encode(rows) for name, engine in engines.items()
        }
        least(calls, 1)
        show(f"{count} texts of {TEXT}", least(calls, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", default="128,512,2048")
    asked = parser.parse_args()
    if (asked.folder / ENCODER).is_dir():
        encoders(asked.folder, asked.rounds)
    else:
        decoders(asked.folder, [int(length) for length in asked.lengths.split(",")], asked.rounds)


if __name__ == "__main__":
    main()
