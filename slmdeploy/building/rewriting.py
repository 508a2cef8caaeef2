"""Graph surgery in small: take one node out of an ONNX graph and put a few others in its place.

Knows nothing of quantisation. It exists so that w8a8.py and blockwise.py read as the mathematics they implement, with
the naming of nodes and constants, the order of nodes and the removal of what is no longer used in one place.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

MICROSOFT = "com.microsoft"
Constant = npt.NDArray[np.generic] | np.generic


class Replacement:
    """New nodes in front of ``node``; `finish` gives ``node``'s outputs to their values and removes ``node``."""

    def __init__(self, node: ir.Node) -> None:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        name = node.name or node.outputs[0].name
        assert name, "a node without a name has an output with one"
        self._graph, self._node, self._name = graph, node, name

    def constant(self, name: str, value: Constant, *, shared: bool = False) -> ir.Value:
        """An initializer of this node; a ``shared`` one belongs to the whole graph and is made once."""
        full = name if shared else f"{self._name}.{name}"
        if shared and full in self._graph.initializers:
            return self._graph.initializers[full]
        array = np.asarray(value)
        tensor = ir.tensor(array, name=full)
        made = ir.Value(name=full, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self._graph.register_initializer(made)
        return made

    def add(
        self, operator: str, *inputs: ir.Value | None, name: str = "", domain: str = "", **attributes: float
    ) -> ir.Value:
        """Append one single-output node and return its output; two of an operator in one place need a ``name``."""
        name = f"{self._name}.{name or operator}"
        node = ir.node(operator, inputs=list(inputs), attributes=attributes or None, domain=domain, name=name)
        node.outputs[0].name = f"{name}.out"
        self._graph.insert_before(self._node, node)
        return node.outputs[0]

    def split(self, source: ir.Value | None, sizes: ir.Value, parts: tuple[str, ...]) -> tuple[ir.Value, ...]:
        """``source`` cut along its last axis into parts of these sizes."""
        name = f"{self._name}.split"
        node = ir.node("Split", [source, sizes], attributes={"axis": -1}, num_outputs=len(parts), name=name)
        for value, part in zip(node.outputs, parts, strict=True):
            value.name = f"{name}.{part}"
        self._graph.insert_before(self._node, node)
        return tuple(node.outputs)

    def finish(self, *values: ir.Value) -> None:
        """Let each value stand for one of the old node's outputs, keeping name, type and shape; remove the node."""
        for old, value in zip(self._node.outputs, values, strict=True):
            value.name, value.type, value.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self._graph.remove(self._node, safe=True)


def remove_unused_initializers(graph: ir.Graph) -> None:
    """Drop constants that no node reads, such as the fp32 weight of a layer that has been replaced."""
    kept = {id(value) for value in graph.outputs}
    for name, value in list(graph.initializers.items()):
        if not value.uses() and id(value) not in kept:
            del graph.initializers[name]


def weight_array(value: ir.Value) -> npt.NDArray[np.float32]:
    """The fp32 contents of an initializer."""
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), dtype=np.float32)
