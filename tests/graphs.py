"""A backend of torch.compile that treats results as CUDA graphs do, so that a CPU shows what would go wrong with them.

Each compiled graph returns its results in memory of its own, which its next run overwrites; at each forward pass all
results of the runs before become NaN.
"""

from collections.abc import Callable, Sequence

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd


class Graphs:
    """The backend; counts what is compiled."""

    def __init__(self):
        self.memory: list[Tensor] = []
        self.graphs = self.forward_passes = self.backward_passes = 0
        self.runs = 0  # of compiled forward passes
        self.compile = aot_autograd(
            fw_compiler=self.forward, bw_compiler=self.backward, partition_fn=min_cut_rematerialization_partition
        )

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
        self.graphs += 1
        return self.compile(graph, inputs)

    def forward(self, graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable:
        self.forward_passes += 1
        return self.in_own_memory(graph, is_forward=True)

    def backward(self, graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable:
        self.backward_passes += 1
        return self.in_own_memory(graph, is_forward=False)

    def in_own_memory(self, graph: torch.fx.GraphModule, is_forward: bool) -> Callable:
        results: list[Tensor | None] = []

        def run(*inputs: Tensor) -> list[Tensor | None]:
            if is_forward:
                self.runs += 1
                for tensor in self.memory:
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)
            computed = graph(*inputs)
            if not results:
                results.extend(torch.empty_like(value) if isinstance(value, Tensor) else value for value in computed)
                self.memory.extend(value for value in results if isinstance(value, Tensor))
            for value, result in zip(computed, results, strict=True):
                if isinstance(value, Tensor):
                    result.copy_(value)
            # Autograd keeps a gradient that nobody else refers to, in the memory where it is.
            return [result.detach() if isinstance(result, Tensor) else result for result in results]

        return make_boxed_func(run)

    def install(self) -> None:
        """Makes this the backend of all that is compiled from now on."""
        compile_ = torch.compile
        torch.compile = lambda model, **options: compile_(model, **options | {"backend": self})
