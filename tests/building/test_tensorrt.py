"""Compiling: real plans by TensorRT for RTX where it is installed, and each way in which that fails as a sentence."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from slmdeploy.artifacts import Artifact
from slmdeploy.building import fp8_build, tensorrt, tensorrt_worker
from slmdeploy.building.build import build
from slmdeploy.building.fp8 import half_scale, quantize_linears
from slmdeploy.building.half import to_half
from slmdeploy.building.onnxruntime import read_model, write_models, write_runtime
from slmdeploy.building.quantize import EMBEDDING, parts
from slmdeploy.building.tensorrt import compile_graph
from slmdeploy.errors import InputError, ResourceError
from slmdeploy.exporting.export import export
from slmdeploy.runtime import tensorrt_api
from slmdeploy.runtime.tensorrt_plan import PLAN, RECIPE, read_recipe
from slmdeploy.specs import Compiler, Fp8, Gate, Profile, SessionOptions, load_profile, load_target, named_workload
from slmdeploy.verification import verify
from tests.building.portable_encoders import write_portable_encoder
from tests.exporting.families import CASES, write_case

RTX = Compiler(module="tensorrt_rtx", timeout_s=500)
OPEN = Gate(max_kl=10.0, min_top1=0.0, max_ppl_ratio=10.0, min_cosine=0.5)
LAYERS, PRODUCTS = 3, 3 * 4 + 1
"""Of the toy decoder: its linear layers, the head among them, are all FP8."""


def profile(name: str) -> Profile:
    return load_profile(name).model_copy(update={"session": SessionOptions(threads=1, spinning=False), "gate": OPEN})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    letters = np.random.default_rng(0).integers(97, 123, (4, 60)).astype(np.uint8)
    records = [
        json.dumps({"prompt": row[:20].tobytes().decode(), "completion": row.tobytes().decode()}) for row in letters
    ]
    for split, part in (("train", records[:2]), ("valid", records[2:])):
        (folder / f"generate.{split}.jsonl").write_text("\n".join(part) + "\n")
    return folder


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    write_case(CASES["llama-gqa"], folder / "checkpoint")
    return {
        opset: export(
            folder / "checkpoint",
            out=folder / f"{opset}",
            tasks=("generate",),
            dialect="portable",
            opset=opset,
            parity=False,
        ).path
        for opset in (23, 24)
    }


@pytest.fixture(scope="module", params=[23, 24])
def built(
    request: pytest.FixtureRequest, graphs: dict[int, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """A build with a plan, in each form of the cache: concatenated, and scattered into buffers."""
    pytest.importorskip("tensorrt_rtx")
    return build(
        graphs[request.param],
        profile=profile("tensorrt-rtx-fp8"),
        target=load_target("nvidia-ada-sm89"),
        workload=named_workload("generate-48-16"),
        data=data,
        out=tmp_path_factory.mktemp("built") / "build",
    )


def test_every_linear_layer_is_an_fp8_product_and_every_attention_one_kernel(built: Artifact) -> None:
    found = built.result["compiled"]
    assert found["products"] == {"fp8": 2 * PRODUCTS}
    assert found["fused_attentions"] == 2 * LAYERS
    assert found["phases"] == ["prefill", "decode"]
    assert found["plan_bytes"] == (built.path / PLAN).stat().st_size > 0


def test_the_recipe_says_what_of_and_the_ladder_how_far(built: Artifact) -> None:
    recipe = read_recipe(built.path)
    assert (recipe.module, recipe.compute_capabilities, recipe.driver) == ("tensorrt_rtx", ("8.9",), None)
    assert recipe.phases[0].shapes["input_ids"] == ((1, 1), (1, 48), (1, 192))
    ladder = verify(built.path)["verification"]
    assert ladder["summary"].startswith("contract checked, compiled (TensorRT for RTX")
    assert "ahead of time, without a GPU, for 8.9: 26 fp8 products, 6 fused attentions" in ladder["compiled"]
    assert ladder["executed_on_gpu"] == "no"
    assert {PLAN, RECIPE} < set(built.manifest["files"])
    assert not [name for name in built.manifest["files"] if name.startswith(".")]


def test_the_shipped_graph_keeps_its_open_length_and_the_recipe_has_the_plans(built: Artifact) -> None:
    recipe, graph = read_recipe(built.path), ir.load(built.path / "model.onnx")
    static = any(value.name == "cache_lengths" for value in graph.graph.inputs)
    assert recipe.capacity == (192 if static else None)
    past = next(value for value in graph.graph.inputs if value.name == "past_key_values.0.key")
    assert past.shape is not None
    assert not isinstance(past.shape[2], int)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A build of an encoder with a plan."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("encoder")
    return build(
        write_portable_encoder(folder / "graph"),
        profile=profile("tensorrt-rtx-fp8"),
        target=load_target("nvidia-ada-sm89"),
        workload=named_workload("embed-4x16"),
        out=folder / "build",
    )


def test_an_encoder_has_one_phase_of_batches_with_fp8_products_and_one_fused_attention(encoder: Artifact) -> None:
    found = encoder.result["compiled"]
    assert found["products"] == {"fp8": 4}
    assert found["fused_attentions"] == 1
    (phase,) = read_recipe(encoder.path).phases
    assert phase.name == "encode"
    assert phase.shapes == dict.fromkeys(("input_ids", "attention_mask"), ((1, 1), (4, 16), (32, 32)))
    assert verify(encoder.path)["verification"]["summary"].startswith("contract checked, compiled (TensorRT for RTX")


@pytest.mark.parametrize(
    ("name", "message"),
    [("generate-8-4", "is of the task generate"), ("embed-64", "has texts of 64 tokens, and the model takes 32")],
)
def test_a_workload_that_is_not_an_encoders_is_refused(tmp_path: Path, name: str, message: str) -> None:
    graph = write_portable_encoder(tmp_path / "graph")
    with pytest.raises(InputError, match=message):
        compile_graph(graph, RTX, ("8.9",), named_workload(name))


@pytest.mark.slow
def test_a_scorer_has_a_phase_for_the_prefix_and_one_for_items(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    write_case(CASES["llama-gqa"], tmp_path / "checkpoint")
    options: dict[str, Any] = {"tasks": ("score",), "dialect": "portable", "opset": 23, "parity": False}
    built = build(
        export(tmp_path / "checkpoint", out=tmp_path / "graph", **options).path,
        profile=profile("tensorrt-rtx-fp8"),
        target=load_target("nvidia-ada-sm89"),
        workload=named_workload("score-64-8x8"),
        data=data,
        out=tmp_path / "build",
    )
    found = built.result["compiled"]
    # The label rows of the head, one product in each phase, stay float16.
    assert found["products"] == {"fp8": 2 * (PRODUCTS - 1), "fp16": 2}
    assert found["fused_attentions"] == 2 * LAYERS
    assert found["phases"] == ["prefix", "items"]
    assert "model.onnx" not in built.manifest["files"]


@pytest.mark.parametrize("built", [23], indirect=True)
def test_several_compute_capabilities_from_one_graph(built: Artifact, tmp_path: Path) -> None:
    folder = copied(built.path, tmp_path)
    found = compile_graph(folder, RTX, ("8.9", "12.0"))
    assert read_recipe(folder).compute_capabilities == ("8.9", "12.0")
    assert found.products == {"fp8": 2 * PRODUCTS}


def copied(folder: Path, place: Path) -> Path:
    """The files that compiling reads."""
    for name in ("model.onnx", "model.onnx.data", "runtime.json"):
        (place / name).write_bytes((folder / name).read_bytes())
    return place


@pytest.mark.parametrize("built", [23], indirect=True)
def test_a_compute_capability_that_the_compiler_has_not_is_refused(built: Artifact, tmp_path: Path) -> None:
    folder = copied(built.path, tmp_path)
    with pytest.raises(InputError, match=r"does not compile for compute capability 9\.0 \(it does for 7\.5, .*8\.9"):
        compile_graph(folder, RTX, ("9.0",))
    assert not (folder / PLAN).exists()


def test_fp8_for_ampere_is_refused_before_anything_is_compiled(graphs: dict[int, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError, match=r"needs compute capability 8\.9 for FP8.*'nvidia-ampere-sm86' has 8\.6"):
        build(
            graphs[23],
            profile=profile("tensorrt-rtx-fp8"),
            target=load_target("nvidia-ampere-sm86"),
            out=tmp_path / "build",
        )
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("built", [23], indirect=True)
def test_a_node_that_the_parser_refuses_is_named_with_its_operator(built: Artifact, tmp_path: Path) -> None:
    folder = copied(built.path, tmp_path)
    model = ir.load(folder / "model.onnx")
    node = next(node for node in model.graph if node.name == "model.layers.1.attn.mixed")
    node.op_type = "Sttention"
    ir.save(model, folder / "model.onnx")
    with pytest.raises(InputError, match=r"does not compile the graph: at node model\.layers\.1\.attn\.mixed \(Stte"):
        compile_graph(folder, RTX, ("8.9",))


def test_a_target_that_the_compiler_has_not_is_refused_before_the_work(
    graphs: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(fp8_build, "Reference", None)  # what the work begins with
    hopper = load_target("nvidia-hopper-sm90")
    with pytest.raises(InputError, match=r"does not compile for compute capability 9\.0"):
        build(graphs[23], profile=profile("tensorrt-rtx-fp8"), target=hopper, out=tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_without_a_target_there_is_nothing_to_compile_for(graphs: dict[int, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError, match=r"compiles ahead of time: name what for with --target"):
        build(graphs[23], profile=profile("tensorrt-rtx-fp8"), out=tmp_path / "build")


def test_a_workload_of_another_task_or_longer_than_the_context_is_refused(
    graphs: dict[int, Path], tmp_path: Path
) -> None:
    for name, message in (("score-64-4x8", "is of the task score"), ("generate-180-40", "takes 220 tokens of 192")):
        with pytest.raises(InputError, match=message):
            compile_graph(graphs[23], RTX, ("8.9",), named_workload(name))


def test_a_compiler_that_is_not_installed_is_one_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(tensorrt_api, "import_module", absent)
    with pytest.raises(InputError, match=r"TensorRT for RTX cannot be used here .*pip install 'slmdeploy\[tensorrt\]'"):
        tensorrt.missing(RTX)
    assert "pip install tensorrt" in str(tensorrt.missing(Compiler(module="tensorrt")))


@pytest.mark.parametrize(
    ("code", "stderr", "error", "message"),
    [
        (-11, "", InputError, r"crashed over the graph \(signal 11; it said: nothing\)"),
        (-9, "", ResourceError, "ran out of memory"),
        (1, "Traceback\nMemoryError", ResourceError, "ran out of memory"),
        (3, "line\nlast words", InputError, r"crashed over the graph \(exit code 3; it said: last words\)"),
    ],
)
def test_a_crash_of_the_compiler_is_a_sentence(code: int, stderr: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tensorrt._answer(subprocess.CompletedProcess([], code, "", stderr), "TensorRT")


def test_memory_that_the_builder_lacks_and_a_refusal_are_told_apart() -> None:
    def answer(message: str) -> None:
        line = json.dumps({"error": "refused", "message": message})
        tensorrt._answer(subprocess.CompletedProcess([], 0, f"noise\n{line}\n", ""), "TensorRT")

    with pytest.raises(ResourceError, match="ran out of memory over the graph: lower workspace_bytes"):
        answer("Error Code 2: OutOfMemory (Requested size was 12 bytes)")
    with pytest.raises(InputError, match="does not compile the graph: no kernel"):
        answer("no kernel")


def test_a_compiler_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: Any, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(ResourceError, match="had not compiled the graph after 7 s and was stopped"):
        tensorrt._run({}, Compiler(module="tensorrt_rtx", timeout_s=7))


def test_a_timing_cache_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    cache.write_bytes(b"of another version")
    for config in (
        SimpleNamespace(create_timing_cache=lambda content: None),
        SimpleNamespace(create_timing_cache=lambda content: content, set_timing_cache=lambda found, loose: False),
    ):
        with pytest.raises(InputError, match="timings is a timing cache of another version or GPU: remove it"):
            tensorrt_worker._reuse_timings(config, cache)


def test_messages_of_the_compiler_become_one_line() -> None:
    assert tensorrt_worker.one_line("a\n  b (See https://example.org/x#y for z.) c") == "a b c"
    assert len(tensorrt_worker.one_line("x" * 900)) == 400


def test_a_log_without_layers_gives_no_counts() -> None:
    assert tensorrt_worker.layers([(2, "nothing to see")]) is None
    operands = "Inputs: [ { Name: x, Datatype: FP8 }], Constants: [ { Datatype: FP8 } { Datatype: Float }]"
    (found,) = tensorrt_worker.layers([(4, f"Layers:\nName: a_b, LayerType: gemm, {operands}, Outputs: [ ]")]) or []
    assert found == {"name": "a_b", "type": "gemm", "operands": ["FP8", "Float"]}


def test_products_that_are_fused_with_what_is_around_them_count_and_are_no_attention() -> None:
    named = [("x_myl0_1", "gemm"), ("__myl_CastMulFc_myl0_3", "runtime_fusion"), ("__myl_FcAdd_myl0_4", "kgen")]
    named += [("layer.0.attention.output.dense_myl0_9", "gemm"), ("_gemm_mha_v2_myl0_8", "kgen")]
    layers = [{"name": name, "type": kind, "operands": ["FP8", "Half"]} for name, kind in named]
    recipe: Any = None  # not asked for
    found = tensorrt.Compiled(recipe, 1, 1.0, 1, layers)
    assert found.products == {"fp8": 3}
    assert found.fused_attentions == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timing_cache": "t"}, "times nothing: leave timing_cache out"),
        ({"options": ["weight-streaming"]}, "does not take 'weight-streaming'"),
        ({"level": 6}, "level"),
        ({"module": "trt"}, "module"),
    ],
)
def test_settings_that_a_compiler_has_not(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Compiler.model_validate({"module": "tensorrt_rtx"} | change)


@pytest.mark.slow
def test_a_model_of_smollm2s_shape_compiles_in_full(tmp_path: Path) -> None:
    """30 layers of width 576 with a vocabulary of 49,152, in random numbers; docs/tensorrt.md has time and memory."""
    pytest.importorskip("tensorrt_rtx")
    import torch
    import transformers

    from tests.graphs import tiny_tokenizer

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=3, vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save(str(tmp_path / "checkpoint" / "tokenizer.json"))
    options: dict[str, Any] = {"tasks": ("generate",), "dialect": "portable", "opset": 23, "parity": False}
    graph = export(tmp_path / "checkpoint", out=tmp_path / "graph", **options).path
    found = compile_graph(quantised(graph, tmp_path / "build"), RTX, ("8.9",))
    assert found.products == {"fp8": 2 * (30 * 4 + 1)}
    assert found.fused_attentions == 2 * 30


def quantised(graph: Path, folder: Path) -> Path:
    """Every linear layer of a graph in FP8 with scales of 1, the rest in float16: what it computes is not asked."""
    model = read_model(graph)
    layers = {name: node for name, node in parts(model).items() if name != EMBEDDING}
    scales = {node.inputs[0].name: np.float32(1) for node in layers.values() if node.inputs[0] is not None}
    quantize_linears(model.graph, layers, {str(name): scale for name, scale in scales.items()}, Fp8(), half_scale)
    to_half(model)
    folder.mkdir()
    write_runtime(graph, folder, cache="float16", numerics_only=True)
    write_models({"model.onnx": model}, folder)
    return folder
