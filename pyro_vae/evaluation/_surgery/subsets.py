r"""Estimates of the aggregated posterior from a minibatch, and the bias of the information.

Let z be a code of data point n, and B a minibatch of M of the N data points that includes n. The
estimates are (Chen et al. 2018, appendix C)

.. math::
    \hat q_{weighted}(z) = \frac{1}{NM} \sum_{m \in B} q(z|x_m), \qquad
    \hat q_{stratified}(z) = \frac1N q(z|x_n)
    + \frac{N - 1}{N (M - 1)} \sum_{m \in B, m \ne n} q(z|x_m)

In the stratified sum of Chen et al., one data point other than n has its own weight. The even
weights here are the average over the choice of that data point. The expectation is the same, and
the variance is lower.

Let :math:`I` be the mutual information over all pairs and :math:`\hat I` the average of
:math:`\log q(z|x_n) - \log \hat q(z)`. If the other data points are sampled without replacement,

.. math::
    0 \le E[\hat I_{stratified}] - I \le \log N - I, \qquad
    \log M \le E[\hat I_{weighted}] - I \le \log (NM) - I.

The stratified sum is unbiased for q_agg, and its lower bound follows from Jensen's inequality. The
upper bounds hold because a sum of positive terms is at least the term of n.

For the weighted sum, let :math:`r = q(z|x_n) / q_{agg}(z) \le N`. Divide the sum of the other terms
by the term of n. Given z, this ratio has the expectation (M - 1)(N / r - 1) / (N - 1). So by
Jensen's inequality the bias is at least the mean of
:math:`\log(NM) - \log(r + (M - 1)(N - r)/(N - 1))`. The argument of the last logarithm is linear in
r, and at most N for r up to N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from pyro_vae._utils.checks import require_word

Estimator = Literal["exact", "weighted", "stratified"]


def check_estimator(estimator: str) -> None:
    """Raise ValueError if there is no estimator of q_agg with this name.

    Raises:
        ValueError: The name is unknown.
    """
    require_word("estimator", estimator, get_args(Estimator))


def random_subsets(count: int, size: int) -> Sequence[Tensor]:
    """Split the numbers of all N data points at random into minibatches.

    The sizes are nearly equal, and at least M if N is.

    Args:
        count: N.
        size: M.

    Raises:
        ValueError: A minibatch has fewer than two data points.
    """
    if min(count, size) < 2:
        raise ValueError(
            "a minibatch estimator needs at least two data points per minibatch, got one. Increase "
            "batch_size, or pass estimator='exact'"
        )
    return torch.randperm(count).tensor_split(max(1, count // size))


def subset_information(pairs: Tensor, num_data: int, estimator: Estimator) -> Tensor:
    """Return log q(z|x_n) minus the log of the estimate of q_agg(z) for each code.

    Args:
        pairs: log q(z_kn|x_m) of the codes of M data points under all M posteriors, (K, M, M).
        num_data: N.
        estimator: "weighted" or "stratified".

    Returns:
        Shape (K, M), in nats.
    """
    size = pairs.shape[-1]
    own = pairs.diagonal(dim1=1, dim2=2)
    ratios = pairs.double() - own.unsqueeze(2)
    if estimator == "weighted":
        return math.log(num_data * size) - ratios.logsumexp(2)
    of_others = math.log(num_data - 1) - math.log(size - 1)
    log_weights = torch.full_like(ratios[0], of_others).fill_diagonal_(0.0)
    return math.log(num_data) - (ratios + log_weights).logsumexp(2)
