"""genai.py: the keys of genai_config.json for our graphs; that onnxruntime-genai reads them is tests/ecosystem's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.exporting.genai import genai_config, write_genai_config
from slmdeploy.runtime.bundle import RuntimeConfig, read_runtime
from tests.graphs import write_tiny_graph

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "bos_token_id": 7,
    "pad_token_id": None,
}


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeConfig:
    return read_runtime(write_tiny_graph(tmp_path / "graph", kv_heads=(2, 1), tasks=("generate",)))


def test_sizes_names_and_ids_are_those_of_the_folder(runtime: RuntimeConfig) -> None:
    made = genai_config(replace(runtime, eos_token_ids=(1, 5)), CONFIG, {"pad_token_id": 3})
    model, decoder = made["model"], made["model"]["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("qwen3", 272, 64)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (7, [1, 5], 3)
    assert (decoder["num_hidden_layers"], decoder["head_size"], decoder["num_key_value_heads"]) == (2, 16, 2)
    assert decoder["filename"] == "standard.onnx"
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert (made["search"]["max_length"], made["search"]["past_present_share_buffer"]) == (64, True)


def test_a_graph_that_is_standard_itself_is_named_and_shares_no_buffers(runtime: RuntimeConfig) -> None:
    made = genai_config(replace(runtime, interface="standard"), CONFIG, {})
    assert made["model"]["decoder"]["filename"] == "model.onnx"
    assert not made["search"]["past_present_share_buffer"]


@pytest.mark.parametrize(("model_type", "expected"), [("gpt2", "decoder"), ("olmo2", "decoder"), ("phi3", "phi3")])
def test_a_type_that_it_does_not_know_is_a_decoder(runtime: RuntimeConfig, model_type: str, expected: str) -> None:
    config = {"model_type": model_type, "n_embd": 64, "n_head": 4}
    made = genai_config(runtime, config, {})
    assert made["model"]["type"] == expected
    assert (made["model"]["decoder"]["hidden_size"], made["model"]["decoder"]["num_attention_heads"]) == (64, 4)


def test_ids_that_a_model_lacks_are_its_end_token(runtime: RuntimeConfig) -> None:
    ids = ("bos_token_id", "pad_token_id")
    config = {key: value for key, value in CONFIG.items() if key != "bos_token_id"}
    assert [genai_config(runtime, config, {})["model"][key] for key in ids] == [1, 1]
    endless = genai_config(replace(runtime, eos_token_ids=()), config, {})
    assert [endless["model"][key] for key in (*ids, "eos_token_id")] == [0, 0, []]


def test_search_settings_are_those_of_the_generation_config(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "graph", tasks=("generate",))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_k": None, "transformers_version": "5.23.0"})
    )
    write_genai_config(folder)
    search = json.loads((folder / "genai_config.json").read_text())["search"]
    assert (search["do_sample"], search["temperature"], search["top_k"], search["top_p"]) == (True, 0.6, 50, 1.0)
    assert "transformers_version" not in search
