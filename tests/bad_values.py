"""Arrays and numbers that nobody should pass, as strategies of hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

BAD, EITHER, PLAIN = "bad", "either", "plain"


@dataclass
class Array:
    """Something in the place of an array.

    Args:
        value: that thing.
        plain: the same numbers as a contiguous float32 tensor, where they are merely laid out or
            typed otherwise: who takes the one must find what the other gives.
        good: what stands for it where it is refused for a reason: True if it may be accepted.
        how: how it was made, for the message of a failure.
    """

    value: Any
    plain: Tensor | None
    good: bool
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
    *["float32"] * 8,  # which most networks take
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
    "sparse rows": lambda x: x.to_sparse_csr(),
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


@st.composite
def arrays(draw: st.DrawFn, rows: int = 5, columns: int = 4) -> Array:
    """Draw something for data of 0 and 1 of shape (rows, columns)."""
    seed = draw(st.integers(0, 3))
    x = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).round()
    kind = draw(st.sampled_from(["laid out", "laid out", "content", "shape", "dtype", "thing"]))
    if kind == "laid out":
        dtype = draw(st.sampled_from(DTYPES))
        layout = draw(st.sampled_from(LAYOUTS))
        of_torch = draw(st.booleans())
        plain = x[:1].repeat(rows, 1) if layout == "expanded" else x
        how = f"{'tensor' if of_torch else 'array'} of {dtype}, {layout}"
        return Array(laid_out(x, dtype, layout, of_torch), plain, True, how)
    if kind == "content":
        content = draw(st.sampled_from([*CONTENTS]))
        dtype = draw(st.sampled_from(["float32", "float64"]))
        row = draw(st.integers(0, rows - 1))
        x[row, draw(st.integers(0, columns - 1))] = CONTENTS[content]
        finite = bool(torch.isfinite(x).all())
        value = laid_out(x, dtype, "contiguous", draw(st.booleans()))
        return Array(value, x if finite else None, finite, f"{content} in row {row}, {dtype}")
    if kind == "shape":
        shape = draw(
            st.sampled_from(
                [
                    (),
                    (0,),
                    (1,),
                    (rows,),
                    (0, columns),
                    (rows, 0),
                    (rows, 1),
                    (rows, columns + 1),
                    (rows, columns, 1),
                    (1, rows, columns),
                    (rows, 2, columns),
                    (columns, rows),
                    (rows, 1, 1, columns),
                ]
            )
        )
        value = torch.ones(shape)
        if draw(st.booleans()):
            value = value.numpy()
        return Array(value, None, 0 not in shape, f"{type(value).__name__} of shape {shape}")
    if kind == "dtype":
        dtype = draw(st.sampled_from(NO_NUMBERS))
        number = x.numpy().astype("int64" if "date" in dtype else "float32")
        value = number.astype("S1" if dtype == "bytes" else dtype)
        of_torch = "complex" in dtype and draw(st.booleans())
        value = torch.from_numpy(value) if of_torch else value
        return Array(value, None, False, f"{'tensor' if of_torch else 'array'} of {dtype}")
    thing = draw(st.sampled_from([*THINGS]))
    return Array(THINGS[thing](x), None, False, thing)


SCALARS = (
    True,
    False,
    np.bool_(True),
    -1,
    0,
    1,
    2,
    3,
    np.int8(2),
    np.int64(2),
    np.uint64(2),
    2.0,
    2.5,
    0.5,
    -0.5,
    0.0,
    np.float16(0.5),
    np.float32(0.5),
    np.float64(2.0),
    float("nan"),
    np.float32("nan"),
    float("inf"),
    -float("inf"),
    1e-300,
    1e300,
    10**400,
    1j,
    "2",
    "",
    "nan",
    "none",
    b"2",
    None,
    (),
    [2],
    (2, 2),
    [2.5],
    [None],
    {"a": 1},
    {2},
    object,
    torch.tensor(2),
    torch.tensor(0.5),
    torch.tensor([2]),
    torch.ones(2, 2),
    np.array(2),
    np.array([2.0]),
    2 + 0j,
    range(2),
    torch.nn.Identity(),
    torch.relu,
    print,
)
HUGE = (10**15, -(10**15), 2**63, 10**30)


def scalars(huge: bool = False) -> st.SearchStrategy[Any]:
    """Draw something for a number, a name or a flag."""
    return st.sampled_from(SCALARS + HUGE if huge else SCALARS)
