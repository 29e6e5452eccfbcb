"""The estimator that chooses another: Gauss-Newton, but for losses that show it nothing."""

from __future__ import annotations

from hawq_lightning._config import MeasureConfig
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._estimator import Estimator, Pilot, ProbeRequest, Probes, register_estimator
from hawq_lightning.sensitivity._ggn import GaussNewton
from hawq_lightning.sensitivity._hessian import Hessian
from hawq_lightning.sensitivity._hutchinson import Hutchinson
from hawq_lightning.sensitivity._linearity import check_linearity, layer_names
from hawq_lightning.sensitivity._output_probes import sees_curvature


@register_estimator("auto")
class Auto(Estimator):
    """``ggn`` wherever the loss has curvature in the network's outputs; what that leaves out goes into the notes.

    Of a piecewise linear network Gauss-Newton traces are those of the Hessian, and there is nothing to say. Of others
    they tell what rounding does to the outputs: at cross-entropy they are the second derivative of the KL divergence
    between the float and the quantized network (Martens, JMLR 21, 2020, section 9). ``docs/method.md`` shows that they
    predict it better than the Hessian's, so nothing is measured to decide between the two. ``hessian`` only where the
    loss has no curvature in the outputs, but the network has some of its own; ``hutchinson`` where the loss takes
    derivatives of the network, which do not go through its outputs.
    """

    def prepare(self, context: MeasureContext, pilot: Pilot, config: MeasureConfig) -> Estimator:
        """The estimator that measures."""
        warn_once = context.diagnostics.warn_once
        if context.diagnostics.differentiates:
            warn_once(
                "The loss takes derivatives of the network (a gradient penalty, forces, a differential equation): "
                "estimator='auto' took 'hutchinson', the true Hessian by double backward through all of it, which is "
                "noisier and can be negative."
            )
            return Hutchinson(config.distribution)
        gauss_newton = GaussNewton(config.rotate)
        linearity = check_linearity(context, pilot, config.seed, most=1)
        if linearity.failed:
            warn_once(
                f"estimator='auto' could not check whether the network is piecewise linear ({linearity.failed}), and "
                "took 'ggn', whose traces leave out the network's own second derivative if it is not."
            )
            return gauss_newton
        if not linearity.nonlinear_sites:
            return gauss_newton
        where = f"The network is not piecewise linear, for example at {layer_names(context, linearity.nonlinear_sites)}"
        if not sees_curvature(context, pilot.batch):
            warn_once(
                f"{where}; and the loss of the first batch has no curvature in its outputs: estimator='auto' took "
                "'hessian', the true trace at the cost of a double backward at every site for every probe. It can be "
                "negative."
            )
            return Hessian(config.rotate, check_linearity(context, pilot, config.seed).nonlinear_sites)
        warn_once(
            f"{where}: estimator='auto' took 'ggn', whose traces tell what rounding does to the outputs and leave out "
            "the network's own second derivative (docs/method.md compares the two). estimator='hessian' measures the "
            "true traces."
        )
        return gauss_newton

    def probe(self, context: MeasureContext, request: ProbeRequest) -> Probes:
        """Never called: :meth:`prepare` gives another estimator.

        Raises:
            TypeError: always.
        """
        raise TypeError("estimator='auto' chooses another estimator; call prepare() and probe with what it returns.")
