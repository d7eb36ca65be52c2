"""Data on a grid of levels, such as gray values of images, and their categorical likelihood."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae._utils.checks import positive_integer, require_tensor
from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.precision import exact_product
from pyro_vae.likelihoods._base import Likelihood


class Levels(constraints.Constraint):
    r"""L levels: floating-point x in :math:`\{0, \frac1{L-1}, \ldots, 1\}`, or integers below L.

    A floating-point number may be off by a thousandth of the distance between two levels.

    Args:
        levels: L.

    Example:
        >>> import torch, pyro_vae as pv
        >>> support = pv.likelihoods.Levels(256)
        >>> support.check(torch.tensor([0.0, 7 / 255, 0.5])), support.check(torch.tensor([3, 256]))
        (tensor([ True,  True, False]), tensor([ True, False]))
    """

    is_discrete = True
    event_dim = 0

    def __init__(self, levels: int):
        self.levels = positive_integer("levels", levels, minimum=2)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return True for each number that is a level."""
        if not value.is_floating_point():
            number = value.long()  # a small integer type may not hold L
            return (number >= 0) & (number < self.levels)
        number = value * (self.levels - 1)
        rounding = 2 * self.levels * torch.finfo(value.dtype).eps
        near = (number - number.round()).abs() <= min(1e-3 + rounding, 0.1)
        return near & (number.round() >= 0) & (number.round() <= self.levels - 1)

    def __repr__(self) -> str:
        return f"levels({self.levels})"


class OnLevels(TorchDistribution):
    """A distribution over L levels. A subclass defines their probabilities.

    Args:
        levels: L.
        batch_shape: batch shape of the distribution.
        validate_args: whether to check arguments and values.
    """

    arg_constraints = {}  # noqa: RUF012 - as torch declares them

    def __init__(self, levels: int, batch_shape: torch.Size, validate_args: bool | None = None):
        self.levels = levels
        super().__init__(batch_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Levels:
        """The levels."""
        return Levels(self.levels)

    @abstractmethod
    def log_prob_of_level(self, level: Tensor) -> Tensor:
        """Return the log-probabilities of levels, which are integers 0..L-1."""

    @abstractmethod
    def sample_level(self, sample_shape: torch.Size) -> Tensor:
        """Sample levels, 0..L-1."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(x) of floating-point numbers on the grid, or of integer levels."""
        require_tensor("the value to be scored", value)
        if self._validate_args:
            self._validate_sample(value)
        if value.is_floating_point():
            value = (value * (self.levels - 1)).round()
        return self.log_prob_of_level(value.long())

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Sample numbers on the grid."""
        with torch.no_grad():
            return self.sample_level(torch.Size(sample_shape)) / (self.levels - 1)


@records_init_args
class Categorical(Likelihood):
    r""":math:`p(x|z) = \prod_d \mathrm{softmax}(f_d(z))_{x_d}` over L levels of each number.

    Floating-point x lies on the grid :math:`\{0, \frac1{L-1}, \ldots, 1\}`, such as gray values.
    Integer x are the numbers of the levels from zero.

    Args:
        decoder: network f from z, and any covariates, to L logits for each number of x. All logits
            of the first level come first, then all of the second, and so on.
        levels: L.
        event_dim: number of rightmost dimensions of x that form one data point.

    Raises:
        ValueError: ``event_dim`` is less than one, or ``levels`` less than two.

    Example:
        >>> import torch, pyro_vae as pv
        >>> likelihood = pv.likelihoods.Categorical(pv.nets.MLP(2, [8], 4 * 5), levels=4)
        >>> p = likelihood(torch.zeros(2))
        >>> torch.allclose(p.log_prob(torch.tensor([0, 1, 2, 3, 0])),
        ...                p.log_prob(torch.tensor([0, 1, 2, 3, 0]) / 3))
        True
    """

    def __init__(self, decoder: nn.Module, levels: int, event_dim: int = 1):
        super().__init__(decoder, event_dim)
        self.levels = positive_integer("levels", levels, minimum=2)

    def forward(self, *inputs: Tensor) -> TorchDistributionMixin:
        """Return p(x|z), of batch shape (...), for z of shape ``(..., *latent event)``."""
        logits = self.outputs(self.levels, *inputs).movedim(0, -1)
        return _CategoricalLevels(logits).to_event(self.event_dim)


class _CategoricalLevels(OnLevels):
    """A categorical distribution over L levels, with logits ``(*batch, L)``."""

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        self.logits = logits.log_softmax(-1)
        super().__init__(logits.shape[-1], logits.shape[:-1], validate_args)

    def expand(self, batch_shape, _instance=None) -> _CategoricalLevels:
        logits = self.logits.expand(*batch_shape, -1)
        return _CategoricalLevels(logits, validate_args=self._validate_args)

    @property
    def mean(self) -> Tensor:
        """The mean, ``batch_shape``."""
        numbers = torch.arange(self.levels, dtype=self.logits.dtype, device=self.logits.device)
        return exact_product(self.logits.exp(), numbers / (self.levels - 1))

    def log_prob_of_level(self, level: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(level.shape, self.batch_shape)
        logits = self.logits.expand(*shape, -1)
        return logits.gather(-1, level.expand(shape).unsqueeze(-1)).squeeze(-1)

    def sample_level(self, sample_shape: torch.Size) -> Tensor:
        drawn = torch.distributions.Categorical(logits=self.logits).sample(sample_shape)
        return drawn.to(self.logits.dtype)
