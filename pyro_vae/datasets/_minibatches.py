"""Minibatches of tensors, arrays, tables, a torch Dataset or a DataLoader, with one interface."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

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
from pyro_vae.datasets._columns import KINDS, Column, as_column, as_tensor, finite_rows, native
from pyro_vae.datasets._sparse_rows import SparseRows
from pyro_vae.datasets._unused_columns import columns_taken

Batch: TypeAlias = tuple[Tensor, ...]

if TYPE_CHECKING:

    class Table(Protocol):
        """A DataFrame or a Series of pandas, for type checkers with or without its stubs."""

        def to_numpy(self) -> Any:
            """Return the array of its values."""

    class SparseMatrix(Protocol):
        """A sparse matrix or array of scipy."""

        def tocsr(self) -> Any:
            """Return the matrix in CSR format."""

    Data: TypeAlias = (
        Tensor
        | np.ndarray[Any, Any]
        | Table
        | SparseMatrix
        | tuple[Any, ...]
        | Dataset[Any]
        | DataLoader[Any]
    )
else:
    Data = Any  # each function checks its data itself, with better messages

_ROWS_OF_A_DIGEST = 1000
_NUMBERS_OF_A_BLOCK = 2**20  # of sparse rows that are dense at the same time


class Minibatches:
    """Minibatches ``(x, *covariates)`` of any data, on one device.

    Args:
        data: a tensor, array, DataFrame or sparse matrix x of N rows, a tuple (x, *covariates) of
            these, a torch Dataset with such items, or a DataLoader. A DataLoader keeps its own
            batch size and order. Rows of a ``numpy.memmap`` are read from the file on demand. Rows
            of a sparse matrix are made dense one minibatch at a time, on the device.
        batch_size: number of rows per minibatch. The last minibatch may have fewer. None is
            :func:`default_batch_size`.
        device: device of the minibatches.
        shuffle: whether each pass has a new random order.
        generator: generator of this order. It also seeds the random numbers of a stream.
        transform: function applied to each x on the device, such as dynamic binarization.
        name: name of the data in error messages.
        programs: model and guide. Columns of the data that they do not take are left out.
        joins_last: whether a last minibatch of one row is joined to the minibatch before it.

    Attributes:
        columns: all columns in memory, on the device, or None for a stream.
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
        batch_size: int | None,
        *,
        device: torch.device | str = "cpu",
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        name: str = "data",
        programs: Sequence[Callable[..., Any]] = (),
        joins_last: bool = False,
    ):
        if batch_size is not None:
            batch_size = positive_integer("batch_size", batch_size)
        self.device = torch.device(device)
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be a function of x, got {transform!r}")
        self.transform = transform
        self._shuffle = shuffle
        self._generator = generator
        self.name = name
        self._programs = programs
        self._num_taken: int | None = None
        self._joins_last = joins_last
        self.columns: tuple[Column, ...] | None = None
        self._loader: DataLoader | None = None
        self._begun: _Begun | None = None
        if isinstance(data, DataLoader):
            self._loader = data
            self.batch_size = default_batch_size(None) if batch_size is None else batch_size
        elif isinstance(data, Dataset) and not isinstance(data, TensorDataset):
            streamed = isinstance(data, IterableDataset)
            self.batch_size = self._resolved(batch_size, None if streamed else len(data))
            self._loader = DataLoader(data, self.batch_size, shuffle=None if streamed else shuffle)
        else:
            given = _columns(data, name)
            columns = self._taken(given)
            if not columns:
                raise ValueError(f"{name} is an empty tuple: pass x or (x, *covariates)")
            self._set_columns(columns, batch_size)
            shapes = map(np.shape, given[len(columns) :])  # also of columns that are not taken
            _require_one_length([self.num_data, *(shape[0] for shape in shapes if shape)], name)

    def _set_columns(self, columns: Sequence[Any], batch_size: int | None) -> None:
        on_disk = any(isinstance(column, np.memmap) for column in columns)
        named = [(column, _column_name(self.name, i)) for i, column in enumerate(columns)]
        columns = tuple(
            column if isinstance(column, np.memmap) else as_column(column, name).to(self.device)
            for column, name in named
        )
        _require_one_length(map(len, columns), self.name)
        self.batch_size = self._resolved(batch_size, len(columns[0]))
        if not on_disk:
            self.columns = columns
            return
        rows = _RowsOnDisk(columns, self.name)
        shuffle = self._shuffle and self.batch_size < len(rows)
        order = RandomSampler(rows) if shuffle else SequentialSampler(rows)
        sampler = BatchSampler(order, self.batch_size, drop_last=False)
        self._loader = DataLoader(rows, sampler=sampler, batch_size=None)

    def _resolved(self, batch_size: int | None, num_data: int | None) -> int:
        """Return the batch size. If only one row would be left, it is the number of rows."""
        size = default_batch_size(num_data) if batch_size is None else batch_size
        return num_data if self._leaves_one(num_data, size) and num_data == size + 1 else size

    def _leaves_one(self, num_data: int | None, size: int) -> bool:
        """Return whether a last minibatch of one row is joined to the one before."""
        return self._joins_last and num_data is not None and num_data > size > num_data % size == 1

    def _taken(self, columns: Sequence[Any]) -> Sequence[Any]:
        """Return the columns that the programs take, and warn if there are others."""
        if self._num_taken is None:
            self._num_taken = len(columns_taken(self._programs, columns))
        return columns[: self._num_taken]

    @property
    def num_data(self) -> int | None:
        """The number of rows, or None for a stream of unknown length."""
        if self.columns is not None:
            return len(self.columns[0])
        try:
            return len(self._loader.dataset)
        except TypeError:
            return None

    @property
    def is_sharded(self) -> bool:
        """Whether a DistributedSampler gives each process its own rows."""
        return any(isinstance(s, DistributedSampler) for s in _samplers(self._loader))

    @property
    def columns_to_validate(self) -> tuple[Column, ...] | None:
        """All columns, as the model and guide get them, or None if streamed or transformed."""
        return self.columns if self.transform is None else None

    @property
    def num_batches(self) -> int | None:
        """The number of minibatches per pass, or None for a stream."""
        if self.columns is None:
            return None
        count, size = self.num_data, self.batch_size
        return -(-count // size) - self._leaves_one(count, size)

    @property
    def sizes(self) -> list[int] | None:
        """The usual minibatch size, and the size of the last minibatch if it differs.

        None if the sizes are unknown before the pass.
        """
        count, size, drop_last = self.num_data, self.batch_size, False
        if self.columns is None:
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
        if self._leaves_one(count, size) and not drop_last:
            return [size, size + 1] if count > size + 1 else [size + 1]
        return [size, rest] if rest and not drop_last else [size]

    def nonfinite_rows(self) -> Tensor | None:
        """Return the indices of the rows with NaN or infinite values, or None for a stream."""
        if self.columns is None:
            return None
        finite = [finite_rows(column) for column in self.columns]
        return (~torch.stack(finite).all(0)).nonzero()[:, 0]

    def in_memory(self) -> tuple[Column, ...]:
        """Return all rows, transformed. A stream is read once.

        A sparse matrix stays sparse if there is no transform.
        """
        if self.columns is not None and self.transform is None:
            return tuple(c if isinstance(c, SparseRows) else c.clone() for c in self.columns)
        self.first()
        return tuple(torch.cat(columns) for columns in zip(*self, strict=True))

    def blocks(self) -> Iterator[tuple[int, Batch]]:
        """Yield all columns in memory as dense blocks, each with the number of rows before it.

        Dense columns are one block. Each block of sparse rows has whole minibatches.
        """
        sparse = [column for column in self.columns if isinstance(column, SparseRows)]
        size = self.num_data
        if sparse:
            width = self.batch_size * sum(column.shape[1] for column in sparse)
            size = self.batch_size * max(1, _NUMBERS_OF_A_BLOCK // width)
        for start in range(0, self.num_data, size):
            yield start, tuple(column[start : start + size] for column in self.columns)

    def digest(self) -> str | None:
        """Return a hash of the dtypes, shapes and first rows, or None for a stream."""
        if self.columns is None:
            return None
        found = hashlib.sha256()
        for column in self.columns:
            found.update(f"{column.dtype} {tuple(column.shape)}".encode())
            count = min(len(column), _ROWS_OF_A_DIGEST)
            for start in range(0, count, 100):
                rows = column[start : min(start + 100, count)].detach().cpu().contiguous()
                found.update(rows.reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def first(self) -> Batch:
        """Return the first minibatch, unshuffled. The next pass of a stream starts with it."""
        if self.columns is not None:
            return self._transformed(c[: self.batch_size].clone() for c in self.columns)
        if self._begun is None:
            self._begun = _Begun(self._stream())
        return self._transformed(column.clone() for column in self._begun.first)

    def spread(self) -> Batch:
        """Return a minibatch of evenly spaced rows, or the first minibatch of a stream."""
        if self.columns is None:
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
        parts = order.split(self.batch_size)
        if self._leaves_one(self.num_data, self.batch_size):
            parts = (*parts[:-2], order[-self.batch_size - 1 :])
        yield from ((rows,) for rows in parts[start:])

    def prepare(self, *selection: Tensor) -> Batch:
        """Return the minibatch of a selection, with x transformed."""
        return self.assemble(*self.read(*selection))

    def read(self, *selection: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs of :meth:`assemble`.

        The number of values in sparse rows differs between minibatches, so that a captured step
        cannot read them. They become dense here.
        """
        if not self._is_sparse:
            return selection
        (rows,) = selection
        return tuple(column[rows] for column in self.columns)

    def assemble(self, *inputs: Tensor) -> Batch:
        """Gather a minibatch and transform its x, with tensor operations alone."""
        if self.columns is None or self._is_sparse:
            return self._transformed(inputs)
        (rows,) = inputs
        return self._transformed(column[rows] for column in self.columns)

    @property
    def _is_sparse(self) -> bool:
        return any(isinstance(column, SparseRows) for column in self.columns or ())

    def _generators(self) -> list[torch.Generator]:
        sources = [self._loader, *_samplers(self._loader)]
        own = [getattr(source, "generator", None) for source in sources]
        found = [g for g in (self._generator, *own) if g is not None]
        return list({id(generator): generator for generator in found}.values())

    def _stream(self) -> Iterator[Batch]:
        batches = _joined(self._read_all()) if self._joins_last else self._read_all()
        rows = 0
        for columns in batches:
            found = tuple(column.to(self.device, non_blocking=True) for column in columns)
            if self.check_nonfinite is not None and not all(
                bool(finite_rows(column).all()) for column in columns
            ):
                self._check_nonfinite(found, rows)
            rows += len(found[0])
            yield found
        if not rows:
            raise ValueError(
                f"{self.name} is empty: its loader yields no minibatch. Use a stream that can be "
                "read several times."
            )

    def _read_all(self) -> Iterator[Batch]:
        """Yield the minibatches of the loader."""
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
        while True:
            with sequence():
                batch = self._next(stream)
            if batch is None:
                break
            if isinstance(batch, Mapping):
                raise ValueError(  # noqa: TRY004 - bad data are a ValueError throughout
                    f"{self.name} yields minibatches that are dictionaries, with the keys "
                    f"{[*batch]}. Programs take columns in order: return a tuple (x, *covariates) "
                    "from the Dataset, or from the collate_fn of a DataLoader"
                )
            columns = self._taken(batch if isinstance(batch, tuple | list) else (batch,))
            yield tuple(
                as_tensor(column, _column_name(self.name, i), finite=False)
                for i, column in enumerate(columns)
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
        if self.transform is None:
            return (x, *covariates)
        count, x = len(x), self.transform(x)
        if not isinstance(x, Tensor):
            raise TypeError(f"transform must return x as a tensor, got {type(x).__name__}")
        if x.shape[:1] != (count,):
            raise ValueError(
                f"transform must return as many rows as it got, {count}, but returned shape "
                f"{tuple(x.shape)}"
            )
        return (x, *covariates)


class _RowsOnDisk(Dataset):
    """Columns, some of them in files, that are read one minibatch of row indices at a time."""

    def __init__(self, columns: Sequence[Any], name: str):
        for i, column in enumerate(columns):
            as_tensor(column[:1], _column_name(name, i), finite=False)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, rows: list[int]) -> Batch:
        return tuple(torch.as_tensor(native(column[rows], "data")) for column in self._columns)


def default_batch_size(num_data: int | None) -> int:
    """Return the batch size of a fit for a number of rows, or for an unknown number."""
    if num_data is None or not 100 < num_data < 1000:
        return 100
    return num_data // 10


def _columns(data: Data, name: str) -> Sequence[Any]:
    if isinstance(data, list):
        kind = "list" if not data else f"list of {type(data[0]).__name__}"
        raise ValueError(  # noqa: TRY004 - bad data are a ValueError throughout
            f"{name} must be {KINDS}, got a {kind}. Pass torch.tensor(rows) for rows of numbers, "
            "torch.stack(rows) or numpy.stack(rows) for rows of tensors or arrays, torch.cat or "
            "numpy.concatenate for minibatches, and a tuple (x, *covariates) for columns"
        )
    columns = data.tensors if isinstance(data, TensorDataset) else data
    return columns if isinstance(columns, tuple) else (columns,)


def _joined(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Join each minibatch of one row to the larger minibatch before it."""
    held: Batch | None = None
    for batch in batches:
        if held is not None and len(batch[0]) == 1 < len(held[0]):
            yield tuple(map(torch.cat, zip(held, batch, strict=True)))
            held = None
            continue
        if held is not None:
            yield held
        held = batch
    if held is not None:
        yield held


def _column_name(name: str, number: int) -> str:
    return name if number == 0 else f"{name} covariate {number}"


def _require_one_length(lengths: Iterable[int], name: str) -> None:
    lengths = list(lengths)
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
