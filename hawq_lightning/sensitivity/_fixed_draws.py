"""Random draws of a loss, the same in every pass over a batch: inline LayerDrop, stochastic depth, sampled noise.

What draws by a module's training mode is off while measuring. What draws whatever the mode is followed: each batch has
a seed of its own, of several the first that leaves out fewest layers where any are left out.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from hawq_lightning._batches import parts_of
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Batch
from hawq_lightning.sensitivity._isolate import RandomStates, random_states_kept

_SEEDS = 12  # tried for a batch
_VALUES = 64  # of each tensor, in a batch's seed
_CHOSEN: weakref.WeakKeyDictionary[nn.Module, dict[int, int]] = weakref.WeakKeyDictionary()


class FixedDraws:
    """Seeds for the batches of a loss.

    Args:
        model: whose layers are counted.

    Attributes:
        drew: whether a pass has drawn anything.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.drew = False

    @contextmanager
    def __call__(self, batch: Batch) -> Iterator[None]:
        """Inside, draws are those of the batch; afterwards random states are what they were."""
        key = key_of(batch)
        with random_states_kept(_CHOSEN.get(self._model, {}).get(key, key)):
            before = RandomStates()
            yield
            self.drew = self.drew or before.moved()

    def choose(self, batches: Iterable[Batch], run: Callable[[Batch], object]) -> None:
        """Find for each batch a seed that leaves out fewest layers; from now on all losses of the model take it.

        Args:
            batches: to choose for.
            run: the loss of a batch, in these contexts.
        """
        readers = quantizable_layers(self._model)[0]
        chosen = _CHOSEN.setdefault(self._model, {})
        called: set[str] = set()
        handles = [r.on_call(lambda x, y, n=n: called.add(n)) for n, r in readers.items()]  # type: ignore[misc]
        try:
            for batch in batches:
                key, most = key_of(batch), -1
                for seed in range(key, key + _SEEDS):
                    called.clear()
                    before, chosen[key] = chosen.get(key, key), seed
                    with torch.enable_grad():
                        run(batch)
                    if len(called) > most:
                        most = len(called)
                    else:
                        chosen[key] = before
                    if most == len(readers):
                        break
        finally:
            for handle in handles:
                handle.remove()


def key_of(batch: Batch) -> int:
    """A number that tells batches apart, by their shapes and some values."""
    text: list[bytes] = []

    def look(value: object) -> None:
        if isinstance(value, torch.Tensor):
            text.append(str((value.dtype, tuple(value.shape))).encode())
            if value.layout == torch.strided and not value.is_meta and not value.is_quantized and not value.is_nested:
                flat = value.detach().flatten()
                text.append(str(flat[:: max(1, flat.numel() // _VALUES)].tolist()).encode())
        else:
            for part in parts_of(value):
                look(part)

    with torch._C.DisableTorchFunction(), _disable_current_modes():  # whoever watches the loss does not see this
        look(batch)
    return zlib.crc32(b" ".join(text)) % (1 << 31)
