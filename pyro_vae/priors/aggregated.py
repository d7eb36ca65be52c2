"""The aggregated posterior as the prior."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae import programs
from pyro_vae.mixtures import EvenMixture, MixtureOfNormals
from pyro_vae.priors.posteriors import check_guide, diagonal_gaussian, posteriors

_ROWS_AT_A_TIME = 500


class AggregatedPosterior(nn.Module):
    r""":math:`q_{agg}(z) = \frac1N \sum_n q(z|x_n)`: the prior that a guide and data want.

    .. math::
        \frac1N \sum_n \mathrm{KL}(q(z|x_n) \| p(z)) = I_q[n, z] + \mathrm{KL}(q_{agg} \| p)

    so no prior gives these data a higher ELBO (Hoffman & Johnson 2016; Tomczak & Welling 2018),
    and this one gains the marginal KL that :func:`pyro_vae.elbo_surgery` reports. It is for a
    guide that was trained: put it into a model of its own, evaluate that, sample from it. Codes
    of the very data it was made of fit it too well: the gain on other data is smaller, the more so
    the more of the mutual information's log N is used.

    The posteriors are those at the time it is made. Diagonal Gaussians are kept as their
    parameters; of any other guide a copy is kept, which runs on all the data at each call.

    Args:
        guide: program of q(z|x).
        data: x ``(N, *event)``, or a tuple of it and covariates.
        site: the latent.
        subset: how many of the data, drawn at random, stand for all; all of them, if not given.

    Raises:
        ValueError: ``subset`` is not between 1 and N; the guide's posterior of the latent is not
            known from x alone.

    Example:
        >>> import torch, pyro_vae as pv
        >>> likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16))
        >>> model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.rand(100, 16).round()
        >>> better = pv.LatentVariableModel(pv.priors.AggregatedPosterior(guide, x), likelihood)
        >>> pv.elbo_surgery(better, guide, x).marginal_kl < 1e-3
        True
    """

    def __init__(
        self,
        guide: Callable[..., Any],
        data: Tensor | tuple[Tensor, ...],
        site: str = "z",
        subset: int | None = None,
    ):
        super().__init__()
        columns = data if isinstance(data, (tuple, list)) else (data,)
        device = programs.device_of(guide, guide)
        columns = [torch.as_tensor(column).to(device) for column in columns]
        count = len(columns[0])
        if not count:
            raise ValueError("there are no data to take an aggregated posterior of")
        if subset is not None:
            if not 1 <= subset <= count:
                raise ValueError(f"subset must be between 1 and the {count} data, got {subset}")
            chosen = torch.randperm(count)[:subset].to(device)
            columns = [column[chosen] for column in columns]
        self._site = site
        with programs.parameter_store(guide, guide), programs.evaluation_mode(guide):
            check_guide(guide, site, [column[:_ROWS_AT_A_TIME] for column in columns])
            parts = _in_blocks(guide, site, columns)
        gaussians = [diagonal_gaussian(part) for part in parts]
        self.guide = None
        if None not in gaussians:
            columns = [torch.cat(each) for each in zip(*gaussians, strict=True)]
        elif isinstance(guide, nn.Module):
            self.guide = copy.deepcopy(guide).requires_grad_(False)
        else:
            self.guide = guide
        self._names = [f"column_{number}" for number in range(len(columns))]
        for name, column in zip(self._names, columns, strict=True):
            self.register_buffer(name, column)

    def forward(self) -> TorchDistributionMixin:
        """Return q_agg(z): batch shape ()."""
        columns = [getattr(self, name) for name in self._names]
        if self.guide is None:
            loc, scale = columns
            return MixtureOfNormals(loc.new_zeros(len(loc)), loc, scale)
        with programs.evaluation_mode(self.guide):
            return EvenMixture(_in_blocks(self.guide, self._site, columns))


def _in_blocks(
    guide: Callable[..., Any], site: str, columns: Sequence[Tensor]
) -> list[TorchDistributionMixin]:
    blocks = zip(*(column.split(_ROWS_AT_A_TIME) for column in columns), strict=True)
    return [posteriors(guide, site, block) for block in blocks]
