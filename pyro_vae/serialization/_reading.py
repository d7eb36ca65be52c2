"""Folders back into structures, with no trust in what they hold.

Nothing in a file is ever run or imported. A file is read once, from one descriptor, and its
checksum is known before anything looks into it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from pyro_vae.serialization import _files as files
from pyro_vae.serialization._encoding import decode
from pyro_vae.serialization._files import UnreadableFile, unreadable

MAX_RECORD = 32 * 2**20  # bytes; parsed, it may take thirty times as much
_BEGINNINGS = {b"\x80": "a pickle", b"PK": "a zip archive, such as torch.save makes"}


def read(folder: str | Path, *, kind: str) -> dict[Any, Any]:
    """Read what :func:`pyro_vae.serialization._writing.write` has written into a folder.

    Args:
        folder: to read.
        kind: of the content, as it was written.

    Returns:
        The content. Tensors are on the CPU, contiguous, and share no memory.

    Raises:
        UnreadableFile: the folder or one of its two files is missing, damaged, of another kind or
            of a newer version, no regular file, or never was one of these. It is a ValueError.
        OSError: reading failed, or is not permitted.

    Example:
        >>> import tempfile, torch
        >>> from pyro_vae.serialization._reading import read
        >>> from pyro_vae.serialization._writing import write
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write(f"{place}/run", {"step": 7, "z": torch.ones(2)}, kind="example")
        ...     read(f"{place}/run", kind="example")
        {'step': 7, 'z': tensor([1., 1.])}
    """
    folder = Path(folder)
    try:
        for _ in range(2):
            with contextlib.suppress(_Missing):  # it may have been replaced while it was read
                return _read(folder, kind)
        return _read(folder, kind)
    except MemoryError as error:
        raise UnreadableFile(f"{folder} asks for more memory than there is") from error


def record_of(folder: Path) -> dict[str, Any]:
    """Return the record of a folder, checked but for what the content says.

    Raises:
        UnreadableFile: as :func:`read`.
    """
    with _opened(folder) as directory:
        return _record(folder / files.RECORD, directory)


def checksum(record: dict[str, Any]) -> str:
    """Return the sha256 of a record, without its own, as JSON in its shortest form."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class _Missing(UnreadableFile):
    pass


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """Open a folder, so that its files are of the same one even while it is replaced."""
    try:
        directory = _open_folder(folder)
    except FileNotFoundError:
        directory = _open_replaced(folder)
    try:
        yield directory
    finally:
        os.close(directory)


def _open_folder(folder: Path) -> int:
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except NotADirectoryError:
        advice = f"Name the one that holds {files.RECORD}."
        raise unreadable(folder, "is no folder", advice) from None


def _open_replaced(folder: Path) -> int:
    """Open a folder that was taken away to be replaced, by a writer that came no further."""
    for place in files.replaced(folder):
        with contextlib.suppress(FileNotFoundError):
            return _open_folder(place)
    raise _Missing(f"{folder} does not exist: is the name right?")


def _read(folder: Path, kind: str) -> dict[Any, Any]:
    path = folder / files.RECORD
    with _opened(folder) as directory:
        record = _record(path, directory)
        if record["kind"] != kind:
            raise unreadable(
                path, f"is of the kind {record['kind']!r}, not {kind!r}", "Read it as what it is."
            )
        tensors = _tensors(folder / files.TENSORS, directory, record["tensors"])
    try:
        content = decode(record["content"], tensors)
    except ValueError as error:
        raise unreadable(path, f"is damaged: {error}") from error
    if not isinstance(content, dict):
        raise unreadable(path, "holds no dictionary")
    return content


def _record(path: Path, directory: int) -> dict[str, Any]:
    """Read and check the record, but for what the content says."""
    data = _bytes(path, directory, MAX_RECORD)
    try:
        record = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=float)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"is no record of pyro_vae{_foreign(data, error)}") from error
    if not isinstance(record, dict) or record.get("format") != files.FORMAT:
        raise unreadable(path, "is JSON, but no record of pyro_vae")
    version = record.get("format_version")
    if isinstance(version, int) and version > files.VERSION:
        raise unreadable(
            path,
            f"is of format {version}, and this pyro_vae reads formats up to {files.VERSION}",
            "Install a newer pyro_vae.",
        )
    if record.get("sha256") != _checksum_or_none(record):
        raise unreadable(path, "is damaged: its content has another checksum than it says")
    expected = {"format": str, "format_version": int, "kind": str, "tensors": dict, "sha256": str}
    wrong = [key for key, kind in expected.items() if not isinstance(record.get(key), kind)]
    if wrong or "content" not in record or version != files.VERSION:
        raise unreadable(path, f"is no record of pyro_vae: {wrong or ['content']} is missing")
    return record


def _tensors(path: Path, directory: int, expected: dict[str, Any]) -> dict[str, Tensor]:
    """Read the tensors, whose size and checksum the record tells."""
    size = expected.get("bytes")
    if not isinstance(size, int):
        raise unreadable(path, f"has no size in {files.RECORD}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise unreadable(path, f"has {size} bytes, and this machine {memory} of memory")
    data = _bytes(path, directory, size, exactly=True)
    if hashlib.sha256(data).hexdigest() != expected.get("sha256"):
        raise unreadable(path, f"is damaged: {files.RECORD} has another checksum for it")
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # the library has no class of errors for what a file may hold
        raise unreadable(path, f"is no safetensors file{_foreign(data, error)}") from error


def _bytes(path: Path, directory: int, limit: int, exactly: bool = False) -> bytes:
    """Read a regular file of an open folder, and nothing else."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path.name, flags, dir_fd=directory)
    except FileNotFoundError:
        raise _Missing(str(unreadable(path, "is missing"))) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EMLINK):
            raise unreadable(path, "is a link or a device, no regular file") from error
        raise OSError(error.errno, f"cannot open {path}: {error.strerror}", str(path)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise unreadable(path, "is no regular file")
        if status.st_size > limit or (exactly and status.st_size != limit):
            bound = "" if exactly else "at most "
            raise unreadable(path, f"has {status.st_size} bytes, not {bound}{limit}")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(status.st_size + 1)
    finally:
        os.close(descriptor)
    if len(data) != status.st_size:
        raise unreadable(path, "changed while it was read", "Try again.")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    things = dict(pairs)
    if len(things) < len(pairs):
        raise ValueError("a key stands in an object twice")
    return things


def _checksum_or_none(record: dict[str, Any]) -> str | None:
    try:
        return checksum(record)
    except (ValueError, RecursionError):  # numbers that JSON does not know
        return None


def _foreign(data: bytes, error: Exception) -> str:
    for beginning, what in _BEGINNINGS.items():
        if data.startswith(beginning):
            return f", but {what}; nothing in it was run"
    return f": {str(error).splitlines()[0][:200]}" if str(error) else ""
