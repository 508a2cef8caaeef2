"""What each step of building an encoder gains: `python benchmarks/encoder_forms.py [NAME ...]`.

NAME is `minilm` (6 layers of 384), `bert` (base) or both; weights are random, so this is speed only. Steps add up: the
graph as exported, then attention as one node, one addition of the Q, K, V biases, plain norms (encoder_fusion.py), then
the linear layers in W8A8, with ranges by token and static ones; beside them W8A8 without any fusion, and OpenVINO's
int8 by `slmdeploy build --profile openvino-int8` where the extra openvino is installed. Forms take turns, round by
round, with the same threads. Printed are medians: milliseconds of one text of 128 tokens, and texts per second of 8 and
of 32 at once, with the ratio to OpenVINO's. `--batches` compares how many texts a batch should hold instead,
`--one-thread` counts CPU time of one thread, which other work on the machine disturbs least. Graphs are kept in --work.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModel, BertConfig

from slmdeploy.building.build import build
from slmdeploy.building.encoder_fusion import fuse_attention, fuse_biases, unfuse_norms
from slmdeploy.building.encoder_gate import rows_for
from slmdeploy.building.encoder_parts import plan_for, quantize
from slmdeploy.building.encoder_ranges import ranges_of
from slmdeploy.building.onnxruntime import MODEL, copy_companions, read_model, write_models, write_runtime
from slmdeploy.building.static_w8a8 import Range
from slmdeploy.exporting.export import export
from slmdeploy.runtime.encoder_config import read_encoder
from slmdeploy.runtime.encoder_model import open_encoder
from slmdeploy.runtime.encoding import Encoder, Row
from slmdeploy.specs import load_profile

SIZES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert": {},
}
TOKENS, OUTPUT = 128, "sentence_embedding"
BATCHES = (1, 8, 32)
WARM_UP = 1
OPENVINO, STATIC = "OpenVINO int8", "cpu-int8-static"
Step = Callable[[ir.Model], object]
FORMS: dict[str, tuple[Step, ...]] = {
    "as exported": (),
    "+ attention": (fuse_attention,),
    "+ biases": (fuse_attention, fuse_biases),
    "+ norms": (fuse_attention, fuse_biases, unfuse_norms),
}


def exported(name: str, work: Path) -> Path:
    """The graph folder of the shape, made once."""
    graph = work / name / "graph"
    if graph.is_dir():
        return graph
    torch.manual_seed(0)
    source = work / name / "checkpoint"
    AutoModel.from_config(BertConfig(**SIZES[name])).save_pretrained(source)
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 1000)}}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    return export(source, out=graph, tasks=("embed",)).path


def stepped(graph: Path, steps: tuple[Step, ...]) -> ir.Model:
    """The graph after these steps."""
    model = read_model(graph)
    for step in steps:
        step(model)
    return model


def ranges(graph: Path, steps: tuple[Step, ...]) -> dict[str, Range]:
    """Of a few random rows: which ranges they are decides no speed."""
    config = read_encoder(graph)
    return ranges_of(stepped(graph, steps), config, rows_for(graph, config, None)[0][:4])


def written(graph: Path, folder: Path, steps: tuple[Step, ...], profile: str | None = None) -> Path:
    """The graph after these steps, quantised under a shipped profile, in a folder that can be opened."""
    model = stepped(graph, steps)
    if profile:
        quantize(model, plan_for(load_profile(profile), model), ranges(graph, steps) if profile == STATIC else None)
    folder.mkdir()
    copy_companions(graph, folder)
    write_runtime(graph, folder)
    write_models({MODEL: model}, folder)
    return folder


def forms(graph: Path, scratch: Path, work: Path) -> dict[str, Path]:
    """A folder for each form by name."""
    steps = FORMS["+ norms"]
    found = {name: written(graph, scratch / f"fp32 {name}", FORMS[name]) for name in FORMS}
    found["W8A8, not fused"] = written(graph, scratch / "w8a8", (), "cpu-int8")
    found["W8A8 and all steps"] = written(graph, scratch / "w8a8 fused", steps, "cpu-int8")
    found["static W8A8 and all steps"] = written(graph, scratch / "static fused", steps, STATIC)
    if importlib.util.find_spec("openvino") and importlib.util.find_spec("nncf"):
        folder = work / graph.parent.name / "openvino-int8"
        if not folder.is_dir():
            build(graph, profile=load_profile("openvino-int8"), out=folder)
        found[OPENVINO] = folder
    return found


def rows(count: int, vocab_size: int) -> list[Row]:
    """Texts of random tokens, all of one length."""
    ids = np.random.default_rng(0).integers(1, vocab_size, (count, TOKENS)).tolist()
    return [Row(tuple(text), (0,) * TOKENS) for text in ids]


def seconds(call: Callable[[], object], *, cpu: bool) -> float:
    """Of the second of two calls: the first meets threads of the form before it that still spin."""
    call()
    clock = time.process_time if cpu else time.perf_counter
    started = clock()
    call()
    return clock() - started


def medians(calls: dict[str, Callable[[], object]], rounds: int, *, cpu: bool) -> dict[str, float]:
    """Median seconds of each, in turns; the order turns round each time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UP + rounds):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            took = seconds(calls[name], cpu=cpu)
            times[name] += [took] if turn >= WARM_UP else []
    return {name: statistics.median(found) for name, found in times.items()}


def compare_forms(encoders: dict[str, Encoder], vocab_size: int, rounds: int, *, cpu: bool) -> None:
    """A table of forms: one text, 8 and 32 of them."""
    cells: dict[str, list[str]] = {name: [] for name in encoders}
    for count in BATCHES:
        batch = rows(count, vocab_size)
        calls = {name: lambda e=encoder, b=batch: e.rows(b, OUTPUT) for name, encoder in encoders.items()}
        found = medians(calls, rounds, cpu=cpu)
        for name, took in found.items():
            figure = f"{took * 1e3:.1f}" if count == 1 else f"{count / took:.1f}"
            ratio = f" ({found[OPENVINO] / took:.2f})" if OPENVINO in found else ""
            cells[name].append(figure + ratio)
    heads = ["ms of 1" if count == 1 else f"texts/s of {count}" for count in BATCHES]
    print(f"| form | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, figures in cells.items():
        print(f"| {name} | {' | '.join(figures)} |")


def compare_batches(encoders: dict[str, Encoder], vocab_size: int, rounds: int, *, cpu: bool) -> None:
    """A table of batch sizes for the quantised forms: texts per second of 32 texts."""
    texts = rows(BATCHES[-1], vocab_size)
    sizes = (1, 2, 4, 8, 16, 32)
    print(f"| texts per batch | {' | '.join(map(str, sizes))} |\n|---|{'---|' * len(sizes)}")
    for name in (name for name in ("W8A8 and all steps", OPENVINO) if name in encoders):
        encoder = encoders[name]
        calls: dict[str, Callable[[], object]] = {
            str(size): lambda s=size, e=encoder: [e.run(texts[i : i + s], [OUTPUT]) for i in range(0, len(texts), s)]
            for size in sizes
        }
        found = medians(calls, rounds, cpu=cpu)
        print(f"| {name} | {' | '.join(f'{len(texts) / found[str(size)]:.1f}' for size in sizes)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SIZES)} (default: all)")
    parser.add_argument("--work", type=Path, default=Path("work/encoder_forms"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: one per physical core")
    parser.add_argument("--one-thread", action="store_true", help="CPU time of one thread in place of elapsed time")
    parser.add_argument("--batches", action="store_true", help="compare sizes of batches in place of forms")
    options = parser.parse_args()
    compare = compare_batches if options.batches else compare_forms
    for name in options.names or SIZES:
        graph = exported(name, options.work)
        config = read_encoder(graph)
        with tempfile.TemporaryDirectory(prefix="encoder-forms-") as scratch:
            found = forms(graph, Path(scratch), options.work)
            threads = 1 if options.one_thread else options.threads
            encoders = {form: open_encoder(folder, read_encoder(folder), threads) for form, folder in found.items()}
            clock = "CPU time of one thread" if options.one_thread else "elapsed"
            print(
                f"\n{name}, {TOKENS} tokens, {clock}, medians of {options.rounds}; in brackets speed over OpenVINO's\n"
            )
            compare(encoders, config.vocab_size, options.rounds, cpu=options.one_thread)


if __name__ == "__main__":
    main()
