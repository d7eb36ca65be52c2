"""Data in files of the IDX format, as those of MNIST."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np

_MAGIC = bytes([0, 0, 8])  # 8 stands for uint8; the number of dimensions and the sizes follow


def read_idx(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Read an array of uint8 from an IDX file, gzipped or not.

    Args:
        path: the file.
        shape: the shape of the array. None reads it from the file.

    Raises:
        ValueError: The file is not IDX, or it is truncated or too long.
        OSError: The file cannot be read.
        EOFError: The file is a truncated gzip.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    # A malicious download may be much larger than its array.
    most = -1 if shape is None else len(idx_header(shape)) + math.prod(shape) + 1
    with gzip.open(path) if zipped else path.open("rb") as file:
        content = file.read(most)
    if shape is None:
        shape = _shape_in(content[:16])
    header = idx_header(shape)
    size = len(header) + math.prod(shape)
    if len(content) != size:
        came = f"more than {size}" if len(content) > size else str(len(content))
        raise ValueError(f"expected {size} bytes, got {came}")
    if not content.startswith(header):
        raise ValueError(f"expected an IDX header of uint8 {shape}, got {content[:16].hex()}")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def idx_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of an IDX file of uint8: a magic number, then the sizes."""
    return bytes([*_MAGIC, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)


def _shape_in(start: bytes) -> tuple[int, ...]:
    """Return the shape in the first bytes of a file with one to three dimensions."""
    if start[:3] != _MAGIC or start[3:4] not in (b"\x01", b"\x02", b"\x03"):
        raise ValueError(f"expected an IDX header of uint8, got {start.hex()}")
    return tuple(int.from_bytes(start[4 * i : 4 * i + 4], "big") for i in range(1, start[3] + 1))
