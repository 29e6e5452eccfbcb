"""What a packed file keeps of a quantizer beside the codes, and the checks that reading it back needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._types import JsonObject


@dataclass(frozen=True)
class Storage:
    """All that an enabled quantizer needs to be built again, besides bits, code format and codes.

    Attributes:
        tensors: name -> tensor, in the file under ``<site>.<name>``. Names and shapes depend on channels, bits and code
            format only, so that a file's size is known before any value is.
        facts: name -> number or short text, in the file's metadata.
        plain: whether the quantizer ``uniform`` can read it back. Otherwise the registered quantizer that wrote it has
            to be there.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: JsonObject = field(default_factory=dict)
    plain: bool = True

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A float32 tensor of finite numbers.

        Raises:
            HawqError: it is missing, of another shape or type, or holds NaN or infinity.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise HawqError(f"{name} is missing")
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise HawqError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not float32 {list(shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise HawqError(f"{name} is not finite")
        return tensor

    def number(self, name: str) -> float:
        """A finite number.

        Raises:
            HawqError: it is missing or none.
        """
        value = self.facts.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
            raise HawqError(f"{name} is {value!r}, not a finite number")
        return float(value)

    def only(self, *names: str) -> None:
        """Refuse tensors and facts of other names.

        Raises:
            HawqError: there are some.
        """
        if other := sorted({*self.tensors, *self.facts} - {*names}):
            raise HawqError(f"{other[0]} is nothing that this quantizer stores")
