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
from pyro_vae._utils.messages import first_line
from pyro_vae.distributions._casting import Normal, Transformed


@records_init_args
class FlowPrior(nn.Module):
    r"""A standard normal transformed by a learned flow f.

    .. math:: p(z) = \mathcal{N}(f^{-1}(z); 0, I)\,|\det \partial f^{-1} / \partial z|

    Each training step scores the guide's samples, so it computes the inverse, from z to noise. It
    costs one pass for coupling flows and masked autoregressive flows, and D passes for inverse
    autoregressive flows. Planar flows need a root search. Sampling computes f, from noise to z.

    Args:
        dim: D of z.
        transform: a module such as :class:`pyro_vae.flows.Composition`, which returns f when
            called without arguments; or f itself, a torch transform. f is a bijection of R^D.

    Raises:
        ValueError: ``dim`` is not positive. Or f is not a bijection of R^D, or has no inverse. Or
            f has parameters that belong to no module.
        TypeError: f is not a torch transform.

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
                "the prior's transform must be a torch Transform or a module that returns one, got "
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
                "the prior's transform has parameters that nothing would train, because no module "
                "contains them. Pass a module that returns the transform when called without "
                "arguments"
            )

    @staticmethod
    def _require_inverse(transform: Transform, image: Tensor) -> None:
        try:
            with torch.no_grad():
                transform.inv(image.detach().clone())
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                "the prior's transform must have an inverse to score the guide's samples, and "
                f"{type(transform).__name__} has none. Use one of pyro_vae.flows. They all have an "
                "inverse, the planar, radial and Sylvester flows too"
            ) from error

    def _image(self, transform: Transform) -> Tensor:
        try:
            return transform(self.loc.clone())
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the prior's transform must be a bijection of R^{len(self.loc)}, but it fails on "
                f"z of shape ({len(self.loc)},): {first_line(error)}"
            ) from error

    def _made(self) -> Transform:
        if isinstance(self.transform, Transform) or not callable(self.transform):
            return self.transform
        return self.transform()
