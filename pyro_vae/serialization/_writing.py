"""Structures into folders: whole, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from pyro_vae.serialization import _files as files
from pyro_vae.serialization._encoding import encode
from pyro_vae.serialization._files import UnreadableFile
from pyro_vae.serialization._reading import MAX_RECORD, checksum, record_of


def write(
    folder: str | Path, content: Mapping[Any, Any], *, kind: str, overwrite: bool = False
) -> None:
    """Write a nested structure into a folder: ``record.json`` and ``tensors.safetensors``.

    The folder is written under a hidden name beside its own, brought to the disk, and renamed: a
    process that is killed at any instant leaves the whole folder or none, and where one is
    replaced, the old one or the new one. What it leaves beside, the next write removes.

    Args:
        folder: to write; folders above it are made. An empty one may be there.
        content: dictionaries with keys that are strings or whole numbers, lists, tuples, strings,
            numbers, booleans, None, tensors and numpy arrays, 100 deep at most. All come back as
            they are, to the bit; tensors on the CPU, and without gradients.
        kind: of the content, any word; who reads it says the same.
        overwrite: whether to replace a folder of the same kind.

    Raises:
        TypeError: something in the content is of another type, by the way that leads to it.
        ValueError: it is nested more than 100 deep, or holds itself, or its record takes more than
            32 MiB.
        FileExistsError: there is a folder or file of that name, and it is not to be replaced, or is
            none that was written here as one of this kind.
        OSError: it could not be written: a full disk, a lack of permission. What was there before
            is as it was.

    Example:
        See :func:`pyro_vae.serialization._reading.read`.
    """
    if not isinstance(content, Mapping) or not isinstance(kind, str):
        raise TypeError(
            "content must be a dictionary and kind a string, got "
            f"{type(content).__name__} and {type(kind).__name__}"
        )
    plain, named = encode(content)
    # Bytes, rather than a file by the library, whose errors do not tell a full disk.
    tensors = safetensors.torch.save(named)
    record = {
        "format": files.FORMAT,
        "format_version": files.VERSION,
        "kind": kind,
        "tensors": {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()},
        "content": plain,
    }
    text = json.dumps(record | {"sha256": checksum(record)}, indent=1, allow_nan=False).encode()
    if len(text) > MAX_RECORD:
        raise ValueError(
            f"the record takes {len(text)} bytes, and may take {MAX_RECORD}: store long lists as "
            "tensors"
        )
    folder = Path(os.path.abspath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.clear(folder)
        replaces = _check_place(folder, kind, overwrite)
        with _temporary(folder) as temporary:
            for name, data in ((files.TENSORS, tensors), (files.RECORD, text)):
                _write_file(temporary / name, data)
            _sync(temporary)
            _put(temporary, folder, replaces)
    except OSError as error:
        if isinstance(error, FileExistsError) and error.errno is None:
            raise
        message = f"could not write {folder}: {error.strerror or error}"
        raise OSError(error.errno, message, str(folder)) from error


def _check_place(folder: Path, kind: str, overwrite: bool) -> bool:
    """Tell whether there is a folder to be replaced; refuse to replace others."""
    if not os.path.lexists(folder):
        return False
    is_folder = folder.is_dir() and not folder.is_symlink()
    names = set(os.listdir(folder)) if is_folder else None
    if names == set():
        return False
    if not overwrite:
        raise FileExistsError(f"{folder} exists: pass overwrite=True, or another name")
    try:
        ours = names == {files.RECORD, files.TENSORS} and record_of(folder)["kind"] == kind
    except UnreadableFile:
        ours = False
    if not ours:
        raise FileExistsError(
            f"{folder} is not replaced, for it is no folder of the kind {kind!r} and nothing else: "
            "remove it yourself, or pass another name"
        )
    return True


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    temporary = files.hidden(folder, files.WRITING)
    try:
        temporary.mkdir()
        yield temporary
    finally:  # it has another name by now, if all went well
        shutil.rmtree(temporary, ignore_errors=True)


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(temporary: Path, folder: Path, replaces: bool) -> None:
    """Give a folder its name, in place of what has it; or leave all as it was."""
    old = files.hidden(folder, files.REPLACED)
    with contextlib.ExitStack() as undo:
        if replaces:
            os.rename(folder, old)
            undo.callback(os.rename, old, folder)
        os.rename(temporary, folder)
        undo.callback(os.rename, folder, temporary)
        _sync(folder.parent)
        undo.pop_all()
    shutil.rmtree(old, ignore_errors=True)
