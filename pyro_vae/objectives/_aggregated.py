"""Objectives with a term for the aggregated posterior q(z), estimated from the minibatch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_vae._programs.terms import Terms
from pyro_vae._utils.checks import (
    nonnegative_number,
    positive_integer,
    positive_number,
    real_number,
)
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.objectives._base import Objective


@records_init_args
class BetaTCVAE(Objective):
    r"""The ELBO with its KL in three weighted parts (Chen et al. 2018, eq. 2 and 4).

    .. math::
        \mathrm{KL}(q(z|x) \| p(z)) = \underbrace{I_q[x, z]}_\alpha
        + \underbrace{\mathrm{KL}\bigl(q(z) \| \prod_j q(z_j)\bigr)}_\beta
        + \underbrace{\sum_j \mathrm{KL}(q(z_j) \| p(z_j))}_\gamma

    averaged over the data. The second part is the total correlation. The minibatch gives estimates
    of q(z) and q(z_j) at a sample of data point b, by stratified sampling (appendix). Data point b
    has weight 1/N, and the other B - 1 share the rest. The estimate is unbiased for q(z) and biased
    for its logarithm. The three parts still add up to the KL.

    Args:
        beta: weight of the total correlation.
        mutual_information: :math:`\alpha`.
        dimension_wise: :math:`\gamma`.
        num_data: N, size of the training set; not needed if the plate ``"data"`` subsamples.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: A number is out of range. Or, when the loss is computed, a site is global or
            scaled, there are several latent sites, or the latent has dependent dimensions. Or N is
            unknown or less than the minibatch, or the minibatch has one data point.
        TypeError: The guide's distribution of the latent is not Gaussian, when the loss is
            computed.
    """

    def __init__(
        self,
        beta: float = 6.0,
        mutual_information: float = 1.0,
        dimension_wise: float = 1.0,
        num_data: int | None = None,
        num_particles: int = 1,
        *,
        vectorize_particles: bool | None = None,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.beta = nonnegative_number("beta", beta)
        self.mutual_information = real_number("mutual_information", mutual_information)
        self.dimension_wise = nonnegative_number("dimension_wise", dimension_wise)
        self.num_data = None if num_data is None else positive_integer("num_data", num_data)

    def bound(self, terms: Terms) -> Tensor:
        """Average the log-likelihood minus the three weighted parts over the particles."""
        terms.require_reparameterized("BetaTCVAE")
        mutual_information, total_correlation, dimension_wise = self.parts(terms)
        return (
            terms.log_likelihood
            - self.mutual_information * mutual_information
            - self.beta * total_correlation
            - self.dimension_wise * dimension_wise
        ).mean(0)

    def check_num_data(self, num_data: int) -> None:
        """Raise ValueError if there are more data points than ``num_data``."""
        if self.num_data is not None and self.num_data < num_data:
            raise ValueError(
                f"BetaTCVAE has num_data={self.num_data}, but got {num_data} data points. "
                f"Pass the size of the training set, num_data={num_data} or more"
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
                "BetaTCVAE needs the size of the training set, got num_data=None. Pass num_data="
            )
        if batch_size < 2 and num_data > 1:
            raise ValueError(
                "BetaTCVAE needs at least 2 data points in a minibatch, got 1. Use larger batches"
            )
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


@records_init_args
class InfoVAE(Objective):
    r"""The ELBO with a distance between the aggregated posterior and the prior.

    .. math::
        \frac1K \sum_k \log p(x|z_k) - (1 - \alpha) \, \mathrm{KL}(q(z|x) \| p(z))
        - (\alpha + \lambda - 1) \, \mathrm{MMD}^2(q(z), p(z))

    (Zhao et al. 2019). At :math:`\alpha = 1` there is no KL. This is the Wasserstein autoencoder
    with the MMD penalty (Tolstikhin et al. 2018, algorithm 2), which also accepts a point (Delta)
    as posterior. The MMD is the unbiased estimate from the minibatch's samples and as many samples
    of the prior, in which masked numbers are zero. Its kernel is the sum of the inverse
    multiquadratics :math:`C / (C + \|z - z'\|^2)` with C = 2 D s. The values of s are 0.1, 0.2,
    0.5, 1, 2, 5, 10.

    Args:
        alpha: 1 minus the weight of the KL; 1 removes the KL, 0 keeps it.
        scale: :math:`\lambda`, at least :math:`1 - \alpha`.
        num_particles: K.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.

    Raises:
        ValueError: A number is out of range. Or, in a loss, a site is global or scaled, a guide
            site has no reparameterized sample, or a minibatch has one data point.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        scale: float = 10.0,
        num_particles: int = 1,
        *,
        vectorize_particles: bool | None = None,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.alpha, self.scale = real_number("alpha", alpha), positive_number("scale", scale)
        if alpha > 1:
            raise ValueError(
                f"alpha must be at most 1, got {alpha}. A larger alpha would reward the KL"
            )
        if self.alpha + self.scale < 1 - 1e-6:
            raise ValueError(
                f"alpha + scale must be at least 1, got {alpha} + {scale}. The weight of the "
                "distance is alpha + scale - 1. If it is negative, the objective rewards distance"
            )

    def bound(self, terms: Terms) -> Tensor:
        """Return the average log-likelihood minus the weighted KL and distance."""
        terms.require_reparameterized("InfoVAE")
        bound = terms.log_likelihood.mean(0)
        if self.alpha != 1:
            bound = bound - (1 - self.alpha) * terms.kl.mean(0)
        if not terms.samples:
            raise ValueError(
                "InfoVAE compares the latent variables of guide and prior, got no latent site in "
                'the plate "data". Use objectives.ELBO'
            )
        posterior, prior = terms.samples, {**terms.sample_joint().latents}
        masks = terms.masked_numbers()
        for name, masked in masks.items():
            posterior[name] = posterior[name].masked_fill(masked, 0)
            prior[name] = prior[name].masked_fill(masked, 0)
        prior = _flat(prior[name] for name in posterior)
        samples = [_flat(each) for each in zip(*posterior.values(), strict=True)]
        # Row i of both has the same mask, so these two samples depend on each other.
        distances = [squared_mmd(each, prior, without_pairs=bool(masks)) for each in samples]
        return bound - (self.alpha + self.scale - 1) * torch.stack(distances).mean()

    def shared(self, terms: Terms) -> float:
        """Raise ValueError for global or scaled sites, and for Delta sites if there is a KL."""
        terms.require_independent_data("InfoVAE", points=self.alpha == 1)
        return 0.0


def squared_mmd(x: Tensor, y: Tensor, *, without_pairs: bool = False) -> Tensor:
    """Return the unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012).

    Args:
        x: samples of one distribution, ``(M, D)``.
        y: samples of another, ``(N, D)``.
        without_pairs: leave out the pairs of row i of x and row i of y, which are not independent.
            M and N are equal then.

    Raises:
        ValueError: One of the two has fewer than two samples.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(
            "the MMD needs at least 2 data points in a minibatch, got 1. Use larger batches"
        )

    def of_others(a: Tensor, b: Tensor) -> Tensor:
        off_diagonal = 1 - torch.eye(len(a), dtype=a.dtype, device=a.device)
        return (_kernel(a, b) * off_diagonal).sum() / (len(a) * (len(a) - 1))

    between = of_others(x, y) if without_pairs else _kernel(x, y).mean()
    return of_others(x, x) + of_others(y, y) - 2 * between


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    square = (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)
    widths = [2 * x.shape[1] * scale for scale in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]
    return sum(width / (width + square) for width in widths)


def _flat(values: Iterable[Tensor]) -> Tensor:
    """Concatenate the values of all sites into one row per data point."""
    return torch.cat([value.reshape(len(value), -1) for value in values], 1)
