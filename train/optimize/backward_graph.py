"""Transfers of gradients inside a compiled backward pass, which would otherwise hand all gradients over at its end.

Between Dynamo and Inductor the graph's inputs are still the model's parameters; so a back end of torch.compile notes the
place of each there, and lets Inductor put `train::start_bucket` behind the last gradient of each bucket. The operator is
declared to write the gradients that it reads, because a compiler drops or moves what returns and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from train.optimize.overlap import start_bucket

# torch.library.Library carries no type hints
_library: Any = torch.library.Library("train", "DEF")
_library.define("start_bucket(Tensor(a!)[] gradients, int[] numbers) -> ()")
_library.impl("start_bucket", start_bucket, "CompositeExplicitAutograd")
torch.library.register_fake("train::start_bucket", lambda gradients, numbers: None, lib=_library)


class StartBuckets(CustomGraphPass):
    """Puts the start of each bucket behind the last of its gradients; leaves a forward pass alone.

    Args:
        buckets: numbers of matrices.
        places: where among the forward pass's inputs a matrix is, which is where its gradient is among the backward
            pass's outputs.
        shapes: of the matrices.
    """

    def __init__(
        self, buckets: Sequence[Sequence[int]], places: Mapping[int, int], shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self._buckets = buckets
        self._places = dict(places)
        self._shapes = shapes

    def uuid(self) -> str:
        # part of the compile cache's key: a graph that has other starts, or none, must not come back
        return f"{get_hash_for_files((__file__,)).hex()} {self._buckets} {sorted(self._places.items())}"

    def __call__(self, graph: fx.Graph) -> None:
        if not any(node.op == "placeholder" and "tangents" in node.name for node in graph.nodes):
            return
        gradients: Any = graph.output_node().args[0]
        order = {node: place for place, node in enumerate(graph.nodes)}
        for bucket in self._buckets:
            found = {n: gradients[self._places[n]] for n in bucket if n in self._places}
            # a form of the model may leave a matrix out
            found = {n: node for n, node in found.items() if isinstance(node, fx.Node)}
            for number, node in found.items():
                if tuple(node.meta["val"].shape) != self._shapes[number]:
                    raise RuntimeError(
                        f"torch {torch.__version__} returns gradients in another order, {node} is not of matrix {number}: "
                        "set GRADIENT_REDUCTION=after"
                    )
            if found:
                with graph.inserting_after(max(found.values(), key=order.__getitem__)):
                    graph.call_function(torch.ops.train.start_bucket.default, ([*found.values()], [*found]))


def overlapping_compiler(
    matrices: Sequence[Tensor], buckets: Sequence[Sequence[int]], options: Mapping[str, Any]
) -> Callable[[fx.GraphModule, Sequence[Any]], Any]:
    """A back end for torch.compile: Inductor, and a backward pass that starts buckets.

    Args:
        matrices: parameters of the model.
        buckets: numbers of matrices.
        options: Inductor's switches.
    """
    numbers = {id(matrix): number for number, matrix in enumerate(matrices)}
    shapes = [tuple(matrix.shape) for matrix in matrices]

    def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        places = {numbers[id(value)]: place for place, value in enumerate(inputs) if id(value) in numbers}
        starts = StartBuckets(buckets, places, shapes)
        return compile_fx(graph, inputs, config_patches={**options, "post_grad_custom_post_pass": starts})

    return compile_graph
