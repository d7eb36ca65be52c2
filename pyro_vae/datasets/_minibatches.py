"""Minibatches of tensors, arrays, a torch Dataset or a DataLoader, with one interface."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from torch.utils.data.distributed import DistributedSampler

from pyro_vae._utils.checks import positive_integer
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.random import OwnSequence, random_state, set_random_state

Batch: TypeAlias = tuple[Tensor, ...]
Data: TypeAlias = Any  # Tensor | ndarray | tuple of these | Dataset | DataLoader

_ROWS_OF_A_DIGEST = 1000
_KINDS = "a tensor, a numpy array, a tuple of these, a torch Dataset or a DataLoader"


class Minibatches:
    """Minibatches ``(x, *covariates)`` of any data, on one device.

    Args:
        data: a tensor or array x of N rows, a tuple (x, *covariates) of these, a torch Dataset
            with such items, or a DataLoader. A DataLoader keeps its own batch size and order.
            Rows of a ``numpy.memmap`` are read from the file on demand.
        batch_size: number of rows per minibatch. The last minibatch may have fewer.
        device: device of the minibatches.
        shuffle: whether each pass has a new random order.
        generator: generator of this order. It also seeds the random numbers of a stream.
        transform: function applied to each x on the device, such as dynamic binarization.
        name: name of the data in error messages.

    Attributes:
        values_checked: whether each value is known to lie in the support of the site that
            observes it; ``validation.check_pair`` sets it.
        check_nonfinite: called with each minibatch of a stream that holds NaN or infinite values,
            and the number of rows before it; ``validation.check_pair`` sets it.

    Raises:
        TypeError: ``transform`` is not callable.
        ValueError: The data have no rows, or the lengths differ, or the type of the data is not
            supported.
    """

    values_checked = False
    check_nonfinite: Callable[[Batch, int], None] | None = None

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        name: str = "data",
    ):
        self.batch_size = positive_integer("batch_size", batch_size)
        self.device = torch.device(device)
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be a function of x, got {transform!r}")
        self.transform = transform
        self._shuffle = shuffle
        self._generator = generator
        self.name = name
        self.tensors: Batch | None = None
        self._loader: DataLoader | None = None
        self._begun: _Begun | None = None
        if isinstance(data, DataLoader):
            self._loader = data
        elif isinstance(data, Dataset) and not isinstance(data, TensorDataset):
            streamed = isinstance(data, IterableDataset)
            self._loader = DataLoader(
                data,
                batch_size,
                shuffle=None if streamed else shuffle,
            )
        elif any(isinstance(column, np.memmap) for column in _columns(data, name)):
            rows = _RowsOnDisk(_columns(data, name), name)
            shuffle = shuffle and self.batch_size < len(rows)
            order = RandomSampler(rows) if shuffle else SequentialSampler(rows)
            self._loader = DataLoader(
                rows, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None
            )
        else:
            columns = _columns(data, name)
            self.tensors = tuple(
                as_tensor(column, _column_name(name, i), finite=False).to(self.device)
                for i, column in enumerate(columns)
            )
            if not columns:
                raise ValueError(f"{name} is an empty tuple: pass x or (x, *covariates)")
            _require_one_length(self.tensors, name)

    @property
    def num_data(self) -> int | None:
        """The number of rows, or None for a stream of unknown length."""
        if self.tensors is not None:
            return len(self.tensors[0])
        try:
            return len(self._loader.dataset)
        except TypeError:
            return None

    @property
    def is_sharded(self) -> bool:
        """Whether a DistributedSampler gives each process its own rows."""
        return any(isinstance(s, DistributedSampler) for s in _samplers(self._loader))

    @property
    def columns_to_validate(self) -> Batch | None:
        """All columns, as the model and guide get them, or None if streamed or transformed."""
        return self.tensors if self.transform is None else None

    @property
    def num_batches(self) -> int | None:
        """The number of minibatches per pass, or None for a stream."""
        return None if self.tensors is None else -(-self.num_data // self.batch_size)

    @property
    def sizes(self) -> list[int] | None:
        """The usual minibatch size, and the size of the last minibatch if it differs.

        None if the sizes are unknown before the pass.
        """
        count, size, drop_last = self.num_data, self.batch_size, False
        if self.tensors is None:
            sampler = next(
                (s for s in _samplers(self._loader) if isinstance(s, BatchSampler)), None
            )
            try:
                count = len(sampler.sampler)
            except (AttributeError, TypeError):
                return None
            size, drop_last = sampler.batch_size, sampler.drop_last
        size = min(size, count)
        rest = count % size if size else 0
        return [size, rest] if rest and not drop_last else [size]

    def nonfinite_rows(self) -> Tensor | None:
        """Return the indices of the rows with NaN or infinite values, or None for a stream."""
        if self.tensors is None:
            return None
        finite = [finite_rows(column) for column in self.tensors]
        return (~torch.stack(finite).all(0)).nonzero()[:, 0]

    def in_memory(self) -> Batch:
        """Return all rows as tensors. A stream is read once."""
        if self.tensors is not None:
            return self._transformed(column.clone() for column in self.tensors)
        self.first()
        return tuple(torch.cat(columns) for columns in zip(*self, strict=True))

    def digest(self) -> str | None:
        """Return a hash of the dtypes, shapes and first rows, or None for a stream."""
        if self.tensors is None:
            return None
        found = hashlib.sha256()
        for column in self.tensors:
            rows = column[:_ROWS_OF_A_DIGEST].detach().cpu().contiguous()
            found.update(f"{column.dtype} {tuple(column.shape)}".encode())
            found.update(rows.reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def first(self) -> Batch:
        """Return the first minibatch, unshuffled. The next pass of a stream starts with it."""
        if self.tensors is not None:
            return self._transformed(c[: self.batch_size].clone() for c in self.tensors)
        if self._begun is None:
            self._begun = _Begun(self._stream())
        return self._transformed(column.clone() for column in self._begun.first)

    def spread(self) -> Batch:
        """Return a minibatch of evenly spaced rows, or the first minibatch of a stream."""
        if self.tensors is None:
            return self.first()
        size = min(self.batch_size, self.num_data)
        rows = torch.linspace(0, self.num_data - 1, size, dtype=torch.float64).long()
        return self.prepare(rows.to(self.device))

    def __iter__(self) -> Iterator[Batch]:
        return (self.prepare(*selection) for selection in self.selections())

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the states of the generators that give the order of the next pass."""
        return {"order": [generator.get_state() for generator in self._generators()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the next pass the order that :meth:`state_dict` returned."""
        for generator, value in zip(self._generators(), state["order"], strict=True):
            generator.set_state(value)

    def manual_seed(self, seed: int) -> None:
        """Give the next pass the order of a seed, and let it begin with the first minibatch."""
        self._begun = None
        for generator in self._generators():
            generator.manual_seed(seed)

    def selections(self, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield the inputs of :meth:`prepare`, on the device.

        For tensors, they are the row indices of a minibatch. For a stream, they are its columns.

        Args:
            start: number of minibatches of the pass to skip.
        """
        if self._loader is not None:
            begun, self._begun = self._begun, None
            stream = self._stream() if begun is None else begun
            yield from itertools.islice(stream, start, None)
            return
        # Keep the order of a full batch, because a guide may have one parameter per position.
        if self._shuffle and self.batch_size < self.num_data:
            order = torch.randperm(self.num_data, generator=self._generator).to(self.device)
        else:
            order = torch.arange(self.num_data, device=self.device)
        if len(rest := order[start * self.batch_size :]):
            yield from ((rows,) for rows in rest.split(self.batch_size))

    def prepare(self, *selection: Tensor) -> Batch:
        """Gather a minibatch and transform its x, with tensor operations alone."""
        if self.tensors is None:
            return self._transformed(selection)
        (rows,) = selection
        return self._transformed(column[rows] for column in self.tensors)

    def _generators(self) -> list[torch.Generator]:
        sources = [self._loader, *_samplers(self._loader)]
        own = [getattr(source, "generator", None) for source in sources]
        found = [g for g in (self._generator, *own) if g is not None]
        return list({id(generator): generator for generator in found}.values())

    def _stream(self) -> Iterator[Batch]:
        sequence = contextlib.nullcontext
        if self._generator is not None:
            # A stream has its own random sequence, apart from the noise of the training steps. So a
            # pass can be repeated, or resumed from its middle.
            seed = torch.randint(2**62, (), generator=self._generator).item()
            sequence = OwnSequence(seed)
            for sampler in _samplers(self._loader):
                if isinstance(sampler, DistributedSampler):
                    sampler.set_epoch(seed % 2**31)
        with sequence():
            stream = iter(self._loader)
        rows = 0
        while True:
            with sequence():
                batch = self._next(stream)
            if batch is None:
                break
            columns = batch if isinstance(batch, tuple | list) else (batch,)
            columns = [
                as_tensor(column, _column_name(self.name, i), finite=False)
                for i, column in enumerate(columns)
            ]
            found = tuple(column.to(self.device, non_blocking=True) for column in columns)
            if self.check_nonfinite is not None and not _all_finite(columns):
                self._check_nonfinite(found, rows)
            rows += len(found[0])
            yield found
        if not rows:
            raise ValueError(
                f"{self.name} is empty: its loader yields no minibatch. Use a stream that can be "
                "read several times."
            )

    def _next(self, stream: Iterator[Any]) -> Any:
        try:
            return next(stream, None)
        except TypeError as error:
            if "collate" not in str(error):
                raise
            raise ValueError(
                f"{self.name} has items that torch's DataLoader cannot collate: "
                f"{first_line(error)}. Return tensors or numpy arrays from the Dataset, or pass "
                "a DataLoader with a collate_fn"
            ) from error

    def _check_nonfinite(self, columns: Batch, row_offset: int) -> None:
        noise = random_state(self.device)
        try:
            self.check_nonfinite(self._transformed(c.clone() for c in columns), row_offset)
        finally:
            set_random_state(noise, self.device)

    def _transformed(self, columns: Iterable[Tensor]) -> Batch:
        """Return the columns with x transformed. The transform may modify x in place."""
        x, *covariates = columns
        return (x if self.transform is None else self.transform(x), *covariates)


class _RowsOnDisk(Dataset):
    """Columns, some of them in files, that are read one minibatch of row indices at a time."""

    def __init__(self, columns: Sequence[Any], name: str):
        for i, column in enumerate(columns):
            as_tensor(column[:1], _column_name(name, i), finite=False)
        _require_one_length(columns, name)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, rows: list[int]) -> Batch:
        return tuple(torch.as_tensor(_native(column[rows], "data")) for column in self._columns)


def _columns(data: Data, name: str) -> Sequence[Any]:
    if isinstance(data, list):
        raise ValueError(  # noqa: TRY004 - bad data are a ValueError throughout
            f"{name} must be {_KINDS}, got a list. For rows, pass torch.stack(rows); for "
            "minibatches, torch.cat(minibatches); for columns, a tuple (x, *covariates)"
        )
    columns = data.tensors if isinstance(data, TensorDataset) else data
    return columns if isinstance(columns, tuple) else (columns,)


def _column_name(name: str, number: int) -> str:
    return name if number == 0 else f"{name} covariate {number}"


def _require_one_length(columns: Sequence[Any], name: str) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1:
        raise ValueError(f"{name} and its covariates must be of one length, got {lengths}")


def _samplers(loader: DataLoader | None) -> list[Any]:
    batches = getattr(loader, "batch_sampler", None)
    return [getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]


class _Begun:
    """A started pass over a stream, with its first minibatch kept."""

    def __init__(self, stream: Iterator[Batch]):
        self.first = next(stream)
        self._rest = stream

    def __iter__(self) -> Iterator[Batch]:
        yield self.first
        yield from self._rest


def _native(values: np.ndarray | Tensor, name: str) -> np.ndarray | Tensor:
    """Return an array of numbers in the native byte order."""
    if isinstance(values, Tensor):
        return values
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise ValueError(f"{name} must hold numbers, got dtype {values.dtype}")
    if np.ma.is_masked(values):
        raise ValueError(
            f"{name} has masked values: fill them, or replace them by NaN and see "
            "docs/missing-data.md"
        )
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def as_tensor(values: Any, name: str, *, finite: bool = True) -> Tensor:
    """Return one column of data as a tensor with N >= 1 rows.

    Args:
        values: tensor or numpy array (N, ...).
        name: name of the column in error messages.
        finite: whether NaN and infinite values raise a ValueError.

    Raises:
        ValueError: The values are not a dense tensor or numpy array of real numbers, or have no
            rows. With ``finite``, they include NaN or infinity.
    """
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.array(_native(values, name)))  # a copy: it may be read-only
    if not isinstance(values, Tensor):
        raise ValueError(  # noqa: TRY004 - bad data are a ValueError throughout
            f"{name} must be {_KINDS}, got {type(values).__name__}"
        )
    if values.layout != torch.strided or values.is_nested or values.is_quantized:
        raise ValueError(f"{name} must be dense, got layout {values.layout}: use to_dense()")
    if values.is_complex() or values.is_meta:
        raise ValueError(
            f"{name} must hold real numbers, got dtype {values.dtype} on device {values.device}"
        )
    values = values.detach()
    if values.is_inference() and not torch.is_inference_mode_enabled():
        values = values.clone()  # autograd can use a clone
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):  # few operations support them
        values = values.to(torch.int64)
        if (values < 0).any():
            raise ValueError(f"{name} must hold numbers below 2**63, got larger ones")
    if values.dim() == 0 or len(values) == 0 or values.numel() == 0:
        raise ValueError(
            f"{name} is empty: expected shape (N, *event) with N >= 1, got {tuple(values.shape)}"
        )
    if finite and not (rows := finite_rows(values)).all():
        row = (~rows).nonzero()[0].item()
        raise ValueError(
            f"{name} has NaN or infinite values, first in row {row}: remove or impute them"
        )
    return values


def _all_finite(columns: Sequence[Tensor]) -> bool:
    return all(bool(finite_rows(column).all()) for column in columns)


def finite_rows(values: Tensor) -> Tensor:
    """Return True for each row whose numbers are all finite, shape (N,)."""
    if not values.is_floating_point() or values.sum().isfinite():  # the sum is a fast test
        return values.new_ones(len(values), dtype=torch.bool)
    return torch.isfinite(values).flatten(1).all(1) if values.dim() > 1 else values.isfinite()
