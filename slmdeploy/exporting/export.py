"""The verb `export`: from a checkpoint to a graph folder that runs, proven equal to torch before it exists.

    checkpoint -> spec (refuses what it does not understand) -> graph -> scoring variant -> parity -> artifact

The folder holds model.onnx and its data, score.onnx for the task score, runtime.json, and config and tokenizer beside
them. Knows nothing of quantisation. Torch and onnx are imported when the verb runs, so that importing this file is
free and a missing extra is one sentence.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.checkpoint import (
    LABELS,
    TOKENIZER_FILES,
    Weights,
    chat_templates,
    label_token_ids,
    read_json,
    read_tokenizer,
    require_exact_weights,
)
from slmdeploy.errors import InputError, SlmdeployError, UnsupportedModelError
from slmdeploy.exporting.adapters import Source, whole_checkpoint
from slmdeploy.exporting.encoder import EncoderSettings, export_encoder
from slmdeploy.exporting.reading import read_spec
from slmdeploy.exporting.spec import DecoderSpec, check_tensors, head_rows, located
from slmdeploy.exporting.tasks import DECODER, check_names, choose
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress
from slmdeploy.runtime.bundle import read_runtime

if TYPE_CHECKING:
    from slmdeploy.exporting.causal import CausalSpec
    from slmdeploy.exporting.parity import TorchSide

DIALECTS = ("ort", "portable")
OPSETS = (21, 23, 24)
STATIC_OPSET = 24
"""From here on the portable dialect has a cache of fixed capacity."""
_PARITY_MEASURE = "largest absolute difference of logits, divided by the largest logit of torch where that is above 1"


def export(
    checkpoint: Path | str,
    *,
    out: Path,
    tasks: Sequence[str] | None = None,
    labels: tuple[str, str] = LABELS,
    dialect: str = "ort",
    opset: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    base: Path | str | None = None,
    revision: str | None = None,
    cache_dir: Path | str | None = None,
    fallback: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Write the float32 graph of a checkpoint (a folder or a Hugging Face id) to `out`, and its parity with torch.

    tasks: out of generate, score, embed and classify; None for what the checkpoint's class is for (tasks.py).
    dialect: "ort", fastest in ONNX Runtime, or "portable", of standard operators alone, by default in `opset` 21.
    pooling ("mean", "cls", "last") and normalize: of the vectors of embed; None as the checkpoint says, else the mean.
    max_length: the context in tokens, instead of the config's; the scaling of its positions may allow a longer one.
    base: for a LoRA adapter, the checkpoint that it was trained on, if not the one that it names; it is merged in.
    revision and cache_dir: of a Hugging Face id, see `resolve_checkpoint`.
    fallback: trace a decoder with transformers.exporters, whether or not it could be built from its weights.
    labels: the words for label values 0 and 1 of the task score; each must be one token. Raises UnsupportedModelError
    for a model that is not understood entirely, InputError for an unknown task or dialect, a missing file or a label of
    several tokens, GateError when a logit differs from torch's by more than parity.LIMIT, and what `writing` raises.
    """
    require("build", "torch", "transformers", "onnx", "onnx_ir")
    if tasks is not None:
        check_names(tasks)
    _check_dialect(dialect, opset)
    progress = progress or SILENT
    with whole_checkpoint(
        checkpoint, beside=out, base=base, revision=revision, cache_dir=cache_dir, progress=progress
    ) as found:
        choice = choose(found.path, tasks)
        require_exact_weights(found.path)
        inputs = found.origins or {"checkpoint": found.path}
        if choice.role != DECODER:
            settings = EncoderSettings(dialect, pooling, normalize, max_length)
            return export_encoder(found.path, choice, settings, out=out, inputs=inputs, force=force, progress=progress)
        if pooling is not None or normalize is not None:
            raise InputError("pooling and normalize are settings of the task embed, not of a decoder's")
        if fallback:
            if dialect != "ort" or opset is not None:
                raise InputError("the fallback has one form, standard operators: leave dialect and opset out with it")
            return _export_traced(found, out, choice.tasks, max_length, force, progress)
        return _export(found, out, choice.tasks, labels, dialect, opset, max_length, force, progress)


def _export(
    found: Source,
    out: Path,
    tasks: Sequence[str],
    labels: tuple[str, str],
    dialect: str,
    opset: int | None,
    max_length: int | None,
    force: bool,
    progress: Progress,
) -> Artifact:
    source = found.path
    weights = Weights(source)
    try:
        spec = located(read_spec(source, max_length), weights)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}; --fallback exports any decoder that transformers can trace") from error
    check_tensors(spec, weights)
    _check_vocabulary(source, spec)
    if "score" in tasks and spec.scaled_context:
        original = min(rope.original for rope in spec.ropes if rope.changes_within(spec.max_length))
        raise InputError(
            f"{source}: its rotary embedding changes with the length of a sequence beyond {original} tokens, so items "
            f"cannot share a prefix there; for the task score export with --max-length {original}"
        )
    if "score" in tasks and dialect != "ort":
        raise InputError("the task score needs the dialect 'ort', whose attention can see items side by side")
    label_ids = label_token_ids(source, labels) if "score" in tasks else None
    opset = opset or OPSETS[0]
    interface = "shared" if dialect == "ort" else "static" if opset >= STATIC_OPSET else "standard"
    plan: dict[str, Any] = {"tasks": list(tasks), "dialect": dialect}
    if dialect == "portable":
        plan["opset"] = opset
    if label_ids is not None:
        plan["labels"] = list(labels)
    if max_length is not None:
        plan["max_length"] = max_length
    with writing(out, kind="graph", plan=plan, inputs=found.origins or {"checkpoint": source}, force=force) as draft:
        _copy_texts(source, draft.path, spec)
        end_ids = _end_ids(draft.path, spec)
        runtime = _runtime(spec, end_ids, tasks, labels, label_ids) | {"interface": interface}
        _write_json(draft.path / "runtime.json", runtime)
        _write_graphs(spec, weights, draft.path, label_ids, None if dialect == "ort" else opset, progress)
        if "generate" in tasks and interface != "static":
            _write_for_other_runtimes(draft.path)
        draft.result |= _prove(source, draft.path, progress)
        draft.result["parameters"] = sum(math.prod(shape) for shape in spec.tensor_shapes().values())
        draft.result["path"] = "weights"
    return open_artifact(out, "graph")


def _export_traced(
    found: Source,
    out: Path,
    tasks: Sequence[str],
    max_length: int | None,
    force: bool,
    progress: Progress,
) -> Artifact:
    """The fallback: the graph is traced, in standard operators alone, and marked with its cost."""
    from slmdeploy.exporting.causal import CausalModel, measure_spec, open_causal
    from slmdeploy.exporting.fallback import exporter_versions, require_runs, trace_decoder, write_graph
    from slmdeploy.exporting.stand_in import measured_cost

    source = found.path
    if "score" in tasks:
        raise InputError(f"{source}: the fallback cannot score, only generate; export it with --task generate alone")
    Weights(source)  # refuses what is no safetensors before transformers looks at it
    model = open_causal(source)
    spec = measure_spec(source, model, max_length)
    _check_vocabulary(source, spec)
    plan: dict[str, Any] = {"tasks": list(tasks), "fallback": True}
    if max_length is not None:
        plan["max_length"] = max_length
    with writing(out, kind="graph", plan=plan, inputs=found.origins or {"checkpoint": source}, force=force) as draft:
        _copy_texts(source, draft.path, spec)
        runtime = _runtime(spec, _end_ids(draft.path, spec), tasks, LABELS, None) | {"interface": "standard"}
        _write_json(draft.path / "runtime.json", runtime)
        progress.start("trace", None, "")
        write_graph(trace_decoder(model, spec, str(source)), draft.path)
        progress.finish()
        require_runs(draft.path, source)
        parameters = sum(tensor.numel() for tensor in model.parameters())
        del model  # parity opens the checkpoint anew, so that nothing the tracer did to it can hide
        draft.result |= _prove(source, draft.path, progress, CausalModel)
        draft.result |= {"parameters": parameters, "path": "fallback", "exporter": exporter_versions()}
        progress.start("time beside the fast path", None, "")
        draft.result["cost"] = measured_cost(draft.path, hidden=spec.hidden, heads=spec.heads, parameters=parameters)
        progress.finish()
    return open_artifact(out, "graph")


def _check_dialect(dialect: str, opset: int | None) -> None:
    _check_choice("dialect", (dialect,), DIALECTS)
    if opset is None:
        return
    if dialect != "portable":
        raise InputError(f"opset = {opset}: only the dialect 'portable' has a choice of opset")
    if opset not in OPSETS:
        raise InputError(f"opset = {opset} is not known: choose from {', '.join(map(str, OPSETS))}")


def _check_choice(what: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    if not chosen or isinstance(chosen, str) or len(set(chosen)) != len(chosen):
        raise InputError(f"{what}s = {chosen!r}: give a list of different ones out of {', '.join(known)}")
    for one in chosen:
        if one not in known:
            raise InputError(f"{what} {one!r} is not known: choose from {', '.join(known)}")


def _check_vocabulary(checkpoint: Path, spec: "DecoderSpec | CausalSpec") -> None:
    tokens = read_tokenizer(checkpoint).get_vocab_size(with_added_tokens=True)
    if tokens > spec.vocab_size:
        raise InputError(
            f"{checkpoint / 'tokenizer.json'} has {tokens} tokens, but the model's vocab_size is {spec.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


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
    if label_ids is not None:
        write_score_graph(path, head_rows(spec, weights)[list(label_ids)].T, folder / "score.onnx")


def _cause(error: BaseException) -> BaseException:
    """The error of ours that another was raised from, the innermost one if there is none."""
    if isinstance(error, SlmdeployError) or error.__cause__ is None:
        return error
    return _cause(error.__cause__)


def _write_for_other_runtimes(folder: Path) -> None:
    """The standard interface where model.onnx has not got it, and what onnxruntime-genai wants to know."""
    from slmdeploy.building.standard_graph import write_standard_graph
    from slmdeploy.exporting.genai import write_genai_config

    if read_runtime(folder).interface == "shared":
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


def _runtime(
    spec: "DecoderSpec | CausalSpec",
    end_ids: Sequence[int],
    tasks: Sequence[str],
    labels: tuple[str, str],
    label_ids: tuple[int, int] | None,
) -> dict[str, Any]:
    """runtime.json: what running the graph needs to know about it (runtime/bundle.py reads it)."""
    return {
        "format": 1,
        "tasks": list(tasks),
        "interface": "shared",
        "layers": len(spec.layers),
        "kv_heads": [layer.kv_heads for layer in spec.layers],
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_length": spec.max_length,
        "bos_token_id": spec.bos_token_id,
        "eos_token_ids": list(end_ids),
        "score": None if label_ids is None else {"labels": list(labels), "label_ids": list(label_ids)},
        "session": {"threads": 0, "spinning": True, "parallel_items": False},
        "precision": "fp32",
    }


def _copy_texts(source: Path, folder: Path, spec: "DecoderSpec | CausalSpec") -> None:
    """Config and tokenizer files as they are; a generation_config.json is made where the checkpoint has none."""
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES, *chat_templates(source)):
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    if not (folder / "generation_config.json").exists():
        ids = {"bos_token_id": spec.bos_token_id, "eos_token_id": list(spec.eos_token_ids)}
        _write_json(folder / "generation_config.json", ids)


def _end_ids(folder: Path, spec: "DecoderSpec | CausalSpec") -> list[int]:
    """End tokens as transformers finds them: generation_config.json goes before config.json."""
    file = folder / "generation_config.json"
    value = read_json(file).get("eos_token_id", list(spec.eos_token_ids))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < spec.vocab_size for i in ids):
        raise InputError(f"{file}: eos_token_id = {value!r} has to be token ids below {spec.vocab_size}")
    return ids


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
