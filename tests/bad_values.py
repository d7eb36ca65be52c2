"""Bad values of data and of every other argument."""

from __future__ import annotations

import functools
import itertools
import numbers
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor


@dataclass
class Array:
    """A value to pass as data: an array or another object.

    Args:
        value: the value itself.
        plain: the same numbers as a contiguous float32 tensor, or None. A call that accepts
            ``value`` must return the same result for ``plain``.
        good: whether the value is valid; None if that depends on the function.
        how: the name of the case, for failure messages.
    """

    value: Any
    plain: Tensor | None
    good: bool | None
    how: str

    def __repr__(self) -> str:
        return self.how


DTYPES = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
)
NO_NUMBERS = ("complex64", "complex128", "object", "str", "datetime64[s]", "bytes")
LAYOUTS = (
    "contiguous",
    "transposed",
    "reversed",
    "strided",
    "read-only",
    "expanded",
    "swapped",
    "offset",
    "requires grad",
    "parameter",
)
THINGS = {
    "none": lambda x: None,
    "string": lambda x: "x",
    "number": lambda x: 1.0,
    "list": lambda x: x.tolist(),
    "nested tuple": lambda x: tuple(map(tuple, x.tolist())),
    "dictionary": lambda x: {"x": x},
    "empty tuple": lambda x: (),
    "set": lambda x: {1.0},
    "function": lambda x: torch.ones_like,
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: sp.csr_array(x.numpy()),
    "table": lambda x: pd.DataFrame(x.numpy()),
    "meta": lambda x: x.to("meta"),
    "nested tensor": lambda x: torch.nested.nested_tensor([x[0], x[0, :2]]),
    "masked array": lambda x: np.ma.masked_array(x.numpy(), x.numpy() > 0),
    "records": lambda x: np.zeros(len(x), dtype=[("a", "f4"), ("b", "f4")]),
    "long double": lambda x: x.numpy().astype(np.longdouble),
}
CONTENTS = {
    "nan": float("nan"),
    "infinite": float("inf"),
    "minus infinite": float("-inf"),
    "huge": 1e30,
    "largest": 3e38,
    "tiny": 1e-30,
    "denormal": 1e-42,
    "negative": -1.0,
    "half": 0.5,
    "two": 2.0,
    "large count": 300.0,
}


def laid_out(x: Tensor, dtype: str, layout: str, torch_tensor: bool) -> Any:
    """Return the numbers of a contiguous float tensor in another type and layout."""
    array = x.numpy().astype(dtype)
    if layout == "transposed":
        array = np.array(array.T, order="C").T
    elif layout == "reversed":
        array = array[::-1].copy()[::-1]
    elif layout == "strided":
        array = np.repeat(array, 2, 0)[::2]
    elif layout == "offset":
        array = np.concatenate([array, array])[len(array) :]
    elif layout == "read-only":
        array = array.copy()
        array.setflags(write=False)
    elif layout == "expanded":
        array = np.broadcast_to(array[:1], array.shape)
    elif layout == "swapped" and not torch_tensor:
        array = array.astype(array.dtype.newbyteorder())
    if not torch_tensor:
        return array
    if layout == "expanded":
        return torch.from_numpy(array[:1].copy()).expand(array.shape)
    if layout == "reversed":  # torch has no negative strides
        return torch.from_numpy(array.copy())
    if layout == "transposed":
        return torch.from_numpy(array.T.copy()).mT
    tensor = torch.from_numpy(array.copy() if layout in ("read-only", "swapped") else array)
    if tensor.is_floating_point() and layout == "requires grad":
        return tensor.requires_grad_()
    if tensor.is_floating_point() and layout == "parameter":
        return torch.nn.Parameter(tensor)
    return tensor


SHAPES = (
    *((), (0,), (1,), (5,), (0, 4), (5, 0), (5, 1), (5, 5), (5, 4, 1), (1, 5, 4), (5, 2, 4)),
    *((4, 5), (5, 1, 1, 4)),
)


def _with(x: Tensor, place: int, value: float) -> Tensor:
    x.view(-1)[place * 7 % x.numel()] = value
    return x


def _array(x: Tensor, dtype: str) -> Array:
    array = x.numpy().astype("int64" if "date" in dtype else "float32")
    return array.astype("S1" if dtype == "bytes" else dtype)


def _cases() -> dict[str, tuple[Callable[[Tensor, int], Any], bool | None, bool]]:
    """Return (make, valid, same) by the name of each case.

    ``make`` creates the value from x. ``same`` is whether the value has the numbers of x.
    ``valid`` is None if only some functions accept the value, such as another dtype.
    """
    found: dict[str, Any] = {}
    for kind, of_torch in (("tensor", True), ("array", False)):
        for dtype, layout in itertools.product(DTYPES, LAYOUTS):
            valid = True if dtype == "float32" else None
            make = functools.partial(laid_out, dtype=dtype, layout=layout, torch_tensor=of_torch)
            found[f"{kind} of {dtype}, {layout}"] = (lambda x, i, f=make: f(x), valid, True)
        for content, dtype in itertools.product(CONTENTS, ("float32", "float64")):
            value = CONTENTS[content]
            make = functools.partial(laid_out, dtype=dtype, layout="", torch_tensor=of_torch)
            valid = None if np.isfinite(value) else False
            found[f"{kind} of {dtype}, {content}"] = (
                lambda x, i, f=make, v=value: f(_with(x, i, v)),
                valid,
                False,
            )
        for shape in SHAPES:
            found[f"{kind} of shape {shape}"] = (
                lambda x, i, s=shape, t=of_torch: torch.ones(s) if t else np.ones(s, np.float32),
                False if 0 in shape else None,
                False,
            )
    for dtype in NO_NUMBERS:
        found[f"array of {dtype}"] = (lambda x, i, d=dtype: _array(x, d), False, False)
        if "complex" in dtype:
            found[f"tensor of {dtype}"] = (
                lambda x, i, d=dtype: torch.from_numpy(_array(x, d)),
                False,
                False,
            )
    valid = dict.fromkeys(("sparse", "sparse rows", "table"))  # where data may be sparse or a table
    return found | {
        name: (lambda x, i, f=f: f(x), valid.get(name, False), name in valid)
        for name, f in THINGS.items()
    }


CASES = _cases()


def make_array(name: str, seed: int) -> Array:
    """Make the value of a case from random data of 0 and 1, of shape (5, 4)."""
    make, good, same = CASES[name]
    x = torch.rand(5, 4, generator=torch.Generator().manual_seed(seed)).round()
    plain = (x[:1].repeat(5, 1) if "expanded" in name else x.clone()) if same else None
    return Array(make(x, seed), plain, good, name)


NAN, INF = float("nan"), float("inf")
# Values to pass as a number, a name, a flag, a sequence, a program or an object.
ODD = (
    *(True, False, np.bool_(True), None, 1j, 2 + 0j, b"2", object, print, range(2)),
    *(-1, 0, 1, 2, 3, np.int8(2), np.int64(2), np.uint64(2), 2**63, -(10**15), 10**30, 10**400),
    *(2.0, 2.5, 0.5, -0.5, 0.0, np.float16(0.5), np.float32(0.5), np.float64(2.0), 1e-300, 1e300),
    *(NAN, np.float32("nan"), INF, -INF, "2", "", "nan", "none"),
    *((), [2], (2, 2), [2.5], [None], [True], [-1], [0], [NAN], [10**30], {"a": 1}, {2}),
    *(torch.tensor(2), torch.tensor(0.5), torch.tensor([2]), torch.ones(2, 2)),
    *(np.array(2), np.array([2.0]), torch.nn.Identity(), torch.relu),
)


def accepts(hint: Any, value: Any) -> bool:
    """Return whether a value has the type of an annotation."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(each, value) for each in inside)
    if hint is Any or hint is type(None):
        return hint is Any or value is None
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint is torch.device:
        return accepts(int, value) or isinstance(value, hint)
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if hint is Tensor:
        return isinstance(value, Tensor | np.ndarray)
    if origin is typing.Literal:
        return isinstance(value, str) and value in inside
    if origin is Callable or hint is torch.nn.Module:
        return callable(value)
    if origin in (Sequence, tuple):
        rows = value.tolist() if isinstance(value, np.ndarray) and value.ndim == 1 else value
        kind = isinstance(rows, Sequence) and not isinstance(rows, str | bytes)
        return kind and all(accepts(inside[0], each) for each in rows)
    return isinstance(value, origin or hint)


def is_out_of_range(value: Any, least: float = -INF) -> bool:
    """Return whether any number is NaN, too large for torch, or below ``least``."""
    if isinstance(value, tuple | list | range):
        return any(is_out_of_range(each, least) for each in value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    limit = 2**63 if isinstance(value, numbers.Integral) else 3.4e38
    return not least <= value < limit


def equals_of(value: Any) -> list[Any]:
    """Return the same number, flag or sequence as objects of other types."""
    if isinstance(value, bool):
        return [np.bool_(value)]
    if isinstance(value, int):
        return [kind(value) for kind in (np.int64, np.uint8)]
    if isinstance(value, float):
        return [np.float64(value), np.float32(value)]
    if isinstance(value, tuple | list):
        return [list(value), tuple(value)]
    return []
