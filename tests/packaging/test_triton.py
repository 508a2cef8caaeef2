"""Triton's repository: an encoder's graph with its names, types and sizes, a decoder's tasks with their models'."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

import slmdeploy
from slmdeploy.artifacts import open_artifact
from slmdeploy.errors import InputError
from slmdeploy.packaging.package import package
from slmdeploy.packaging.triton import TASKS, Repository, config_text, task_text, write
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.encoder_config import read_encoder
from tests.graphs import write_tiny_graph
from tests.packaging.packages import write_encoder_build
from tests.runtime.encoder_graphs import write_encoder_graph


def repository(folder: Path, role: str, **session: object) -> Path:
    """The repository of an encoder in this role."""
    source = write_encoder_graph(folder / "p", role, session={"threads": 2, "spinning": False} | session)
    assert write(source, folder / "triton", read_encoder(source)) is not None
    return folder / "triton" / "model"


def test_an_encoder_gets_its_graph_and_a_configuration_of_it(tmp_path: Path) -> None:
    source = write_encoder_graph(tmp_path / "p", "embed")
    written = write(source, tmp_path / "triton", read_encoder(source))
    assert written == Repository("onnxruntime", {"model": ("last_hidden_state", "sentence_embedding")})
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
    made = package(write_encoder_build(tmp_path / "b", "classify"), out=tmp_path / "p", kind="server")
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


def test_a_decoder_gets_a_model_for_each_of_its_tasks(tmp_path: Path) -> None:
    write_tiny_graph(tmp_path / "p")
    written = write(tmp_path / "p", tmp_path / "triton", read_runtime(tmp_path / "p"))
    assert written == Repository("python", {"generate": ("text_output", "finish_reason"), "score": ("scores",)})
    for name, task in TASKS.items():
        code = compile((tmp_path / "triton" / name / "1" / "model.py").read_text(), "model.py", "exec")
        assert task.model in code.co_names
        assert (tmp_path / "triton" / name / "config.pbtxt").read_text() == task_text(name, task)


def test_an_encoder_of_another_engine_gets_none(tmp_path: Path) -> None:
    source = write_encoder_graph(tmp_path / "p", "embed")
    config = dataclasses.replace(read_encoder(source), inference_precision="f32")
    assert write(source, tmp_path / "triton", config) is None
    assert not (tmp_path / "triton").exists()


def test_a_tasks_ends_are_those_that_its_model_reads_and_writes() -> None:
    """The configuration is written without importing what runs, so a test holds the two together."""
    source = (Path(slmdeploy.__file__).parent / "scaling" / "triton_python.py").read_text()
    for task in TASKS.values():
        assert f"class {task.model}:" in source
        for end in (*task.inputs, *task.outputs):
            assert f'"{end}"' in source
    assert 'name: "stop" data_type: TYPE_STRING dims: [ -1 ] optional: true' in task_text("generate", TASKS["generate"])
    assert "decoupled: true" in task_text("generate", TASKS["generate"])
    assert "decoupled" not in task_text("score", TASKS["score"])
    assert "optional" not in task_text("score", TASKS["score"])


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_configuration_is_one_that_triton_parses(name: str) -> None:
    grpc = pytest.importorskip("tritonclient.grpc", reason="pip install 'tritonclient[grpc]' to check config.pbtxt")
    from google.protobuf import text_format

    config = text_format.Parse(task_text(name, TASKS[name]), grpc.model_config_pb2.ModelConfig())
    assert (config.backend, config.max_batch_size) == ("python", 0)
    assert config.model_transaction_policy.decoupled is TASKS[name].decoupled
    assert {one.name for one in config.input if not one.optional} == set(TASKS[name].required)
