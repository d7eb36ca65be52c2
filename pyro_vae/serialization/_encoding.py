"""Encode nested structures as JSON and tensors.

A value that JSON lacks is an object with one key, which starts with ``$``:

========================  ===========================================================
``{"$tensor": name}``     a tensor in the file of tensors
``{"$array": name}``      the same, as a numpy array
``{"$tuple": [...]}``     a tuple
``{"$dict": [[k, v]]}``   a dictionary with keys that JSON would change
``{"$int": "0x..."}``     an integer of more than 64 bits
``{"$float": "inf ..."}`` a NaN or infinite number, and its bits
========================  ===========================================================
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_DEPTH = 100  # maximum nesting of lists and dictionaries
RESERVED = "__metadata__"  # not allowed as a tensor's name in a safetensors file
DTYPES = frozenset({
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32,
    torch.uint64, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
})  # fmt: skip


def encode(content: Mapping[Any, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Split a structure into a JSON value and its tensors.

    Returns:
        The JSON value, and the tensors by name. Tensors are on the CPU and contiguous, and share no
        memory.

    Raises:
        TypeError: The structure has a value of an unsupported type. The message gives its path.
        ValueError: The structure is nested more than 100 deep, or contains itself.
    """
    encoder = _Encoder()
    return encoder.encode(content, ()), encoder.tensors


def decode(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the structure that :func:`encode` has split.

    Raises:
        ValueError: The arguments are not an output of :func:`encode`.
    """
    waiting = dict(tensors)
    content = _decode(plain, waiting, depth=0)
    if waiting:
        raise ValueError(f"the tensor {next(iter(waiting))!r} is not in the record")
    return content


class _Encoder:
    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self._places: set[int] = set()  # addresses of the tensors' memory

    def encode(self, thing: Any, path: tuple[Any, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise ValueError(
                f"{described(path[:3])}... is nested more than {MAX_DEPTH} deep, or contains itself"
            )
        # Numbers of numpy and of subclasses of these types are restored as these types.
        if isinstance(thing, np.bool_):
            return bool(thing)
        if thing is None or isinstance(thing, bool):
            return thing
        if isinstance(thing, str):
            return str.__str__(thing)
        if isinstance(thing, int | np.integer):
            thing = int(thing)
            return thing if -(2**63) <= thing < 2**63 else {"$int": hex(thing)}
        if isinstance(thing, float | np.floating):
            thing = float(thing)
            return thing if math.isfinite(thing) else {"$float": _non_finite(thing)}
        if isinstance(thing, Tensor):
            return {"$tensor": self._keep(_plain_tensor(thing, path), path)}
        if isinstance(thing, np.ndarray):
            return {"$array": self._keep(_tensor_of_array(thing, path), path)}
        if isinstance(thing, tuple):
            return {"$tuple": self._encode_all(enumerate(thing), path)}
        if isinstance(thing, list):
            return self._encode_all(enumerate(thing), path)
        if isinstance(thing, Mapping):
            return self._encode_mapping(thing, path)
        raise TypeError(
            f"{described(path)} is {_kind_of(thing)}: only dictionaries, lists, tuples, strings, "
            "numbers, None, tensors and numpy arrays can be saved"
        )

    def _encode_all(self, pairs: Iterable[tuple[Any, Any]], path: tuple[Any, ...]) -> list[Any]:
        return [self.encode(value, (*path, key)) for key, value in pairs]

    def _encode_mapping(self, things: Mapping[Any, Any], path: tuple[Any, ...]) -> Any:
        for key in things:
            if isinstance(key, bool) or not isinstance(key, str | int | np.integer):
                raise TypeError(
                    f"{described(path)} has the key {key!r}, {_kind_of(key)}: keys must be strings "
                    "or integers"
                )
        values = self._encode_all(things.items(), path)
        if all(isinstance(key, str) and not key.startswith("$") for key in things):
            return {str.__str__(key): value for key, value in zip(things, values, strict=True)}
        keys = [self.encode(key, path) for key in things]
        return {"$dict": [list(pair) for pair in zip(keys, values, strict=True)]}

    def _keep(self, tensor: Tensor, path: tuple[Any, ...]) -> str:
        place = tensor.untyped_storage().data_ptr()
        self.tensors[name := self._name(path)] = tensor.clone() if place in self._places else tensor
        self._places.add(place)
        return name

    def _name(self, path: tuple[Any, ...]) -> str:
        name = "/".join(map(str, path)).encode("utf-8", "replace").decode("utf-8")
        numbered = (f"{name}#{number}" for number in itertools.count(2))
        candidates = itertools.chain([name], numbered)
        return next(n for n in candidates if n not in self.tensors and n != RESERVED)


def described(path: tuple[Any, ...]) -> str:
    """Return the Python expression for a path in the structure, whose keys are named first."""
    first, *rest = path or ("content",)
    return f"{first}" + "".join(f"[{key!r}]" for key in rest)


def _kind_of(thing: Any) -> str:
    kind = type(thing)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _plain_tensor(tensor: Tensor, path: tuple[Any, ...]) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        kind = "meta, nested or quantized" if tensor.layout == torch.strided else tensor.layout
        raise TypeError(f"{described(path)} is a {kind} tensor: convert it to a dense tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{described(path)} is a tensor of {tensor.dtype}, which safetensors does "
                        "not support: convert it")  # fmt: skip
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _tensor_of_array(array: np.ndarray, path: tuple[Any, ...]) -> Tensor:
    if type(array) not in (np.ndarray, np.memmap):
        raise TypeError(f"{described(path)} is {_kind_of(array)}: pass a plain numpy array")
    try:
        native = array.astype(array.dtype.newbyteorder("="), order="C")
        tensor = torch.from_numpy(native)
    except TypeError as error:
        raise TypeError(
            f"{described(path)} is an array of {array.dtype}: only numbers and Booleans can be "
            "saved"
        ) from error
    return _plain_tensor(tensor, path)


def _array_of_tensor(tensor: Tensor) -> np.ndarray:
    try:
        return tensor.numpy()
    except TypeError as error:
        raise ValueError(f"numpy does not support {tensor.dtype}") from error


def _non_finite(number: float) -> str:
    return f"{number} {struct.pack('>d', number).hex()}"


def _decode(plain: Any, waiting: dict[str, Tensor], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"the content is nested more than {MAX_DEPTH} deep")
    if isinstance(plain, list):
        return [_decode(each, waiting, depth + 1) for each in plain]
    if not isinstance(plain, dict):
        return plain
    tags = [key for key in plain if key.startswith("$")]
    if not tags:
        return {key: _decode(value, waiting, depth + 1) for key, value in plain.items()}
    if len(plain) > 1:
        raise ValueError(f"the content has {tags[0]!r} beside other keys")
    ((tag, value),) = plain.items()
    if tag in ("$tensor", "$array"):
        if not isinstance(value, str) or value not in waiting:
            raise ValueError(f"the tensor {value!r} is missing, or is referred to twice")
        tensor = waiting.pop(value)
        return tensor if tag == "$tensor" else _array_of_tensor(tensor)
    if tag == "$tuple" and isinstance(value, list):
        return tuple(_decode(each, waiting, depth + 1) for each in value)
    if tag == "$dict" and isinstance(value, list):
        return _decode_pairs(value, waiting, depth)
    if tag == "$int" and isinstance(value, str):
        return int(value, 16)
    if tag == "$float" and isinstance(value, str):
        bits = bytes.fromhex(value.partition(" ")[2])
        if len(bits) == 8:
            return struct.unpack(">d", bits)[0]
    raise ValueError(f"the content has {tag!r} with {str(value)[:50]}")


def _decode_pairs(pairs: list[Any], waiting: dict[str, Tensor], depth: int) -> dict[Any, Any]:
    content: dict[Any, Any] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("the content has a dictionary whose items are not pairs")
        key = _decode(pair[0], waiting, depth + 1)
        if isinstance(key, bool) or not isinstance(key, str | int) or key in content:
            raise ValueError(f"the content has the key {key!r} twice, or it is of the wrong type")
        content[key] = _decode(pair[1], waiting, depth + 1)
    return content
