"""`prune`: a Llama checkpoint becomes smaller in one shot: layers, neurons and GQA groups go, the rest is re-fitted.

Checks without torch, then has whole layers removed (depth.py), has each layer that is left pruned behind the already
pruned ones (calibration.py, importance.py), cuts the model (surgery.py), checks that the cut changed nothing, and
writes an ordinary checkpoint with the indices of what went or stayed in its manifest. Knows nothing of distillation,
which is what makes a pruned model good again.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.checkpoint import LABELS, read_config, resolve_checkpoint
from slmdeploy.errors import InputError, UnsupportedModelError
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress

METHODS = ("osscar", "magnitude", "random")
MODEL_TYPES = ("llama",)
LENGTH = 512


class KeptCounts(NamedTuple):
    """How many layers stay, and how many KV heads and neurons of each of them."""

    layers: int
    kv_heads: int
    neurons: int


def prune(
    checkpoint: Path | str,
    *,
    out: Path,
    ratio: float,
    data: Path | str,
    method: Literal["osscar", "magnitude", "random"] = "osscar",
    attention_ratio: float | None = None,
    layer_ratio: float = 0.0,
    calibration_tokens: int = 16384,
    tile: int = 16,
    seed: int = 0,
    labels: tuple[str, str] = LABELS,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Remove the share ``ratio`` of every layer's MLP neurons and GQA groups and write the rest at ``out``.

    ``attention_ratio`` is another share for the groups (0 keeps all). Kept neurons are a multiple of ``tile``, kept
    groups at least one. ``layer_ratio`` is the share of whole layers that goes first, rounded to a number of layers:
    those of least block influence (depth.py), with method random any; with it ``ratio`` may be 0, and when no neuron
    and no group goes either, the layers that stay are unchanged. ``data`` (see data.py) calibrates; magnitude and
    random choose neurons and groups without it and re-fit nothing, but their errors are measured on it. ``result``
    holds the new shape, the removed layers in order with the influence that each had, the kept indices and relative
    output errors per layer that is left (none when nothing was cut from them), and the largest logit difference between
    masked and cut model. Raises InputError for unfit numbers or data, UnsupportedModelError for a family that is not
    Llama.
    """
    require("build", "torch", "transformers", "datasets")
    path = resolve_checkpoint(checkpoint)
    kept = kept_counts(path, ratio=ratio, attention_ratio=attention_ratio, layer_ratio=layer_ratio, tile=tile)
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")
    if calibration_tokens < LENGTH:
        raise InputError(f"calibration_tokens = {calibration_tokens} is too few: give at least {LENGTH}")
    plan: dict[str, Any] = {
        "verb": "prune",
        "ratio": ratio,
        "attention_ratio": attention_ratio,
        "layer_ratio": layer_ratio,
        "method": method,
        "calibration_tokens": calibration_tokens,
        "tile": tile,
        "seed": seed,
        "labels": list(labels),
    }
    inputs = {"checkpoint": path}
    if Path(data).exists():
        inputs["data"] = Path(data)
    else:
        plan["data"] = str(data)
    with writing(out, kind="checkpoint", plan=plan, inputs=inputs, force=force) as draft:
        from slmdeploy.compress.pruning import prune_checkpoint  # brings torch, which the checks above need not

        draft.result.update(
            prune_checkpoint(
                path,
                draft.path,
                data=data,
                kept=kept,
                method=method,
                tokens=calibration_tokens,
                seed=seed,
                labels=labels,
                progress=progress or SILENT,
            )
        )
    return open_artifact(out, "checkpoint")


def kept_counts(
    checkpoint: Path, *, ratio: float, attention_ratio: float | None, layer_ratio: float, tile: int
) -> KeptCounts:
    """How many layers stay, and how many KV heads and neurons of each.

    Raises InputError when a ratio is outside its range, leaves nothing, or all together remove nothing;
    UnsupportedModelError for another family.
    """
    config = read_config(checkpoint)
    if config.get("model_type") not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{checkpoint}: model_type = {config.get('model_type')!r} cannot be pruned, only {', '.join(MODEL_TYPES)}"
        )
    if not 0 <= layer_ratio < 1:
        raise InputError(f"layer_ratio = {layer_ratio} is not a share to remove: give 0 to below 1")
    if not 0 <= ratio < 1 or ratio == layer_ratio == 0:
        raise InputError(
            f"ratio = {ratio} is not a share to remove: give a number between 0 and 1, or 0 with a layer_ratio above 0"
        )
    if attention_ratio is not None and not 0 <= attention_ratio < 1:
        raise InputError(f"attention_ratio = {attention_ratio} is not a share to remove: give 0 to below 1")
    layers, neurons = int(config["num_hidden_layers"]), int(config["intermediate_size"])
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    kept = KeptCounts(
        layers=layers - round(layers * layer_ratio),
        neurons=_kept_neurons(checkpoint, neurons, ratio, tile),
        kv_heads=_kept_heads(checkpoint, config, heads, ratio if attention_ratio is None else attention_ratio),
    )
    if kept.layers == 0:
        raise InputError(f"{checkpoint}: layer_ratio = {layer_ratio} leaves none of its {layers} layers: lower it")
    if ratio == 0 and kept == (layers, heads, neurons):
        raise InputError(
            f"{checkpoint}: layer_ratio = {layer_ratio} removes none of its {layers} layers, and nothing else goes: "
            "raise it"
        )
    return kept


def _kept_neurons(checkpoint: Path, neurons: int, ratio: float, tile: int) -> int:
    if ratio == 0:
        return neurons  # also where the dense model is no multiple of the tile
    kept = round(neurons * (1 - ratio) / tile) * tile
    if not 0 < kept <= neurons:
        raise InputError(
            f"{checkpoint}: ratio = {ratio} leaves no multiple of tile = {tile} of its {neurons} neurons: change either"
        )
    return kept


def _kept_heads(checkpoint: Path, config: dict[str, Any], heads: int, share: float) -> int:
    kept = round(heads * (1 - share))
    if kept == 0:
        raise InputError(f"{checkpoint}: removing {share} of its {heads} KV heads leaves none: lower attention_ratio")
    # transformers refuses a Llama whose hidden size the query heads do not divide, whatever head_dim says.
    hidden, queries = int(config["hidden_size"]), int(config["num_attention_heads"])
    fitting = [n for n in range(1, heads + 1) if hidden % (n * queries // heads) == 0]
    if kept not in fitting:
        raise InputError(
            f"{checkpoint}: removing {share} keeps {kept} of its {heads} KV heads, which transformers does not "
            f"load with hidden_size = {hidden}: set attention_ratio so that {_either(fitting)} stay"
        )
    return kept


def _either(numbers: list[int]) -> str:
    *front, last = map(str, numbers)
    return f"{', '.join(front)} or {last}" if front else last
