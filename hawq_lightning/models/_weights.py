"""Where a network's weights come from: a file on disk, its library's download, or a clear refusal."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawq_lightning._errors import HawqError


def build(
    name: str,
    make: Callable[[bool], nn.Module],
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    source: str | None = None,
    **fitting: Any,
) -> nn.Module:
    """A network with its library's weights, weights from disk, or fresh ones.

    Args:
        name: of the network, for messages.
        make: builds it; called with True it downloads the library's weights as well.
        pretrained: ask for the download.
        weights: a file to read instead.
        source: the library that can download; ``None`` when nobody publishes weights for this variant.
        **fitting: ``head``, ``drop`` and ``rename`` of :func:`load_weights`.

    Raises:
        HawqError: both or neither can be had, or the file does not fit.
    """
    if pretrained and weights is not None:
        raise HawqError(f"{name}: give either pretrained=true or weights={weights}, not both.")
    if not pretrained:
        net = make(False)
        return net if weights is None else load_weights(net, weights, **fitting)
    if source is None:
        raise HawqError(f"{name}: nobody publishes weights for this variant; give weights=/path/to/file.pt instead.")
    try:
        return make(True)
    except (OSError, RuntimeError) as error:  # no network, a full disk, a wrong checksum
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HawqError(
            f"{name}: {source} could not download its weights ({reason}); "
            "give weights=/path/to/file.pt, or pretrained=false."
        ) from error


def load_weights(
    net: nn.Module,
    path: str | Path,
    *,
    head: str | None = None,
    drop: Sequence[str] = (),
    rename: Callable[[str], str] | None = None,
) -> nn.Module:
    """Load a state dict, or the one inside a Lightning checkpoint, into ``net``.

    Args:
        net: the network; changed in place.
        path: a file of ``torch.save`` (read with ``weights_only=True``) or a ``.safetensors`` file.
        head: name of the classifier layer; its mismatch is reported as a wrong number of classes.
        drop: entries under these submodules of the file are left out.
        rename: gives the network's name for a name in the file.

    Returns:
        ``net``.

    Raises:
        HawqError: no such file, not a weights file, or names and shapes that do not fit.
    """
    path = Path(path)
    state = _read(path)
    own = net.state_dict()
    for prefix in ("module.", "net.", "model."):  # DataParallel's and LightningModules' wrappers
        if state and all(k.startswith(prefix) for k in state) and not any(k.startswith(prefix) for k in own):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not any(k.startswith(f"{d}.") for d in drop)}
    if rename is not None:
        state = {rename(k): v for k, v in state.items()}
    if head and f"{head}.weight" in state and f"{head}.weight" in own:
        file_classes, classes = len(state[f"{head}.weight"]), len(own[f"{head}.weight"])
        if file_classes != classes:
            raise HawqError(f"The weights at {path} have {file_classes} classes, the model {classes}; set num_classes.")
    _check_fits(net, state, own, path)
    net.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return net


def _check_fits(net: nn.Module, state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], path: Path) -> None:
    counter = "num_batches_tracked"  # absent from old files and from frozen BatchNorm
    missing = [k for k in own if k not in state and not k.endswith(counter)]
    unknown = [k for k in state if k not in own and not k.endswith(counter)]
    reshaped = [
        f"{k} {list(state[k].shape)} against {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or unknown or reshaped:
        wrong = [
            f"{what} {', '.join(which[:3])}{f' and {len(which) - 3} more' if len(which) > 3 else ''}"
            for what, which in (("missing", missing), ("unknown", unknown), ("other shapes", reshaped))
            if which
        ]
        raise HawqError(f"The weights at {path} do not fit {type(net).__name__}: {'; '.join(wrong)}.")


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise HawqError(f"No weights at {path}.")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HawqError(f"The weights at {path} cannot be read: {reason}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise HawqError(f"The file {path} holds no state dict: expected names and tensors.")
    return dict(state)
