"""Exports decoders: checkpoint -> spec -> graphs -> parity -> artifact, built from weights, or traced as a fallback.

The folder holds model.onnx and its data, score.onnx for the task score, standard.onnx and genai_config.json for other
runtimes, and what graph_folder.py puts beside them. Knows nothing of encoders, nor of quantisation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.checkpoint import LABELS, Weights, label_token_ids
from slmdeploy.errors import InputError, SlmdeployError, UnsupportedModelError
from slmdeploy.exporting.adapters import Source
from slmdeploy.exporting.graph_folder import check_vocabulary, copy_texts, write_runtime
from slmdeploy.exporting.reading import read_spec
from slmdeploy.exporting.spec import (
    PORTABLE_OPSETS,
    STATIC_OPSET,
    DecoderSpec,
    check_tensors,
    head_rows,
    located,
)
from slmdeploy.progress import Progress

if TYPE_CHECKING:
    from slmdeploy.exporting.parity import TorchSide

_UNPROVEN = {"parity": "not measured: exported with --no-parity"}
_PARITY_MEASURE = "largest absolute difference of logits, divided by the largest logit of torch where that is above 1"


@dataclass(frozen=True)
class DecoderSettings:
    """How to export a decoder; see `export`. opset is that of the portable dialect."""

    tasks: Sequence[str]
    labels: tuple[str, str] = LABELS
    dialect: str = "ort"
    opset: int | None = None
    max_length: int | None = None
    parity: bool = True

    @property
    def portable_opset(self) -> int | None:
        """The opset of the portable dialect; None for the other."""
        return None if self.dialect == "ort" else self.opset or PORTABLE_OPSETS[0]

    @property
    def interface(self) -> str:
        """What runtime.json calls the interface of model.onnx."""
        opset = self.portable_opset
        return "shared" if opset is None else "static" if opset >= STATIC_OPSET else "standard"

    def plan(self) -> dict[str, Any]:
        """What the artifact's content key is made of: settings that are not given are not there."""
        found: dict[str, Any] = {"tasks": list(self.tasks), "dialect": self.dialect}
        if self.portable_opset is not None:
            found["opset"] = self.portable_opset
        if "score" in self.tasks:
            found["labels"] = list(self.labels)
        if self.max_length is not None:
            found["max_length"] = self.max_length
        if not self.parity:
            found["parity"] = False
        return found


def export_built(
    found: Source, settings: DecoderSettings, *, out: Path, inputs: dict[str, Any], force: bool, progress: Progress
) -> Artifact:
    """Write a graph that is built from the checkpoint's weights, and its parity with torch; raises as `export` does."""
    source, tasks = found.path, settings.tasks
    weights = Weights(source)
    try:
        spec = located(read_spec(source, settings.max_length), weights)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}; --fallback exports any decoder that transformers can trace") from error
    check_tensors(spec, weights)
    check_vocabulary(source, spec)
    if "score" in tasks:
        _check_scoring(source, spec, settings)
    label_ids = label_token_ids(source, settings.labels) if "score" in tasks else None
    with writing(out, kind="graph", plan=settings.plan(), inputs=inputs, force=force) as draft:
        copy_texts(source, draft.path, spec)
        write_runtime(
            draft.path, spec, tasks, interface=settings.interface, labels=settings.labels, label_ids=label_ids
        )
        _write_graphs(spec, weights, draft.path, label_ids, settings.portable_opset, progress)
        if "generate" in tasks and settings.interface != "static":
            _write_for_other_runtimes(draft.path, settings.interface)
        draft.result |= _prove(source, draft.path, progress) if settings.parity else _UNPROVEN
        draft.result["parameters"] = sum(math.prod(shape) for shape in spec.tensor_shapes().values())
        draft.result["path"] = "weights"
    return open_artifact(out, "graph")


def _check_scoring(source: Path, spec: DecoderSpec, settings: DecoderSettings) -> None:
    if spec.scaled_context:
        original = min(rope.original for rope in spec.ropes if rope.changes_within(spec.max_length))
        raise InputError(
            f"{source}: its rotary embedding changes with the length of a sequence beyond {original} tokens, so items "
            f"cannot share a prefix there; for the task score export with --max-length {original}"
        )


def export_traced(
    found: Source, settings: DecoderSettings, *, out: Path, inputs: dict[str, Any], force: bool, progress: Progress
) -> Artifact:
    """The fallback: the graph is traced, of standard operators alone, and marked with its cost."""
    from slmdeploy.exporting.causal import CausalModel, measure_spec, open_causal
    from slmdeploy.exporting.fallback import exporter_versions, require_runs, trace_decoder, write_graph
    from slmdeploy.exporting.stand_in import measured_cost

    source, tasks, max_length = found.path, settings.tasks, settings.max_length
    if not settings.parity:
        raise InputError("a traced graph is always compared with torch: leave --no-parity out with the fallback")
    if settings.dialect != "ort" or settings.opset is not None:
        raise InputError("the fallback has one form, standard operators: leave dialect and opset out with it")
    if "score" in tasks:
        raise InputError(f"{source}: the fallback cannot score, only generate; export it with --task generate alone")
    Weights(source)  # refuses what is no safetensors before transformers looks at it
    model = open_causal(source)
    spec = measure_spec(source, model, max_length)
    check_vocabulary(source, spec)
    plan: dict[str, Any] = {"tasks": list(tasks), "fallback": True}
    if max_length is not None:
        plan["max_length"] = max_length
    with writing(out, kind="graph", plan=plan, inputs=inputs, force=force) as draft:
        copy_texts(source, draft.path, spec)
        write_runtime(draft.path, spec, tasks, interface="standard")
        progress.start("trace", None, "")
        write_graph(trace_decoder(model, spec, str(source)), draft.path)
        progress.finish()
        require_runs(draft.path, source)
        _write_for_other_runtimes(draft.path, "standard")
        parameters = sum(tensor.numel() for tensor in model.parameters())
        # a tied head is computed like any other, so the stand-in counts it
        computed = sum(tensor.numel() for _, tensor in model.named_parameters(remove_duplicate=False))
        del model  # parity opens the checkpoint anew, so that nothing the tracer did to it can hide
        draft.result |= _prove(source, draft.path, progress, CausalModel)
        draft.result |= {"parameters": parameters, "path": "fallback", "exporter": exporter_versions()}
        progress.start("time beside the fast path", None, "")
        draft.result["cost"] = measured_cost(draft.path, hidden=spec.hidden, heads=spec.heads, parameters=computed)
        progress.finish()
    return open_artifact(out, "graph")


def _write_graphs(
    spec: DecoderSpec,
    weights: Weights,
    folder: Path,
    label_ids: tuple[int, int] | None,
    opset: int | None,
    progress: Progress,
) -> None:
    """model.onnx, portable where an opset is given, and score.onnx where there are labels."""
    import onnx_ir as ir

    from slmdeploy.building.scoring_graph import write_score_graph
    from slmdeploy.exporting.decoder import build_decoder
    from slmdeploy.exporting.dialect import OrtDialect
    from slmdeploy.exporting.portable import PortableDialect

    emitter = OrtDialect(spec) if opset is None else PortableDialect(spec, opset)
    model, path = build_decoder(spec, weights, emitter), folder / "model.onnx"
    progress.start("write graph", len(model.graph.initializers), "tensors")
    try:
        ir.save(model, path, external_data="model.onnx.data", callback=lambda tensor, info: progress.advance())
    except ir.serde.SerdeError as error:  # what reading a weight raised is inside, once for each level of the graph
        raise _cause(error) from error
    progress.finish()
    if label_ids is None:
        return
    if opset is None:
        write_score_graph(path, head_rows(spec, weights)[list(label_ids)].T, folder / "score.onnx")
    else:
        _write_portable_scoring(spec, weights, folder, label_ids, opset)


def _write_portable_scoring(
    spec: DecoderSpec, weights: Weights, folder: Path, label_ids: tuple[int, int], opset: int
) -> None:
    """score.onnx beside model.onnx; what both hold is stored once."""
    import onnx_ir as ir

    from slmdeploy.building.onnxruntime import MODEL, SCORE
    from slmdeploy.exporting.decoder import build_decoder
    from slmdeploy.exporting.portable_scoring import LABELS, PortableScoring

    scoring = build_decoder(spec, weights, PortableScoring(spec, len(label_ids), opset), (LABELS, label_ids))
    generating = ir.load(folder / MODEL)
    shared = generating.graph.initializers
    for name, value in scoring.graph.initializers.items():
        if name in shared:
            value.const_value = shared[name].const_value
    ir.save(scoring, folder / SCORE)


def _cause(error: BaseException) -> BaseException:
    """The error of ours that another was raised from, the innermost one if there is none."""
    if isinstance(error, SlmdeployError) or error.__cause__ is None:
        return error
    return _cause(error.__cause__)


def _write_for_other_runtimes(folder: Path, interface: str) -> None:
    """The standard interface where model.onnx has not got it, and what onnxruntime-genai wants to know."""
    from slmdeploy.building.standard_graph import write_standard_graph
    from slmdeploy.exporting.genai import write_genai_config

    if interface == "shared":
        write_standard_graph(folder / "model.onnx")
    write_genai_config(folder)


def _prove(checkpoint: Path, folder: Path, progress: Progress, torch_side: "TorchSide | None" = None) -> dict[str, Any]:
    """The manifest's record of parity; raises GateError when it fails."""
    from slmdeploy.building.standard_check import standard_rungs
    from slmdeploy.building.standard_graph import STANDARD
    from slmdeploy.exporting import parity
    from slmdeploy.exporting.eager import EagerModel

    rungs = parity.measure(checkpoint, folder, progress, torch_side or EagerModel)
    if (folder / STANDARD).is_file():
        rungs += standard_rungs(folder, limit=parity.LIMIT)
    parity.require_passed(rungs, checkpoint)
    return {
        "parity": [rung.as_dict() for rung in rungs],
        "parity_limit": parity.LIMIT,
        "parity_measure": _PARITY_MEASURE,
    }
