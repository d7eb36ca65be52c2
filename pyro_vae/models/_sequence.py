"""A model of sequences with a Markov chain of latent variables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vae._programs.sites import DATA_PLATE
from pyro_vae._utils.checks import require_batch, require_distribution
from pyro_vae._utils.init_args import records_init_args


@records_init_args
class SequenceModel(PyroModule):
    r"""A Deep Markov Model (Krishnan, Shalit & Sontag 2017) of sequences of unequal lengths.

    .. math::
        p(x, z) = p(z_1) \prod_{t=2}^{\ell} p(z_t|z_{t-1}) \prod_{t=1}^{\ell} p(x_t|z_t)

    Here :math:`\ell` is the length of the sequence, which is padded at its end to the T steps of
    the minibatch. Padded steps are masked: they add zero to every density and every gradient,
    even if the padding is NaN. Their latent variables are sampled, but have no meaning.

    Args:
        prior: returns p(z_1) when called without arguments; see :mod:`pyro_vae.priors`.
        transition: returns p(z_t|z_{t-1}), with the event shape of the prior, when called on
            z_{t-1}.
        likelihood: returns p(x_t|z_t) when called on z_t; see :mod:`pyro_vae.likelihoods`.

    Shape:
        x is ``(B, T, *event)`` with the event shape of p(x_t|z_t). T may differ between calls.
        lengths are integers from 1 to T, ``(B,)``. Without lengths, all sequences have T steps.

    Sites:
        ``"z_1"`` to ``"z_T"`` are latent and ``"x_1"`` to ``"x_T"`` are observed, all in the plate
        ``"data"``. If lengths are given, the sites of step t are masked by :math:`t \le \ell`.
        Padding is then replaced by the first step of its sequence, which the likelihood can score.

    Raises:
        ValueError: x has no steps, or lengths are not of shape ``(B,)``. With validation on
            (``pyro.validation_enabled``), a length is not in 1 to T. This check synchronizes with
            the device. :func:`pyro_vae.fit` makes it in the first epoch, and
            :func:`pyro_vae.evidence` once per minibatch.
        TypeError: lengths are not a tensor of integers.

    Example:
        >>> import torch, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> model = pv.models.SequenceModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     transition=lambda z: dist.Normal(0.9 * z, 0.4).to_event(1),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.SequenceGuide(model)
        >>> x, lengths = torch.bernoulli(torch.full((3, 5, 16), 0.5)), torch.tensor([5, 2, 4])
        >>> t = pv.terms(model, guide, x, lengths, num_particles=7)
        >>> t.log_weight.shape
        torch.Size([7, 3])
        >>> t.samples["z_5"].shape
        torch.Size([7, 3, 2])
    """

    def __init__(
        self,
        prior: Callable[[], TorchDistributionMixin],
        transition: Callable[[Tensor], TorchDistributionMixin],
        likelihood: Callable[[Tensor], TorchDistributionMixin],
    ):
        super().__init__()
        self.prior = prior
        self.transition = transition
        self.likelihood = likelihood

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the program on a minibatch and return its sequences, ``(..., B, T, *event)``.

        They equal x except for the padding. Under ``poutine.uncondition`` they are samples from
        the model.
        """
        if x.dim() < 2 or not x.shape[1]:
            raise ValueError(
                f"x must have shape (B, T, *event) with T >= 1, got shape {tuple(x.shape)}"
            )
        inside = None
        if lengths is not None:
            inside = _inside(x, lengths)
            # Replace the padding, because a mask does not remove NaN gradients: 0 * NaN is NaN.
            x = torch.where(inside.reshape(inside.shape + (1,) * (x.dim() - 2)), x, x[:, :1])
        p_1, steps = require_distribution("prior", self.prior()), []
        z: Tensor | None = None
        with pyro.plate(DATA_PLATE, require_batch("x", x), dim=-1):
            for t in range(x.shape[1]):
                with _masked(None if inside is None else inside[:, t]):
                    p_z = (
                        p_1 if z is None else require_distribution("transition", self.transition(z))
                    )
                    z = pyro.sample(f"z_{t + 1}", p_z)
                    p_x = require_distribution("likelihood", self.likelihood(z))
                    steps.append(pyro.sample(f"x_{t + 1}", p_x, obs=x[:, t]))
        return torch.stack(torch.broadcast_tensors(*steps), -1 - len(p_x.event_shape))


def _masked(mask: Tensor | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mask is None else poutine.mask(mask=mask)


def _inside(x: Tensor, lengths: Tensor) -> Tensor:
    """Return True where a step is not padding, ``(B, T)``; raise an error for invalid lengths."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}: use lengths.long()")
    batch_size, num_steps = x.shape[:2]
    if lengths.shape != (batch_size,):
        raise ValueError(
            f"lengths must have shape ({batch_size},), one per sequence of x of shape "
            f"{tuple(x.shape)}; got {tuple(lengths.shape)}"
        )
    if torch.distributions.Distribution._validate_args:
        outside = (lengths < 1) | (lengths > num_steps)
        if outside.any():
            row = outside.nonzero()[0].item()
            raise ValueError(
                f"lengths must lie in 1 to {num_steps}, the steps of x of shape {tuple(x.shape)}; "
                f"got {lengths[row].item()} in row {row}. Drop empty sequences. If x was "
                "truncated, truncate its lengths too."
            )
    return torch.arange(num_steps, device=x.device) < lengths.unsqueeze(-1)
