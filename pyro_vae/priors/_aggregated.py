"""The aggregated posterior as the prior."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._programs import parameters as programs
from pyro_vae._utils.checks import checked, positive_integer
from pyro_vae.datasets._minibatches import as_tensor
from pyro_vae.distributions._mixtures import MixtureOfDiagNormals, UniformMixture
from pyro_vae.priors._posteriors import check_guide, diagonal_gaussian, posteriors, stand_in

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
        ValueError: ``subset`` is not between 1 and N; data are not in memory, or none; the guide's
            posterior of the latent is not known from x alone; the guide is neither a diagonal
            Gaussian nor a module.

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

    @checked
    def __init__(
        self,
        guide: Callable[..., Any],
        data: Tensor | tuple[Tensor, ...],
        site: str = "z",
        subset: int | None = None,
    ):
        super().__init__()
        device = programs.device_of(guide, guide)
        columns = [column.to(device) for column in _columns(data)]
        count = len(columns[0])
        if subset is not None:
            if positive_integer("subset", subset) > count:
                raise ValueError(f"subset must be between 1 and the {count} data, got {subset}")
            chosen = torch.randperm(count)[:subset].to(device)
            columns = [column[chosen] for column in columns]
        with programs.parameter_store(guide, guide), programs.evaluation_mode(guide):
            blocks = _blocks(columns)
            for block in blocks:
                check_guide(guide, site, block)
            parts = [posteriors(guide, site, block) for block in blocks]
        gaussians = [diagonal_gaussian(part) for part in parts]
        kept, method = None, None
        if None in gaussians:
            kept, method = _frozen(guide)
        else:
            columns = [torch.cat(each) for each in zip(*gaussians, strict=True)]
        self._keep(columns, parts[0].event_shape, site, kept, method)

    def _keep(
        self,
        columns: Sequence[Tensor],
        event_shape: torch.Size,
        site: str,
        guide: nn.Module | None,
        method: str | None,
    ) -> None:
        self._event_shape, self._site = event_shape, site
        self.guide, self._method = guide, method
        self._names = [f"column_{number}" for number in range(len(columns))]
        for name, column in zip(self._names, columns, strict=True):
            self.register_buffer(name, column)
        self._runs = False

    def forward(self) -> TorchDistributionMixin:
        """Return q_agg(z): batch shape ()."""
        columns = [getattr(self, name) for name in self._names]
        if self.guide is None:
            loc, scale = columns
            return MixtureOfDiagNormals(loc.new_zeros(len(loc)), loc, scale)
        if self._runs:
            return stand_in(self._event_shape, next(self.guide.parameters()))
        guide = self.guide if self._method is None else getattr(self.guide, self._method)
        self._runs = True
        try:
            with torch.no_grad():
                return UniformMixture([posteriors(guide, self._site, b) for b in _blocks(columns)])
        finally:
            self._runs = False

    def as_arguments(self) -> dict[str, Any]:
        """Return what :meth:`of_arguments` makes such a prior of: neither data nor posteriors."""
        return {
            "shapes": [tuple(getattr(self, name).shape) for name in self._names],
            "event_shape": tuple(self._event_shape),
            "site": self._site,
            "guide": self.guide,
            "method": self._method,
        }

    @classmethod
    def of_arguments(
        cls,
        shapes: Sequence[Sequence[int]],
        event_shape: Sequence[int],
        site: str,
        guide: nn.Module | None,
        method: str | None,
    ) -> AggregatedPosterior:
        """Make a prior whose buffers are to be loaded."""
        if method not in (None, "forward"):
            raise ValueError(f"a guide of this library has no method {method!r}")
        prior = cls.__new__(cls)
        nn.Module.__init__(prior)
        columns = [torch.zeros(shape) for shape in shapes]
        prior._keep(columns, torch.Size(event_shape), site, guide, method)
        if guide is not None:
            guide.requires_grad_(False).eval()
        return prior

    def train(self, mode: bool = True) -> AggregatedPosterior:
        """Set the mode; the guide stays as it was evaluated."""
        super().train(mode)
        if self.guide is not None:
            self.guide.eval()
        return self


def _columns(data: Any) -> list[Any]:
    columns = list(data) if isinstance(data, (tuple, list)) else [data]
    held = all(isinstance(column, Tensor) or hasattr(column, "__array__") for column in columns)
    columns = [as_tensor(column, "data") for column in columns] if held else columns
    sizes = [len(column) for column in columns] if held else []
    if len(set(sizes)) != 1:
        raise ValueError(
            "an aggregated posterior needs data in memory, x and covariates of as many rows, and "
            f"at least one; got {[type(column).__name__ for column in columns]} of sizes {sizes}"
        )
    return columns


def _blocks(columns: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return [*zip(*(column.split(_ROWS_AT_A_TIME) for column in columns), strict=True)]


def _frozen(guide: Callable[..., Any]) -> tuple[nn.Module, str | None]:
    """Return a copy of a guide's module, and the name of its method if the guide is one."""
    owner = getattr(guide, "__self__", guide)
    if not isinstance(owner, nn.Module):
        raise ValueError(  # noqa: TRY004 - it is the family that asks for a module
            "the posteriors of a guide that is no diagonal Gaussian are kept as a copy of the "
            f"guide, which must be a module or a method of one; got {guide!r}"
        )
    copied = copy.deepcopy(owner).requires_grad_(False).eval()
    return copied, None if guide is owner else guide.__name__
