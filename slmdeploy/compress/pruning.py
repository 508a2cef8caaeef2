"""The torch half of `prune`: loads, calibrates, removes layers, channels and groups, cuts, checks, saves.

Between the verb (prune.py: checks and files) and the parts that each know one thing: depth, activations, widths and
surgery.
"""

from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slmdeploy.compress import activations, depth, encoders, loading, surgery
from slmdeploy.compress.data import make_texts
from slmdeploy.compress.frame import Frame, Rows
from slmdeploy.compress.importance import Method
from slmdeploy.compress.journal import Journal
from slmdeploy.compress.labelled import Table, read_table
from slmdeploy.compress.mixtures import open_data
from slmdeploy.compress.packing import mixed_rows
from slmdeploy.compress.prune import LENGTH, Cuts, KeptCounts
from slmdeploy.compress.queries import Queries
from slmdeploy.compress.shapes import Form, Goal
from slmdeploy.compress.shaping import find_shape, key_of, write_slice
from slmdeploy.compress.widths import Widths
from slmdeploy.errors import GateError, InputError
from slmdeploy.progress import Progress
from slmdeploy.specs import TextColumns

MAX_DIFFERENCE = 1e-4
"""Between masked and cut logits, as a share of the largest logit where that is above 1."""


class Settings(NamedTuple):
    """What the verb was asked for, resolved; ``kept`` is None where a ``goal`` is to decide it.

    ``queries`` is how many query heads stay with each KV head; None for all.
    """

    kept: KeptCounts | None
    queries: int | None
    goal: Goal | None
    cuts: Cuts
    method: Method
    allocation: str
    tokens: int
    seed: int
    labels: tuple[str, str]
    columns: TextColumns | None


def prune_checkpoint(
    checkpoint: Path, out: Path, *, data: Path | str, settings: Settings, journal: Journal, progress: Progress
) -> dict[str, Any]:
    """Prune ``checkpoint``, layers, channels, query heads, then widths; save into ``out`` and say what was done.

    Raises GateError when a cut model and the masked one differ.
    """
    with loading.quiet():
        config = loading.load_config(checkpoint)
        rows, model = _opened(checkpoint, config, data, settings)
        before, stored = model.num_parameters(), loading.stored_dtype(config)
        work = _Work(checkpoint, model, rows, settings, stored, journal, progress)
        del model  # not held beside the smaller ones
        work.decide()
        work.remove_layers()
        work.remove_channels()
        work.remove_queries()
        work.remove_groups()
        work.time()
        after = work.model.num_parameters()
        work.model.to(stored).save_pretrained(out)
    encoders.copy_companions(checkpoint, out)
    return {
        "parameters": {"before": before, "after": after},
        "kept_per_layer": {"kv_heads": work.kept.kv_heads, "neurons": work.kept.neurons},
        "cut_max_difference": work.difference,
        "calibration_tokens": int(rows.valid.sum()),
        **work.result,
    }


def _opened(checkpoint: Path, config: Any, data: Path | str, settings: Settings) -> tuple[Rows, Any]:
    """Calibration rows and the model in float32."""
    if settings.columns is not None:
        limit = encoders.positions_of(config)
        length = LENGTH if limit is None else min(LENGTH, limit)
        opened = encoders.open_encoder(checkpoint, encoders.role_of(checkpoint), length)
        return text_rows(opened, read_table(Path(data), settings.columns), settings.tokens, settings.seed), opened.model
    rows = calibration_rows(checkpoint, config, data, settings.tokens, settings.seed, settings.labels)
    if not rows.valid.any():
        raise InputError(f"{data} has no token to predict, so that nothing can be measured on it: add completions")
    return rows, loading.load_model(checkpoint, torch.float32).eval()


def text_rows(encoder: encoders.Encoder, table: Table, tokens: int, seed: int) -> Rows:
    """Texts of a table in the order of ``seed``, until they have ``tokens`` tokens; a row each."""
    records, taken, count = table.train, list[int](), 0
    for index in torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist():
        if count >= tokens:
            break
        taken.append(index)
        count += len(encoder.tokenizer.encode(records[index].text, records[index].pair).ids)
    texts, pairs = [records[i].text for i in taken], [records[i].pair for i in taken]
    found = encoder.rows(texts, None if pairs[0] is None else [str(pair) for pair in pairs])
    ids = found["input_ids"]
    return Rows(ids, torch.zeros_like(ids), found["attention_mask"].bool(), found.get("token_type_ids"))


class _Work:
    """The model as it gets smaller, and what was done to it."""

    def __init__(
        self,
        checkpoint: Path,
        model: Any,
        rows: Rows,
        settings: Settings,
        stored: torch.dtype,
        journal: Journal,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.model, self.rows, self.settings = checkpoint, model, rows, settings
        self.stored, self.journal, self.progress = stored, journal, progress
        self.difference = 0.0
        self.result: dict[str, Any] = {"removed_layers": [], "kept_channels": None, "layers": []}
        self.result |= {"allocation": None, "singular": []}

    @property
    def kept(self) -> KeptCounts:
        """What stays; known from the start, or since `decide`."""
        assert self.settings.kept is not None
        return self.settings.kept

    def decide(self) -> None:
        """Where a goal is to decide what stays, let it."""
        if (goal := self.settings.goal) is None:
            return
        kept, told = find_shape(
            goal, self.settings.cuts, self.model, self.rows, self._widths(), self.journal, self.progress
        )
        self.settings = self.settings._replace(kept=kept)
        self.result["shape"] = told

    def remove_layers(self) -> None:
        """Whole layers first, so that everything else is fitted to the model that is left."""
        layers = len(Frame(self.model).layers)
        if (count := layers - self.kept.layers) == 0:
            return
        found = self.journal.read("layers")
        removed = depth.remove_layers(
            self.model,
            count,
            self.rows,
            method=self.settings.method,
            seed=self.settings.seed,
            done=[depth.Removal(**one) for one in found[0]] if found else (),
            note=lambda all_: self.journal.write("layers", [asdict(one) for one in all_]),
            progress=self.progress,
        )
        gone = {removal.layer for removal in removed}
        shorter = surgery.shorten(self.model, [i for i in range(layers) if i not in gone])
        self._replace(self.model, shorter)
        self.result["removed_layers"] = [asdict(removal) for removal in removed]

    def remove_channels(self) -> None:
        """Channels of the residual stream, by one ranking for the whole model, because all layers share the stream."""
        shape, keep = surgery.config_shape(self.model.config), self.kept.hidden
        if keep == shape.hidden:
            return
        scores = self._channel_scores(shape.group_width)
        kept = sorted(scores.argsort(descending=True, stable=True)[:keep].tolist())
        self._replace(surgery.masked_channels(self.model, kept), surgery.narrow(self.model, kept))
        self.result["kept_channels"] = kept

    def remove_queries(self) -> None:
        """Query heads of every KV head, before the groups, which are then fitted to those that are left."""
        one = self.settings
        if one.queries is None or one.queries == surgery.config_shape(self.model.config).queries_per_kv:
            return
        found = Queries(self.model, self.rows, one.queries, one.method, one.seed, self.stored, self.journal).prune(
            self.progress
        )
        self._replace(self.model, surgery.cut_queries(self.model, [choice.kept for choice in found]))
        self.result["queries"] = [choice.to_dict() for choice in found]

    def remove_groups(self) -> None:
        """The groups of every layer that is left."""
        shape, kept = surgery.config_shape(self.model.config), self.kept
        if (kept.kv_heads, kept.neurons) == (shape.kv_heads, shape.neurons):
            return
        widths = self._widths()
        widths.prune(kept, self.settings.allocation, self.progress)
        self._replace(self.model, surgery.cut(self.model, widths.kept()))
        self.result |= {"layers": widths.report(), "allocation": widths.explained, "singular": widths.singular()}

    def time(self) -> None:
        """Where a goal decided, how long the model takes that came of it, beside what was predicted."""
        if (goal := self.settings.goal) is None:
            return
        form = Form(self.kept.layers, self.kept.kv_heads, self.kept.neurons)
        took = goal.clock.milliseconds(
            key_of(self.model.config, form), partial(write_slice, self.checkpoint, self.model, form)
        )
        self.result["shape"] |= {"measured_ms": took, "within_limit": took <= goal.limit.limit_ms}

    def _widths(self) -> Widths:
        one = self.settings
        return Widths(self.model, self.rows, one.method, one.seed, self.stored, one.cuts.tile, self.journal)

    def _channel_scores(self, group_width: int) -> Tensor:
        method = self.settings.method
        if method == "magnitude":
            return surgery.channel_norms(self.model)
        if method == "random":
            generator = torch.Generator().manual_seed(self.settings.seed)
            return torch.rand(surgery.config_shape(self.model.config).hidden, generator=generator)
        return activations.measure(Frame(self.model), self.rows, group_width).hidden

    def _replace(self, masked: Any, smaller: Any) -> None:
        """Go on with the cut model; GateError when the cut changed more than rounding does."""
        first, second = (Frame(model).answer(self.rows) for model in (masked, smaller))
        difference = float((first - second).abs().max())
        if difference > MAX_DIFFERENCE * max(1.0, float(first.abs().max())):
            raise GateError(
                f"cutting {self.checkpoint} changed its logits by {difference:.2e}, more than {MAX_DIFFERENCE}"
            )
        self.difference, self.model = max(self.difference, difference), smaller


def calibration_rows(
    checkpoint: Path, config: Any, data: Path | str, tokens: int, seed: int, labels: tuple[str, str]
) -> Rows:
    """Packed rows of the training split; of both kinds of records if it has both."""
    length = min(LENGTH, config.max_position_embeddings)
    sources = open_data(data, "train")
    score_share = {(True, True): 0.5, (True, False): 0.0, (False, True): 1.0}["generate" in sources, "score" in sources]
    texts = make_texts(checkpoint, loading.end_ids(config), labels, score_share > 0)
    stream = mixed_rows(sources, texts, length=length, score_share=score_share, seed=seed)
    rows = list(islice(stream, max(1, tokens // length)))
    return Rows(
        torch.stack([row["input_ids"] for row in rows]),
        torch.stack([row["position_ids"] for row in rows]),
        # The last token of every sequence counts, so what follows the last one that does is padding.
        torch.stack([row["weights"].flip(0).cumsum(0).flip(0) > 0 for row in rows]),
    )
