"""A normalizing flow as the prior."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions.transforms import Transform

from pyro_vae._programs.sites import is_real
from pyro_vae._utils.checks import positive_integer
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.distributions._casting import Normal, Transformed


@records_init_args
class FlowPrior(nn.Module):
    r""":math:`p(z) = \mathcal{N}(f^{-1}(z); 0, I)\,|\det \partial f^{-1} / \partial z|`, f learned.

    The density is taken at what the guide draws, so a step costs the way from z to noise: one pass
    for coupling flows and masked autoregressive ones, D passes for inverse autoregressive ones, a
    root for planar ones. Sampling goes the other way.

    Args:
        dim: D of z.
        transform: called without arguments, gives f, a bijection of R^D, such as a
            :class:`pyro_vae.flows.Composition`; a torch transform serves too.

    Raises:
        ValueError: ``dim`` is not positive. Or f is no bijection of R^D, or has no inverse. Or it
            has parameters that are no module's.
        TypeError: it is no transform.

    Example:
        >>> import torch, pyro_vae as pv
        >>> f = pv.flows.Composition(2, pv.flows.AffineCoupling, length=4)
        >>> prior = pv.priors.FlowPrior(2, f)
        >>> prior().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, dim: int, transform: Callable[[], Transform] | Transform):
        super().__init__()
        positive_integer("dim", dim)
        self.transform = transform
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self._check()

    def forward(self) -> TorchDistributionMixin:
        """Return p(z): batch shape (), event shape (D,)."""
        base = Normal(self.loc, self.scale).to_event(1)
        return Transformed(base, [self._made()])

    def _check(self) -> None:
        transform, dim = self._made(), len(self.loc)
        if not isinstance(transform, Transform):
            raise TypeError(
                "the prior's transform must be a torch Transform, or a module that gives one, got "
                f"{self.transform!r}"
            )
        of_reals = is_real(transform.domain) and is_real(transform.codomain)
        image = self._image(transform)
        if not transform.bijective or not of_reals or image.shape != (dim,):
            raise ValueError(
                f"the prior's transform must be a bijection of R^{dim}, got {transform} from "
                f"{transform.domain} onto {transform.codomain}"
            )
        self._require_inverse(transform, image)
        if image.requires_grad and not [*self.parameters()]:
            raise ValueError(
                "the prior's transform has parameters that nothing would train, for they are not "
                "found: pass a module, which gives the transform when called without arguments"
            )

    @staticmethod
    def _require_inverse(transform: Transform, image: Tensor) -> None:
        try:
            with torch.no_grad():
                transform.inv(image.detach().clone())
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                "the prior's transform must have an inverse, for z is scored where the guide draws "
                f"it, and {type(transform).__name__} has none. Take one of pyro_vae.flows, whose "
                "planar, radial and Sylvester flows are inverted too"
            ) from error

    def _image(self, transform: Transform) -> Tensor:
        try:
            return transform(self.loc.clone())
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the prior's transform must be a bijection of R^{len(self.loc)}, and cannot be "
                f"applied to z of shape ({len(self.loc)},): {error}"
            ) from error

    def _made(self) -> Transform:
        if isinstance(self.transform, Transform) or not callable(self.transform):
            return self.transform
        return self.transform()
