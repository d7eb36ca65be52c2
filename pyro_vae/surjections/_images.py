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
    r"""An input, split into its output and its remainder.

    Args:
        output: ``(*batch, *output event)``.
        remainder: ``(*batch, *remainder event)``; None for a bijection.
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


# The origin of each image, while the image exists. One program of a pair samples the image, and
# the other program receives the tensor alone. With the origin, it need not compute the map again.
# An origin must not refer to its own image, which then would never be freed.
_ORIGINS: MutableMapping[Tensor, _Origin] = WeakTensorKeyDictionary()


class Image(TorchDistribution):
    r"""The image of an input under a map: a point of log-density zero.

    The log-density is minus infinity elsewhere. The change of volume is part of the other
    program's density, in :class:`Preimage`. A sample is a differentiable function of the input
    and of the map's parameters.

    Args:
        surjection: the map.
        input: ``(*batch, *input event)``.
        split: the split of the input, if known.
        batch_shape: the batch shape to expand to. The default is that of the input.

    Shape:
        The batch shape is ``batch``, and the event shape is that of the image.
    """

    arg_constraints = {}  # noqa: RUF012 - as torch declares them
    has_rsample = True
    deterministic = True  # a function of the input, without randomness

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
        """The support of the outputs."""
        return self.surjection.output_support

    @property
    def mean(self) -> Tensor:
        """The point."""
        return self.split.output.expand(self.batch_shape + self.event_shape)

    def expand(self, batch_shape, _instance=None) -> Image:
        """Return the image with a larger batch shape."""
        return Image(self.surjection, self.input, self.split, torch.Size(batch_shape))

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Return the point, ``(*sample, *batch, *event)``."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        value = self.split.output.expand(shape)  # a new tensor, even of the same shape
        with_gradient = torch.is_grad_enabled()
        _ORIGINS[value] = _Origin(self.surjection, self.input, self.split, with_gradient)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zero where the value is the point, up to rounding, else minus infinity."""
        split, origin = self.split, _ORIGINS.get(value)
        if origin is not None and origin.split is split:
            return _like(split.output, 0.0).expand(value.shape[: value.dim() - self.event_dim])
        same = self.surjection.same(value, split.output)
        if split.remainder is None:  # the input may come from this output, with rounding
            same = same | self._leads_back(value)
        return torch.where(same, 0.0, _like(split.output, -torch.inf)).expand(
            torch.broadcast_shapes(same.shape, self.batch_shape)
        )

    def _leads_back(self, value: Tensor) -> Tensor:
        """Return whether the output maps back to this input, ``(*batch)``."""
        with torch.no_grad():
            try:
                joined = self.surjection.join(collapse_expanded_dims(value, self.event_dim), None)
            except (KeyError, NotImplementedError):  # raised by Pyro's flows without an inverse
                return torch.zeros((), dtype=torch.bool, device=value.device)
            eps = torch.finfo(joined.dtype).eps
            near = (joined - self.input).abs() <= 4 * eps * (1 + self.input.abs())
            return near.flatten(near.dim() - self.surjection.input_event_dim).all(-1)


class Preimage(TorchDistribution):
    r"""The inputs that a map sends to one output: sample a remainder, and join the two.

    .. math::
        \log p(\text{input}|\text{output}) = \log p(\text{remainder}|\text{output}) + \log\left|\det
        \frac{\partial(\text{output}, \text{remainder})}{\partial\,\text{input}}\right|

    where the map sends the input to the output, up to rounding, and minus infinity elsewhere. The
    density is relative to :class:`Image`, so the Dirac measures of the two cancel.

    Args:
        surjection: the map.
        output: ``(*batch, *output event)``.
        remainder: the distribution of the remainder, if known.
        batch_shape: the batch shape to expand to. The default is that of the output.

    Shape:
        The batch shape is ``batch``, and the event shape is that of the input.

    Raises:
        ValueError: The number of event dimensions of the remainder's distribution differs from the
            surjection's, or its batch shape from the output's.
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
    def has_rsample(self) -> bool:  # type: ignore[override] # a class attribute of torch
        """Whether the remainder has a reparameterized sample. True for a bijection."""
        return self.remainder is None or self.remainder.has_rsample

    @property
    def support(self) -> Constraint:
        """The support of the inputs."""
        return self.surjection.input_support

    def expand(self, batch_shape, _instance=None) -> Preimage:
        """Return the distribution with a larger batch shape."""
        batch_shape = torch.Size(batch_shape)
        remainder = None if self.remainder is None else self.remainder.expand(batch_shape)
        return Preimage(self.surjection, self.output, remainder, batch_shape)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Sample an input, without gradients if the remainder is reparameterized."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.has_rsample):
            return self.rsample(sample_shape)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008 - as in torch
        """Sample a remainder and join it to the output, ``(*sample, *batch, *event)``."""
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
        if value is drawn:  # a flow without an inverse scores only its own remainder
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
                f"{layer} needs a distribution of the remainder with {dims} event "
                f"dimension(s), got event shape {tuple(remainder.event_shape)} and batch shape "
                f"{tuple(remainder.batch_shape)}: declare the event dimensions with "
                f".to_event({dims})"
            )
        if remainder.batch_shape not in (batch, torch.Size()):
            raise ValueError(
                f"{layer} needs a distribution of the remainder with batch shape {tuple(batch)}, "
                f"that of the layer's input, got {tuple(remainder.batch_shape)}: declare the event "
                f"dimensions with .to_event({dims})"
            )
        return remainder.expand(batch)


def _like(values: Tensor, number: float) -> Tensor:
    """Return a number as a scalar tensor, with the dtype and device of the values."""
    dtype = values.dtype if values.dtype.is_floating_point else torch.get_default_dtype()
    return torch.full((), number, dtype=dtype, device=values.device)
