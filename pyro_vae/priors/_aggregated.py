"""The aggregated posterior as the prior."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.parameters import device_of, parameter_store
from pyro_vae._programs.validation import nonfinite_data
from pyro_vae._utils.checks import checked, positive_integer
from pyro_vae._utils.constructor_calls import constructor_call
from pyro_vae._utils.init_args import Unknown
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._columns import Column, finite_rows
from pyro_vae.datasets._minibatches import Data, Minibatches
from pyro_vae.distributions._mixtures import MixtureOfDiagNormals, UniformMixture
from pyro_vae.priors._posteriors import (
    RunsGuide,
    check_guide,
    diagonal_gaussian,
    posteriors,
    stand_in,
)

_ROWS_AT_A_TIME = 500


class AggregatedPosterior(RunsGuide):
    r"""The aggregated posterior :math:`q_{agg}(z) = \frac1N \sum_n q(z|x_n)` as the prior.

    .. math::
        \frac1N \sum_n \mathrm{KL}(q(z|x_n) \| p(z)) = I_q[n, z] + \mathrm{KL}(q_{agg} \| p)

    So no prior gives these data a higher ELBO (Hoffman & Johnson 2016; Tomczak & Welling 2018).
    The gain is the marginal KL that :func:`pyro_vae.elbo_surgery` reports. Use this prior after
    training: build a new model with it, evaluate that model, and sample from it. The prior fits the
    latent codes of its own data too well, so the gain on other data is smaller. The difference
    grows as the mutual information comes closer to its upper limit log N.

    The prior keeps the posteriors from the time of its creation. For diagonal Gaussians it stores
    their parameters. For any other guide it stores a copy, which runs on all the data at each call.
    Data points whose latent the guide masks have no posterior, and are left out.

    Args:
        guide: program of q(z|x).
        data: the data, as in :func:`pyro_vae.fit`. A stream is read once.
        site: name of the latent site.
        subset: number of data points to draw at random and use; default all.

    Raises:
        ValueError: ``subset`` is not between 1 and N. Or the data are invalid. Or the guide's
            posterior of the latent depends on more than x. Or the guide is neither a diagonal
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
        data: Data,
        site: str = "z",
        subset: int | None = None,
    ):
        super().__init__()
        device, programs = device_of(guide, guide), _programs_of(guide)
        batches = Minibatches(data, _ROWS_AT_A_TIME, device=device, programs=programs)
        columns: Sequence[Column] = batches.columns or batches.in_memory()
        _check_finite(guide, site, columns)
        rows = torch.arange(len(columns[0]), device=device)
        if subset is not None:
            if positive_integer("subset", subset) > len(rows):
                raise ValueError(
                    f"subset must be between 1 and the {len(rows)} data points, got {subset}"
                )
            rows = torch.randperm(len(rows))[:subset].to(device)
        used, parts = [], []
        with parameter_store(guide, guide), evaluation_mode(guide):
            for some in rows.split(_ROWS_AT_A_TIME):
                has_posterior = check_guide(guide, site, [column[some] for column in columns])
                if has_posterior.any():
                    used.append(some[has_posterior])
                    parts.append(posteriors(guide, site, [c[used[-1]] for c in columns]))
        if not parts:
            raise ValueError(f"the guide masks latent site {site!r} of all data points")
        gaussians = [diagonal_gaussian(part) for part in parts]
        kept, method = None, None
        if None in gaussians:
            kept, method = _frozen(guide)
            columns = [column[torch.cat(used)] for column in columns]
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
        self.is_running = False

    def forward(self) -> TorchDistributionMixin:
        """Return q_agg(z): batch shape ()."""
        columns = [getattr(self, name) for name in self._names]
        if self.guide is None:
            loc, scale = columns
            return MixtureOfDiagNormals(loc.new_zeros(len(loc)), loc, scale)
        if self.is_running:
            return stand_in(self._event_shape, next(self.guide.parameters()))
        guide = self.guide if self._method is None else getattr(self.guide, self._method)
        self.is_running = True
        try:
            with torch.no_grad():
                return UniformMixture([posteriors(guide, self._site, b) for b in _blocks(columns)])
        finally:
            self.is_running = False

    def __repr__(self) -> str:
        given = {
            "guide": Unknown("a guide") if self.guide is None else self.guide,
            "data": Unknown(f"{len(getattr(self, self._names[0]))} data points"),
            "site": self._site,
        }
        return constructor_call(type(self), given)

    def as_arguments(self) -> dict[str, Any]:
        """Return the arguments of :meth:`of_arguments`, without data and posteriors."""
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
        """Create a prior whose buffers are loaded afterwards."""
        if method not in (None, "forward"):
            raise ValueError(f"method must be None or 'forward', got {method!r}")
        prior = cls.__new__(cls)
        nn.Module.__init__(prior)
        columns = [torch.zeros(shape) for shape in shapes]
        prior._keep(columns, torch.Size(event_shape), site, guide, method)
        if guide is not None:
            guide.requires_grad_(False).eval()
        return prior

    def train(self, mode: bool = True) -> AggregatedPosterior:
        """Set the mode; the guide stays in evaluation mode."""
        super().train(mode)
        if self.guide is not None:
            self.guide.eval()
        return self


def _programs_of(guide: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the guide, and the model that a guide of the library was made for.

    Columns that the model does not take, such as labels, are left out as in a fit.
    """
    model = getattr(getattr(getattr(guide, "__self__", guide), "_model", None), "program", None)
    return [guide] if model is None else [guide, model]


def _check_finite(guide: Callable[..., Any], site: str, columns: Sequence[Column]) -> None:
    """Raise ValueError if data are infinite, or if NaN data reach the guide's posteriors."""
    finite = torch.stack([finite_rows(column) for column in columns]).all(0)
    if finite.all():
        return
    rows = tuple(column[~finite] for column in columns)
    # Infinite values could saturate an encoder, whose output is then finite.
    if not any(column.isinf().any() for column in rows):
        with (
            contextlib.suppress(RuntimeError, ValueError),  # a scale that is NaN has no samples
            parameter_store(guide, guide),
            evaluation_mode(guide),
            values_checked(False),
        ):
            if posteriors(guide, site, rows).sample().isfinite().all():
                return
    reached = "the guide has no posterior of them"
    numbers = [number for number, column in enumerate(columns) if not finite_rows(column).all()]
    raise nonfinite_data("data", (~finite).nonzero()[:, 0].cpu(), reached, numbers)


def _blocks(columns: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return [*zip(*(column.split(_ROWS_AT_A_TIME) for column in columns), strict=True)]


def _frozen(guide: Callable[..., Any]) -> tuple[nn.Module, str | None]:
    """Return a copy of the guide's module, and the method's name if the guide is a method."""
    owner = getattr(guide, "__self__", guide)
    if not isinstance(owner, nn.Module):
        raise ValueError(  # noqa: TRY004 - only this family needs a module
            "a guide that is not a diagonal Gaussian is stored as a copy. It must be a module or a "
            f"method of one, got {guide!r}"
        )
    copied = copy.deepcopy(owner).requires_grad_(False).eval()
    return copied, None if guide is owner else guide.__name__
