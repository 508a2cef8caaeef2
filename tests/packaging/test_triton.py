"""Triton's repository: an encoder's graph with the names, types and sizes that it has, and nothing for a decoder."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from slmdeploy.artifacts import open_artifact, writing
from slmdeploy.errors import InputError
from slmdeploy.packaging.package import package
from slmdeploy.packaging.triton import Backend, config_text, write
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.encoder_config import read_encoder
from tests.graphs import write_tiny_graph
from tests.runtime.encoder_graphs import write_encoder_graph


def repository(folder: Path, role: str, **session: object) -> Path:
    """The repository of an encoder in this role."""
    source = write_encoder_graph(folder / "p", role, session={"threads": 2, "spinning": False} | session)
    assert write(source, folder / "triton", read_encoder(source)) is not None
    return folder / "triton" / "model"


def test_an_encoder_gets_its_graph_and_a_configuration_of_it(tmp_path: Path) -> None:
    source = write_encoder_graph(tmp_path / "p", "embed")
    backend = write(source, tmp_path / "triton", read_encoder(source))
    assert backend == Backend("onnxruntime", ("last_hidden_state", "sentence_embedding"))
    model = tmp_path / "triton" / "model"
    assert (model / "1" / "model.onnx").read_bytes() == (source / "model.onnx").read_bytes()
    text = (model / "config.pbtxt").read_text()
    assert 'input [ { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] } ]' in text
    assert 'output [ { name: "sentence_embedding" data_type: TYPE_FP32 dims: [ 3 ] } ]' in text
    assert 'key: "intra_op_thread_count" value: { string_value: "1" }' in text


@pytest.mark.parametrize("role", ["embed", "classify", "score", "tokens"])
def test_the_configuration_is_one_that_triton_parses(tmp_path: Path, role: str) -> None:
    grpc = pytest.importorskip("tritonclient.grpc", reason="pip install 'tritonclient[grpc]' to check config.pbtxt")
    from google.protobuf import text_format

    text = (repository(tmp_path, role) / "config.pbtxt").read_text()
    config = text_format.Parse(text, grpc.model_config_pb2.ModelConfig())
    assert [one.name for one in config.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert config.max_batch_size == 32
    assert config.parameters["intra_op_thread_count"].string_value == "2"


def test_a_server_package_of_an_encoder_holds_the_repository_and_says_what_it_takes(tmp_path: Path) -> None:
    source = write_encoder_graph(tmp_path / "g", "classify")
    with writing(tmp_path / "b", kind="build", plan={}, inputs={}) as draft:
        for file in source.iterdir():
            if file.name != "manifest.json":
                (draft.path / file.name).write_bytes(file.read_bytes())
    made = package(tmp_path / "b", out=tmp_path / "p", kind="server")
    assert made.result["start"]["task"] == "classify"
    assert made.result["server"]["limit_bytes"] == made.result["server"]["request_bytes"], "an encoder has no cache"
    assert "server/triton/model/1/model.onnx" in open_artifact(made.path).manifest["files"]
    readme = (made.path / "server" / "README.md").read_text()
    assert "with the onnxruntime backend: token ids in, logits out" in readme
    assert "There is no model repository" not in readme


def test_one_number_a_row_and_unknown_types() -> None:
    scores = SimpleNamespace(name="scores", type="tensor(float)", shape=["batch"])
    ids = SimpleNamespace(name="ids", type="tensor(int64)", shape=["batch", 8])
    text = config_text([ids], [scores], 0)
    assert "dims: [ 8 ]" in text
    assert "dims: [ 1 ] reshape { shape: [ ] }" in text
    assert "thread" not in text
    with pytest.raises(InputError, match=r"no type for words, which is tensor\(string\)"):
        config_text([SimpleNamespace(name="words", type="tensor(string)", shape=["batch"])], [scores], 0)


def test_a_decoder_gets_none(tmp_path: Path) -> None:
    write_tiny_graph(tmp_path / "p")
    assert write(tmp_path / "p", tmp_path / "triton", read_runtime(tmp_path / "p")) is None
    assert not (tmp_path / "triton").exists()
