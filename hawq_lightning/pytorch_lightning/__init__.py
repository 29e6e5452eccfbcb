"""The callbacks for programs that are written with ``import pytorch_lightning``.

Those of :mod:`hawq_lightning` work in the list of callbacks of either Trainer. Where a callback must be one of
``pytorch_lightning`` by its class (``Trainer(callbacks=HAWQ(...))`` without a list, LightningCLI, type checkers), take
it from here::

    from hawq_lightning.pytorch_lightning import HAWQ
"""

import pytorch_lightning

from hawq_lightning import callbacks


class HAWQ(callbacks.HAWQ, pytorch_lightning.Callback):  # type: ignore[misc]
    """:class:`hawq_lightning.HAWQ` as a callback of ``pytorch_lightning``."""


class MeasureTraces(callbacks.MeasureTraces, pytorch_lightning.Callback):  # type: ignore[misc]
    """:class:`hawq_lightning.MeasureTraces` as a callback of ``pytorch_lightning``."""


class ApplyPlan(callbacks.ApplyPlan, pytorch_lightning.Callback):  # type: ignore[misc]
    """:class:`hawq_lightning.ApplyPlan` as a callback of ``pytorch_lightning``."""


class BlockwiseOrder(callbacks.BlockwiseOrder, pytorch_lightning.Callback):  # type: ignore[misc]
    """:class:`hawq_lightning.BlockwiseOrder` as a callback of ``pytorch_lightning``."""


class Distillation(callbacks.Distillation, pytorch_lightning.Callback):  # type: ignore[misc]
    """:class:`hawq_lightning.Distillation` as a callback of ``pytorch_lightning``."""


class FreezeSchedule(callbacks.FreezeSchedule, pytorch_lightning.Callback):  # type: ignore[misc]
    """:class:`hawq_lightning.FreezeSchedule` as a callback of ``pytorch_lightning``."""


class PostTraining(callbacks.PostTraining, pytorch_lightning.Callback):  # type: ignore[misc]
    """:class:`hawq_lightning.PostTraining` as a callback of ``pytorch_lightning``."""


load_from_checkpoint = callbacks.load_from_checkpoint

__all__ = [
    "HAWQ",
    "ApplyPlan",
    "BlockwiseOrder",
    "Distillation",
    "FreezeSchedule",
    "MeasureTraces",
    "PostTraining",
    "load_from_checkpoint",
]
