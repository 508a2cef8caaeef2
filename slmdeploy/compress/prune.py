"""`prune`: a checkpoint becomes smaller in one shot: layers, hidden channels, neurons and GQA groups go.

Checks without torch, then has whole layers removed (depth.py), channels of the residual stream after them, and the
groups of each layer that is left, behind the already pruned ones (widths.py); what was cut is checked against the same
model masked, and an ordinary checkpoint is written with the indices of what went or stayed in its manifest. A pruning
that was killed goes on after its last finished layer. Knows nothing of distillation, which is what makes a pruned model
good again.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from slmdeploy.artifacts import Artifact, content_key, open_artifact, writing
from slmdeploy.checkpoint import LABELS, read_config, resolve_checkpoint
from slmdeploy.compress.families import Family, Shape, family_of, shape_of
from slmdeploy.errors import InputError
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress
from slmdeploy.specs import TextColumns, data_inputs

if TYPE_CHECKING:
    from slmdeploy.compress.shapes import Goal

METHODS = ("osscar", "minitron", "magnitude", "random")
ALLOCATIONS = ("uniform", "global")
LENGTH = 512
TILE = 16


class KeptCounts(NamedTuple):
    """How many layers and hidden channels stay, and how many KV heads and neurons of each layer.

    With allocation "global" the last two are means: layers differ, and together keep as many.
    """

    layers: int
    hidden: int
    kv_heads: int
    neurons: int


def prune(
    checkpoint: Path | str,
    *,
    out: Path,
    data: Path | str,
    ratio: float | None = None,
    goal: "Goal | None" = None,
    method: Literal["osscar", "minitron", "magnitude", "random"] = "osscar",
    attention_ratio: float | None = None,
    query_ratio: float = 0.0,
    layer_ratio: float = 0.0,
    hidden_ratio: float = 0.0,
    allocation: Literal["uniform", "global"] = "uniform",
    calibration_tokens: int = 16384,
    tile: int = TILE,
    seed: int = 0,
    labels: tuple[str, str] = LABELS,
    columns: TextColumns | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Remove the share ``ratio`` of the MLP neurons and GQA groups of a decoder and write the rest at ``out``.

    ``attention_ratio`` is another share for the groups (0 keeps all); without GQA a group is a single head. Kept
    neurons are a multiple of ``tile``, kept groups at least one. ``query_ratio`` is the share of a KV head's query
    heads that goes before the groups, where it has several. ``layer_ratio`` is the share of whole layers that goes
    first, rounded to a number of layers: those of least block influence (depth.py), with method random any.
    ``hidden_ratio`` is the share of the residual stream's channels that goes next, to a multiple of ``tile``: the least
    active ones with methods osscar and minitron. With either of them ``ratio`` may be 0, and when no neuron and no
    group goes, those of the layers that stay are unchanged.

    ``goal`` stands in the place of the ratios: the depth, heads and neurons are then those that lose least, by an
    estimate, within its limit on latency (shapes.py), the hidden width stays, and ``result["shape"]`` tells of it.

    ``allocation`` "uniform" takes the same share of every layer; "global" takes what costs least over all layers, and
    the result, whose config lists ``layer_shapes``, is read by `distill` and `export` and not by transformers.

    An encoder takes ``columns``: ``data`` is then a table of texts (labelled.py). Its heads go only by an
    ``attention_ratio``, since config.json has no word for fewer and then lists ``layer_shapes``.

    ``data`` (see data.py) calibrates. Only osscar re-fits what stays; minitron ranks by activations, magnitude and
    random know no data, but their errors are measured on it. ``result`` holds the new shape, the removed layers in
    order with the influence that each had, the kept channels, the kept indices and relative output errors per layer
    that is left (none when nothing was cut from them), how the shares were allocated, where the calibration data did
    not span a layer's inputs, and the largest logit difference between masked and cut model. Raises InputError for
    unfit numbers or data, UnsupportedModelError for a family that is not in the table of families.py,
    InfeasibleError where no shape is within the goal.
    """
    require("build", "torch", "transformers", "datasets")
    path = resolve_checkpoint(checkpoint)
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")
    if allocation not in ALLOCATIONS:
        raise InputError(f"allocation {allocation!r} is unknown: use one of {', '.join(ALLOCATIONS)}")
    _check_columns(path, columns, goal)
    uneven = allocation == "global"
    if goal is not None:
        _check_goal(ratio, attention_ratio, query_ratio, layer_ratio, hidden_ratio, uneven=uneven)
        goal.clock.check(path)
        cuts, kept, queries = cuts_of(path, tile, uneven=False), None, None
    elif ratio is None:
        raise InputError("neither a ratio nor a limit on latency is given: give one of them")
    else:
        cuts = cuts_of(path, tile, uneven=uneven)
        kept = counts_of(cuts, ratio, attention_ratio, layer_ratio, hidden_ratio, query_ratio)
        queries = cuts.queries(query_ratio) if query_ratio else None
    if method == "random" and (uneven or goal):
        raise InputError("method random has no scores to compare by: use it with ratios and allocation uniform")
    if calibration_tokens < LENGTH:
        raise InputError(f"calibration_tokens = {calibration_tokens} is too few: give at least {LENGTH}")
    plan: dict[str, Any] = {
        "verb": "prune",
        "ratio": ratio,
        "attention_ratio": attention_ratio,
        "layer_ratio": layer_ratio,
        "hidden_ratio": hidden_ratio,
        "allocation": allocation,
        "method": method,
        "calibration_tokens": calibration_tokens,
        "tile": tile,
        "seed": seed,
        "labels": list(labels),
    }
    if query_ratio:
        plan["query_ratio"] = query_ratio
    if columns is not None:
        plan["columns"] = columns.model_dump()
    if goal is not None:
        plan["goal"] = goal.clock.identity()
    inputs, named = data_inputs(data)
    plan |= named
    inputs |= {"checkpoint": path}
    with writing(out, kind="checkpoint", plan=plan, inputs=inputs, force=force) as draft:
        # brings torch, which the checks above need not
        from slmdeploy.compress.journal import journal
        from slmdeploy.compress.pruning import Settings, prune_checkpoint

        settings = Settings(kept, queries, goal, cuts, method, allocation, calibration_tokens, seed, labels, columns)
        with journal(out, content_key("checkpoint", plan, inputs)) as notes:
            result = prune_checkpoint(
                path, draft.path, data=data, settings=settings, journal=notes, progress=progress or SILENT
            )
        draft.result.update(result)
    return open_artifact(out, "checkpoint")


def kept_counts(
    checkpoint: Path,
    *,
    ratio: float,
    attention_ratio: float | None = None,
    layer_ratio: float = 0.0,
    hidden_ratio: float = 0.0,
    tile: int = TILE,
    uneven: bool = False,
) -> KeptCounts:
    """How many layers and channels stay, and how many KV heads and neurons of each layer.

    Raises InputError when a ratio is outside its range, leaves nothing, all together remove nothing, or the family's
    config cannot say the result; UnsupportedModelError for another family.
    """
    return counts_of(cuts_of(checkpoint, tile, uneven=uneven), ratio, attention_ratio, layer_ratio, hidden_ratio)


def cuts_of(checkpoint: Path, tile: int = TILE, *, uneven: bool = False) -> "Cuts":
    """What can be cut from a checkpoint; raises as `kept_counts` does for families."""
    config = read_config(checkpoint)
    family = family_of(checkpoint, config)
    if uneven and family.fused:
        raise InputError(
            f"{checkpoint}: its layers keep one size, since its family stores projections fused or turned: use "
            "allocation uniform"
        )
    return Cuts(checkpoint, family, shape_of(config), tile, uneven)


def counts_of(
    cuts: "Cuts",
    ratio: float,
    attention_ratio: float | None,
    layer_ratio: float,
    hidden_ratio: float,
    query_ratio: float = 0.0,
) -> KeptCounts:
    """`kept_counts` of what is read already; beside them go query heads."""
    _check_ratios(ratio, attention_ratio, query_ratio, layer_ratio, hidden_ratio)
    checkpoint, dense = cuts.checkpoint, cuts.dense
    heads = attention_ratio
    if heads is None:
        heads = 0.0 if cuts.family.encoder else ratio
    layers, hidden, neurons = cuts.layers(layer_ratio), cuts.hidden(hidden_ratio), cuts.neurons(ratio)
    queries = cuts.queries(query_ratio)
    kept = KeptCounts(layers, hidden, cuts.kv_heads(heads, hidden, queries), neurons)
    dense_too = kept == (dense.layers, dense.hidden, dense.kv_heads, dense.neurons)
    if dense_too and queries == dense.queries_per_kv:
        raise InputError(
            f"{checkpoint}: layer_ratio = {layer_ratio} removes none of its {dense.layers} layers, and nothing else "
            "goes: raise it"
            if layer_ratio
            else f"{checkpoint}: nothing goes, since what stays is rounded to tiles of {cuts.tile}: raise a ratio"
        )
    return kept


def _check_columns(checkpoint: Path, columns: TextColumns | None, goal: "Goal | None") -> None:
    encoder = family_of(checkpoint, read_config(checkpoint)).encoder
    if encoder != (columns is not None):
        raise InputError(
            f"{checkpoint} is an encoder: name the column of the texts in a table (--text)"
            if encoder
            else f"{checkpoint} is a decoder, whose data has no columns to name: leave --text and --pair out"
        )
    if encoder and goal is not None:
        raise InputError(f"{checkpoint} is an encoder, and a limit on latency shapes decoders: give ratios")


def _check_goal(
    ratio: float | None,
    attention_ratio: float | None,
    query_ratio: float,
    layer_ratio: float,
    hidden_ratio: float,
    *,
    uneven: bool,
) -> None:
    if ratio is not None or attention_ratio is not None or query_ratio or layer_ratio or hidden_ratio:
        raise InputError("a limit on latency decides what goes: leave the ratios out")
    if uneven:
        raise InputError("a limit on latency chooses one shape for all layers: use allocation uniform")


def _check_ratios(
    ratio: float, attention_ratio: float | None, query_ratio: float, layer_ratio: float, hidden_ratio: float
) -> None:
    shares = {"query_ratio": query_ratio, "layer_ratio": layer_ratio, "hidden_ratio": hidden_ratio}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise InputError(f"{name} = {share} is not a share to remove: give 0 to below 1")
    if not 0 <= ratio < 1 or not (ratio or attention_ratio or any(shares.values())):
        raise InputError(
            f"ratio = {ratio} is not a share to remove: give a number between 0 and 1, or 0 with an attention_ratio, "
            "query_ratio, layer_ratio or hidden_ratio above 0"
        )
    if attention_ratio is not None and not 0 <= attention_ratio < 1:
        raise InputError(f"attention_ratio = {attention_ratio} is not a share to remove: give 0 to below 1")


class Cuts(NamedTuple):
    """What shares of a model's sizes come to, and whether its family can say them."""

    checkpoint: Path
    family: Family
    dense: Shape
    tile: int
    uneven: bool

    def layers(self, share: float) -> int:
        """How many layers stay."""
        kept = self.dense.layers - round(self.dense.layers * share)
        if kept == 0:
            raise InputError(
                f"{self.checkpoint}: layer_ratio = {share} leaves none of its {self.dense.layers} layers: lower it"
            )
        return kept

    def hidden(self, share: float) -> int:
        """How many hidden channels stay."""
        if share and "hidden" in self.family.bound:
            raise InputError(
                f"{self.checkpoint}: its hidden width cannot be pruned, since {self.family.bound['hidden']}: "
                "leave hidden_ratio at 0"
            )
        return self._tiles("hidden_ratio", share, self.dense.hidden, "hidden channels")

    def neurons(self, share: float) -> int:
        """How many neurons of a layer stay."""
        return self._tiles("ratio", share, self.dense.neurons, "neurons")

    def queries(self, share: float) -> int:
        """How many query heads stay with each KV head."""
        each = self.dense.queries_per_kv
        if share and "kv_heads" in self.family.bound:
            raise InputError(
                f"{self.checkpoint}: its heads cannot be pruned, since {self.family.bound['kv_heads']}: "
                "set query_ratio to 0"
            )
        if share and each == 1:
            raise InputError(
                f"{self.checkpoint}: each of its query heads has a KV head of its own, which attention_ratio removes: "
                "set query_ratio to 0"
            )
        kept = round(each * (1 - share))
        if kept == 0:
            raise InputError(
                f"{self.checkpoint}: removing {share} of the {each} query heads of a KV head leaves none: lower "
                "query_ratio"
            )
        return kept

    def kv_heads(self, share: float, hidden: int, queries: int | None = None) -> int:
        """How many KV heads of a layer stay beside this hidden width, each with so many query heads, or all of its."""
        heads = self.dense.kv_heads
        if share and "kv_heads" in self.family.bound:
            raise InputError(
                f"{self.checkpoint}: its heads cannot be pruned, since {self.family.bound['kv_heads']}: "
                "set attention_ratio to 0"
            )
        kept = round(heads * (1 - share))
        if kept == 0:
            raise InputError(
                f"{self.checkpoint}: removing {share} of its {heads} KV heads leaves none: lower attention_ratio"
            )
        fitting = self.fitting_heads(hidden, queries)
        # Layers of unequal sizes leave the config's own head count as it was.
        if (heads if self.uneven else kept) not in fitting:
            raise InputError(self._unfit(share, kept, hidden, fitting, queries))
        return kept

    def fitting_heads(self, hidden: int, queries: int | None = None) -> list[int]:
        """The numbers of KV heads that may stay beside this hidden width, rising."""
        # Some config classes refuse a hidden size that the query heads do not divide, whatever head_dim says.
        bound, per_kv = self.family.whole_heads, queries or self.dense.queries_per_kv
        return [n for n in range(1, self.dense.kv_heads + 1) if not bound or hidden % (n * per_kv) == 0]

    def _unfit(self, share: float, kept: int, hidden: int, fitting: list[int], queries: int | None) -> str:
        where = f"transformers does not load with hidden_size = {hidden}"
        if queries not in (None, self.dense.queries_per_kv):
            each = f"{queries} query heads for each of {kept} KV heads"
            return f"{self.checkpoint}: {each} stay, which {where}: change query_ratio or attention_ratio"
        if hidden != self.dense.hidden:
            return f"{self.checkpoint}: {kept} KV heads stay, which {where}: change hidden_ratio or attention_ratio"
        return (
            f"{self.checkpoint}: removing {share} keeps {kept} of its {self.dense.kv_heads} KV heads, which {where}: "
            f"set attention_ratio so that {_either(fitting)} stay"
        )

    def _tiles(self, name: str, share: float, whole: int, what: str) -> int:
        if share == 0:
            return whole  # also where the dense model is no multiple of the tile
        kept = round(whole * (1 - share) / self.tile) * self.tile
        if not 0 < kept <= whole:
            raise InputError(
                f"{self.checkpoint}: {name} = {share} leaves no multiple of tile = {self.tile} of its {whole} {what}: "
                "change either"
            )
        return kept


def _either(numbers: list[int]) -> str:
    *front, last = map(str, numbers)
    return f"{', '.join(front)} or {last}" if front else last
