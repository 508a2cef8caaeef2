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
from typing import Any

from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.checkpoint import (
    LABELS,
    TOKENIZER_FILES,
    Weights,
    label_token_ids,
    read_json,
    read_tokenizer,
    resolve_checkpoint,
)
from slmdeploy.errors import InputError
from slmdeploy.exporting.spec import DecoderSpec, check_tensors, read_spec
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress

TASKS = ("generate", "score")
DIALECTS = ("ort",)
_PARITY_MEASURE = "largest absolute difference of logits, divided by the largest logit of torch where that is above 1"


def export(
    checkpoint: Path | str,
    *,
    out: Path,
    tasks: Sequence[str] = ("generate",),
    labels: tuple[str, str] = LABELS,
    dialect: str = "ort",
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Write the float32 graph of a checkpoint (a folder or a Hugging Face id) to `out`, and its parity with torch.

    labels: the words for label values 0 and 1 of the task score; each must be one token. Raises UnsupportedModelError
    for a model that is not understood entirely, InputError for an unknown task or dialect, a missing file or a label of
    several tokens, GateError when a logit differs from torch's by more than parity.LIMIT, and what `writing` raises.
    """
    require("build", "torch", "transformers", "onnx", "onnx_ir")
    _check_choice("task", tasks, TASKS)
    _check_choice("dialect", (dialect,), DIALECTS)
    source = resolve_checkpoint(checkpoint)
    spec, weights = read_spec(source), Weights(source)
    check_tensors(spec, weights)
    _check_vocabulary(source, spec)
    label_ids = label_token_ids(source, labels) if "score" in tasks else None
    progress = progress or SILENT
    plan: dict[str, Any] = {"tasks": list(tasks), "dialect": dialect}
    if label_ids is not None:
        plan["labels"] = list(labels)
    with writing(out, kind="graph", plan=plan, inputs={"checkpoint": source}, force=force) as draft:
        _copy_texts(source, draft.path, spec)
        end_ids = _end_ids(draft.path, spec)
        _write_json(draft.path / "runtime.json", _runtime(spec, end_ids, tasks, labels, label_ids))
        _write_graphs(spec, weights, draft.path, label_ids, progress)
        draft.result |= _prove(source, draft.path, progress)
        draft.result["parameters"] = sum(math.prod(shape) for shape in spec.tensor_shapes().values())
    return open_artifact(out, "graph")


def _check_choice(what: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    if not chosen or isinstance(chosen, str) or len(set(chosen)) != len(chosen):
        raise InputError(f"{what}s = {chosen!r}: give a list of different ones out of {', '.join(known)}")
    for one in chosen:
        if one not in known:
            raise InputError(f"{what} {one!r} is not known: choose from {', '.join(known)}")


def _check_vocabulary(checkpoint: Path, spec: DecoderSpec) -> None:
    tokens = read_tokenizer(checkpoint).get_vocab_size(with_added_tokens=True)
    if tokens > spec.vocab_size:
        raise InputError(
            f"{checkpoint / 'tokenizer.json'} has {tokens} tokens, but the model's vocab_size is {spec.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def _write_graphs(
    spec: DecoderSpec, weights: Weights, folder: Path, label_ids: tuple[int, int] | None, progress: Progress
) -> None:
    import onnx_ir as ir

    from slmdeploy.building.scoring_graph import write_score_graph
    from slmdeploy.exporting.decoder import build_decoder

    model, path = build_decoder(spec, weights), folder / "model.onnx"
    progress.start("write graph", len(model.graph.initializers), "tensors")
    ir.save(model, path, external_data="model.onnx.data", callback=lambda tensor, info: progress.advance())
    progress.finish()
    if label_ids is not None:
        head = weights.read("model.embed_tokens.weight" if spec.tied else "lm_head.weight")
        write_score_graph(path, head[list(label_ids)].T, folder / "score.onnx")


def _prove(checkpoint: Path, folder: Path, progress: Progress) -> dict[str, Any]:
    """The manifest's record of parity; raises GateError when it fails."""
    from slmdeploy.exporting import parity

    rungs = parity.measure(checkpoint, folder, progress)
    parity.require_passed(rungs, checkpoint)
    return {
        "parity": [rung.as_dict() for rung in rungs],
        "parity_limit": parity.LIMIT,
        "parity_measure": _PARITY_MEASURE,
    }


def _runtime(
    spec: DecoderSpec,
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


def _copy_texts(source: Path, folder: Path, spec: DecoderSpec) -> None:
    """Config and tokenizer files as they are; a generation_config.json is made where the checkpoint has none."""
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "generation_config.json").exists():
        ids = {"bos_token_id": spec.bos_token_id, "eos_token_id": list(spec.eos_token_ids)}
        _write_json(folder / "generation_config.json", ids)


def _end_ids(folder: Path, spec: DecoderSpec) -> list[int]:
    """End tokens as transformers finds them: generation_config.json goes before config.json."""
    file = folder / "generation_config.json"
    value = read_json(file).get("eos_token_id", list(spec.eos_token_ids))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < spec.vocab_size for i in ids):
        raise InputError(f"{file}: eos_token_id = {value!r} has to be token ids below {spec.vocab_size}")
    return ids


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
