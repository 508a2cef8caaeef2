"""What a build asks of a machine, read from its folder: matrices of each graph, attention, cache, chunks, threads.

Reads manifest.json, runtime.json, config.json and the graphs without the onnx package, without torch and without
opening a session, so a build can be estimated where it does not run. Builds of the engine openvino are refused: their
plugin fuses operators in ways that the file does not show. Knows nothing of workloads (runs.py) or of time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmdeploy.artifacts import open_artifact
from slmdeploy.checkpoint import read_config
from slmdeploy.errors import InputError
from slmdeploy.profiling.graph_facts import GraphFacts, read_graph
from slmdeploy.runtime.bundle import RuntimeConfig, read_runtime
from slmdeploy.runtime.decoding import GRAPH, PREFILL
from slmdeploy.runtime.encoder_config import EncoderConfig, is_encoder, read_encoder
from slmdeploy.runtime.scoring import GRAPH as SCORE

_RUNNABLE = ("graph", "build", "package")
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "dim", "d_model")
_HEADS = ("num_attention_heads", "n_heads", "num_heads")


@dataclass(frozen=True)
class BuildFacts:
    """One build. ``widths``: query heads x head size of each layer; ``kv_widths`` the same of keys, none of an encoder.

    ``graphs``: by role `steps`, `prompts`, `score` or `encode`. ``chunk`` 0: prompts run in one piece. ``step_rows``:
    from so many sequences on steps run in the graph of prompts, 0 for never. ``threads`` 0: all physical cores.
    """

    name: str
    content_key: str | None
    tasks: tuple[str, ...]
    graphs: Mapping[str, GraphFacts]
    widths: tuple[int, ...]
    kv_widths: tuple[int, ...]
    vocab_size: int
    max_length: int
    chunk: int = 0
    step_rows: int = 0
    threads: int = 0
    parallel_items: bool = False
    cache_number_bytes: int = 4
    compiled: bool = False
    """Whether a compiler for GPUs runs it, and not ONNX Runtime."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.cache_number_bytes * sum(self.kv_widths)

    def memory_bytes(self, roles: set[str]) -> int:
        """Bytes of the matrices of these graphs; graphs of one form share theirs, those of another have their own."""
        used = {(graph.forms, graph.weight_bytes) for role, graph in self.graphs.items() if role in roles}
        by_form: dict[frozenset[str], int] = {}
        for forms, size in used:
            by_form[forms] = max(by_form.get(forms, 0), size)
        return sum(by_form.values())


def read_facts(path: Path, name: str) -> BuildFacts:
    """The facts of a graph, build or package folder; ``name`` is what its row is called.

    Raises InputError for a folder of another kind or engine, CorruptArtifactError for one that is not sound.
    """
    artifact = open_artifact(path)
    if artifact.kind not in _RUNNABLE:
        raise InputError(f"{path} is a {artifact.kind}: estimate takes what `slmdeploy build` or `export` made")
    runtime: RuntimeConfig | EncoderConfig = read_encoder(path) if is_encoder(path) else read_runtime(path)
    if runtime.engine != "onnxruntime":
        raise InputError(
            f"{path} is a build for {runtime.engine}, whose time is not estimated: measure it with `slmdeploy profile`"
        )
    if isinstance(runtime, RuntimeConfig):
        return _decoder(path, name, artifact.content_key, runtime)
    return _encoder(path, name, artifact.content_key, runtime)


def _decoder(path: Path, name: str, content_key: str, runtime: RuntimeConfig) -> BuildFacts:
    files = (
        {"steps": GRAPH, "prompts": PREFILL if runtime.own_prefill else GRAPH} if "generate" in runtime.tasks else {}
    )
    if "score" in runtime.tasks:
        files["score"] = SCORE
    read = {file: read_graph(path / file) for file in set(files.values())}
    return BuildFacts(
        name=name,
        content_key=content_key,
        tasks=runtime.tasks,
        graphs={role: read[file] for role, file in files.items()},
        widths=_query_widths(path, read_config(path), runtime),
        kv_widths=tuple(heads * runtime.head_dim for heads in runtime.kv_heads),
        vocab_size=runtime.vocab_size,
        max_length=runtime.max_length,
        chunk=runtime.prefill_chunk,
        step_rows=runtime.step_rows,
        threads=runtime.threads,
        parallel_items=runtime.parallel_items,
        cache_number_bytes=2 if runtime.cache == "float16" else 4,
        compiled=runtime.numerics_only or runtime.provider != "cpu",
    )


def _encoder(path: Path, name: str, content_key: str, runtime: EncoderConfig) -> BuildFacts:
    config = read_config(path)
    layers, hidden = (_size(path, config, names) for names in (_LAYERS, _HIDDEN))
    return BuildFacts(
        name=name,
        content_key=content_key,
        tasks=runtime.tasks,
        graphs={"encode": read_graph(path / GRAPH)},
        widths=(hidden,) * layers,
        kv_widths=(),
        vocab_size=runtime.vocab_size,
        max_length=runtime.max_length,
        threads=runtime.threads,
        compiled=runtime.numerics_only,
    )


def _query_widths(path: Path, config: Mapping[str, Any], runtime: RuntimeConfig) -> tuple[int, ...]:
    shapes = config.get("layer_shapes")  # what structured pruning writes where layers differ
    heads = [shape[_HEADS[0]] for shape in shapes] if shapes else [_size(path, config, _HEADS)] * runtime.layers
    return tuple(count * runtime.head_dim for count in heads)


def _size(path: Path, config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    text = config.get("text_config")  # decoders of models that also see have their sizes one level down
    places = (config, text if isinstance(text, dict) else {})
    found = next((place[name] for place in places for name in names if type(place.get(name)) is int), None)
    if found is None:
        raise InputError(f"{path / 'config.json'}: one of {', '.join(names)} must be a number, or nothing is estimated")
    return int(found)
