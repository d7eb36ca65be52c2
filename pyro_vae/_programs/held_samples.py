"""Samples held fixed: what a guide drew, cut off from the parameters that it was drawn with.

Score functions, importance-weighted updates and path derivatives take the gradient of
log q(z|x; phi) at a fixed z, or along z at a fixed phi. Run under :class:`HeldSamples`, a guide
goes on from copies of its samples, so that each density is a function of phi and of these copies
apart. No distribution needs to be known for that.
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
    """Hands a copy of every reparameterised sample on to the program, and keeps both.

    Enter it before ``poutine.trace``, which then records the copies. A distribution that draws
    nothing (``deterministic``, as the image of a flow's layer is) hands on what it is.

    Attributes:
        drawn: by site, the sample with its way back to the parameters.
        held: by site, its copy, a leaf of autograd.
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
            return  # nothing was drawn: a function of parameters, and of samples before it
        self.drawn[msg["name"]] = msg["value"]
        msg["value"] = self.held[msg["name"]] = msg["value"].detach().clone().requires_grad_()


def path_adjoints(
    target: Tensor, drawn: Sequence[Tensor], held: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradient of a target to each sample, the samples after it following.

    Args:
        target: a scalar function of the held samples.
        drawn: the samples in the order they were drawn, each a function of parameters and of the
            held samples before it.
        held: their copies.

    Returns:
        One for each sample, None if nothing depends on it.
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
    """Score a copy of a sample under a flow that remembers what it drew, but inverts nothing.

    The preimages are known; their gradient comes from the implicit function theorem.

    Args:
        distribution: that ``drawn`` is a sample of.
        drawn: the very tensor.
        held: its copy, which the gradient shall reach.

    Raises:
        TypeError: the distribution is no ``TransformedDistribution``.
        ValueError: it acts on matrices.
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
        # A new call: some of these transforms know the determinant of their last one alone.
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
