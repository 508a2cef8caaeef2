"""`prune`: a Llama checkpoint becomes a narrower one in one shot: MLP neurons and GQA groups go, the rest is re-fitted.

Checks without torch, then has each layer pruned behind the already pruned ones (calibration.py, importance.py), cuts
the model (surgery.py), checks that the cut changed nothing, and writes an ordinary checkpoint with the kept indices in
its manifest. Knows nothing of distillation, which is what makes a pruned model good again.
"""

from pathlib import Path
from typing import Any, Literal

from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.checkpoint import LABELS, read_config, resolve_checkpoint
from slmdeploy.errors import InputError, UnsupportedModelError
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress

METHODS = ("osscar", "magnitude", "random")
MODEL_TYPES = ("llama",)
LENGTH = 512


def prune(
    checkpoint: Path | str,
    *,
    out: Path,
    ratio: float,
    data: Path | str,
    method: Literal["osscar", "magnitude", "random"] = "osscar",
    attention_ratio: float | None = None,
    calibration_tokens: int = 16384,
    tile: int = 16,
    seed: int = 0,
    labels: tuple[str, str] = LABELS,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Remove the share ``ratio`` of every layer's MLP neurons and GQA groups and write the rest at ``out``.

    ``attention_ratio`` is another share for the groups (0 keeps all). Kept neurons are a multiple of ``tile``, kept
    groups at least one. ``data`` (see data.py) calibrates; magnitude and random choose without it and re-fit nothing,
    but their errors are measured on it. ``result`` holds the new shape, the kept indices and relative output errors per
    layer, and the largest logit difference between masked and cut model. Raises InputError for unfit numbers or data,
    UnsupportedModelError for a family that is not Llama.
    """
    require("build", "torch", "transformers", "datasets")
    path = resolve_checkpoint(checkpoint)
    kept = kept_counts(path, ratio=ratio, attention_ratio=attention_ratio, tile=tile)
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")
    if calibration_tokens < LENGTH:
        raise InputError(f"calibration_tokens = {calibration_tokens} is too few: give at least {LENGTH}")
    plan: dict[str, Any] = {
        "verb": "prune",
        "ratio": ratio,
        "attention_ratio": attention_ratio,
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


def kept_counts(checkpoint: Path, *, ratio: float, attention_ratio: float | None, tile: int) -> tuple[int, int]:
    """How many KV heads and neurons of each layer stay.

    Raises InputError when a ratio is outside its range or leaves nothing, UnsupportedModelError for another family.
    """
    config = read_config(checkpoint)
    if config.get("model_type") not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{checkpoint}: model_type = {config.get('model_type')!r} cannot be pruned, only {', '.join(MODEL_TYPES)}"
        )
    if not 0 < ratio < 1:
        raise InputError(f"ratio = {ratio} is not a share to remove: give a number between 0 and 1")
    if attention_ratio is not None and not 0 <= attention_ratio < 1:
        raise InputError(f"attention_ratio = {attention_ratio} is not a share to remove: give 0 to below 1")
    neurons, queries = int(config["intermediate_size"]), int(config["num_attention_heads"])
    heads = int(config.get("num_key_value_heads") or queries)
    kept_neurons = round(neurons * (1 - ratio) / tile) * tile
    if not 0 < kept_neurons <= neurons:
        raise InputError(
            f"{checkpoint}: ratio = {ratio} leaves no multiple of tile = {tile} of its {neurons} neurons: change either"
        )
    share = ratio if attention_ratio is None else attention_ratio
    kept_heads = round(heads * (1 - share))
    if kept_heads == 0:
        raise InputError(f"{checkpoint}: removing {share} of its {heads} KV heads leaves none: lower attention_ratio")
    # transformers refuses a Llama whose hidden size the query heads do not divide, whatever head_dim says.
    fitting = [n for n in range(1, heads + 1) if int(config["hidden_size"]) % (n * queries // heads) == 0]
    if kept_heads not in fitting:
        raise InputError(
            f"{checkpoint}: removing {share} keeps {kept_heads} of its {heads} KV heads, which transformers does not "
            f"load with hidden_size = {config['hidden_size']}: set attention_ratio so that {_either(fitting)} stay"
        )
    return kept_heads, kept_neurons


def _either(numbers: list[int]) -> str:
    *front, last = map(str, numbers)
    return f"{', '.join(front)} or {last}" if front else last
