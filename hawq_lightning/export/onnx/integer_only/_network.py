"""An integer program as a whole: codes in, integers out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning.export.onnx._ports import Port
from hawq_lightning.export.onnx.integer_only._steps import Step


@dataclass(frozen=True)
class IntegerNetwork:
    """A network that computes with integers alone.

    Attributes:
        inputs: UINT8 codes.
        outputs: UINT8 codes or INT32 numbers, each on one scale.
        steps: in an order in which they can run.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: tuple[Step, ...]

    def codes(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """UINT8 codes of the network's float inputs: where its program begins.

        Args:
            inputs: name -> float32 values.
        """
        return {port.name: port.codes(inputs[port.of]) for port in self.inputs}

    def run(
        self,
        codes: Mapping[str, np.ndarray],
        keep: Collection[str] | None = None,
        instead: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the program in numpy, whose integers are all that it uses.

        Args:
            codes: name of each input -> UINT8.
            keep: names of tensors to return; ``None``: the outputs.
            instead: tensors that later steps read in the place of what was computed.

        Returns:
            name -> integers, as they were computed.

        Raises:
            HawqError: an input is missing or has another type.
        """
        held: dict[str, np.ndarray] = {}
        for port in self.inputs:
            given = codes.get(port.name)
            if given is None or given.dtype != np.uint8:
                raise HawqError(f"The integer program reads UINT8 codes under the name {port.name!r}.")
            held[port.name] = given
        wanted = {port.name for port in self.outputs} if keep is None else set(keep)
        last = {name: i for i, step in enumerate(self.steps) for name in step.reads}
        found = {name: x for name, x in held.items() if name in wanted}
        for i, step in enumerate(self.steps):
            made = step.run(held)
            if step.result in wanted:
                found[step.result] = made
            held[step.result] = made if instead is None else instead.get(step.result, made)
            for name in {*step.reads, step.result}:
                if last.get(name, -1) <= i:
                    held.pop(name, None)
        return found
