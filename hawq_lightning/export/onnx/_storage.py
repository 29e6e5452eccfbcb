"""How the codes of weights lie in an ONNX file."""

from __future__ import annotations

from typing import Any, Literal, get_args

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.export.onnx._float_bias import split_bias
from hawq_lightning.export.onnx._lookup import look_up_weights
from hawq_lightning.export.onnx._low_bits import pack_low_bit_weights, weights
from hawq_lightning.export.onnx._zero_points import add_zero_points

Storage = Literal["lookup", "int8", "native"]
"""``lookup``: packed bytes and a table, read by every runtime. ``int8``: a byte a code. ``native``: INT2 and INT4."""


def check_storage(storage: str, integer: bool = False) -> None:
    """Raise HawqError for a name that is none, or a storage that integer kernels do not read."""
    if storage not in get_args(Storage):
        raise HawqError(f"storage={storage!r} is none of {', '.join(get_args(Storage))}.")
    if integer and storage == "native":
        raise HawqError("Integer kernels read INT8 only: an integer file has storage='lookup' or storage='int8'.")


def store_weights(proto: Any, storage: Storage, *, exact: bool) -> None:
    """Put the weights of a translated model into their storage, in place.

    Args:
        proto: an ONNX model whose codes are INT8 or INT16 initializers.
        storage: see :data:`Storage`.
        exact: add biases by nodes of their own; INT2 and INT4 need that in any case.

    Raises:
        HawqError: this version of onnx lacks a type.
    """
    if storage == "native":
        types = pack_low_bit_weights(proto)
        split_bias(proto, [name for name, kind in types.items() if exact or kind in ("INT2", "INT4")])
        add_zero_points(proto)
        return
    if exact:
        split_bias(proto, [t.name for t in weights(proto)])
    kinds = {t.name: t.data_type for t in weights(proto)}
    if storage == "lookup":
        wide = require("onnx").TensorProto
        looked_up = look_up_weights(proto)
        kinds = {n: wide.INT32 if k == wide.INT16 and looked_up[n] == 8 else k for n, k in kinds.items()}
    add_zero_points(proto, kinds)
