"""The part of a model that an exporter can follow: a detector without resizing before and suppression after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class DetectorNetwork(nn.Module):
    """Backbone and heads of a torchvision detector.

    A RetinaNet's outputs are finished: a score of every class and the box of every anchor. Other detectors give what
    their head gives.

    Args:
        detector: the whole one; its modules are shared, not copied.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head
        self.boxes = AnchorBoxes(detector) if _is_retinanet(detector) else None

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Normalised images ``[N, 3, H, W]`` to scores and boxes.

        Returns:
            of a RetinaNet ``scores`` ``[N, anchors, classes]`` between 0 and 1 and ``boxes`` ``[N, anchors, 4]``, x and
            y of two corners in pixels of the input, clipped to it.
        """
        features = list(self.backbone(images).values())
        found: dict[str, torch.Tensor] = self.head(features)
        if self.boxes is None:
            return found
        return {
            "scores": found["cls_logits"].sigmoid(),
            "boxes": self.boxes(found["bbox_regression"], features, images.shape[-2:]),
        }


class AnchorBoxes(nn.Module):
    """Box offsets of every anchor to corners, without a table of all anchors: a grid's are sums of a row and a column.

    Args:
        detector: a RetinaNet of torchvision's, whose anchors and box coding these are.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.levels = len(detector.anchor_generator.cell_anchors)
        for i, anchors in enumerate(detector.anchor_generator.cell_anchors):
            self.register_buffer(f"cell_{i}", anchors.detach().clone().float(), persistent=False)
        self.weights: tuple[float, ...] = tuple(map(float, detector.box_coder.weights))
        self.most = float(detector.box_coder.bbox_xform_clip)

    def forward(
        self, offsets: torch.Tensor, features: Sequence[torch.Tensor], size: tuple[int, int] | torch.Size
    ) -> torch.Tensor:
        """``[N, anchors, 4]`` offsets to corners.

        Args:
            offsets: level by level, row by row, column by column, anchor by anchor.
            features: of every level, for their sizes.
            size: height and width of the input.
        """
        height, width = int(size[0]), int(size[1])
        grids = [(int(f.shape[-2]), int(f.shape[-1])) for f in features]
        cells = [getattr(self, f"cell_{i}") for i in range(self.levels)]
        parts = offsets.split([h * w * len(c) for (h, w), c in zip(grids, cells)], dim=1)
        wx, wy, ww, wh = self.weights
        levels = []
        for part, cell, (rows, columns) in zip(parts, cells, grids):
            each = part.reshape(-1, rows, columns, len(cell), 4)
            wide, high = cell[:, 2] - cell[:, 0], cell[:, 3] - cell[:, 1]
            xs = torch.arange(columns, dtype=torch.float32, device=cell.device) * (width // columns)
            ys = torch.arange(rows, dtype=torch.float32, device=cell.device) * (height // rows)
            x = each[..., 0] / wx * wide + (xs[:, None] + cell[:, 0] + 0.5 * wide)
            y = each[..., 1] / wy * high + (ys[:, None, None] + cell[:, 1] + 0.5 * high)
            half_wide = 0.5 * wide * torch.exp((each[..., 2] / ww).clamp(max=self.most))
            half_high = 0.5 * high * torch.exp((each[..., 3] / wh).clamp(max=self.most))
            corners = [
                (x - half_wide).clamp(0, width),
                (y - half_high).clamp(0, height),
                (x + half_wide).clamp(0, width),
                (y + half_high).clamp(0, height),
            ]
            levels.append(torch.stack(corners, -1).reshape(-1, rows * columns * len(cell), 4))
        return torch.cat(levels, 1)


def _is_retinanet(detector: Any) -> bool:
    return any(
        t.__name__ == "RetinaNet" and t.__module__.startswith("torchvision.") for t in type(detector).__mro__
    ) and hasattr(detector, "box_coder")


def network_of(model: nn.Module) -> nn.Module:
    """The network inside a LightningModule or a detector that maps a batch of images to raw outputs."""
    net = getattr(model, "net", None)
    model = net if isinstance(net, nn.Module) else model
    parts = all(isinstance(getattr(model, name, None), nn.Module) for name in ("backbone", "head", "transform"))
    return DetectorNetwork(model).train(model.training) if parts else model
