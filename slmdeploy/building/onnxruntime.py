"""What building for ONNX Runtime on a CPU takes beside quantisation: requirements, writing a graph, opening the result.

Knows the folder layout of docs/architecture.md and nothing of how a part is quantised or judged. A graph is written
with its large tensors in one data file, each distinct content once, so a tied embedding and head that are quantised
alike share their bytes; small tensors stay inside the graph. Every written graph is opened and run before anyone sees
it: a builder that exits 0 over an invalid model is worse than one that fails.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.scoring_graph import packed_variant, read_label_rows
from slmdeploy.building.standard_graph import STANDARD, standard_variant
from slmdeploy.errors import CorruptArtifactError, GateError, InputError
from slmdeploy.runtime.bundle import MANIFEST, read_runtime
from slmdeploy.runtime.decoding import PREFILL
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.text import load_tokenizer
from slmdeploy.specs import Profile, SessionOptions, Target

MODEL, DATA, SCORE, RUNTIME = "model.onnx", "model.onnx.data", "score.onnx", "runtime.json"
_INLINE_BYTES = 1024
_ALIGNMENT_BYTES = 64
_CPUINFO = Path("/proc/cpuinfo")
_Place = tuple[int, int]
"""Offset and length in the data file."""
_Known = tuple[_Place, ir.TensorProtocol]
"""A tensor that has been written, kept so that no other takes its identity, and where."""


def local_isa(cpuinfo: Path = _CPUINFO) -> frozenset[str] | None:
    """The instruction set extensions of this machine in Linux's names, None where the system does not list them."""
    if not cpuinfo.is_file():
        return None
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(flags.split())
    return None


def check_requirements(profile: Profile, target: Target | None) -> None:
    """Raise InputError unless ``target``, or this machine when it is None, has all that ``profile`` needs to run."""
    if target is not None and profile.engine not in target.engines:
        raise InputError(
            f"profile {profile.name!r} needs the engine {profile.engine}, which target {target.name!r} does not have "
            f"(it has {', '.join(target.engines)}): choose another profile or target"
        )
    if not profile.requires.isa:
        return
    found: Collection[str] | None = local_isa() if target is None else target.isa
    place = f"this machine ({platform.machine()})" if target is None else f"target {target.name!r}"
    if found is None:
        raise InputError(
            f"profile {profile.name!r} needs {', '.join(profile.requires.isa)}, and {place} does not tell its "
            "instruction set: name a target with --target"
        )
    missing = [flag for flag in profile.requires.isa if flag not in found]
    if missing:
        raise InputError(
            f"profile {profile.name!r} needs {', '.join(missing)}, which {place} does not have: choose another profile"
        )


def read_model(folder: Path) -> ir.Model:
    """The graph of a folder, its large tensors mapped from their file; CorruptArtifactError when it cannot be read.

    Mapped, a model of billions of weights takes no memory that the system could not take back; so the folder has to
    stay as it is for as long as the model is used, which a finished artifact does.
    """
    try:
        model = ir.load(folder / MODEL)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.numpy()  # a file that is missing or too short is found here
    except Exception as error:  # protobuf, onnx_ir and the file system each raise their own kinds for a damaged file
        raise CorruptArtifactError(f"{folder / MODEL} cannot be read ({error}): export the checkpoint again") from error
    return model


def write_models(models: Mapping[str, ir.Model], folder: Path) -> None:
    """Write each model under its file name, and the tensors of all in model.onnx.data, where they live from then on."""
    places: dict[bytes, _Place] = {}
    # Graphs that were derived from one another hold the same tensors: those need not be hashed for each of them.
    known: dict[int, _Known] = {}
    with (folder / DATA).open("wb") as file:
        for model in models.values():
            for value in model.graph.initializers.values():
                _store(value, file, places, known, folder)
    for name, model in models.items():
        ir.save(model, folder / name)


def _store(
    value: ir.Value, file: BinaryIO, places: dict[bytes, _Place], known: dict[int, _Known], folder: Path
) -> None:
    """Move an initializer's content to the end of ``file``, or to where the same content already is."""
    tensor = value.const_value
    assert tensor is not None
    if id(tensor) not in known:
        content = tensor.tobytes()
        if len(content) < _INLINE_BYTES:
            if isinstance(tensor, ir.ExternalTensor):  # of another folder's file
                value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=value.name)
            return
        key = hashlib.sha256(content).digest()
        if key not in places:
            file.write(bytes(-file.tell() % _ALIGNMENT_BYTES))
            places[key] = (file.tell(), len(content))
            file.write(content)
        known[id(tensor)] = (places[key], tensor)
    place, _ = known[id(tensor)]
    value.const_value = ir.ExternalTensor(
        DATA, *place, tensor.dtype, shape=_shape(tensor), name=value.name or "", base_dir=folder
    )


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(tuple(int(size) for size in tensor.shape.numpy()))


def write_folder(
    model: ir.Model,
    graph: Path,
    folder: Path,
    *,
    precision: str,
    session: SessionOptions,
    prefill: ir.Model | None = None,
    scoring: ir.Model | None = None,
    label_rows: npt.NDArray[np.float32] | None = None,
) -> None:
    """Write ``model``, made from the graph folder ``graph``, into ``folder`` with all that goes along with it.

    The standard graph, if ``graph`` has one, is derived from ``model``; the scoring graph, if it has one, from
    ``scoring``, or from ``model`` itself where that is None. ``prefill`` becomes the graph of prompts. ``label_rows``
    [hidden, labels] is the head of the scoring graph where it is another than that of ``graph``.
    """
    copy_companions(graph, folder)
    write_runtime(
        graph,
        folder,
        precision=precision,
        session=session.model_dump(mode="json") | {"parallel_items": False},
        prefill={"chunk": 0, "own_graph": prefill is not None, "step_rows": 0},
    )
    models = {MODEL: model}
    if prefill is not None:
        models[PREFILL] = prefill
    if (graph / STANDARD).is_file():
        models[STANDARD] = standard_variant(model)
    if (graph / SCORE).is_file():
        rows = read_label_rows(graph / SCORE) if label_rows is None else label_rows
        models[SCORE] = packed_variant(scoring or model, rows)
    write_models(models, folder)


def copy_companions(graph: Path, folder: Path) -> None:
    """Copy what stands in a graph folder beside its graphs: tokenizer, config, chat templates, sentence modules."""
    for file in sorted(graph.rglob("*")):
        name = file.relative_to(graph).as_posix()
        if file.is_file() and name not in (MODEL, DATA, SCORE, STANDARD, RUNTIME, MANIFEST):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def write_runtime(graph: Path, folder: Path, **changes: object) -> None:
    """The runtime.json of ``graph`` in ``folder``, with these keys changed."""
    runtime = json.loads((graph / RUNTIME).read_text(encoding="utf-8")) | changes
    (folder / RUNTIME).write_text(json.dumps(runtime, indent=1) + "\n", encoding="utf-8")


def keep_only_scoring(folder: Path) -> None:
    """Leave a folder that only scores with score.onnx and the tensors that it reads: of the head, the label rows."""
    scoring = ir.load(folder / SCORE)
    ir.external_data.load_to_model(scoring)
    for name in (MODEL, STANDARD, DATA):
        (folder / name).unlink(missing_ok=True)
    write_models({SCORE: scoring}, folder)


def open_folder(folder: Path) -> Model:
    """A graph or an unfinished build, whatever its tasks, ready to give logits; each of its graphs has run once.

    Raises CorruptArtifactError when ONNX Runtime refuses a graph.
    """
    runtime = read_runtime(folder)
    score = ("score",) if (folder / SCORE).is_file() else ()
    model = Model(folder, replace(runtime, tasks=("generate", *score)), load_tokenizer(folder), runtime.threads)
    model.logits([0] * min(2, runtime.max_length))  # the second token is a step where prompts have a graph
    if score:
        model.score_ids([0], [[0]])
    return model


def open_build(folder: Path, profile: Profile) -> Model:
    """Open what has just been written; GateError when it is no valid model."""
    try:
        return open_folder(folder)
    except CorruptArtifactError as error:
        raise GateError(f"profile {profile.name!r} gives no valid graph, so nothing is written: {error}") from error
