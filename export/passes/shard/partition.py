"""A lowered decoder cut where ranks meet: partitions that run from one collective to the next.

The level of a node is the number of collectives on the longest path that leads to it, or the lowest of its readers'
levels where that is higher, so that little crosses cuts; partition k holds the nodes of level k. What a collective
reads leaves partition k under its name, what it gives enters later partitions under another. Collectives of one level
share a cut.

Constants, sizes and rows of an input list are repeated in every partition that uses them. Every other value is computed
once, and crosses cuts under its own name, in a shape that the graph says in the names of its inputs' sizes, such as
[``batch*tokens``, 5120].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ....model.llama4.operators import DOMAIN
from ....runtimes.bundle.shards import CollectiveOp
from ...graph.functions import is_collective

_SUMS = {"AllReduce": "all_reduce", "AllGather": "all_gather"}


@dataclass(frozen=True)
class Partition:
    """Part of a graph, and how ranks meet around it.

    Attributes:
        model: runs in ONNX Runtime; initializers are those of the whole, not copies.
        before: what is received before it runs.
        after: collectives on its outputs, and what is sent.
    """

    model: ir.Model
    before: tuple[CollectiveOp, ...]
    after: tuple[CollectiveOp, ...]


def partition_at_collectives(model: ir.Model) -> list[Partition]:
    """Cut a lowered model, which is changed, at its collectives; without any it is one partition."""
    received, sent = remove_ends(model.graph)
    levels = _Levels(model.graph)
    return [
        Partition(_partition(model, levels, level), () if level else received,
                  (*levels.exchanges(level), *(sent if level == levels.last else ())))
        for level in range(levels.last + 1)
    ]


def remove_ends(graph: ir.Graph) -> tuple[tuple[CollectiveOp, ...], tuple[CollectiveOp, ...]]:
    """Take ``Recv`` and ``Send`` out of a stage: what they carry becomes an input and an output.

    Returns:
        What is received, and what is sent.
    """
    received: list[CollectiveOp] = []
    sent: list[CollectiveOp] = []
    for node in [node for node in graph if is_collective(node) and node.op_type in ("Recv", "Send")]:
        (outside,), (inside,) = (node.inputs, node.outputs) if node.op_type == "Recv" else (node.outputs, node.inputs)
        assert outside is not None
        assert inside is not None
        name = str(outside.name)
        (received if node.op_type == "Recv" else sent).append(CollectiveOp(node.op_type.lower(), name))
        if node.op_type == "Recv":
            inside.replace_all_uses_with(outside)
        else:
            graph.outputs[graph.outputs.index(outside)] = inside
            outside.name, inside.name = None, name
        graph.remove(node, safe=True)
    return tuple(received), tuple(sent)


class _Levels:
    """The levels of a graph's nodes.

    Attributes:
        of: level of every node but those that are repeated.
        last: the highest of a node that is no collective.
        read: the values that each node reads.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.read = {node: _read_by(node) for node in graph}
        repeated = self._repeated()
        self.of: dict[ir.Node, int] = {}
        self._readers: dict[ir.Value, list[ir.Node]] = {}
        for node, values in self.read.items():
            if node in repeated:
                continue
            makers = [maker for value in values if (maker := value.producer()) is not None and maker in self.of]
            self.of[node] = max((self.of[maker] + is_collective(maker) for maker in makers), default=0)
            for value in values:
                self._readers.setdefault(value, []).append(node)
        self._lower()
        self.last = max(level for node, level in self.of.items() if not is_collective(node))

    def _repeated(self) -> set[ir.Node]:
        """Constants, what follows from them and the sizes of the graph's inputs alone, and lists read as a row."""
        found: set[ir.Node] = set()
        rows: set[ir.Node] = set()
        for node, values in self.read.items():
            of_input = all(value.is_graph_input() or value.producer() in rows for value in values[:1])
            if (node.op_type == "Shape" and of_input) or all(
                value.is_initializer() or value.producer() in found for value in values
            ):
                found.add(node)
            elif node.op_type == "Unsqueeze" and of_input:
                rows.add(node)
        return found | rows

    def _lower(self) -> None:
        """Let every node run in the partition that needs it first."""
        for node in reversed(self.of):
            handed_out = any(value.is_graph_output() for value in node.outputs)
            readers = [self.of[reader] for value in node.outputs for reader in self._readers.get(value, ())]
            if readers and not handed_out and not is_collective(node):
                self.of[node] = max(self.of[node], min(readers))

    def nodes(self, level: int) -> list[ir.Node]:
        """What runs in a partition."""
        return [node for node, at in self.of.items() if at == level and not is_collective(node)]

    def leaving(self, level: int) -> list[ir.Value]:
        """Values of a partition that are needed outside of it."""
        made = (value for node in self.nodes(level) for value in node.outputs)
        return [value for value in made if value.is_graph_output() or any(
            is_collective(reader) or self.of[reader] > level for reader in self._readers.get(value, ())
        )]

    def exchanges(self, level: int) -> Iterator[CollectiveOp]:
        """The collectives behind a partition."""
        for node in (node for node, at in self.of.items() if at == level and is_collective(node)):
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else None
            (part,), (whole,) = self.read[node], node.outputs
            yield CollectiveOp(_SUMS[node.op_type], str(part.name), str(whole.name), axis)

    def with_repeated(self, own: list[ir.Node]) -> tuple[list[ir.Node], list[ir.Value]]:
        """A partition's nodes with those that are repeated in it, in order, and what it reads from outside."""
        nodes, stack = set(own), list(own)
        while stack:
            for value in self.read[stack.pop()]:
                maker = value.producer()
                if maker is not None and maker not in self.of and maker not in nodes:
                    nodes.add(maker)
                    stack.append(maker)
        ordered = [node for node in self.read if node in nodes]
        outside = dict.fromkeys(value for node in ordered for value in self.read[node]
                                if value.producer() not in nodes and not value.is_initializer())
        return ordered, list(outside)


def _read_by(node: ir.Node) -> list[ir.Value]:
    """Values that a node reads from its graph, those that only its subgraphs name included."""
    read = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            own = {value for part in inner for value in part.outputs} | set(inner.initializers.values())
            named = (*(value for part in inner for value in _read_by(part)), *inner.outputs)
            read += [value for value in named if value not in own]
    return read


def _partition(model: ir.Model, levels: _Levels, level: int) -> ir.Model:
    nodes, inputs = levels.with_repeated(levels.nodes(level))
    leaving = levels.leaving(level)
    for value in (*inputs, *leaving):
        assert value.type is not None, f"{value.name} crosses a cut and has no type"
        assert value.shape is not None, f"{value.name} crosses a cut and has no shape"
    weights = dict.fromkeys(value for node in nodes for value in levels.read[node] if value.is_initializer())
    view = ir.GraphView(
        inputs, leaving, nodes=nodes, initializers=tuple(weights), name=f"{model.graph.name}.{level:02}",
        opset_imports={domain: version for domain, version in model.opset_imports.items() if domain != DOMAIN},
    )
    return ir.Model(view.clone(), ir_version=model.ir_version, producer_name=model.producer_name)
