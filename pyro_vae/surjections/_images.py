"""The two distributions of a map: the image of an input, and the inputs with one image."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_vae.flows import collapse_expanded_dims

if TYPE_CHECKING:
    from pyro_vae.surjections._surjection import Surjection


class Split(NamedTuple):
    r"""An input, as its output and the remainder.

    Args:
        output: ``(*batch, *output event)``.
        remainder: ``(*batch, *remainder event)``; None for a bijection, which leaves nothing out.
        log_volume: :math:`\log|\det \partial(\text{output}, \text{remainder}) /
            \partial\,\text{input}|`, ``(*batch)``, or a number.
    """

    output: Tensor
    remainder: Tensor | None
    log_volume: Tensor | float = 0.0


class _Origin(NamedTuple):
    """The map and the input that an image was made from."""

    surjection: Surjection
    input: Tensor
    split: Split
    with_gradient: bool


# The origin of each image, as long as the image lives. One program of a pair draws the image and
# the other one gets the tensor alone: with its origin, the map need not be computed twice. No
# origin refers to its own image, which would then live forever.
_ORIGINS: MutableMapping[Tensor, _Origin] = WeakTensorKeyDictionary()


class Image(TorchDistribution):
    r"""The image of an input under a map: one point, of log-density zero, minus infinity elsewhere.

    The volume that the map changes stands at the other side of the pair, in :class:`Preimage`.
    A sample is a differentiable function of the input and of the map's parameters.

    Args:
        surjection: the map.
        input: ``(*batch, *input event)``.
        split: of the input, if it is known.
        batch_shape: that to expand to, if it is not the input's.

    Shape:
        batch shape ``batch``, event shape that of the image.
    """

    arg_constraints = {}  # noqa: RUF012 - as torch declares them
    has_rsample = True
    deterministic = True  # a function of what it is given: nothing is drawn

    def __init__(
        self,
        surjection: Surjection,
        input: Tensor,
        split: Split | None = None,
        batch_shape: torch.Size | None = None,
    ):
        self.surjection, self.input = surjection, input
        if split is None:
            split = surjection.split(collapse_expanded_dims(input, surjection.input_event_dim))
        self.split = split
        if batch_shape is None:
            batch_shape = input.shape[: input.dim() - surjection.input_event_dim]
        event_shape = split.output.shape[split.output.dim() - surjection.output_event_dim :]
        super().__init__(torch.Size(batch_shape), event_shape, validate_args=False)

    @property
    def support(self) -> Constraint:
        """All values that an output may have."""
        return self.surjection.output_support

    @property
    def mean(self) -> Tensor:
        """The point."""
        return self.split.output.expand(self.batch_shape + self.event_shape)

    def expand(self, batch_shape, _instance=None) -> Image:
        """Return the image with a larger batch shape."""
        return Image(self.surjection, self.input, self.split, torch.Size(batch_shape))

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        """Return the point, ``(*sample, *batch, *event)``."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        value = self.split.output.expand(shape)  # a new tensor, even of the same shape
        with_gradient = torch.is_grad_enabled()
        _ORIGINS[value] = _Origin(self.surjection, self.input, self.split, with_gradient)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zero where the value is the point, up to rounding, minus infinity elsewhere."""
        split, origin = self.split, _ORIGINS.get(value)
        if origin is not None and origin.split is split:
            return _like(split.output, 0.0).expand(value.shape[: value.dim() - self.event_dim])
        same = self.surjection.same(value, split.output)
        if split.remainder is None:  # it may have been drawn from the output, with rounding
            same = same | self._leads_back(value)
        return torch.where(same, 0.0, _like(split.output, -torch.inf)).expand(
            torch.broadcast_shapes(same.shape, self.batch_shape)
        )

    def _leads_back(self, value: Tensor) -> Tensor:
        """Return where the input of an output is this input, ``(*batch)``."""
        with torch.no_grad():
            try:
                joined = self.surjection.join(collapse_expanded_dims(value, self.event_dim), None)
            except (KeyError, NotImplementedError):  # as Pyro's flows without an inverse raise
                return torch.zeros((), dtype=torch.bool, device=value.device)
            eps = torch.finfo(joined.dtype).eps
            near = (joined - self.input).abs() <= 4 * eps * (1 + self.input.abs())
            return near.flatten(near.dim() - self.surjection.input_event_dim).all(-1)


class Preimage(TorchDistribution):
    r"""The inputs that a map sends to one output: the remainder is drawn, and joined to it.

    .. math::
        \log p(\text{input}|\text{output}) = \log p(\text{remainder}|\text{output}) + \log\left|\det
        \frac{\partial(\text{output}, \text{remainder})}{\partial\,\text{input}}\right|

    where the map sends the input to the output, up to rounding, and minus infinity elsewhere. It is
    a density relative to :class:`Image`: the Dirac measures of both cancel.

    Args:
        surjection: the map.
        output: ``(*batch, *output event)``.
        remainder: its distribution, if it is known.
        batch_shape: that to expand to, if it is not the output's.

    Shape:
        batch shape ``batch``, event shape that of the input.

    Raises:
        ValueError: The distribution of the remainder has another number of event dimensions than
            the surjection says, or another batch shape than the output.
    """

    arg_constraints = {}  # noqa: RUF012 - as torch declares them

    def __init__(
        self,
        surjection: Surjection,
        output: Tensor,
        remainder: TorchDistribution | None = None,
        batch_shape: torch.Size | None = None,
    ):
        self.surjection, self.output = surjection, output
        split_at = output.dim() - surjection.output_event_dim
        if batch_shape is None:
            batch_shape = output.shape[:split_at]
            remainder = self._remainder_given(output, batch_shape)
        self.remainder = remainder
        self._last_draw: tuple[Tensor | None, Tensor | None] = (None, None)  # input and remainder
        remainder_shape = torch.Size() if remainder is None else remainder.event_shape
        event_shape = surjection.input_shape(output.shape[split_at:], remainder_shape)
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether the remainder has a reparameterized sample; true of a bijection."""
        return self.remainder is None or self.remainder.has_rsample

    @property
    def support(self) -> Constraint:
        """All values that an input may have."""
        return self.surjection.input_support

    def expand(self, batch_shape, _instance=None) -> Preimage:
        """Return the distribution with a larger batch shape."""
        batch_shape = torch.Size(batch_shape)
        remainder = None if self.remainder is None else self.remainder.expand(batch_shape)
        return Preimage(self.surjection, self.output, remainder, batch_shape)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        """Draw an input; without gradients if the remainder is reparameterized."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.has_rsample):
            return self.rsample(sample_shape)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        """Draw the remainder and join it to the output, ``(*sample, *batch, *event)``."""
        batch, join = torch.Size(sample_shape) + self.batch_shape, self.surjection.join
        dims = self.surjection.output_event_dim
        if self.remainder is None:
            input = join(collapse_expanded_dims(self.output, dims), None)
            return input.expand(batch + self.event_shape)
        draw = self.remainder.rsample if self.remainder.has_rsample else self.remainder.sample
        remainder = draw(torch.Size(sample_shape))
        event = self.output.shape[self.output.dim() - dims :]
        input = join(self.output.expand(batch + event), remainder)
        self._last_draw = (input, remainder)
        return input

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of an input, ``(*batch)``."""
        drawn, remainder = self._last_draw
        if value is drawn:  # the remainder may come from a flow that scores its own draws alone
            log_volume = self.surjection.log_volume(remainder)
            return self._density(Split(self.output, remainder, log_volume))
        origin = _ORIGINS.get(self.output)
        known = origin is not None and origin.surjection is self.surjection
        if known and origin.input is value and origin.with_gradient >= torch.is_grad_enabled():
            return self._density(origin.split)
        split = self.surjection.split(collapse_expanded_dims(value, self.event_dim))
        density = self._density(split)
        same = self.surjection.same(split.output, self.output)
        batch = torch.broadcast_shapes(value.shape[: value.dim() - self.event_dim], density.shape)
        return torch.where(same, density, -torch.inf).expand(batch)

    def _density(self, split: Split) -> Tensor:
        if self.remainder is None:
            log_prob = _like(split.output, 0.0)
        else:
            log_prob = self.remainder.log_prob(split.remainder)
        log_prob = log_prob + split.log_volume
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def _remainder_given(self, output: Tensor, batch: torch.Size) -> TorchDistribution | None:
        remainder = self.surjection.remainder(output)
        if remainder is None:
            return None
        layer, dims = type(self.surjection).__name__, self.surjection.remainder_event_dim
        if len(remainder.event_shape) != dims:
            raise ValueError(
                f"{layer} needs a distribution of what it leaves out with {dims} event "
                f"dimension(s), got event shape {tuple(remainder.event_shape)} and batch shape "
                f"{tuple(remainder.batch_shape)}: declare them with .to_event({dims})"
            )
        if remainder.batch_shape not in (batch, torch.Size()):
            raise ValueError(
                f"{layer} needs a distribution of what it leaves out with batch shape "
                f"{tuple(batch)}, as what it is given, got {tuple(remainder.batch_shape)}: "
                f"declare the dimensions of an event with .to_event({dims})"
            )
        return remainder.expand(batch)


def _like(values: Tensor, number: float) -> Tensor:
    """Return a scalar tensor of a number, of the values' floating type and device."""
    dtype = values.dtype if values.dtype.is_floating_point else torch.get_default_dtype()
    return torch.full((), number, dtype=dtype, device=values.device)
