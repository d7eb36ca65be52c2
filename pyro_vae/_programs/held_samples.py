"""Hold samples fixed: cut a guide's samples off from the parameters that they depend on.

Score functions, importance-weighted updates and path derivatives take the gradient of
log q(z|x; phi) at a fixed z, or along z at a fixed phi. Under :class:`HeldSamples`, a guide
continues with copies of its samples. So each density depends on phi and on these copies
separately. This works for any distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import TransformedDistribution
from torch.distributions.transforms import Transform

from pyro_vae._programs.sites import Site, base_distribution
from pyro_vae._utils.numerics import implicit


class HeldSamples(Messenger):
    """Replace every reparameterized sample by a copy, and keep both.

    Enter the handler before ``poutine.trace``, which then records the copies. The value of a
    ``deterministic`` distribution is not a sample and stays the same. An example is the image of
    a flow's layer.

    Attributes:
        drawn: by site, the sample, which depends on the parameters.
        held: by site, the copy, a leaf of autograd.
    """

    def __init__(self):
        super().__init__()
        self.drawn: dict[str, Tensor] = {}
        self.held: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Site) -> None:
        reparameterized = getattr(msg["fn"], "has_rsample", False)
        if msg["is_observed"] or not reparameterized or site_is_subsample(msg):
            return
        if getattr(msg["fn"], "deterministic", False):
            return  # not a sample, but a function of parameters and earlier samples
        self.drawn[msg["name"]] = msg["value"]
        msg["value"] = self.held[msg["name"]] = msg["value"].detach().clone().requires_grad_()


def path_adjoints(
    target: Tensor, drawn: Sequence[Tensor], held: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradient of a target with respect to each sample, also through later ones.

    Args:
        target: a scalar function of the held samples.
        drawn: the samples in sampling order, each a function of parameters and of earlier held
            samples.
        held: the copies of the samples.

    Returns:
        One gradient for each sample, or None if the target does not depend on it.
    """
    adjoints = list(torch.autograd.grad(target, held, retain_graph=True, allow_unused=True))
    for number in range(len(held) - 1, 0, -1):
        if adjoints[number] is None or not drawn[number].requires_grad:
            continue
        through = torch.autograd.grad(
            drawn[number],
            held[:number],
            adjoints[number],
            retain_graph=True,
            allow_unused=True,
        )
        for before, gradient in enumerate(through):
            if gradient is not None:
                own = adjoints[before]
                adjoints[before] = gradient if own is None else own + gradient
    return adjoints


def log_prob_of_draw(distribution, drawn: Tensor, held: Tensor) -> Tensor:
    """Score a copy of a sample under a flow that can only invert its own last sample.

    The flow returns stored preimages. Their gradient comes from the implicit function theorem.

    Args:
        distribution: the distribution that ``drawn`` was sampled from.
        drawn: the sample, as the same tensor object.
        held: the copy of the sample, which gets the gradient.

    Raises:
        TypeError: The distribution is not a ``TransformedDistribution``.
        ValueError: A transform acts on matrices.
    """
    flow = base_distribution(distribution)
    if not isinstance(flow, TransformedDistribution):
        raise TypeError(f"{type(flow).__name__} cannot score a value that is equal to its sample")
    event_dim = len(flow.event_shape)
    log_prob: Tensor | float = 0.0
    for transform in reversed(flow.transforms):
        drawn, image = transform.inv(drawn), held
        held = _preimage(transform, drawn, image)
        event_dim += transform.domain.event_dim - transform.codomain.event_dim
        # Call the transform again: some transforms only store the determinant of the last call.
        change = transform.log_abs_det_jacobian(held, transform(held))
        log_prob = log_prob - sum_rightmost(change, event_dim - transform.domain.event_dim)
    base = flow.base_dist
    log_prob = log_prob + sum_rightmost(base.log_prob(held), event_dim - len(base.event_shape))
    return sum_rightmost(log_prob, log_prob.dim() - len(distribution.batch_shape))


def _preimage(transform: Transform, known: Tensor, image: Tensor) -> Tensor:
    """Return the known x with f(x) = y, as a function of y and of the transform's parameters."""
    known = known.detach()
    if transform.domain.event_dim > 1:
        raise ValueError(f"{type(transform).__name__} can neither be inverted nor differentiated")
    if not torch.is_grad_enabled():
        return known
    point = known.clone().requires_grad_()
    output = transform(point)
    if transform.domain.event_dim == 0:
        (slope,) = torch.autograd.grad(output.sum(), point, retain_graph=True)
        return implicit(known, transform(known) - image, lambda g: g / slope)
    rows = [
        torch.autograd.grad(output[..., i].sum(), point, retain_graph=True)[0]
        for i in range(output.shape[-1])
    ]
    jacobian = torch.stack(rows, -2)
    return implicit(known, transform(known) - image, lambda g: torch.linalg.solve(jacobian.mT, g))
