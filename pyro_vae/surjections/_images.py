"""The two distributions of a map: where it sends a whole, and what it could have sent there."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_vae.flows import collapse_expanded_dims

if TYPE_CHECKING:
    from pyro_vae.surjections._surjection import Surjection


class Split(NamedTuple):
    r"""A whole, as its image and what the image leaves out.

    Args:
        part: the image, ``(*batch, *part event)``.
        rest: ``(*batch, *rest event)``; None for a bijection, which leaves nothing out.
        log_volume: :math:`\log|\det \partial(\text{part}, \text{rest}) / \partial\text{whole}|`,
            ``(*batch)``, or a number.
    """

    part: Tensor
    rest: Tensor | None
    log_volume: Tensor | float = 0.0


_OF_NOTHING = (None, None, None, False)


class Image(TorchDistribution):
    r"""The image of a whole under a map: one point, of log-density zero, minus infinity elsewhere.

    The volume that the map changes stands at the other side of the pair, in :class:`Preimage`.
    A sample is a differentiable function of the whole and of the map's parameters. It remembers
    what it is the image of, so that the other side need not compute the map once more.

    Args:
        surjection: the map.
        whole: ``(*batch, *whole event)``.
        split: of the whole, if it is known.
        batch_shape: that to expand to, if it is not the whole's.

    Shape:
        batch shape ``batch``, event shape that of the image.
    """

    arg_constraints = {}  # noqa: RUF012 - as torch declares them
    has_rsample = True
    deterministic = True  # a function of what it is given: nothing is drawn

    def __init__(
        self,
        surjection: Surjection,
        whole: Tensor,
        split: Split | None = None,
        batch_shape: torch.Size | None = None,
    ):
        self.surjection, self.whole = surjection, whole
        if split is None:
            split = surjection.split(collapse_expanded_dims(whole, surjection.whole_event_dim))
        self.split = split
        if batch_shape is None:
            batch_shape = whole.shape[: whole.dim() - surjection.whole_event_dim]
        event_shape = split.part.shape[split.part.dim() - surjection.part_event_dim :]
        super().__init__(torch.Size(batch_shape), event_shape, validate_args=False)

    @property
    def support(self) -> Constraint:
        """All values that an image may have."""
        return self.surjection.part_support

    @property
    def mean(self) -> Tensor:
        """The point."""
        return self.split.part.expand(self.batch_shape + self.event_shape)

    def expand(self, batch_shape, _instance=None) -> Image:
        """Return the image with a larger batch shape."""
        return Image(self.surjection, self.whole, self.split, torch.Size(batch_shape))

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        """Return the point, ``(*sample, *batch, *event)``."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        value = self.split.part.expand(shape)  # a tensor of its own, which can bear a name tag
        value._image_of = (self.surjection, self.whole, self.split, torch.is_grad_enabled())
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zero where the value is the point, up to rounding, minus infinity elsewhere."""
        split = self.split
        _, _, its_split, _ = getattr(value, "_image_of", _OF_NOTHING)
        if its_split is split:
            return _like(split.part, 0.0).expand(value.shape[: value.dim() - self.event_dim])
        same = self.surjection.same(value, split.part)
        if split.rest is None:  # drawn from the part, which the map need not meet to the last digit
            same = same | self._leads_back(value)
        return torch.where(same, 0.0, _like(split.part, -torch.inf)).expand(
            torch.broadcast_shapes(same.shape, self.batch_shape)
        )

    def _leads_back(self, value: Tensor) -> Tensor:
        """Tell where a part is one that this whole would be made of, ``(*batch)``."""
        with torch.no_grad():
            try:
                whole = self.surjection.join(collapse_expanded_dims(value, self.event_dim), None)
            except (KeyError, NotImplementedError):  # as Pyro's flows without an inverse raise
                return torch.zeros((), dtype=torch.bool, device=value.device)
            eps = torch.finfo(whole.dtype).eps
            near = (whole - self.whole).abs() <= 4 * eps * (1 + self.whole.abs())
            return near.flatten(near.dim() - self.surjection.whole_event_dim).all(-1)


class Preimage(TorchDistribution):
    r"""All wholes that a map sends to one part: the rest is drawn, and the whole put together.

    .. math::
        \log p(\text{whole}|\text{part}) = \log p(\text{rest}|\text{part}) + \log\left|\det
        \frac{\partial(\text{part}, \text{rest})}{\partial\,\text{whole}}\right|

    where the map sends the whole to the part, up to rounding, and minus infinity elsewhere. It is a
    density beside :class:`Image`: a Dirac measure stands behind both, and cancels.

    Args:
        surjection: the map.
        part: ``(*batch, *part event)``.
        rest: the distribution of the rest, if it is known.
        batch_shape: that to expand to, if it is not the part's.

    Shape:
        batch shape ``batch``, event shape that of the whole.

    Raises:
        ValueError: the distribution of the rest has an event of another number of dimensions, or a
            batch shape that is not the part's.
    """

    arg_constraints = {}  # noqa: RUF012 - as torch declares them

    def __init__(
        self,
        surjection: Surjection,
        part: Tensor,
        rest: TorchDistribution | None = None,
        batch_shape: torch.Size | None = None,
    ):
        self.surjection, self.part = surjection, part
        split_at = part.dim() - surjection.part_event_dim
        if batch_shape is None:
            batch_shape = part.shape[:split_at]
            rest = self._rest_given(part, batch_shape)
        self.rest = rest
        rest_shape = torch.Size() if rest is None else rest.event_shape
        event_shape = surjection.whole_shape(part.shape[split_at:], rest_shape)
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether the rest has a reparameterised sample; true of a bijection."""
        return self.rest is None or self.rest.has_rsample

    @property
    def support(self) -> Constraint:
        """All values that a whole may have."""
        return self.surjection.whole_support

    def expand(self, batch_shape, _instance=None) -> Preimage:
        """Return the distribution with a larger batch shape."""
        rest = None if self.rest is None else self.rest.expand(torch.Size(batch_shape))
        return Preimage(self.surjection, self.part, rest, torch.Size(batch_shape))

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        """Draw a whole; where the rest is not reparameterised, a function of the part alone."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.has_rsample):
            return self.rsample(sample_shape)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        """Draw the rest and put the whole together, ``(*sample, *batch, *event)``."""
        batch, join = torch.Size(sample_shape) + self.batch_shape, self.surjection.join
        dims = self.surjection.part_event_dim
        if self.rest is None:
            whole = join(collapse_expanded_dims(self.part, dims), None)
            return whole.expand(batch + self.event_shape)
        draw = self.rest.rsample if self.rest.has_rsample else self.rest.sample
        rest = draw(torch.Size(sample_shape))
        whole = join(self.part.expand(batch + self.part.shape[self.part.dim() - dims :]), rest)
        whole._joined_of = (self, rest)  # a flow behind the rest may have no other way back
        return whole

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of a whole, ``(*batch)``."""
        drawn_by, rest = getattr(value, "_joined_of", (None, None))
        surjection, whole, split, with_gradient = getattr(self.part, "_image_of", _OF_NOTHING)
        if drawn_by is self:
            return self._density(Split(self.part, rest, self.surjection.log_volume(rest)))
        known = surjection is self.surjection and whole is value
        if known and with_gradient >= torch.is_grad_enabled():
            return self._density(split)
        split = self.surjection.split(collapse_expanded_dims(value, self.event_dim))
        density = self._density(split)
        same = self.surjection.same(split.part, self.part)
        batch = torch.broadcast_shapes(value.shape[: value.dim() - self.event_dim], density.shape)
        return torch.where(same, density, -torch.inf).expand(batch)

    def _density(self, split: Split) -> Tensor:
        log_prob = _like(split.part, 0.0) if self.rest is None else self.rest.log_prob(split.rest)
        log_prob = log_prob + split.log_volume
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def _rest_given(self, part: Tensor, batch: torch.Size) -> TorchDistribution | None:
        rest = self.surjection.rest(part)
        if rest is None:
            return None
        layer, dims = type(self.surjection).__name__, self.surjection.rest_event_dim
        if len(rest.event_shape) != dims:
            raise ValueError(
                f"{layer} needs a distribution of what it leaves out with {dims} event "
                f"dimension(s), got event shape {tuple(rest.event_shape)} and batch shape "
                f"{tuple(rest.batch_shape)}: declare them with .to_event({dims})"
            )
        if rest.batch_shape not in (batch, torch.Size()):
            raise ValueError(
                f"{layer} needs a distribution of what it leaves out with batch shape "
                f"{tuple(batch)}, as what it is given, got {tuple(rest.batch_shape)}: declare the "
                f"dimensions of an event with .to_event({dims})"
            )
        return rest.expand(batch)


def _like(values: Tensor, number: float) -> Tensor:
    """Return a scalar tensor of a number, of the values' floating type and device."""
    dtype = values.dtype if values.dtype.is_floating_point else torch.get_default_dtype()
    return torch.full((), number, dtype=dtype, device=values.device)
