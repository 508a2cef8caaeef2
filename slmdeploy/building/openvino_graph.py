"""From a decoder's ONNX graph of dialect `ort` to a stateful OpenVINO model, in the shapes that its CPU plugin fuses.

OpenVINO reads the graph as it is. Each GroupQueryAttention becomes rotary embedding, a state for keys and one for
values, and ScaledDotProductAttention: the form in which OpenVINO's own tools exchange decoders, and from which its
transformation makes paged attention when a build is opened (runtime/openvino_pages.py), which no file can hold. Inputs
and output as before, less the caches, plus `position_ids` int64 [batch, sequence] and `beam_idx` int32 [batch]: the row
of the states that each row continues. Knows nothing of quantisation.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slmdeploy.errors import InputError
from slmdeploy.runtime.openvino_session import WINDOW

ATTENTION, ROTARY, COUNTED = "GroupQueryAttention", "rotary", "positions"
"""The operator that is replaced, what the names of lookups in rotary tables begin with, and what makes positions."""


def read_graph(path: Path) -> Any:
    """The ov.Model of an ONNX file; InputError where OpenVINO does not know an operator of it."""
    import openvino

    try:
        return openvino.Core().read_model(str(path))
    except RuntimeError as error:
        unknown = str(error).rpartition("Conversion is failed for: ")[2]
        raise InputError(
            f"{path}: OpenVINO cannot read {' '.join(unknown.split())[-240:]} as this graph uses it: use a profile of "
            "the engine onnxruntime"
        ) from error


def stateful_decoder(path: Path) -> Any:
    """The stateful ov.Model of a decoder's model.onnx; InputError where OpenVINO has no such attention."""
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    model = read_graph(path)
    beams = op.parameter([-1], np.int32, name="beam_idx")
    positions = op.parameter([-1, -1], np.int64, name="position_ids")
    for parameter in (beams, positions):
        parameter.output(0).get_tensor().set_names({parameter.get_friendly_name()})
    rewrite = _Attention(model, beams, positions)
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == ATTENTION]
    if not nodes:
        raise InputError(f"{path} has no {ATTENTION}: the engine openvino builds from graphs of --dialect ort")
    for node in nodes:
        rewrite.replace(node)
    _take_positions(model, positions)
    model.add_parameters([positions, beams])
    pasts = [value.get_any_name() for value in model.inputs if value.get_any_name().startswith("past_key_values.")]
    apply_make_stateful_transformation(model, {name: name.replace("past_key_values", "present") for name in pasts})
    _start_empty(model)
    # Nodes that were cut off may live on as readers of nodes of the model, which nncf refuses; a copy has none.
    return model.clone()


def _take_positions(model: Any, positions: Any) -> None:
    """Look tables of learned positions up by the input in place of what the graph counts from the mask."""
    for node in model.get_ordered_ops():
        if node.get_friendly_name() == COUNTED:
            for target in list(node.output(0).get_target_inputs()):
                target.replace_source_output(positions.output(0))


def _start_empty(model: Any) -> None:
    """Give each state its beginning: no tokens, for as many rows as the first run has."""
    from openvino import opset13 as op

    batch = op.gather(op.shape_of(model.input("input_ids")), _integers(0), _integer(0))
    for node in [node for node in model.get_ops() if node.get_type_name() == "ReadValue"]:
        _, heads, _, dim = node.get_output_partial_shape(0)
        shape = op.concat([batch, *(_integers(size) for size in (heads.get_length(), 0, dim.get_length()))], 0)
        node.set_arguments([op.broadcast(op.constant(np.float32(0)), shape)])
    model.validate_nodes_and_infer_types()


def _integers(*values: int) -> Any:
    from openvino import opset13 as op

    return op.constant(np.array(values, np.int64))


def _integer(value: int) -> Any:
    from openvino import opset13 as op

    return op.constant(np.int64(value))


@dataclass
class _Attention:
    """What all layers share: the place of each new token, the keys that it may see, and the rotary tables."""

    model: Any
    beams: Any
    positions: Any
    tables: dict[tuple[str, str], tuple[Any, Any]] = field(default_factory=dict)
    biases: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from openvino import opset13 as op

        self.mask = self.model.input("attention_mask").get_node()
        length = op.gather(op.shape_of(self.model.input("input_ids")), _integer(1), _integer(0))
        total = op.gather(op.shape_of(self.mask), _integer(1), _integer(0))
        self.rows = op.range(op.subtract(total, length), total, _integer(1), "i64")
        self.columns = op.range(_integer(0), total, _integer(1), "i64")

    def replace(self, node: Any) -> None:
        """Put operators that have kernels in the place of one GroupQueryAttention."""
        from openvino import opset13 as op

        found = node.get_attributes()
        heads, groups = found["num_heads"], found["kv_num_heads"]
        query, key, value, past_key, past_value = (node.input_value(i) for i in range(5))
        dim = query.get_partial_shape()[3].get_length()
        if found["do_rotary"]:
            query, key = self._rotated(node, query, dim), self._rotated(node, key, dim)
        keys, values = (
            op.concat([op.gather(past, self.beams, _integer(0)), new], 2)
            for past, new in ((past_key, key), (past_value, value))
        )
        shared = [self._shared(x, heads, groups, dim) for x in (keys, values)]
        scale = op.constant(np.float32(found["scale"] or dim**-0.5))
        bias = self._bias(found["local_window_size"])
        mixed = op.scaled_dot_product_attention(query, *shared, bias, scale)
        mixed.set_friendly_name(f"{node.get_friendly_name()}{WINDOW}{max(0, found['local_window_size'])}")
        output = op.reshape(op.transpose(mixed, _integers(0, 2, 1, 3)), _integers(0, 0, heads * dim), True)
        for index, new in enumerate((output, keys, values)):
            old = node.output(index)
            names = old.get_names()
            for target in list(old.get_target_inputs()):
                target.replace_source_output(new.output(0))
            new.output(0).set_names(names)

    def _rotated(self, node: Any, x: Any, dim: int) -> Any:
        """x cos + (-x2, x1) sin, over the first 2 x width of the tables where a head is wider than they are."""
        from openvino import opset13 as op

        cos, sin = self._tables(node)
        width = cos.get_output_partial_shape(0)[3].get_length()
        turned, *rest = op.variadic_split(x, _integer(3), _integers(width, -1)).outputs() if width < dim else [x]
        halves = op.variadic_split(turned, _integer(3), _integers(width // 2, -1))
        minus = op.multiply(halves.output(1), op.constant(np.full((1, 1, 1, 1), -1, np.float32)))
        other = op.concat([minus, halves.output(0)], -1)
        result = op.add(op.multiply(turned, cos), op.multiply(other, sin))
        return op.concat([result, *rest], -1) if rest else result

    def _tables(self, node: Any) -> tuple[Any, Any]:
        """Cosines and sines of the new tokens, each twice in a row, [batch, 1, sequence, 2 x half a head's width]."""
        from openvino import opset13 as op

        sources = [node.input_value(i).get_node() for i in (7, 8)]
        key = sources[0].get_friendly_name(), sources[1].get_friendly_name()
        if key not in self.tables:
            full: list[npt.NDArray[np.float32]] = [np.tile(source.get_data(), (1, 2)) for source in sources]
            rows = [op.gather(op.constant(table), self.positions, _integer(0)) for table in full]
            for part in rows:
                part.set_friendly_name(f"{ROTARY}.{part.get_friendly_name()}")
            cos, sin = (op.unsqueeze(part, _integers(1)) for part in rows)
            self.tables[key] = cos, sin
        return self.tables[key]

    def _bias(self, window: int) -> Any:
        """What is added to the products, [batch, 1, sequence, total]: 0 for keys that a query sees."""
        from openvino import opset13 as op

        if window not in self.biases:
            queries, keys = op.unsqueeze(self.rows, _integer(1)), op.unsqueeze(self.columns, _integer(0))
            seen = op.less_equal(keys, queries)
            if window > 0:
                seen = op.logical_and(seen, op.less(op.subtract(queries, keys), _integer(window)))
            kept = op.unsqueeze(op.convert(self.mask, "boolean"), _integers(1, 2))
            both = op.logical_and(op.unsqueeze(seen, _integers(0, 1)), kept)
            hidden = op.constant(np.finfo(np.float32).min)
            self.biases[window] = op.select(both, op.constant(np.float32(0)), hidden)
        return self.biases[window]

    def _shared(self, x: Any, heads: int, groups: int, dim: int) -> Any:
        """Keys or values of `groups` heads as `heads` of them, in the pattern that the plugin reads without a copy."""
        from openvino import opset13 as op

        if heads == groups:
            return x
        apart = op.unsqueeze(x, _integers(2))
        times = op.broadcast(apart, _integers(1, 1, heads // groups, 1, 1), broadcast_spec="BIDIRECTIONAL")
        return op.reshape(times, _integers(0, heads, -1, dim), True)
