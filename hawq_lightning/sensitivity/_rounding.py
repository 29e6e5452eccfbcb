"""What rounding changes at every site, and what the loss's second order makes of it: Q = E[<dW, J^T L z>^2].

Omega takes rounding errors for noise without direction. The errors themselves are known: with ``s = <dW, J_n^T L z>``,
``L L^T`` the loss's Hessian at the outputs of sample n and z random signs, the mean of ``s^2`` over z is
``dW^T J_n^T H J_n dW``, and that over samples is the quadratic form ``dW^T G dW`` of the Gauss-Newton matrix G, for
which eq. 10 has its mean over directions (MPQCO, arXiv:2110.06554, and CLADO, arXiv:2307.05657, choose by such forms).
It needs no pass beside those of the traces: one dot product a width where a sample's gradient is formed. At
cross-entropy half of it is the KL divergence from the float network to second order, whatever the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from hawq_lightning._code_formats import CODE_FORMATS
from hawq_lightning._errors import HawqError
from hawq_lightning._fields import check_names, number, sequence, table, text, whole
from hawq_lightning._plan import Candidate
from hawq_lightning._types import JsonObject
from hawq_lightning.layers import Directions

ActivationErrors = Callable[[torch.Tensor], Iterator[torch.Tensor]]
"""From what a site reads to ``Q_w(a) - a`` of each of its candidates, in their order, in memory of its own."""


@dataclass(frozen=True)
class RoundingErrors:
    """What the candidates of every site change in the tensor that they round.

    Attributes:
        candidates: site -> its candidates, as many as there are errors.
        weights: weight site -> ``Q_w(W) - W`` of every candidate, made when it is wanted. A layer with a BatchNorm of
            its own may have as many rows more, ``sd / sd_q Q_w(W) - W`` by channel: what is left once that is
            measured again.
        activations: activation site -> what makes ``Q_w(a) - a``.
        key: what they depend on beside weights and data, for fingerprints.
        offsets: weight site with such rows -> what is added to the channels of the output besides, a row each: zeros,
            then ``mu - sd / sd_q mu_q``.
    """

    candidates: Mapping[str, Sequence[Candidate]]
    weights: Mapping[str, Directions] = field(default_factory=dict)
    activations: Mapping[str, ActivationErrors] = field(default_factory=dict)
    key: str = ""
    offsets: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def count(self, site: str) -> int:
        """Quadratic forms of a site: one a candidate, and one more where there is a BatchNorm."""
        return len(self.candidates.get(site, ())) * (2 if site in self.offsets else 1)


@dataclass(frozen=True)
class QuadraticForm:
    """Q of one site at one width: twice the second-order change of the loss by the real rounding error.

    Attributes:
        bits: code width.
        code: code format.
        perturbation: ``||Q(W) - W||^2``, which tells the rounding error that it is of.
        value: the quadratic form; of activations that of one image's loss, averaged over images.
        stderr: standard error against all columns on the same images.
        stderr_data: with the sampling of the images from their population added.
        renormalised: the form of what is left once the BatchNorm behind the layer is measured again; ``None``: it has
            none of its own, or no batches were given to :func:`hawq_lightning.quantization.rounding_errors`.
        renormalised_stderr: of that.
    """

    bits: int
    code: str
    perturbation: float
    value: float
    stderr: float
    stderr_data: float
    renormalised: float | None = None
    renormalised_stderr: float | None = None

    def to_dict(self) -> JsonObject:
        """Plain JSON types; an error that is not known is null."""
        values = asdict(self)
        values = values if self.renormalised is not None else {k: values[k] for k in _ALWAYS}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def is_of(self, candidate: Candidate) -> bool:
        """Whether this is the quadratic form of a candidate's rounding error."""
        same = (self.bits, self.code) == (candidate.bits, candidate.code)
        return same and math.isclose(self.perturbation, candidate.perturbation, rel_tol=1e-3, abs_tol=1e-30)


_LEFT = ("renormalised", "renormalised_stderr")
_ALWAYS = tuple(n for n in QuadraticForm.__dataclass_fields__ if n not in _LEFT)


def read_forms(data: JsonObject, kinds: Mapping[str, str]) -> dict[str, tuple[QuadraticForm, ...]]:
    """The quadratic forms of a sensitivity file; an old file has none.

    Args:
        data: the JSON object.
        kinds: site -> its kind.

    Raises:
        HawqError: a field that cannot be; the message names it.
    """
    out = {}
    for name, raw in table(data.get("forms", {}), "forms").items():
        if name not in kinds:
            raise HawqError(f"forms has site {name!r}, of which there is no record")
        out[name] = tuple(_form(name, x) for x in sequence(raw, f"forms of {name!r}"))
    return out


def _form(name: str, raw: object) -> QuadraticForm:
    what = f"a form of {name!r}"
    data = table(raw, what)
    check_names(data, what, _ALWAYS, _LEFT)
    code = text(data["code"], f"code of {what}")
    if code not in CODE_FORMATS:
        raise HawqError(f"code of {what} is {code!r}; there are {', '.join(CODE_FORMATS)}")
    numbers = {
        key: math.inf if data[key] is None and key.startswith("stderr") else number(data[key], f"{key} of {what}", low)
        for key, low in (("perturbation", 0.0), ("value", -math.inf), ("stderr", 0.0), ("stderr_data", 0.0))
    }
    form = QuadraticForm(whole(data["bits"], f"bits of {what}", 1, 8), code, **numbers)
    if data.get("renormalised") is None:
        return form
    error = data.get("renormalised_stderr")
    return replace(
        form,
        renormalised=number(data["renormalised"], f"renormalised of {what}"),
        renormalised_stderr=math.inf if error is None else number(error, f"renormalised_stderr of {what}", 0.0),
    )
