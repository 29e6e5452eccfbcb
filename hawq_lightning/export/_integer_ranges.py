"""Grids of tensors for which a plan has none: eight bits over the range seen on some images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from hawq_lightning._batches import image_tensors
from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch

LOW, HIGH = -128, 127


@dataclass(frozen=True)
class Grid:
    """Int8 codes ``low`` to ``high`` of ``(code - zero) * scale``."""

    scale: float
    zero: int
    high: int = HIGH

    @property
    def arguments(self) -> tuple[float, int, int, int, torch.dtype]:
        """Of the two operators."""
        return self.scale, self.zero, LOW, self.high, torch.int8


class Ranges(fx.Interpreter):
    """The range of every float tensor over some images, 0 included."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.low: dict[fx.Node, float] = {}
        self.high: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> object:
        """As the base class, and look at the result."""
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, torch.Tensor) and result.is_floating_point():
            self.low[n] = min(self.low.get(n, 0.0), float(result.min()))
            self.high[n] = max(self.high.get(n, 0.0), float(result.max()))
        return result

    @torch.no_grad()
    def see(self, batches: Iterable[Batch]) -> None:
        """Image by image: the graph is for one."""
        count = 0
        for images in image_tensors(batches):
            for image in images.detach().to("cpu", torch.float32):
                self.run(image[None])
                count += 1
        if not count:
            raise HawqError("There are no images to see the ranges of sums and pools on.")

    def grid(self, node: fx.Node) -> Grid:
        """Of eight bits over the range."""
        scale = max(self.high[node] - self.low[node], 1e-6) / (HIGH - LOW)
        return Grid(scale, LOW + round(-self.low[node] / scale))
