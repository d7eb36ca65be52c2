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
from pyro_vae.surjections._images import Split
from pyro_vae.surjections._surjection import (
    InferenceSurjection,
    all_of_event,
    positive_event_dim,
    sum_of_event,
)


@records_init_args
class Bijection(InferenceSurjection):
    r""":math:`z = f(x)`: the transform f leads from data to latent, and :math:`f^{-1}` generates.

    .. math:: V(x) = \log|\det J_f(x)|

    As a limit, q(z|x) and p(x|z) are Dirac measures, at f(x) and at :math:`f^{-1}(z)`, and
    :math:`\delta(x - f^{-1}(z)) = \delta(z - f(x)) \, |\det J_f(x)|`: the ratio of the two is the
    determinant. With it the ELBO is log p(x) of the flow (Nielsen et al. 2020).

    Args:
        transform: f, a torch ``Transform``; or a module that gives one when called without
            arguments, such as :class:`pyro_vae.flows.Composition`.
        event_dim: how many of the rightmost dimensions of x make one datum. Transforms of fewer
            dimensions, a sigmoid say, act on each number, and their volumes add up.

    Attributes:
        transform: f, of the parameters as they are.

    Raises:
        TypeError: ``transform`` is neither a transform nor gives one.
        ValueError: ``event_dim`` is less than that of the transform's domain; the transform is not
            bijective, or holds parameters and is no module; at a call: it cannot map x, or not
            back.

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
        # Of a torch transform, the pieces and whether they are turned round: an inverse hides the
        # module that it is the inverse of, and does not survive being copied.
        self._pieces = [*_pieces(transform)] if isinstance(transform, Transform) else None
        if self._pieces is None:
            self.source = transform
        else:
            self.learned = nn.ModuleList(p for p, _ in self._pieces if isinstance(p, nn.Module))
        self.input_event_dim = positive_event_dim(event_dim)
        f = self.transform
        if loose := [type(p).__name__ for p, _ in self._pieces or () if _holds_parameters(p)]:
            raise ValueError(
                f"the transform {loose[0]} holds tensors that require gradients, which nothing "
                "would train: pass a module that makes the transform of its parameters when called"
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
        """Return f; what it keeps of its last call belongs to this f alone."""
        if self._pieces is not None:
            copies = [(_fresh(piece), inverse) for piece, inverse in self._pieces]
            pieces = [piece.inv if inverse else piece for piece, inverse in copies]
            return pieces[0] if len(pieces) == 1 else ComposeTransform(pieces)
        f = self.source() if callable(self.source) else self.source
        if not isinstance(f, Transform):
            raise TypeError(
                "the transform of a bijection must be a torch Transform, or what gives one when "
                f"called without arguments, got {type(self.source).__name__}"
                + (f", which gives {type(f).__name__}" if callable(self.source) else "")
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
        """Return f(x), no remainder, and log|det J|; minus infinity outside the domain of f."""
        f, dims = self.transform, self.input_event_dim
        x = input.view_as(input)  # that no cache of f has seen: it may be out of date
        event = x.shape[x.dim() - dims :]
        try:
            z = f(x)
            log_volume = f.log_abs_det_jacobian(x, z)
            there = f.forward_shape(event)
            fits = f.inverse_shape(there) == event and z.shape[z.dim() - len(there) :] == there
        except (RuntimeError, ShapeError) as error:
            raise ValueError(f"{self._cannot_map(f, event)}: {error}") from error
        if not fits:
            raise ValueError(
                f"{self._cannot_map(f, event)}: it gives values of shape {tuple(z.shape)}, "
                "which it does not map back to such events"
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
                f"{self._cannot_map(f, event)} back: {error}. Does the prior, or the layer above, "
                "have the dimensions of the transform?"
            ) from error

    def remainder(self, output: Tensor) -> None:
        """Return None, since a bijection leaves nothing out."""
        return

    def input_shape(self, output_shape: torch.Size, remainder_shape: torch.Size) -> torch.Size:
        """Return the event shape that the transform maps to that of z."""
        return torch.Size(self.transform.inverse_shape(output_shape))

    @staticmethod
    def _cannot_map(f: Transform, event: torch.Size) -> str:
        return f"the transform {type(f).__name__} cannot map events of shape {tuple(event)}"


def _holds_parameters(piece: Transform) -> bool:
    values = () if isinstance(piece, nn.Module) else vars(piece).values()
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _pieces(transform: Transform, inverse: bool = False) -> Iterator[tuple[Transform, bool]]:
    """Yield the transforms that one is composed of, and whether each is to be inverted."""
    if isinstance(transform, _InverseTransform):
        yield from _pieces(transform.inv, not inverse)
    elif isinstance(transform, ComposeTransform) and transform.parts:
        for part in transform.parts:  # an inverse composition has none: it is one of inverses
            yield from _pieces(part, inverse)
    else:
        yield transform, inverse


def _fresh(transform: Transform) -> Transform:
    """Return a transform of the same parameters that keeps what it computes for itself."""
    twin = copy.copy(transform)
    twin._inv = None  # that of the original, which keeps its own
    return twin
