"""The verb `export` for encoders: embedders, classifiers and cross-encoders, traced by transformers.exporters.

    checkpoint -> torch module with pooling or logits -> torch's answers -> traced graph -> parity -> artifact

In the dialect `ort` the graph is traced into ONNX Runtime's own operators first, and in standard ones only where those
are not equal to torch; the manifest says which it was. `portable` is standard operators alone, in the form that
encoder_portable.py gives them. The folder holds what sentence-transformers and optimum look for. Knows nothing of
decoders, which are built from their weights instead.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.building.ladder import Rung
from slmdeploy.checkpoint import TOKENIZER_FILES, read_json, read_tokenizer
from slmdeploy.errors import CorruptArtifactError, InputError, UnsupportedModelError
from slmdeploy.exporting.sentence import POOLINGS, Head, read_head, write_head
from slmdeploy.exporting.spec import PORTABLE_OPSETS
from slmdeploy.exporting.tasks import EMBEDDER, SENTENCE_MODULES, TOKEN_CLASSIFIER, Choice
from slmdeploy.progress import Progress
from slmdeploy.runtime.encoder_config import EncoderConfig, read_encoder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_AXES = {0: "batch", 1: "sequence"}
_FUSED, _STANDARD = "transformers ort_fusions for the CPU", "none: standard operators only"
_COMPANIONS = ("vocab.txt", "sentencepiece.bpe.model", "spiece.model", "spm.model", "config_sentence_transformers.json")
"""Further tokenizer files and settings that peers may look for; the runtime reads tokenizer.json alone."""


@dataclass(frozen=True)
class EncoderSettings:
    """What a caller may set of an encoder's export; None leaves it to the checkpoint, or the opset to the dialect."""

    dialect: str
    pooling: str | None
    normalize: bool | None
    max_length: int | None
    opset: int | None = None

    @property
    def portable_opset(self) -> int | None:
        """The opset of the portable dialect; None for the other."""
        return None if self.dialect == "ort" else self.opset or PORTABLE_OPSETS[0]


def export_encoder(
    source: Path,
    choice: Choice,
    settings: EncoderSettings,
    *,
    out: Path,
    inputs: dict[str, Path],
    force: bool,
    progress: Progress,
) -> Artifact:
    """Write the graph of an encoder's checkpoint folder, made of `inputs`; see `export` for the rest."""
    from slmdeploy.exporting.encoder_module import Classifier, Embedder, load_encoder

    head = _head(source, choice, settings)
    tokens = read_tokenizer(source).get_vocab_size(with_added_tokens=True)
    model = load_encoder(source, choice.role)
    if tokens > model.config.vocab_size:
        raise InputError(
            f"{source / 'tokenizer.json'} has {tokens} tokens, but the model's vocab_size is {model.config.vocab_size};"
            " use the tokenizer that the model was trained with"
        )
    module = (Classifier(model) if head is None else Embedder(model, head)).eval()
    runtime = _runtime(source, model, choice, head, settings.max_length)
    given = asdict(settings) | {"opset": settings.portable_opset}
    plan = {"tasks": list(choice.tasks), **{key: value for key, value in given.items() if value is not None}}
    with writing(out, kind="graph", plan=plan, inputs=inputs, force=force) as draft:
        _write_texts(source, draft.path, head, model.config.hidden_size)
        (draft.path / "runtime.json").write_text(json.dumps(runtime, indent=1) + "\n", encoding="utf-8")
        draft.result |= _write_graph(source, draft.path, module, model, settings.portable_opset, progress)
        draft.result["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    return open_artifact(out, "graph")


def _head(source: Path, choice: Choice, settings: EncoderSettings) -> Head | None:
    """The pooling and what follows it, None for a classifier, which has none that could be set."""
    pooling, normalize = settings.pooling, settings.normalize
    if pooling is not None and pooling not in POOLINGS:
        raise InputError(f"pooling {pooling!r} is not known: choose from {', '.join(POOLINGS)}")
    if choice.role == EMBEDDER:
        return read_head(source).changed(pooling, normalize)
    if pooling is not None or normalize is not None:
        raise InputError(f"pooling and normalize are settings of the task embed, not of {' and '.join(choice.tasks)}")
    return None


def _write_graph(
    source: Path, folder: Path, module: "nn.Module", model: "PreTrainedModel", opset: int | None, progress: Progress
) -> dict[str, Any]:
    """Trace, save and prove, portable where an opset is given; returns the manifest's record.

    Raises GateError when no form of the graph is equal.
    """
    from slmdeploy.exporting import encoder_parity as parity
    from slmdeploy.exporting.tracing import can_fuse

    config = read_encoder(folder)
    progress.start("run torch, trace, compare", 3, "steps")
    checks = parity.expectations(source, module, model, config)
    progress.advance(note="torch")
    fusions, rungs, refused = _STANDARD, [], None
    if opset is None and can_fuse():
        try:
            rungs = _traced(source, folder, module, config, checks, fused=True, opset=None)
            fusions, refused = (_FUSED, None) if parity.passed(rungs) else (_STANDARD, parity.worst(rungs).as_dict())
        except UnsupportedModelError as error:
            refused = {"error": str(error)}
    if fusions == _STANDARD:
        rungs = _traced(source, folder, module, config, checks, fused=False, opset=opset)
    progress.advance(2, note="graph")
    progress.finish()
    parity.require_passed(rungs, source)
    return {
        "exporter": "transformers.exporters",
        "fusions": fusions,
        "fusions_refused": refused,
        "parity": [rung.as_dict() for rung in rungs],
        "parity_limit": parity.LIMIT,
        "parity_measure": parity.MEASURE,
    }


def _traced(
    source: Path,
    folder: Path,
    module: "nn.Module",
    config: EncoderConfig,
    checks: Sequence[Any],
    *,
    fused: bool,
    opset: int | None,
) -> list[Rung]:
    """Write model.onnx in one form; every rung between it and torch."""
    import onnx_ir as ir

    from slmdeploy.exporting import encoder_parity as parity
    from slmdeploy.exporting.encoder_portable import make_portable
    from slmdeploy.exporting.tracing import trace

    # Two rows of unequal lengths: a trace of one row could take the batch for fixed.
    example = parity.tensors([row for check in checks for row in check.rows if len(row.ids) in (5, 12)], config)
    model = trace(module, example, dict.fromkeys(example, _AXES), fused=fused, name=str(source))
    if opset is not None:
        make_portable(model, opset)
    data = "model.onnx.data"
    (folder / data).unlink(missing_ok=True)
    ir.save(model, folder / "model.onnx", external_data=data)
    try:
        return parity.measure(folder, config, checks)
    except CorruptArtifactError as error:
        raise UnsupportedModelError(
            f"{source}: ONNX Runtime does not run the graph traced from it ({error})"
        ) from error


def _runtime(
    source: Path, model: "PreTrainedModel", choice: Choice, head: Head | None, max_length: int | None
) -> dict[str, Any]:
    """runtime.json: what running the graph needs to know about it (runtime/encoder_config.py reads it)."""
    from slmdeploy.exporting.encoder_module import input_names

    pad = model.config.pad_token_id
    return {
        "format": 1,
        "model": "encoder",
        "tasks": list(choice.tasks),
        "inputs": list(input_names(model, source)),
        "vocab_size": model.config.vocab_size,
        "max_length": _max_length(source, model, head, max_length),
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else 0,
        "embedding": None if head is None else _embedding(model, head),
        "labels": None if head is not None else _labels(source, model, choice),
        "session": {"threads": 0, "spinning": True},
        "precision": "fp32",
    }


def _max_length(source: Path, model: "PreTrainedModel", head: Head | None, asked: int | None) -> int:
    """What was asked for, else the least that the model's positions, its tokenizer and sentence-transformers allow."""
    from slmdeploy.exporting.encoder_module import longest_input

    places = longest_input(model)
    if asked is not None:
        if asked < 1 or (places is not None and asked > places):
            raise InputError(
                f"max_length = {asked}: {source} has positions for 1 to {places or 'any number of'} tokens"
            )
        return asked
    file = source / "tokenizer_config.json"
    declared = read_json(file).get("model_max_length") if file.is_file() else None
    # Tokenizers without a limit of their own are saved with 1e30.
    limits = [declared if isinstance(declared, int) and 0 < declared < 1 << 24 else None]
    limits += [places, head.max_length if head else None]
    found = [limit for limit in limits if limit is not None]
    if not found:
        raise InputError(f"{file} has no model_max_length, and the model has no positions that would say it; add it")
    return min(found)


def _embedding(model: "PreTrainedModel", head: Head) -> dict[str, Any]:
    sizes = [step.outputs for step in head.steps if not isinstance(step, str)]
    return {
        "dimension": sizes[-1] if sizes else model.config.hidden_size,
        "pooling": head.pooling,
        "normalized": head.normalized,
        "prompts": head.prompts,
        "default_prompt": head.default_prompt,
    }


def _labels(source: Path, model: "PreTrainedModel", choice: Choice) -> dict[str, Any]:
    names: dict[Any, Any] = dict(model.config.id2label or {})
    if sorted(names) != list(range(len(names))):
        raise InputError(f"{source / 'config.json'}: id2label has to number its labels from 0 without a gap")
    kind = getattr(model.config, "problem_type", None)
    alone = {"multi_label_classification": "sigmoid", "regression": "none"}
    # As transformers' pipelines do: one label without a problem_type is a probability.
    activation = alone.get(str(kind), "sigmoid" if len(names) == 1 else "softmax")
    return {
        "names": [str(names[i]) for i in range(len(names))],
        "per_token": choice.role == TOKEN_CLASSIFIER,
        "activation": activation,
    }


def _write_texts(source: Path, folder: Path, head: Head | None, hidden: int) -> None:
    """Config, tokenizer and sentence-transformers' files; those that say what the graph does as it does it."""
    settings = [file.name for file in source.glob("sentence_*_config.json")]
    for name in ("config.json", *TOKENIZER_FILES, *_COMPANIONS, SENTENCE_MODULES, *settings):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if head is not None:
        write_head(source, head, hidden, folder)
