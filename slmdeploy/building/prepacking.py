"""Stores what ONNX Runtime packs weights into beside them, so that sessions map it from the file and hold no copy.

ONNX Runtime brings each matrix into the layout that its kernel for this CPU reads, on the heap of every session that
loads it. Here one session writes what it has packed; the blobs go to the end of the data file, each distinct content
once for all graphs of the folder, and each tensor says where its own is (`prepacked_N` in its external data). A session
packs a matrix as before, finds by the hash of the outcome that the file has it, and maps it instead: processes share
those pages, and two graphs of one process too. On a CPU or under a version of ONNX Runtime that packs otherwise no hash
is found and the session keeps its own: results are right everywhere, and only the memory is not saved. The price is a
data file of about twice the size. Knows nothing of quantisation.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from slmdeploy.building.encoder_gate import output_of, random_row
from slmdeploy.building.onnxruntime import DATA, MODEL, SCORE
from slmdeploy.errors import GateError
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.decoding import PREFILL
from slmdeploy.runtime.encoder_config import is_encoder, read_encoder
from slmdeploy.runtime.encoding import Encoder
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.text import load_tokenizer

_GRAPHS = (MODEL, PREFILL, SCORE)
_KEY = "prepacked_"
_ALIGNMENT_BYTES = 4096
_PACKED_GRAPH, _PACKED_DATA = "packed.onnx", "packed.data"
_FATAL_ONLY = 4
_TOKENS, _STEPS = 9, 2


@dataclass
class _Blobs:
    """The end of a data file and where each content that is there begins."""

    file: BinaryIO
    places: dict[bytes, int] = field(default_factory=dict)
    stored: int = 0

    def place(self, content: bytes) -> int:
        """The offset of this content, which is written where it is new; whole pages, since pages are what is shared."""
        key = hashlib.sha256(content).digest()
        if key not in self.places:
            self.file.write(bytes(-self.file.tell() % _ALIGNMENT_BYTES))
            self.places[key] = self.file.tell()
            self.file.write(content)
            self.stored += len(content)
        return self.places[key]


def prepack(folder: Path) -> dict[str, Any]:
    """Store the packed weights of the graphs of a build in its data file; what was stored, for the manifest.

    `tensors`: those that have packed forms, over all graphs; `bytes`: what these take. Raises GateError when the build
    does not give exactly the same answers as before.
    """
    before, tensors = _answers(folder), 0
    with (folder / DATA).open("r+b") as file:
        file.seek(0, 2)
        blobs = _Blobs(file)
        for name in _GRAPHS:
            if (folder / name).is_file():
                tensors += _prepack_graph(folder, name, blobs)
    if not all(np.array_equal(*pair) for pair in zip(before, _answers(folder), strict=True)):
        raise GateError(
            f"ONNX Runtime {ort.__version__} computes something else from packed weights that it maps from the file: "
            "nothing is written, build without prepacked"
        )
    return {"tensors": tensors, "bytes": blobs.stored, "onnxruntime": ort.__version__}


def _answers(folder: Path) -> list[npt.NDArray[np.float32]]:
    """What each graph of the build computes for a few tokens, opened anew."""
    random = np.random.default_rng(0)
    if is_encoder(folder):
        config = read_encoder(folder)
        row = random_row(random, min(_TOKENS, config.max_length), config)
        return Encoder(folder, config, config.threads).rows([row], output_of(config))
    runtime = read_runtime(folder)
    model = Model(folder, runtime, load_tokenizer(folder), runtime.threads)
    ids = random.integers(0, runtime.vocab_size, min(_TOKENS + _STEPS, runtime.max_length)).tolist()
    prompt, steps = ids[:-_STEPS] or ids, ids[-_STEPS:] if len(ids) > _STEPS else []
    answers = []
    if "generate" in model.tasks:
        answers += [model.logits(prompt), model.prefill(prompt), *(model.decode(token) for token in steps)]
    if "score" in model.tasks:
        answers.append(model.score_ids(prompt[:1], [[token] for token in ids[1:]]))
    return answers


def _prepack_graph(folder: Path, name: str, blobs: _Blobs) -> int:
    model = onnx.load(folder / name, load_external_data=False)
    with tempfile.TemporaryDirectory(prefix="slmdeploy-build-") as scratch:
        _save_packed(folder / name, Path(scratch))
        packed = onnx.load(Path(scratch) / _PACKED_GRAPH, load_external_data=False)
        forms = {tensor.name: list(_packed_forms(tensor)) for tensor in packed.graph.initializer}
        with (Path(scratch) / _PACKED_DATA).open("rb") as source:
            found = [_attach(tensor, forms.get(tensor.name, []), source, blobs) for tensor in model.graph.initializer]
    onnx.save(model, folder / name)
    return sum(found)


def _save_packed(graph: Path, folder: Path) -> None:
    """Let ONNX Runtime write the graph as it would run it, with all that it has packed; threads do not matter to it."""
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.optimized_model_filepath = str(folder / _PACKED_GRAPH)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _PACKED_DATA)
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _packed_forms(tensor: onnx.TensorProto) -> Iterator[tuple[str, str]]:
    """Key and value of each packed form: `operator+hash|offset;bytes;checksum|…`, a triple for each buffer."""
    for entry in tensor.external_data:
        if entry.key.startswith(_KEY):
            yield entry.key, entry.value


def _attach(tensor: onnx.TensorProto, forms: list[tuple[str, str]], source: BinaryIO, blobs: _Blobs) -> bool:
    """Give a tensor its packed forms, moved from ``source``; whether it has any. Tensors inside the graph have none."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return False
    for key, value in forms:
        identity, *buffers = value.split("|")
        moved = [identity]
        for buffer in buffers:
            offset, size, checksum = buffer.split(";")
            source.seek(int(offset))
            moved.append(f"{blobs.place(source.read(int(size)))};{size};{checksum}")
        entry = tensor.external_data.add()
        entry.key, entry.value = key, "|".join(moved)
    return bool(forms)
