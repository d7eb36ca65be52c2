"""Follow each number of x through the operations of a program to the site that observes it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pyro_vae._programs.sites import Site, base_distribution

aten = torch.ops.aten
NOT_OF_X = -1  # the place of a number that does not come from x

# Operations that move or copy the numbers of their first argument.
_MOVES = frozenset({
    aten.alias, aten.clone, aten.detach, aten.diagonal, aten.expand, aten.flip, aten.gather,
    aten.index, aten.index_select, aten.lift_fresh, aten.permute, aten.repeat, aten.roll,
    aten.select, aten.slice, aten.split, aten.split_with_sizes, aten.squeeze, aten.t,
    aten.transpose, aten.unbind, aten.unfold, aten.unsqueeze,
})  # fmt: skip
_NOT_BY_NUMBER = frozenset({aten._to_copy, aten.copy_, aten.masked_fill, aten.where})
_RESHAPES = frozenset({
    aten._reshape_alias.default, aten._unsafe_view.default, aten.view.default,
})  # fmt: skip


class Readings(TorchDispatchMode):
    """Follows the numbers of x through operations that move them, and elementwise operations.

    Each followed tensor has a tensor of places, one per number. A place p >= 0 is an index into the
    flattened x. -2 - p means that another number replaced number p of x. :data:`NOT_OF_X` means
    that the number does not come from x.

    Args:
        x: the data, contiguous.
    """

    def __init__(self, x: Tensor):
        super().__init__()
        self._x = x
        self._as_given = True
        self._places = WeakIdKeyDictionary()
        self._places[x] = torch.arange(x.numel(), device=x.device).reshape(x.shape)
        self._computed = WeakIdKeyDictionary()  # tensors computed from x, not copied

    def places(self, value: Any) -> Tensor | None:
        """Return the places of a tensor, or None if they are unknown."""
        if not isinstance(value, Tensor):
            return None
        found = self._places.get(value)
        if found is not None or not self._as_given or value.dtype != self._x.dtype:
            return found
        # numpy, for example, bypasses the operations. A view of x is then found by its memory.
        start, odd = divmod(value.data_ptr() - self._x.data_ptr(), value.itemsize)
        last = sum(s * (size - 1) for s, size in zip(value.stride(), value.shape, strict=True))
        if value.device != self._x.device or odd or not value.numel():
            return None
        if start < 0 or start + last >= self._x.numel():
            return None
        return self._places[self._x].as_strided(value.shape, value.stride(), start)

    def are_computed(self, value: Tensor) -> bool:
        """Return whether the numbers of a tensor were computed from those of x, not copied."""
        return value in self._computed

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if operation._schema.is_mutable:
            self._forget(operation, args, kwargs)
        places = self._moved(operation, args, kwargs, result)
        if places is not None:
            computed = _is_by_number(operation) or any(
                isinstance(each, Tensor) and each in self._computed for each in tree_leaves(args)
            )
            for tensor, its in zip(tree_leaves(result), tree_leaves(places), strict=True):
                if isinstance(tensor, Tensor) and tensor.shape == its.shape:
                    self._places[tensor] = its
                    if computed:
                        self._computed[tensor] = True
        return result

    def _moved(self, operation, args: Sequence[Any], kwargs: Mapping, result: Any) -> Any:
        """Return the places of each tensor of a result, or None if they are unknown."""
        kind = operation.overloadpacket
        first = self._places_of(args[0]) if args else None
        if kind in (aten.cat, aten.stack) and any(t in self._places for t in args[0]):
            return operation([self._places_or_none(t) for t in args[0]], *args[1:], **kwargs)
        if operation is aten.where.self:
            return self._chosen(*args, result)
        if kind is aten.copy_:
            places = self._places_of(args[1])
            return None if places is None else places.to(result.device).expand(result.shape)
        if _is_by_number(operation):
            return self._by_number(args, result)
        if first is None:
            return None
        if kind in _MOVES:
            kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}
            return operation(first, *args[1:], **kwargs)
        if operation in _RESHAPES:
            return first.reshape(result.shape)
        if kind is aten._to_copy:
            return first.to(result.device)
        if kind is aten.constant_pad_nd:
            return operation(first, args[1], NOT_OF_X)
        if kind is aten.masked_fill:
            return torch.where(args[1], _replaced(first), first)
        return None

    def _places_of(self, value: Any) -> Tensor | None:
        return self._places.get(value) if isinstance(value, Tensor) else None

    def _by_number(self, args: Sequence[Any], result: Tensor) -> Tensor | None:
        """Return the places of the result of an elementwise operation, or None."""
        found = [p for p in map(self._places_of, args) if p is not None]
        if not found or any(not torch.equal(places, found[0]) for places in found):
            return None
        return found[0] if found[0].shape == result.shape else None

    def _chosen(
        self, condition: Tensor, value: Tensor, other: Tensor, result: Tensor
    ) -> Tensor | None:
        """Return the places of the result of ``where``, from the operand with the same shape."""
        for operand, at in ((value, condition), (other, ~condition)):
            places = self._places_of(operand)
            if places is not None and places.shape == result.shape:
                return torch.where(at, places, _replaced(places))
        return None

    def _places_or_none(self, tensor: Tensor) -> Tensor:
        if tensor in self._places:
            return self._places[tensor]
        return torch.full(tensor.shape, NOT_OF_X, device=tensor.device)

    def _forget(self, operation, args: Sequence[Any], kwargs: dict) -> None:
        """Stop following all tensors that share memory with a tensor that is written to."""
        for number, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(written):
                if not isinstance(tensor, Tensor):
                    continue
                storage = tensor.untyped_storage().data_ptr()
                self._as_given &= storage != self._x.untyped_storage().data_ptr()
                for followed in list(self._places):
                    if followed.untyped_storage().data_ptr() == storage:
                        del self._places[followed]


class Layout:
    """Collects one number per observed number, and arranges them in the layout of x.

    Args:
        x: the data.
    """

    def __init__(self, x: Tensor):
        self._shape = x.shape
        self._sites: dict[str, tuple[int, ...]] = {}
        self._reads: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(
        self, site: Site, numbers: Tensor, places: Tensor | None, *, computed: bool = False
    ) -> None:
        """Add the numbers of a site.

        Args:
            site: an observed site.
            numbers: one for each number that the site observes, in the shape of its value.
            places: the places of the observed tensor, see :class:`Readings`. None if unknown.
            computed: whether each observed number was computed from a number of x, not copied.
        """
        self._sites[site["name"]] = tuple(numbers.shape)
        if places is None:
            return
        try:
            numbers, places = torch.broadcast_tensors(numbers, places)
        except RuntimeError:
            return
        counts = torch.ones((), dtype=torch.bool, device=numbers.device)
        base = base_distribution(site["fn"])
        for mask, fn in ((site["mask"], site["fn"]), (getattr(base, "_mask", None), base)):
            if mask is not None:  # a mask has the batch dimensions of its distribution
                mask = torch.as_tensor(mask, device=numbers.device)
                counts = counts & mask.reshape((*mask.shape, *(1,) * len(fn.event_shape)))
        same = torch.full_like(counts, not computed)
        read = (numbers, places, *(each.expand(numbers.shape) for each in (counts, same)))
        self._reads.append(tuple(tensor.flatten().cpu() for tensor in read))

    def numbers(self) -> Tensor:
        """Return the numbers in the layout of x, on the CPU.

        Each place of x is filled from the site that observes this number of x unchanged. Without
        such a site, it is filled from a site that observes a number computed from this one. Masked
        numbers, such as padding, fill the remaining places.

        Raises:
            ValueError: A number of x is observed twice, or cannot be traced to an observed site.
        """
        total = self._shape.numel()
        if not any((places != NOT_OF_X).any() for _, places, *_ in self._reads):
            raise self._error(
                f"no observed site of the model has the shape of x, {tuple(self._shape)}, and "
                "observes numbers that can be traced to x"
            )
        numbers, places, counts, same = map(torch.cat, zip(*self._of_one_type(), strict=True))
        whose = torch.where(places < NOT_OF_X, -2 - places, places)
        first = counts & (places >= 0)
        taken = torch.zeros(total, dtype=torch.bool)
        result = numbers.new_empty(total)
        for chosen in (first & same, first & ~same, ~counts & (places != NOT_OF_X)):
            chosen = chosen & ~taken[whose]
            if (whose[chosen].bincount(minlength=total) > 1).any():
                raise self._error("some numbers of x are observed more than once")
            result[whose[chosen]] = numbers[chosen]
            taken[whose[chosen]] = True
        if not taken.all():
            raise self._error(
                f"{(~taken).sum()} of the {total} numbers of x cannot be traced to an observed site"
            )
        return result.reshape(self._shape)

    def _of_one_type(self) -> list[tuple[Tensor, ...]]:
        dtype = functools.reduce(torch.promote_types, [read[0].dtype for read in self._reads])
        return [(numbers.to(dtype), *rest) for numbers, *rest in self._reads]

    def _error(self, reason: str) -> ValueError:
        return ValueError(
            f"{reason}. The observed sites are {self._sites}. Pass by_site=True for the mean at "
            "each site, or sample them with pyro_vae.terms(...).predict()."
        )


def _is_by_number(operation) -> bool:
    """Return whether an operation is elementwise and changes the numbers."""
    moves = operation.overloadpacket in _MOVES | _NOT_BY_NUMBER
    return torch.Tag.pointwise in operation.tags and not moves


def _replaced(places: Tensor) -> Tensor:
    return torch.where(places >= 0, -2 - places, places)
