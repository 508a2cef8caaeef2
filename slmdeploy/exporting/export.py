"""The verb `export`: from a checkpoint to a graph folder that runs, proven equal to torch before it exists.

Finds the whole checkpoint (a folder, a Hugging Face id, an adapter with its base), what task it is for, and who exports
such a model: decoder_export.py or encoder.py. Torch and onnx are imported when the verb runs, so that importing this
file is free and a missing extra is one sentence.
"""

from collections.abc import Sequence
from pathlib import Path

from slmdeploy.artifacts import Artifact
from slmdeploy.checkpoint import LABELS, require_exact_weights
from slmdeploy.errors import InputError
from slmdeploy.exporting.adapters import whole_checkpoint
from slmdeploy.exporting.decoder_export import DecoderSettings, export_built, export_traced
from slmdeploy.exporting.encoder import EncoderSettings, export_encoder
from slmdeploy.exporting.spec import PORTABLE_OPSETS, STATIC_OPSET
from slmdeploy.exporting.tasks import DECODER, check_names, choose
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress

DIALECTS = ("ort", "portable")


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
    parity: bool = True,
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
    parity: False leaves out the comparison with torch, which takes longer than the export; the manifest says so.
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
        if choice.role != DECODER and not parity:
            raise InputError("a traced graph is always compared with torch: leave --no-parity out for an encoder")
        if choice.role != DECODER:
            if fallback or labels != LABELS:
                raise InputError("fallback and labels are settings of decoders: leave them out for an encoder")
            if opset == STATIC_OPSET:
                raise InputError(f"opset = {opset} differs by its cache, and an encoder has none: choose 21 or 23")
            wanted = EncoderSettings(dialect, pooling, normalize, max_length, opset)
            return export_encoder(found.path, choice, wanted, out=out, inputs=inputs, force=force, progress=progress)
        if pooling is not None or normalize is not None:
            raise InputError("pooling and normalize are settings of the task embed, not of a decoder's")
        settings = DecoderSettings(choice.tasks, labels, dialect, opset, max_length, parity)
        write = export_traced if fallback else export_built
        return write(found, settings, out=out, inputs=inputs, force=force, progress=progress)


def _check_dialect(dialect: str, opset: int | None) -> None:
    if dialect not in DIALECTS:
        raise InputError(f"dialect {dialect!r} is not known: choose from {', '.join(DIALECTS)}")
    if opset is None:
        return
    if dialect != "portable":
        raise InputError(f"opset = {opset}: only the dialect 'portable' has a choice of opset")
    if opset not in PORTABLE_OPSETS:
        raise InputError(f"opset = {opset} is not known: choose from {', '.join(map(str, PORTABLE_OPSETS))}")
