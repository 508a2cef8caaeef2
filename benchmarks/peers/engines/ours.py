"""slmdeploy's own builds, driven through `slmdeploy.load` as a user does.

Quality gates are left open: they judge trained models, and of random weights they say nothing. What a build gave up for
quality on a trained model is in docs/quantisation.md.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import NotOffered, Rows

GRAPH = "ours-graph"


def versions(profile: str) -> dict[str, str]:
    """Of what a build needs at run time."""
    names = ["slmdeploy", "openvino" if profile.startswith("openvino") else "onnxruntime"]
    return {name: version(name) for name in names}


def export_graph(checkpoint: Path, folder: Path) -> None:
    """The graph that all profiles of a checkpoint are built of; not compared with torch, which tests do."""
    from slmdeploy.exporting.export import export

    is_encoder = _is_encoder(checkpoint)
    tasks = ["embed"] if is_encoder else ["generate", "score"]
    labels = {} if is_encoder else {"labels": ("0", "1")}
    export(checkpoint, out=folder, tasks=tasks, parity=is_encoder, force=True, **labels)


def _is_encoder(checkpoint: Path) -> bool:
    return bool(json.loads((checkpoint / "config.json").read_text())["model_type"] == "bert")


def prepare(checkpoint: Path, folder: Path, profile: str) -> None:
    """Build the graph that lies beside ``folder`` under a shipped profile."""
    from slmdeploy.building.build import build
    from slmdeploy.specs import Gate, load_profile

    is_encoder = _is_encoder(checkpoint)
    data = None if is_encoder else _some_text(folder.parent / "ours-data")
    limits = {name: 0.0 if name.startswith("min_") else 1e9 for name in Gate.model_fields}
    wanted = load_profile(profile).model_copy(update={"gate": Gate.model_validate(limits)})
    build(folder.parent / GRAPH, profile=wanted, out=folder, data=data, force=True)


def _some_text(folder: Path) -> Path:
    """A few short records: gates and calibration have something to look at and take no longer than they must."""
    folder.mkdir(exist_ok=True)
    record = {"prompt": "what a gate looks at when", "completion": " nothing depends on its verdict"}
    for split in ("train", "valid"):
        (folder / f"generate.{split}.jsonl").write_text((json.dumps(record) + "\n") * 4)
    return folder


def open_engine(folder: Path, threads: int, profile: str) -> "Ours":
    """Open a build."""
    return Ours(folder, threads)


class Ours:
    """A build, decoder or encoder."""

    def __init__(self, folder: Path, threads: int) -> None:
        from slmdeploy.runtime.opening import load

        self._model: Any = load(folder, threads=threads)
        self._prefix: Sequence[int] = ()

    def generate(self, prompts: Rows, new_tokens: int) -> Iterator[object]:
        """One row by the decoder; several by the batched decoder, whose logits are chosen from as they come."""
        if len(prompts) == 1:
            yield from self._model.generate_ids(prompts[0], max_new_tokens=new_tokens, ignore_eos=True)
            return
        decoder = self._batch_decoder(len(prompts))
        decoder.reserve(len(prompts[0]) + new_tokens)
        tokens = np.array([decoder.admit(np.array(prompt, np.int64)).argmax() for prompt in prompts], np.int64)
        yield tokens
        for _ in range(new_tokens - 1):
            tokens = decoder.step(tokens).argmax(1)
            yield tokens
        for row in reversed(range(len(prompts))):
            decoder.release(row)

    def _batch_decoder(self, rows: int) -> Any:
        from slmdeploy.runtime.errors import InputError

        try:
            return self._model._batch_decoder(rows)
        except InputError as error:
            raise NotOffered("a build of this engine decodes one sequence at a time") from error

    def begin(self, prefix: Sequence[int], hot: bool) -> None:
        """Remembered: `score_ids` computes it, and keeps what it has computed for the next call."""
        self._prefix = prefix
        if hot:
            self._model.score_ids(prefix, [[3]])

    def score(self, items: Rows) -> object:
        """All items packed behind the prefix."""
        return self._model.score_ids(self._prefix, items)

    def encode(self, rows: Rows) -> object:
        """Sentence vectors of rows of token ids."""
        from slmdeploy.runtime.encoding import Row

        return self._model.encoder.rows([Row(tuple(row), (0,) * len(row)) for row in rows], "sentence_embedding")
