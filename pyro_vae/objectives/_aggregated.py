"""Objectives that weigh the aggregated posterior q(z), estimated from the minibatch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_vae._programs.terms import Terms
from pyro_vae._utils.checks import positive_integer, positive_number, real_number
from pyro_vae.objectives._base import Objective


class BetaTCVAE(Objective):
    r"""The KL in three parts, each with a weight (Chen et al. 2018, eq. 2 and 4).

    .. math::
        \mathrm{KL}(q(z|x) \| p(z)) = \underbrace{I_q[x, z]}_\alpha
        + \underbrace{\mathrm{KL}\Big(q(z) \| \prod_j q(z_j)\Big)}_\beta
        + \underbrace{\sum_j \mathrm{KL}(q(z_j) \| p(z_j))}_\gamma

    averaged over the data; the second is the total correlation. q(z) and q(z_j) at a sample of
    datum b are estimated from the B data of the minibatch, stratified (appendix): datum b itself
    stands for one of the N data, the others for the rest. That is unbiased for q(z), and biased for
    its logarithm; the three parts add up to the KL all the same.

    Args:
        beta: weight of the total correlation.
        mutual_information: :math:`\alpha`.
        dimension_wise: :math:`\gamma`.
        num_data: N; not needed where the plate ``"data"`` tells it, as it does if it subsamples.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: a number out of range; in a loss, a site is global or scaled, or there are
            several latents, or one of dependent dimensions, or N is not known or less than the
            minibatch, or a minibatch has one datum.
        TypeError: in a loss, the latent is no Gaussian under the guide.
    """

    def __init__(
        self,
        beta: float = 6.0,
        mutual_information: float = 1.0,
        dimension_wise: float = 1.0,
        num_data: int | None = None,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.beta = real_number("beta", beta)
        self.mutual_information = real_number("mutual_information", mutual_information)
        self.dimension_wise = real_number("dimension_wise", dimension_wise)
        self.num_data = None if num_data is None else positive_integer("num_data", num_data)

    def bound(self, terms: Terms) -> Tensor:
        """Average the likelihood over the particles, less the three weighted parts."""
        terms.require_reparameterized("BetaTCVAE")
        mutual_information, total_correlation, dimension_wise = self.parts(terms)
        return (
            terms.log_likelihood
            - self.mutual_information * mutual_information
            - self.beta * total_correlation
            - self.dimension_wise * dimension_wise
        ).mean(0)

    def check_num_data(self, num_data: int) -> None:
        """Refuse more data than ``num_data``."""
        if self.num_data is not None and self.num_data < num_data:
            raise ValueError(
                f"BetaTCVAE was told num_data={self.num_data}, but it is given {num_data} data "
                f"points. Pass the number of the training data, num_data={num_data} or more"
            )

    def parts(self, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three parts of the KL, each (K, B), in nats."""
        pairs = terms.log_guide_of_pairs()
        batch_size = pairs.shape[2]
        num_data = self.num_data
        if num_data is None and terms.scale != 1.0:
            num_data = round(terms.scale * batch_size)
        if num_data is None:
            raise ValueError(
                "BetaTCVAE needs the number of data that the minibatch comes from: pass num_data="
            )
        if batch_size < 2 and num_data > 1:
            raise ValueError("BetaTCVAE compares the data of a minibatch, which has one")
        self.check_num_data(max(batch_size, round(terms.scale * batch_size)))
        of_others = -math.inf
        if num_data > 1:
            of_others = math.log((num_data - 1) / num_data) - math.log(batch_size - 1)
        log_shares = torch.full_like(pairs[0, ..., 0], of_others)
        log_shares = log_shares.fill_diagonal_(-math.log(num_data))
        log_q = (pairs.sum(-1) + log_shares).logsumexp(2)
        log_q_each = (pairs + log_shares.unsqueeze(-1)).logsumexp(2).sum(-1)
        log_prior = terms.log_prior
        return terms.log_guide - log_q, log_q - log_q_each, log_q_each - log_prior


class InfoVAE(Objective):
    r"""The likelihood, the KL, and a distance of the aggregated posterior to the prior.

    .. math::
        \frac1K \sum_k \log p(x|z_k) - (1 - \alpha) \, \mathrm{KL}(q(z|x) \| p(z))
        - (\alpha + \lambda - 1) \, \mathrm{MMD}^2(q(z), p(z))

    (Zhao et al. 2019). At :math:`\alpha = 1` no KL is left: the Wasserstein autoencoder with
    the MMD penalty (Tolstikhin et al. 2018, algorithm 2), for which a point as posterior will do.
    The MMD is the unbiased estimate from the minibatch's samples and as many of the model's prior,
    with the sum of the inverse multiquadratic kernels :math:`C / (C + \|z - z'\|^2)` for
    C = 2 D s and s = 0.1, 0.2, 0.5, 1, 2, 5, 10.

    Args:
        alpha: 1 removes the KL, 0 leaves it.
        scale: :math:`\lambda`.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: a number out of range; in a loss, a site is global or scaled, a guide site has
            no reparameterised sample, or a minibatch has one datum.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        scale: float = 10.0,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.alpha, self.scale = real_number("alpha", alpha), positive_number("scale", scale)
        if alpha > 1:
            raise ValueError(f"alpha must be at most 1, or the KL would be raised; got {alpha}")

    def bound(self, terms: Terms) -> Tensor:
        """Average the likelihood over the particles, less KL and distance."""
        terms.require_reparameterized("InfoVAE")
        bound = terms.log_likelihood.mean(0)
        if self.alpha != 1:
            bound = bound - (1 - self.alpha) * terms.kl.mean(0)
        if not terms.samples:
            raise ValueError(
                "InfoVAE compares the latents of guide and prior, and this pair has none in the "
                'plate "data": use objectives.ELBO'
            )
        posterior, prior = terms.samples, terms.sample_joint().latents
        prior = _flat(prior[name] for name in posterior)
        samples = [_flat(each) for each in zip(*posterior.values(), strict=True)]
        distances = [squared_mmd(each, prior) for each in samples]
        return bound - (self.alpha + self.scale - 1) * torch.stack(distances).mean()

    def shared(self, terms: Terms) -> float:
        """Refuse global sites and scales; points are welcome if there is no KL."""
        terms.require_independent_data("InfoVAE", points=self.alpha == 1)
        return 0.0


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012).

    Args:
        x: samples of one distribution, ``(M, D)``.
        y: of another, ``(N, D)``.

    Raises:
        ValueError: fewer than two samples of either.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError("the discrepancy needs at least two data in a minibatch, got one")

    def within(a: Tensor) -> Tensor:
        off_diagonal = 1 - torch.eye(len(a), dtype=a.dtype, device=a.device)
        return (_kernel(a, a) * off_diagonal).sum() / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    square = (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)
    widths = [2 * x.shape[1] * scale for scale in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]
    return sum(width / (width + square) for width in widths)


def _flat(values: Iterable[Tensor]) -> Tensor:
    """Put what each datum has at all sites into one row."""
    return torch.cat([value.reshape(len(value), -1) for value in values], 1)
