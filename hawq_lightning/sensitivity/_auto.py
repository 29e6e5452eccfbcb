"""The estimator that chooses another: Gauss-Newton where it is exact or nearly so, else the true Hessian."""

from __future__ import annotations

import torch

from hawq_lightning._config import MeasureConfig
from hawq_lightning._errors import HawqError
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._estimator import Estimator, Pilot, ProbeRequest, Probes, register_estimator
from hawq_lightning.sensitivity._ggn import GaussNewton, gauss_newton_probes
from hawq_lightning.sensitivity._hessian import Hessian, missing_part
from hawq_lightning.sensitivity._linearity import check_linearity, layer_names

_SOME = 4  # samples and probes to weigh the missing part by
_AFFORDABLE = 24  # sites to differentiate twice one by one
_MATTERS = 0.1  # of the Gauss-Newton trace


@register_estimator("auto")
class Auto(Estimator):
    """Gauss-Newton, or the true Hessian, by a check on a few samples; what it chose and why goes into the notes.

    Piecewise linear network: ``ggn``, which is then exact. Otherwise the missing part is estimated on a few samples:
    where it is below a tenth of every trace, or cannot be told from zero, ``ggn`` again, which is cheap and never
    negative; where it is more, ``hessian``, unless that would take a double backward at more than 24 sites for every
    probe. Without double backward through the network: ``ggn``.
    """

    def prepare(self, context: MeasureContext, pilot: Pilot, config: MeasureConfig) -> Estimator:
        """The estimator that measures."""
        warn_once = context.diagnostics.warn_once
        gauss_newton = GaussNewton(config.rotate)
        linearity = check_linearity(context, pilot, config.seed, _AFFORDABLE)
        if linearity.failed:
            warn_once(
                f"estimator='auto' could not check whether the network is piecewise linear ({linearity.failed}); it "
                "took 'ggn', whose traces are then Gauss-Newton approximations."
            )
            return gauss_newton
        sites = linearity.nonlinear_sites
        if not sites:
            return gauss_newton
        where = f"The network is not piecewise linear at {layer_names(context, sites)}"
        try:
            missing, site = _missing_share(context, pilot, sites, config.seed)
        except (RuntimeError, HawqError):
            missing, site = 0.0, ""
        part = f"about {missing:.0%} of" if missing < 1 else "as much as"
        if missing > _MATTERS and len(context.table) > _AFFORDABLE:
            warn_once(
                f"{where}, and Gauss-Newton misses {part} the trace at {site}. estimator='auto' took 'ggn' all the "
                f"same, since the true Hessian takes a double backward at each of {len(context.table)} sites for every "
                "probe; estimator='hessian' asks for it."
            )
            return gauss_newton
        if missing > _MATTERS:
            warn_once(
                f"{where}, and Gauss-Newton misses {part} the trace at {site}: estimator='auto' took 'hessian', the "
                "true trace at the cost of double backward. It can be negative; bits are then chosen by its upper "
                "bound. estimator='ggn' is faster and never negative."
            )
            return Hessian(config.rotate, sites)
        warn_once(
            f"{where}, but Gauss-Newton misses no more than {_MATTERS:.0%} of any trace on the images that were tried: "
            "estimator='auto' took 'ggn'. estimator='hessian' gives the true trace."
        )
        return gauss_newton

    def probe(self, context: MeasureContext, request: ProbeRequest) -> Probes:
        """Never called: :meth:`prepare` gives another estimator.

        Raises:
            TypeError: always.
        """
        raise TypeError("estimator='auto' chooses another estimator; call prepare() and probe with what it returns.")


def _missing_share(context: MeasureContext, pilot: Pilot, sites: tuple[str, ...], seed: int) -> tuple[float, str]:
    """The largest share of a trace that Gauss-Newton misses, less two standard errors; and its site."""
    pilot = pilot.first(context, _SOME)
    request = ProbeRequest(pilot.batch, pilot.samples, pilot.per_sample, [(pilot.samples, seed)], _SOME)
    gauss_newton = gauss_newton_probes(context, request).rows
    missing = missing_part(context, request, sites)
    worst, at = 0.0, ""
    for site in sites:
        trace = sum(float(rows[site].sum()) for rows in gauss_newton if site in rows) / _SOME
        values = torch.tensor([float(rows[site].sum()) for rows in missing], dtype=torch.float64)
        certain = abs(float(values.mean())) - 2 * float(values.std()) / _SOME**0.5
        if trace > 0 and certain / trace > worst:
            worst, at = certain / trace, site
    return worst, at
