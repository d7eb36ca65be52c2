"""A nested structure in one folder, and back: tensors beside a record in JSON.

A folder is written whole or not at all: under a hidden name beside its own, which names the host
and the process that write it, and the purpose::

    .run.<host>.<process>.<random>.writing     becomes run
    .run.<host>.<process>.<random>.replaced    was run before

A file is not trusted. Nothing in it is run or imported. It is read once, from one descriptor, and
its checksum is compared before its content is parsed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from pyro_vae.serialization._encoding import decode, encode

RECORD = "record.json"
TENSORS = "tensors.safetensors"
FORMAT, VERSION = "pyro_vae", 1
WRITING, REPLACED = "writing", "replaced"


class UnreadableFile(ValueError):  # noqa: N818 - the name says what the file is
    """A file that is not what was written; the message says which, why, and what to do."""


def unreadable(
    path: Path, what: str, advice: str = "Take another copy of the folder, or write it anew."
) -> UnreadableFile:
    """Return the error for a file: what it is, or does."""
    return UnreadableFile(f"{path} {what}. {advice}")


def hidden(folder: Path, purpose: str) -> Path:
    """Return an unused name beside a folder, which tells who uses it and what for."""
    token = secrets.token_hex(4)
    return folder.with_name(f".{folder.name}.{_host()}.{os.getpid()}.{token}.{purpose}")


def replaced(folder: Path) -> list[Path]:
    """Return where the folder is, if it has been taken away to be replaced: most often nowhere."""
    return [path for path, purpose, _ in _beside(folder) if purpose == REPLACED]


def clear(folder: Path) -> None:
    """Undo what writers of a folder have left that are no more.

    What they were writing is removed, and what they were about to replace is put back. Writers on
    other hosts are left alone, for they may live.
    """
    for path, purpose, dead in _beside(folder):
        if not dead:
            continue
        if purpose == REPLACED and not os.path.lexists(folder):
            with contextlib.suppress(OSError):  # another writer was faster
                os.rename(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _beside(folder: Path) -> list[tuple[Path, str, bool]]:
    """Return hidden folders beside a folder, what each is for, and whether its writer is dead."""
    pattern = re.compile(
        rf"\.{re.escape(folder.name)}\.([\w-]+)\.(\d+)\.[0-9a-f]{{8}}\.({WRITING}|{REPLACED})"
    )
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for name in sorted(os.listdir(folder.parent)):
            if match := pattern.fullmatch(name):
                host, process, purpose = match.groups()
                dead = host == _host() and not _lives(int(process))
                found.append((folder.with_name(name), purpose, dead))
    return found


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII) or "host"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no process at all
        return True
    return True


MAX_RECORD = 32 * 2**20  # bytes; parsed, it may take thirty times as much
_BEGINNINGS = {b"\x80": "a pickle", b"PK": "a zip archive, such as torch.save makes"}


def read(folder: str | Path, *, kind: str) -> dict[Any, Any]:
    """Read what :func:`pyro_vae.serialization._folder.write` has written into a folder.

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
        >>> from pyro_vae.serialization._folder import read
        >>> from pyro_vae.serialization._folder import write
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
        return _record(folder / RECORD, directory)


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
        advice = f"Name the one that holds {RECORD}."
        raise unreadable(folder, "is no folder", advice) from None


def _open_replaced(folder: Path) -> int:
    """Open a folder that was taken away to be replaced, by a writer that came no further."""
    for place in replaced(folder):
        with contextlib.suppress(FileNotFoundError):
            return _open_folder(place)
    raise _Missing(f"{folder} does not exist: is the name right?")


def _read(folder: Path, kind: str) -> dict[Any, Any]:
    path = folder / RECORD
    with _opened(folder) as directory:
        record = _record(path, directory)
        if record["kind"] != kind:
            raise unreadable(
                path, f"is of the kind {record['kind']!r}, not {kind!r}", "Read it as what it is."
            )
        tensors = _tensors(folder / TENSORS, directory, record["tensors"])
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
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise unreadable(path, "is JSON, but no record of pyro_vae")
    version = record.get("format_version")
    if isinstance(version, int) and version > VERSION:
        raise unreadable(
            path,
            f"is of format {version}, and this pyro_vae reads formats up to {VERSION}",
            "Install a newer pyro_vae.",
        )
    if record.get("sha256") != _checksum_or_none(record):
        raise unreadable(path, "is damaged: its content has another checksum than it says")
    expected = {"format": str, "format_version": int, "kind": str, "tensors": dict, "sha256": str}
    wrong = [key for key, kind in expected.items() if not isinstance(record.get(key), kind)]
    if wrong or "content" not in record or version != VERSION:
        raise unreadable(path, f"is no record of pyro_vae: {wrong or ['content']} is missing")
    return record


def _tensors(path: Path, directory: int, expected: dict[str, Any]) -> dict[str, Tensor]:
    """Read the tensors, whose size and checksum the record tells."""
    size = expected.get("bytes")
    if not isinstance(size, int):
        raise unreadable(path, f"has no size in {RECORD}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise unreadable(path, f"has {size} bytes, and this machine {memory} of memory")
    data = _bytes(path, directory, size, exactly=True)
    if hashlib.sha256(data).hexdigest() != expected.get("sha256"):
        raise unreadable(path, f"is damaged: {RECORD} has another checksum for it")
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
        See :func:`pyro_vae.serialization._folder.read`.
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
        "format": FORMAT,
        "format_version": VERSION,
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
        clear(folder)
        replaces = _check_place(folder, kind, overwrite)
        with _temporary(folder) as temporary:
            for name, data in ((TENSORS, tensors), (RECORD, text)):
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
        ours = names == {RECORD, TENSORS} and record_of(folder)["kind"] == kind
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
    temporary = hidden(folder, WRITING)
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
    old = hidden(folder, REPLACED)
    with contextlib.ExitStack() as undo:
        if replaces:
            os.rename(folder, old)
            undo.callback(os.rename, old, folder)
        os.rename(temporary, folder)
        undo.callback(os.rename, folder, temporary)
        _sync(folder.parent)
        undo.pop_all()
    shutil.rmtree(old, ignore_errors=True)
