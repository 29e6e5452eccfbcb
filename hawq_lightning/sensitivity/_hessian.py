"""The true trace with little noise: Gauss-Newton probes, and Hutchinson's method for what they leave out.

With f the outputs and g the loss's gradient there, H_l = J_l^T H_f J_l + sum_k g_k d2 f_k / d l2. Probes at the outputs
give the trace of the first term; that of the second is Hutchinson's, at the sites where it is not zero.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from hawq_lightning._config import MeasureConfig
from hawq_lightning._errors import HawqError
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._double_backward import rademacher
from hawq_lightning.sensitivity._estimator import (
    Estimator,
    Pilot,
    ProbeRequest,
    Probes,
    Rows,
    register_estimator,
)
from hawq_lightning.sensitivity._ggn import GaussNewton, gauss_newton_probes
from hawq_lightning.sensitivity._hutchinson import hutchinson_batch
from hawq_lightning.sensitivity._linearity import check_linearity, layer_names


@register_estimator("hessian")
class Hessian(Estimator):
    """Rows of Gauss-Newton probes plus ``z^T H z`` of the linearised loss; rows of weights are batches.

    Quadratic forms are Gauss-Newton's alone: those of the distance to the float network, which is flat there.

    Args:
        rotate: signs onto the softmax factor's singular vectors.
        nonlinear_sites: sites at which the network is not piecewise linear; elsewhere Gauss-Newton is exact.
    """

    second_derivatives = quadratic_forms = True

    def __init__(self, rotate: bool = True, nonlinear_sites: Collection[str] = ()) -> None:
        self._rotate, self._nonlinear_sites = rotate, nonlinear_sites

    def prepare(self, context: MeasureContext, pilot: Pilot, config: MeasureConfig) -> Estimator:
        """One for the sites that are not piecewise linear; Gauss-Newton where there are none.

        Raises:
            HawqError: the network cannot be differentiated twice.
        """
        linearity = check_linearity(context, pilot, config.seed)
        if linearity.failed:
            raise HawqError(
                f"estimator='hessian' needs double backward through the network: {linearity.failed}. Use 'ggn'."
            )
        if not linearity.nonlinear_sites:
            context.diagnostics.warn_once(
                "The network is piecewise linear: 'ggn' gives what 'hessian' would, with less noise, and was used."
            )
            return GaussNewton(config.rotate)
        context.diagnostics.warn_once(
            f"The network is not piecewise linear at {layer_names(context, linearity.nonlinear_sites)}: traces there "
            "are those of the true Hessian, not Gauss-Newton's, and can be negative."
        )
        return Hessian(config.rotate, linearity.nonlinear_sites)

    def probe(self, context: MeasureContext, request: ProbeRequest) -> Probes:
        """See :meth:`Estimator.probe`."""
        probes = gauss_newton_probes(context, request, rotate=self._rotate)
        for rows in (*probes.rows, *probes.forms):
            for site in {s.name for s in context.table.weights} & rows.keys():
                rows[site] = rows[site].sum(0)[None]
        if self._nonlinear_sites:
            missing = missing_part(context, request, self._nonlinear_sites)
            for rows, more in zip(probes.rows, missing):
                for site, value in more.items():
                    rows[site] = rows[site] + value if site in rows else value
        return probes


def missing_part(context: MeasureContext, request: ProbeRequest, sites: Collection[str]) -> list[Rows]:
    """What Gauss-Newton leaves out at some sites, by random signs of the seed after the request's."""
    unit = Hessian().row_unit(context, request.per_sample)
    generator = torch.Generator().manual_seed(request.seeds[0][1] + 1)
    return hutchinson_batch(
        context, request.batch, request.samples, unit, rademacher(generator), request.probes,
        linearised=True, only=sites,
    ).rows  # fmt: skip
