"""Bijections as layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, Transform, _InverseTransform

from pyro_vae._programs.sites import is_real
from pyro_vae._utils.checks import ShapeError
from pyro_vae._utils.init_args import records_init_args
from pyro_vae._utils.messages import first_line
from pyro_vae.surjections._images import Split
from pyro_vae.surjections._surjection import (
    InferenceSurjection,
    all_of_event,
    positive_event_dim,
    sum_of_event,
)


@records_init_args
class Bijection(InferenceSurjection):
    r""":math:`z = f(x)`: the transform f infers, and :math:`f^{-1}` generates.

    .. math:: V(x) = \log|\det J_f(x)|

    q(z|x) and p(x|z) are Dirac measures at f(x) and at :math:`f^{-1}(z)`. Their ratio is the
    determinant, since :math:`\delta(x - f^{-1}(z)) = \delta(z - f(x)) \, |\det J_f(x)|`. So the
    ELBO equals log p(x) of the flow (Nielsen et al. 2020).

    Args:
        transform: f, a torch ``Transform``, or a module that returns one when called without
            arguments, such as :class:`pyro_vae.flows.Composition`.
        event_dim: number of rightmost dimensions of x that make one data point. A transform of
            fewer dimensions, such as a sigmoid, acts on each part, and its log-volumes are summed.

    Attributes:
        transform: f, computed from the current parameters.

    Raises:
        TypeError: ``transform`` is not a transform and does not return one.
        ValueError: ``event_dim`` is less than that of the transform's domain. The transform is not
            bijective, or it holds parameters but is not a module. In a call, it cannot map x, or
            cannot map z back.

    Example:
        >>> import torch, pyro_vae as pv
        >>> layer = pv.surjections.Bijection(pv.flows.Composition(3, length=2))
        >>> x = torch.randn(5, 3)
        >>> z = layer.infer(x).sample()
        >>> torch.allclose(layer.generate(z).sample(), x, atol=1e-5)
        True
        >>> layer.generate(z).log_prob(x).shape  # the log-determinants
        torch.Size([5])
    """

    def __init__(self, transform: Transform | Callable[[], Transform], event_dim: int = 1):
        super().__init__()
        # The parts of a torch transform, and whether each is inverted. An inverse transform hides
        # the module that it inverts, and breaks when copied.
        self._pieces = [*_pieces(transform)] if isinstance(transform, Transform) else None
        if self._pieces is None:
            self.source = transform
        else:
            self.learned = nn.ModuleList(p for p, _ in self._pieces if isinstance(p, nn.Module))
        self.input_event_dim = positive_event_dim(event_dim)
        f = self.transform
        if loose := [type(p).__name__ for p, _ in self._pieces or () if _holds_parameters(p)]:
            raise ValueError(
                f"the transform {loose[0]} holds tensors that require gradients, but it is not a "
                "module, so they would not be trained. Pass a module that returns the transform "
                "when called"
            )
        takes, gives = f.domain.event_dim, f.codomain.event_dim
        if event_dim < takes:
            raise ValueError(
                f"the transform {type(f).__name__} acts on events of {takes} dimensions, but "
                f"event_dim is {event_dim}: pass event_dim={takes}, or more"
            )
        if not f.bijective:
            raise ValueError(f"a Bijection needs a bijective transform, got {type(f).__name__}")
        self.output_event_dim = event_dim - takes + gives

    @property
    def transform(self) -> Transform:
        """Return f as a new object with a cache of its own."""
        if self._pieces is not None:
            copies = [(_fresh(piece), inverse) for piece, inverse in self._pieces]
            pieces = [piece.inv if inverse else piece for piece, inverse in copies]
            return pieces[0] if len(pieces) == 1 else ComposeTransform(pieces)
        f = self.source() if callable(self.source) else self.source
        if not isinstance(f, Transform):
            raise TypeError(
                "transform must be a torch Transform, or a module that returns one when called "
                f"without arguments, got {type(self.source).__name__}"
                + (f", which returns {type(f).__name__}" if callable(self.source) else "")
            )
        return f

    @property
    def input_support(self) -> Constraint:
        """The transform's domain."""
        domain = self.transform.domain
        return constraints.independent(domain, self.input_event_dim - domain.event_dim)

    @property
    def output_support(self) -> Constraint:
        """The transform's codomain."""
        codomain = self.transform.codomain
        return constraints.independent(codomain, self.output_event_dim - codomain.event_dim)

    def split(self, input: Tensor) -> Split:
        """Return f(x), no remainder, and log|det J|; minus infinity outside the domain."""
        f, dims = self.transform, self.input_event_dim
        x = input.view_as(input)  # a new tensor, because f's cache may be outdated
        event = x.shape[x.dim() - dims :]
        try:
            z = f(x)
            log_volume = f.log_abs_det_jacobian(x, z)
            there = f.forward_shape(event)
            fits = f.inverse_shape(there) == event and z.shape[z.dim() - len(there) :] == there
        except (RuntimeError, ShapeError) as error:
            raise ValueError(f"{self._cannot_map(f, event)}: {first_line(error)}") from error
        if not fits:
            raise ValueError(
                f"{self._cannot_map(f, event)}: it returns values of shape {tuple(z.shape)}, "
                "and does not map them back to such events"
            )
        log_volume = sum_of_event(log_volume, dims - f.domain.event_dim)
        if not is_real(f.domain):
            inside = all_of_event(f.domain.check(x), dims - f.domain.event_dim)
            log_volume = torch.where(inside, log_volume, -torch.inf)
        return Split(z, None, log_volume)

    def join(self, output: Tensor, remainder: None) -> Tensor:
        """Return the x with f(x) = z."""
        f, z = self.transform, output.view_as(output)
        try:
            return f.inv(z)
        except (RuntimeError, ShapeError) as error:
            event = z.shape[z.dim() - self.output_event_dim :]
            raise ValueError(
                f"{self._cannot_map(f, event)} back: {first_line(error)}. Give the prior, or the "
                "layer above, the event shape of the transform."
            ) from error

    def remainder(self, output: Tensor) -> None:
        """Return None, since a bijection has no remainder."""
        return

    def input_shape(self, output_shape: torch.Size, remainder_shape: torch.Size) -> torch.Size:
        """Return the event shape of x for the event shape of z."""
        return torch.Size(self.transform.inverse_shape(output_shape))

    @staticmethod
    def _cannot_map(f: Transform, event: torch.Size) -> str:
        return f"the transform {type(f).__name__} cannot map events of shape {tuple(event)}"


def _holds_parameters(piece: Transform) -> bool:
    values = () if isinstance(piece, nn.Module) else vars(piece).values()
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _pieces(transform: Transform, inverse: bool = False) -> Iterator[tuple[Transform, bool]]:
    """Yield the parts of a composed transform, and whether each is inverted."""
    if isinstance(transform, _InverseTransform):
        yield from _pieces(transform.inv, not inverse)
    elif isinstance(transform, ComposeTransform) and transform.parts:
        for part in transform.parts:  # torch inverts a composition part by part
            yield from _pieces(part, inverse)
    else:
        yield transform, inverse


def _fresh(transform: Transform) -> Transform:
    """Return a transform with the same parameters and a cache of its own."""
    twin = copy.copy(transform)
    twin._inv = None  # the inverse belongs to the original transform
    return twin
