"""A program without the scales that its training used."""

from __future__ import annotations

from pyro.poutine.messenger import Messenger

from pyro_vae._programs.runs import Program
from pyro_vae._programs.sites import Site
from pyro_vae._utils.checks import require_callable


def unscaled(program: Program) -> Program:
    r"""Return a program without the scales of ``poutine.scale`` inside it.

    Training may scale sites, for example to weight the KL divergence of a warm-up or the loss of
    labels. The scaled program has no evidence, because :math:`p(x, z)^\beta` is not a density.
    Evaluate the program without its scales. Its parameters are those of the fitted program. The
    scale N/B of a plate that subsamples is kept.

    Args:
        program: a model or a guide.

    Raises:
        TypeError: The program is not callable.

    Example:
        >>> import pyro, torch, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         with pyro.poutine.scale(scale=0.5):
        ...             z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)), pyro.poutine.scale(scale=0.5):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))  # the exact posterior
        >>> x = torch.randn(10)
        >>> evidence = pv.evidence(pv.unscaled(model), pv.unscaled(guide), x, num_particles=3)
        >>> torch.allclose(evidence.values.float(), dist.Normal(0.0, 2**0.5).log_prob(x))
        True
    """
    require_callable("program", program)
    return _Unscaled()(program)


class _Unscaled(Messenger):
    """Set the scale of each site to that of its plates."""

    def _pyro_sample(self, msg: Site) -> None:
        msg["scale"] = 1.0
        for frame in msg["cond_indep_stack"]:
            if frame.full_size not in (None, frame.size):
                msg["scale"] = msg["scale"] * frame.full_size / frame.size
