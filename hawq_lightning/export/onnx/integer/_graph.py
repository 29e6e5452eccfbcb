"""An ONNX graph that passes can edit: nodes, who makes a tensor, who reads it, constants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from hawq_lightning._extra import require
from hawq_lightning.export.onnx._low_bits import keep_tensors, replace_nodes

Node: TypeAlias = Any
"""An ``onnx.NodeProto``."""
Read: TypeAlias = tuple[Node, int]
"""A node and which of its inputs."""


class Graph:
    """Nodes and constants of a model, edited in place; :meth:`store` writes them back.

    Args:
        proto: the model. Loops and branches inside of nodes are left as they are; what they read is read.
    """

    def __init__(self, proto: Any) -> None:
        onnx = require("onnx")
        self.proto = proto
        self.nodes: list[Node] = [onnx.NodeProto.FromString(n.SerializeToString()) for n in proto.graph.node]
        self.inputs = [i.name for i in proto.graph.input]
        self.outputs = [o.name for o in proto.graph.output]
        self._stored = {t.name: t for t in proto.graph.initializer}
        self._new: dict[str, np.ndarray] = {}

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is an initializer."""
        return name in self._new or name in self._stored

    def array(self, name: str) -> np.ndarray:
        """Value of an initializer."""
        if name not in self._new:
            return np.asarray(require("onnx").numpy_helper.to_array(self._stored[name]))
        return self._new[name]

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer, or replace one; returns its name."""
        self._new[name] = value
        return name

    def makers(self) -> dict[str, Node]:
        """Tensor -> the node that makes it."""
        return {out: node for node in self.nodes for out in node.output if out}

    def readers(self) -> dict[str, list[Read]]:
        """Tensor -> where it is read."""
        found: dict[str, list[Read]] = defaultdict(list)
        for node in self.nodes:
            for slot, name in enumerate(node.input):
                found[name].append((node, slot))
            for name in _read_inside(node):
                found[name].append((node, -1))
        return found

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> Node:
        """A new node with one output; ``store`` puts it where it belongs."""
        node = require("onnx").helper.make_node(op, inputs, [output], name=f"{output}//{op}", **attributes)
        self.nodes.append(node)
        return node

    def drop(self, nodes: list[Node]) -> None:
        """Take nodes out."""
        gone = {id(n) for n in nodes}
        self.nodes = [n for n in self.nodes if id(n) not in gone]

    def attribute(self, node: Node, name: str, default: Any = None) -> Any:
        """Value of a node's attribute."""
        helper = require("onnx").helper
        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

    def store(self) -> None:
        """Write nodes in an order in which they can run, and new constants, into the model."""
        onnx = require("onnx")
        keep_tensors(self.proto, set(self._stored) - set(self._new))
        del self.proto.graph.value_info[:]
        replace_nodes(self.proto, self._ordered(), [onnx.numpy_helper.from_array(a, n) for n, a in self._new.items()])

    def _ordered(self) -> list[Node]:
        made, left = set(self.inputs) | set(self._stored) | set(self._new) | {""}, self.nodes
        order: list[Node] = []
        while left:
            rest = []
            for node in left:
                if all(name in made for name in (*node.input, *_read_inside(node))):
                    order.append(node)
                    made.update(node.output)
                else:
                    rest.append(node)
            assert len(rest) < len(left), f"nothing makes what {rest[0].name} reads"
            left = rest
        return order


def _read_inside(node: Node) -> Iterator[str]:
    """Tensors of the surrounding graph that a node's loops and branches read."""
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {t.name for t in (*graph.input, *graph.initializer)} | {o for n in graph.node for o in n.output}
            for inner in graph.node:
                yield from (name for name in (*inner.input, *_read_inside(inner)) if name and name not in own)
