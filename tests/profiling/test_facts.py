"""What is read of a build's folder, and which folders are refused."""

import json

import pytest

from slmdeploy.artifacts import writing
from slmdeploy.errors import InputError
from slmdeploy.profiling.facts import read_facts
from tests.graphs import write_manifest, write_tiny_graph
from tests.runtime.encoder_graphs import write_encoder_graph


def configure(folder, **config):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    write_manifest(folder)
    return folder


def test_a_decoder(tmp_path):
    folder = write_tiny_graph(tmp_path / "b", kv_heads=(2, 1), heads=4, head_dim=16)
    facts = read_facts(configure(folder, num_attention_heads=4), "b")
    assert (facts.widths, facts.kv_widths) == ((64, 64), (32, 16))
    assert facts.kv_bytes_per_token == 2 * 4 * 48
    assert set(facts.graphs) == {"steps", "prompts", "score"}
    assert facts.graphs["steps"] is facts.graphs["prompts"]
    assert facts.tasks == ("generate", "score")


def test_graphs_of_one_form_share_their_weights(tmp_path):
    facts = read_facts(configure(write_tiny_graph(tmp_path / "b"), num_attention_heads=4), "b")
    assert facts.memory_bytes({"steps", "prompts"}) == facts.graphs["steps"].weight_bytes
    assert facts.memory_bytes({"steps", "score"}) == facts.graphs["steps"].weight_bytes


def test_layers_that_differ(tmp_path):
    folder = write_tiny_graph(tmp_path / "b", layers=2, head_dim=16)
    shapes = [{"num_attention_heads": 4}, {"num_attention_heads": 2}]
    assert read_facts(configure(folder, layer_shapes=shapes), "b").widths == (64, 32)


def test_sizes_that_stand_one_level_down(tmp_path):
    folder = write_tiny_graph(tmp_path / "b", head_dim=16)
    assert read_facts(configure(folder, text_config={"num_attention_heads": 4}), "b").widths == (64, 64)


def test_an_encoder(tmp_path):
    folder = configure(write_encoder_graph(tmp_path / "e"), num_hidden_layers=2, hidden_size=8)
    facts = read_facts(folder, "e")
    assert (facts.widths, facts.kv_bytes_per_token, set(facts.graphs)) == ((8, 8), 0, {"encode"})


def test_a_config_that_does_not_say(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: one of num_attention_heads, n_heads, num_heads must be"):
        read_facts(write_tiny_graph(tmp_path / "b"), "b")


def test_other_artifacts_and_engines(tmp_path):
    with writing(tmp_path / "m", kind="measurement", plan={}, inputs={}) as draft:
        (draft.path / "measurement.json").write_text("{}")
    with pytest.raises(InputError, match="is a measurement: estimate takes what"):
        read_facts(tmp_path / "m", "m")
    folder = write_tiny_graph(tmp_path / "b", tasks=("generate",))
    runtime = json.loads((folder / "runtime.json").read_text())
    runtime |= {"interface": "stateful", "openvino": {"inference_precision": "f32"}}
    (folder / "runtime.json").write_text(json.dumps(runtime))
    with pytest.raises(InputError, match="is a build for openvino, whose time is not estimated: measure it"):
        read_facts(configure(folder, num_attention_heads=4), "b")
