"""The exemplar prior."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from pyro_vae._programs.evaluation import once_per_evaluation
from pyro_vae._utils.checks import checked, require_tensor
from pyro_vae._utils.constructor_calls import constructor_call
from pyro_vae._utils.numerics import softplus_scale
from pyro_vae.distributions._mixtures import MixtureOfDiagNormals
from pyro_vae.priors._guide_mixture import GuideMixturePrior, as_rows
from pyro_vae.priors._posteriors import diagonal_gaussian, stand_in

_ROWS_AT_A_TIME = 5000


class ExemplarPrior(GuideMixturePrior):
    r"""A Gaussian around the code of each exemplar (Norouzi et al. 2020).

    .. math:: p(z) = \frac1N \sum_m \mathcal{N}(z; \mu(x_m), \sigma^2 I)

    with the mean :math:`\mu(x)` of the guide's Gaussian, and one learned :math:`\sigma` for all.
    In evaluation, the N exemplars are all of the mixture. In training, each call draws M of them
    without replacement.

    Training data are their own exemplars: the prior of a data point would have a Gaussian at its
    own code. Its density there grows as :math:`\sigma` falls, so :math:`\sigma` would become too
    small for other data. So call the prior on the minibatch's positions among the exemplars: each
    data point then has a mixture without its own exemplar, as in the paper. The model gets the
    positions as a column of the data, as in the example.

    Encoding thousands of exemplars in each step is slow. With ``num_nearest`` k, the mixture in
    training keeps a drawn exemplar only if it is among the k nearest of a data point of the
    minibatch (the paper's retrieval). The search compares stored codes. Each encoding of an
    exemplar replaces its stored code, so they are at most two epochs old, and zero before the first
    one. A mixture of near exemplars usually has a higher density than one of all M, by up to
    :math:`\log(M / k)` nats. So compare validation losses, which use all exemplars.

    Args:
        dim: dimension of z.
        exemplars: rows of the data, ``(N, *event of x)``.
        num_drawn: M; default all exemplars.
        num_nearest: k; default all that are drawn.

    Raises:
        ValueError: There are no exemplars, or fewer than ``num_drawn``, or too few for a mixture
            without one's own. The guide is not a diagonal Gaussian. Positions are missing although
            ``num_nearest`` needs them, are not whole numbers ``(B,)``, or not those of exemplars.
            Also under the conditions of :class:`GuideMixturePrior`.
        TypeError: The positions are not a tensor.
        IndexError: In a captured step, a position is not that of an exemplar.

    Example:
        >>> import pyro, torch, pyro_vae as pv
        >>> x = torch.rand(40, 16).round()
        >>> class Model(pyro.nn.PyroModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.prior = pv.priors.ExemplarPrior(2, exemplars=x, num_drawn=20)
        ...         self.likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16))
        ...
        ...     def forward(self, x, index=None):
        ...         p_z = self.prior(index)
        ...         with pyro.plate("data", len(x)):
        ...             z = pyro.sample("z", p_z)
        ...             pyro.sample("x", self.likelihood(z), obs=x)
        >>> class Encoder(pv.nets.MLP):
        ...     def forward(self, x, index=None):
        ...         return super().forward(x)
        >>> model = Model()
        >>> guide = pv.guides.AmortizedNormal(model, Encoder(16, [8]))
        >>> model.prior.bind_guide(guide)
        >>> fit = pv.fit(model, guide, (x, torch.arange(40)), epochs=1, progress=False)
        >>> len(model.eval().prior().loc)
        40
    """

    differs_in_evaluation = True

    @checked
    def __init__(
        self,
        dim: int,
        *,
        exemplars: Tensor,
        num_drawn: int | None = None,
        num_nearest: int | None = None,
    ):
        super().__init__(dim)
        self.register_buffer("exemplars", as_rows("exemplars", exemplars), persistent=False)
        count = len(self.exemplars)
        if num_drawn is not None and not 1 <= num_drawn <= count:
            raise ValueError(
                f"num_drawn must be between 1 and the {count} exemplars, got {num_drawn}"
            )
        most = (num_drawn or count) - 1
        if num_nearest is not None and not 1 <= num_nearest <= most:
            raise ValueError(
                f"num_nearest must be between 1 and {most}, the number of drawn exemplars without "
                f"one's own, got {num_nearest}"
            )
        self.num_drawn, self.num_nearest = num_drawn, num_nearest
        if num_nearest is not None:
            codes = torch.zeros(count, dim, dtype=self.exemplars.dtype)
            self.register_buffer("stored_codes", codes)
        self.raw_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, index: Tensor | None = None) -> TorchDistributionMixin:
        """Return p(z).

        Args:
            index: positions of the minibatch's data points among the exemplars, integers ``(B,)``.
                Evaluation does not use them.

        Returns:
            Batch shape (), or ``(B,)`` in training with positions; event shape ``(dim,)``.
        """
        self._require_guide()
        if self.is_running:
            return stand_in(self.event_shape, self.exemplars)
        if not self.training:
            return self._around(once_per_evaluation(self, self._all_codes))
        if index is not None:
            return self._without_own(self._positions(index))
        if self.num_nearest is not None:
            raise ValueError(
                "ExemplarPrior with num_nearest needs the minibatch's positions among the "
                "exemplars in training. Call the prior on them: prior(index)"
            )
        return super().forward()

    def rows(self) -> Tensor:
        """Return all exemplars, or in training a new random sample of them."""
        return self.exemplars[self._drawn()] if self.training else self.exemplars

    def mix(self, posteriors: TorchDistributionMixin) -> TorchDistributionMixin:
        """Put a Gaussian around each mean."""
        return self._around(self._means(posteriors))

    def __repr__(self) -> str:
        return constructor_call(type(self), self.as_arguments())

    def as_arguments(self) -> dict[str, Any]:
        """Return the arguments that create this prior again."""
        return {
            "dim": self.event_shape[0],
            "exemplars": self.exemplars,
            "num_drawn": self.num_drawn,
            "num_nearest": self.num_nearest,
        }

    def _drawn(self) -> Tensor:
        count, device = len(self.exemplars), self.exemplars.device
        if self.num_drawn is None:
            return torch.arange(count, device=device)
        return torch.randperm(count, device=device)[: self.num_drawn]

    def _without_own(self, index: Tensor) -> TorchDistributionMixin:
        """Return a mixture for each data point, ``(B,)``, without its own exemplar."""
        drawn = self._drawn()
        if len(drawn) == 1:
            raise ValueError(
                "ExemplarPrior without a data point's own exemplar needs at least two that are "
                "drawn, got one. Increase num_drawn"
            )
        unused = None
        if self.num_nearest is not None:
            drawn, unused = self._near(index, drawn)
        loc = self._codes(drawn)
        left_out = drawn == index.unsqueeze(-1)
        if unused is not None:
            self.stored_codes[drawn] = loc.detach().to(self.stored_codes)
            left_out = left_out | unused
        return self._around(loc, loc.new_zeros(left_out.shape).masked_fill(left_out, -torch.inf))

    def _near(self, index: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exemplars to encode, and which of them no mixture has."""
        nearest = self._nearest(index, drawn)
        if len(nearest) >= len(drawn):
            return drawn, torch.ones_like(drawn, dtype=torch.bool).index_fill(0, nearest, False)
        drawn = drawn[nearest.sort().values]
        twice = drawn == drawn.roll(1)
        twice[0] = False
        return drawn, twice

    @torch.no_grad()
    def _nearest(self, index: Tensor, drawn: Tensor) -> Tensor:
        """Return positions in ``drawn``: the k nearest of each data point, some of them twice."""
        own = self._codes(index).to(self.stored_codes)
        self.stored_codes[index] = own
        codes = self.stored_codes[drawn]
        center = codes.mean(0)  # far from zero, the squares would cancel
        own, codes = own - center, codes - center
        distance = codes.square().sum(-1) - 2 * own @ codes.mT
        distance.masked_fill_(drawn == index.unsqueeze(-1), torch.inf)
        return distance.topk(self.num_nearest, largest=False, sorted=False).indices.flatten()

    def _positions(self, index: Tensor) -> Tensor:
        count = len(self.exemplars)
        require_tensor("index", index)
        if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "ExemplarPrior needs the minibatch's positions among the exemplars as integers "
                f"(B,), got {index.dtype} of shape {tuple(index.shape)}"
            )
        reads_values = index.device.type == "cpu" or pyro.distributions.is_validation_enabled()
        reads_values = reads_values and not is_in_torch_dispatch_mode()
        if reads_values and not ((index >= 0) & (index < count)).all():
            raise ValueError(
                f"positions among the {count} exemplars must be between 0 and {count - 1}, got "
                f"{index.min().item()} to {index.max().item()}"
            )
        # In a graph, a position that is too large raises an IndexError here.
        return torch.arange(count, device=index.device)[index.long()]

    def _codes(self, index: Tensor) -> Tensor:
        return self._means(self.posteriors(self.exemplars[index]))

    def _all_codes(self) -> Tensor:
        blocks = self.exemplars.split(_ROWS_AT_A_TIME)
        return torch.cat([self._means(self.posteriors(rows)) for rows in blocks])

    def _means(self, posteriors: TorchDistributionMixin) -> Tensor:
        gaussian = diagonal_gaussian(posteriors)
        if gaussian is None:
            raise ValueError(
                "ExemplarPrior needs a guide that is a diagonal Gaussian, such as AmortizedNormal, "
                f"got the posterior {posteriors}"
            )
        return gaussian[0]

    def _around(self, loc: Tensor, logits: Tensor | None = None) -> TorchDistributionMixin:
        scale = softplus_scale(self.raw_scale).to(loc).expand(loc.shape)
        logits = loc.new_zeros(len(loc)) if logits is None else logits
        return MixtureOfDiagNormals(logits, loc, scale)
