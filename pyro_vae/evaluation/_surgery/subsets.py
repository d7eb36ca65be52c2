r"""The aggregated posterior estimated from a minibatch, and what that does to the information.

For a code z of datum n, and a minibatch B of M of the N data, n among them (Chen et al. 2018,
appendix C):

.. math::
    \hat q_{weighted}(z) = \frac{1}{NM} \sum_{m \in B} q(z|x_m), \qquad
    \hat q_{stratified}(z) = \frac1N q(z|x_n)
    + \frac{N - 1}{N (M - 1)} \sum_{m \in B, m \ne n} q(z|x_m)

Chen et al. give one of the others of the stratified sum a weight of its own; the even weights
here are the average over which one that is, with the same expectation and less variance.

Let :math:`I` be the mutual information over all pairs and :math:`\hat I` the average of
:math:`\log q(z|x_n) - \log \hat q(z)`. Then, for others drawn without replacement,

.. math::
    0 \le E[\hat I_{stratified}] - I \le \log N - I, \qquad
    \log M \le E[\hat I_{weighted}] - I \le \log (NM) - I.

The stratified sum is unbiased for q_agg, and Jensen's inequality gives its lower bound; the upper
ones hold because a sum is no less than its own term. For the weighted sum write
:math:`r = q(z|x_n) / q_{agg}(z) \le N`: given z, the others' terms over the own one have the
expectation (M - 1)(N / r - 1) / (N - 1); so by Jensen's inequality the bias is at least the mean of
:math:`\log(NM) - \log(r + (M - 1)(N - r)/(N - 1))`, whose last argument is linear in r and at most
N for r up to N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["exact", "weighted", "stratified"]


def check_estimator(estimator: str) -> None:
    """Refuse an estimator of q_agg that there is none of.

    Raises:
        ValueError: it is no name of one.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {get_args(Estimator)}, got {estimator!r}")


def random_subsets(count: int, size: int) -> Sequence[Tensor]:
    """Return the numbers of all data, in random minibatches of nearly one size, at least M.

    Args:
        count: N.
        size: M.

    Raises:
        ValueError: there are fewer than two data in a minibatch.
    """
    if min(count, size) < 2:
        raise ValueError(
            "a minibatch estimator compares the data of a minibatch, which has one here: raise "
            "batch_size, or take estimator='exact'"
        )
    return torch.randperm(count).tensor_split(max(1, count // size))


def subset_information(pairs: Tensor, num_data: int, estimator: Estimator) -> Tensor:
    """Return log q(z|x_n) less the logarithm of the estimate of q_agg(z), averaged over codes.

    Args:
        pairs: log q(z_kn|x_m) of the codes of M data under each of them, (K, M, M).
        num_data: N.
        estimator: "weighted" or "stratified".

    Returns:
        Shape (M,), in nats.
    """
    size = pairs.shape[-1]
    own = pairs.diagonal(dim1=1, dim2=2)
    ratios = pairs.double() - own.unsqueeze(2)
    if estimator == "weighted":
        return (math.log(num_data * size) - ratios.logsumexp(2)).mean(0)
    of_others = math.log(num_data - 1) - math.log(size - 1)
    log_weights = torch.full_like(ratios[0], of_others).fill_diagonal_(0.0)
    return (math.log(num_data) - (ratios + log_weights).logsumexp(2)).mean(0)
