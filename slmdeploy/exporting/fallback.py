"""The fallback: any decoder that transformers can export, traced into one graph of the standard interface.

One graph serves prefill and step alike: tokens behind a past, both of any length, the past possibly empty. What comes
out of the tracer is put in the form of our own graphs, so that quantising works on it as well: linear layers are MatMul
with a weight [in, out] and named after their module, embedding and head by the names that building/ knows. Slower than
a graph that is built from the weights (benchmarks/fallback_cost.py); parity decides whether it is right.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
import transformers
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.version_converter import convert_version
from transformers import DynamicCache, PreTrainedModel

from slmdeploy.building.quantize import EMBEDDING, HEAD
from slmdeploy.building.rewriting import remove_unused_initializers
from slmdeploy.errors import CorruptArtifactError, UnsupportedModelError
from slmdeploy.exporting.causal import CausalSpec
from slmdeploy.exporting.tracing import trace
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.session import kv_names
from slmdeploy.runtime.standard import StandardDecoder

_OPSET = 21
"""That of our own graphs: from here on rows can be quantised one by one, as W8A8 does."""
_PAST, _NEW = 5, 3
"""Tokens of the example that is traced: no 0 or 1, which tracers take for fixed, and no two sums alike."""


class _Step(torch.nn.Module):
    """A decoder between flat tensors: past keys and values come in by name, and with the new ones they go out."""

    def __init__(self, decoder: PreTrainedModel, layers: int, positions: bool) -> None:
        super().__init__()
        self.decoder, self.layers, self.positions = decoder, layers, positions

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        **past: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        # Without its config the cache keeps every token of every layer; masks do what sliding windows ask for.
        cache = DynamicCache([(past[f"past_{i}_key"], past[f"past_{i}_value"]) for i in range(self.layers)])
        given = {"position_ids": position_ids} if self.positions else {}
        output = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given
        )
        present = {"logits": output.logits}
        for i, layer in enumerate(output.past_key_values.layers):
            present |= {f"present_{i}_key": layer.keys, f"present_{i}_value": layer.values}
        return present


def trace_decoder(model: PreTrainedModel, spec: CausalSpec, name: str) -> ir.Model:
    """The graph of a decoder (architecture.md, the standard interface); UnsupportedModelError if it cannot be traced.

    name: of the checkpoint, for the sentence. The tensors of the graph are the model's own memory where possible.
    """
    positions = "position_ids" in inspect.signature(model.forward).parameters
    inputs, axes = _example(spec, positions)
    graph = trace(_Step(model, len(spec.layers), positions), inputs, axes, fused=False, name=name)
    _name_ends(graph, len(spec.layers))
    _unfold_gemm(graph)
    _transpose_weights(graph)
    _name_parts(graph, model)
    convert_version(graph, _OPSET)
    return graph


def write_graph(graph: ir.Model, folder: Path) -> None:
    """Write model.onnx and its data."""
    ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")


def require_runs(folder: Path, checkpoint: Path) -> None:
    """Raise UnsupportedModelError where ONNX Runtime does not run a traced graph, which is no fault of its folder."""
    config = read_runtime(folder)
    try:
        StandardDecoder(folder, config, config.threads).logits(np.zeros(2, np.int64))
    except CorruptArtifactError as error:
        raise UnsupportedModelError(
            f"{checkpoint} cannot be exported: what transformers.exporters makes of it does not run ({error})"
        ) from error


def exporter_versions() -> str:
    """What traced the graph, for the manifest."""
    return f"transformers.exporters {transformers.__version__}, torch {torch.__version__}"


def _example(spec: CausalSpec, positions: bool) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    """Inputs of two sequences, and which of their axes may have any size."""
    inputs = {
        "input_ids": torch.zeros((2, _NEW), dtype=torch.int64),
        "attention_mask": torch.ones((2, _PAST + _NEW), dtype=torch.int64),
    }
    axes = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}}
    if positions:
        inputs["position_ids"] = torch.arange(_PAST, _PAST + _NEW).repeat(2, 1)
        axes["position_ids"] = axes["input_ids"]
    for i, layer in enumerate(spec.layers):
        for part in ("key", "value"):
            inputs[f"past_{i}_{part}"] = torch.rand((2, layer.kv_heads, _PAST, spec.head_dim))
            axes[f"past_{i}_{part}"] = {0: "batch", 2: "past"}
    return inputs, axes


def _name_ends(model: ir.Model, layers: int) -> None:
    """Inputs and outputs by the names of the standard interface, which are no Python names."""
    past, present = kv_names(layers)
    names = dict(zip((name.replace("past_key_values.", "past_").replace(".", "_") for name in past), past, strict=True))
    names |= {name.replace(".", "_"): name for name in present}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = names.get(str(value.name), value.name)


def _unfold_gemm(model: ir.Model) -> None:
    """Gemm over rows becomes MatMul and Add, which is the one form of a linear layer that building/ knows."""
    for node in [node for node in model.graph if node.op_type == "Gemm"]:
        flags = {name: node.attributes[name].value for name in ("alpha", "beta", "transA") if name in node.attributes}
        x, weight, bias = (*node.inputs, None)[:3]
        if any(flags.get(name, default) != default for name, default in (("alpha", 1), ("beta", 1), ("transA", 0))):
            continue
        transposed = "transB" in node.attributes and bool(node.attributes["transB"].value)
        new = [ir.node("Transpose", [weight], {"perm": [1, 0]})] if transposed else []
        new.append(ir.node("MatMul", [x, new[0].outputs[0] if transposed else weight], name=node.name))
        if bias is not None:
            new.append(ir.node("Add", [new[-1].outputs[0], bias]))
        old, made = node.outputs[0], new[-1].outputs[0]
        made.name, made.type, made.shape = old.name, old.type, old.shape
        old.name = None
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, [old], [made])


def _transpose_weights(model: ir.Model) -> None:
    """Weights that a MatMul reads through a Transpose are stored transposed, as ONNX Runtime would on every load."""
    for node in [node for node in model.graph if node.op_type == "Transpose"]:
        weight, made = node.inputs[0], node.outputs[0]
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2 or not made.uses():
            continue
        turned = ir.tensor(weight.const_value.numpy().T.copy(), name=f"{weight.name}.transposed")
        shape = ir.Shape(turned.shape.numpy())
        value = ir.Value(name=turned.name, type=weight.type, shape=shape, const_value=turned)
        model.graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(made, value)
    RemoveUnusedNodesPass()(model)
    remove_unused_initializers(model.graph)


def _name_parts(model: ir.Model, decoder: PreTrainedModel) -> None:
    """Nodes that read a weight get their module's name; those of embedding and head the names of building/."""
    special: dict[str, str] = {}
    for module, name in ((decoder.get_input_embeddings(), EMBEDDING), (decoder.get_output_embeddings(), HEAD)):
        special |= {f"decoder.{path}": name for path, found in decoder.named_modules() if found is module}
    taken: set[str] = set()
    for node in model.graph:
        if node.op_type in ("MatMul", "Gather"):
            _rename(node, special, taken)


def _rename(node: ir.Node, special: Mapping[str, str], taken: set[str]) -> None:
    assert node.name
    name = special.get(node.name, node.name.removeprefix("decoder."))
    if name not in taken:
        taken.add(name)
        node.name = name
