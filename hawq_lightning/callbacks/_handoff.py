"""How a parent process learns of the plan that its children chose: under spawn and fork nothing else comes back."""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
import weakref
from pathlib import Path

import torch

from hawq_lightning._plan import Plan
from hawq_lightning._sites import quantizable_layers
from hawq_lightning.quantization import quantized_layers, quantized_operands, quantized_results, quantizers_in


class Handoff:
    """A temporary file with plan and quantizers, which the process that made this object deletes at its end.

    Attributes:
        path: of the file.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir()) / f"hawq_lightning-{uuid.uuid4().hex}.pt"
        weakref.finalize(self, _remove, self.path, os.getpid())

    def write(self, plan: Plan, module: torch.nn.Module) -> None:
        """Leave a plan and the state of the module's quantizers."""
        buffers = {
            f"{layer.prefix}{part}.{key}": value.detach().cpu()
            for layer in quantized_layers(module).values()
            for part, quantizer in quantizers_in(layer.module).items()
            for key, value in quantizer.state_dict().items()
        }
        buffers |= {
            f"{operand.prefix}{operand.operand}.{key}": value.detach().cpu()
            for operand in (*quantized_operands(module).values(), *quantized_results(module).values())
            for key, value in operand.input_quantizer.state_dict().items()
        }
        torch.save({"plan": plan.to_dict(), "buffers": buffers, "weights": weights_hash(module)}, self.path)

    def plan(self) -> Plan | None:
        """The plan that was left, if any was."""
        return Plan.from_dict(torch.load(self.path, weights_only=True)["plan"]) if self.path.is_file() else None

    def restore(self, module: torch.nn.Module) -> None:
        """Give a module the quantizers' state that was left; another model has nothing to do with it."""
        if self.path.is_file():
            message = torch.load(self.path, weights_only=True)
            if message["weights"] == weights_hash(module):
                module.load_state_dict(message["buffers"], strict=False)


def weights_hash(module: torch.nn.Module) -> str:
    """Hash of the quantizable layers' own parameters, from which a hook may make the weight."""
    digest = hashlib.sha256()
    for name, layer in quantizable_layers(module)[0].items():
        for part, p in layer.module.named_parameters(recurse=False):
            digest.update(f"{name}.{part}".encode() + p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner and path.is_file():
        path.unlink()
