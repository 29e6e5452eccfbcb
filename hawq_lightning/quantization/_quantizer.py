"""What weight and activation quantizers share: state, switching on and off, one grid for the layers of a site.

State lives in persistent *float32* buffers that hold integers (weight averaging and `bf16-true` ruin integer buffers),
so that a plain state dict carries the plan. Python mirrors of the integers, which the kernels want, are refreshed
whenever a state dict is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.fx import Proxy

from hawq_lightning._config import Kernel
from hawq_lightning._errors import HawqError
from hawq_lightning._torch_state import transformed
from hawq_lightning.quantization._fake_quantize import with_zero_grads
from hawq_lightning.quantization._storage import Storage

_OLD_NUM_BITS = "width"  # what release 0.1.0 called the buffer


def is_quantizer_state(buffers: Iterable[str]) -> bool:
    """Whether these are names in a quantizer's state, of this release or of 0.1.0."""
    return not {"num_bits", _OLD_NUM_BITS}.isdisjoint(buffers)


class Quantizer(nn.Module):
    """What weight and activation quantizers share: bits (0 is off), a step ``scale`` and a ``zero_point``.

    Args:
        channels: number of scales.

    Attributes:
        bits: code width; 0 means the identity.
        zero: ``zero_point`` as a Python number, as of the last :meth:`refresh`.
        fake_quant_disabled: the identity for a while, whatever the bits.
        range_updates_enabled: whether ranges that follow the data may move in training; a schedule may switch it off.
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.register_buffer("num_bits", torch.zeros((), dtype=torch.float32))
        self.make_scale(() if channels is None else (channels,))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.float32))
        self.bits = 0
        self.zero = 0.0
        self.fake_quant_disabled = False
        self.range_updates_enabled = True
        self._tied_to: tuple[Quantizer, ...] = ()  # in a tuple, so that it is no submodule

    num_bits: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    kernel: Kernel = "torch"  # what :func:`hawq_lightning.quantization.use_kernel` set
    updates_range = False  # whether passes in training move the grid, by what they see

    def make_scale(self, shape: tuple[int, ...]) -> None:
        """Register what ``scale`` is kept in: a buffer, or a Parameter where it is learned."""
        self.register_buffer("scale", torch.ones(shape, dtype=torch.float32))

    def set_scale(self, scale: torch.Tensor) -> None:
        """Fill it, in place."""
        self.scale.copy_(scale)

    @torch.no_grad()
    def enable(self, bits: int, scale: torch.Tensor | float, zero_point: float = 0.0) -> None:
        """Switch on, in place.

        Args:
            bits: code width.
            scale: positive step, one a channel for weights.
            zero_point: what stands for 0 on the integer grid.

        Raises:
            HawqError: a step that is not positive and finite.
        """
        scale = torch.as_tensor(scale, dtype=torch.float32, device=self.num_bits.device)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise HawqError("A quantization step must be positive and finite; weights or activations hold NaN or Inf.")
        self.num_bits.fill_(float(bits))
        self.bits = bits
        self.zero_point.fill_(float(zero_point))
        self.set_scale(scale)
        self.refresh()

    def tie_to(self, leader: Quantizer) -> None:
        """Share a grid that moves in training: from now on ``leader`` quantizes here too, and this one's state follows.

        Layers of one site have a quantizer each, since sites are not known yet when optimizers are made.
        """
        self._tied_to = (leader,)

    @torch.no_grad()
    def _take_state(self) -> None:
        for leader in self._tied_to:
            for tensor, leading in zip(self._tensors(), leader._tensors()):
                tensor.copy_(leading)
            self.bits, self.zero = leader.bits, leader.zero

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.parameters(), *self.buffers()]

    @torch.no_grad()
    def disable(self) -> None:
        """Switch off: the identity again."""
        self._tied_to = ()
        self.num_bits.zero_()
        self.refresh()

    def refresh(self) -> None:
        """Bring the Python mirrors in line with the buffers (rounded: averaging callbacks leave 3.9999)."""
        self._take_state()
        self.bits = round(float(self.num_bits))
        self.zero = round(2 * float(self.zero_point)) / 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantize; same shape and dtype. The identity while off or paused."""
        if isinstance(x, Proxy):  # symbolic tracing has no values: the quantizer is called where the graph runs
            node: torch.Tensor = x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
            return node
        if self.fake_quant_disabled:
            return self._untouched(x)
        if self._tied_to:
            if not transformed():
                self._take_state()
            levels: torch.Tensor = self._tied_to[0](self._untouched(x))
            return levels
        return self.quantize(x) if self.bits else self._untouched(x)

    def _untouched(self, x: torch.Tensor) -> torch.Tensor:
        learned = [p for p in self.parameters() if p.requires_grad] if self.training else []
        return with_zero_grads(x, *learned) if learned and torch.is_grad_enabled() else x

    @property
    def has_dynamic_range(self) -> bool:
        """Whether training changes the grid: by gradients, or by what passes see."""
        return type(self).updates_range or next(self.parameters(), None) is not None

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Q(.) at the present bits: what a subclass defines, with the gradients that it wants."""
        raise NotImplementedError

    @property
    def even_steps(self) -> bool:
        """Whether the levels are whole multiples of one step a channel, as ONNX and torch.export have them."""
        return True

    def storage(self) -> Storage:
        """What a packed file keeps of this enabled quantizer, besides bits, code format and codes."""
        raise NotImplementedError

    def from_storage(self, bits: int, code_format: str, storage: Storage) -> None:
        """Switch on with exactly the levels that were stored; values are checked, since files come from anywhere.

        Args:
            bits: 1 to 8.
            code_format: name of one.
            storage: of :meth:`storage`.

        Raises:
            HawqError: something is missing, not understood, or out of range.
        """
        raise NotImplementedError

    def _save_to_state_dict(self, *args: object) -> None:
        self._take_state()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # a float checkpoint says nothing about quantizers; it must not disable them
        if f"{prefix}{_OLD_NUM_BITS}" in state_dict:
            state_dict[f"{prefix}num_bits"] = state_dict.pop(f"{prefix}{_OLD_NUM_BITS}")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Quantizer:
        # follow the device, never the dtype: a bf16 step is another step
        super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Bits, or off."""
        return f"{self.bits} bits" if self.bits else "off"
