"""Write a nested structure to a folder, as tensors and a JSON record, and read it back.

A folder is written completely or not at all. It is first written under a hidden name, next to the
final one. The hidden name has the host, the writing process and the purpose::

    .run.<host>.<process>.<random>.writing     becomes run
    .run.<host>.<process>.<random>.replaced    was run before

Files are not trusted. Nothing in them is run or imported. A file is read once, from one descriptor,
and its checksum is compared before its content is used.
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
    """A file that cannot be loaded. The message gives its path, the reason and a remedy."""


def unreadable(
    path: Path, what: str, advice: str = "Use another copy of the folder, or save it again."
) -> UnreadableFile:
    """Return an UnreadableFile with the path, the problem and advice."""
    return UnreadableFile(f"{path} {what}. {advice}")


def hidden(folder: Path, purpose: str) -> Path:
    """Return an unused hidden name next to a folder, with host, process and purpose."""
    token = secrets.token_hex(4)
    return folder.with_name(f".{folder.name}.{_host()}.{os.getpid()}.{token}.{purpose}")


def replaced(folder: Path) -> list[Path]:
    """Return the hidden folders that hold an old version of a folder, usually none."""
    return [path for path, purpose, _ in _beside(folder) if purpose == REPLACED]


def clear(folder: Path) -> None:
    """Clean up after writers of a folder that have died.

    Remove their unfinished folders, and restore a folder that they were replacing. Ignore writers
    on other hosts, which may still be running.
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
    """Return the hidden folders next to a folder, with purpose and whether the writer is dead."""
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
    except (PermissionError, OverflowError):  # another user's process; an invalid number
        return True
    return True


MAX_RECORD = 32 * 2**20  # bytes; parsed, it may need thirty times as much memory
_BEGINNINGS = {b"\x80": "a pickle", b"PK": "a zip archive, such as torch.save makes"}


def read(folder: str | Path, *, kind: str) -> dict[Any, Any]:
    """Read a folder that :func:`pyro_vae.serialization._folder.write` has written.

    Args:
        folder: folder to read.
        kind: kind of the content, as passed to ``write``.

    Returns:
        The content. Tensors are on the CPU and contiguous, and share no memory.

    Raises:
        UnreadableFile: The folder or one of its two files is missing, damaged, not a regular file,
            of another kind or of a newer version. UnreadableFile is a ValueError.
        OSError: Reading failed, or is not permitted.

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
            with contextlib.suppress(_Missing):  # the folder may be replaced during the read
                return _read(folder, kind)
        return _read(folder, kind)
    except MemoryError as error:
        raise UnreadableFile(f"{folder} needs more memory than this machine has") from error


def record_of(folder: Path) -> dict[str, Any]:
    """Return the record of a folder, checked except for its content.

    Raises:
        UnreadableFile: The folder or its record is not readable; see :func:`read`.
    """
    with _opened(folder) as directory:
        return _record(folder / RECORD, directory)


def checksum(record: dict[str, Any]) -> str:
    """Return the sha256 of a record as compact JSON, without its key ``"sha256"``."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class _Missing(UnreadableFile):
    pass


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """Open a folder, so that all files come from the same folder even if it is replaced."""
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
        advice = f"Pass the folder that has {RECORD}."
        raise unreadable(folder, "is not a folder", advice) from None


def _open_replaced(folder: Path) -> int:
    """Open the old version of a folder whose writer died before replacing it."""
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
                path, f"is of the kind {record['kind']!r}, not {kind!r}", "Read it as its own kind."
            )
        tensors = _tensors(folder / TENSORS, directory, record["tensors"])
    try:
        content = decode(record["content"], tensors)
    except ValueError as error:
        raise unreadable(path, f"is damaged: {error}") from error
    if not isinstance(content, dict):
        raise unreadable(path, "has content that is not a dictionary")
    return content


def _record(path: Path, directory: int) -> dict[str, Any]:
    """Read and check the record, except for its content."""
    data = _bytes(path, directory, MAX_RECORD)
    try:
        record = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=float)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"is not a record of pyro_vae{_foreign(data, error)}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise unreadable(path, "is JSON, but not a record of pyro_vae")
    version = record.get("format_version")
    if isinstance(version, int) and version > VERSION:
        raise unreadable(
            path,
            f"is of format {version}, and this pyro_vae reads formats up to {VERSION}",
            "Install a newer pyro_vae.",
        )
    if record.get("sha256") != _checksum_or_none(record):
        raise unreadable(path, "is damaged: its content does not match its checksum")
    expected = {"format": str, "format_version": int, "kind": str, "tensors": dict, "sha256": str}
    wrong = [key for key, kind in expected.items() if not isinstance(record.get(key), kind)]
    if wrong or "content" not in record or version != VERSION:
        raise unreadable(path, f"is not a record of pyro_vae: {wrong or ['content']} is missing")
    return record


def _tensors(path: Path, directory: int, expected: dict[str, Any]) -> dict[str, Tensor]:
    """Read the tensors, and check them against the size and checksum in the record."""
    size = expected.get("bytes")
    if not isinstance(size, int):
        raise unreadable(path, f"has no size in {RECORD}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise unreadable(path, f"has {size} bytes, and this machine has {memory} of memory")
    data = _bytes(path, directory, size, exactly=True)
    if hashlib.sha256(data).hexdigest() != expected.get("sha256"):
        raise unreadable(path, f"is damaged: it does not match its checksum in {RECORD}")
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # safetensors has no common error class
        raise unreadable(path, f"is not a safetensors file{_foreign(data, error)}") from error


def _bytes(path: Path, directory: int, limit: int, exactly: bool = False) -> bytes:
    """Read a regular file of an open folder, and nothing else."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path.name, flags, dir_fd=directory)
    except FileNotFoundError:
        raise _Missing(str(unreadable(path, "is missing"))) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EMLINK):
            raise unreadable(path, "is a link or a device, not a regular file") from error
        raise OSError(error.errno, f"cannot open {path}: {error.strerror}", str(path)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise unreadable(path, "is not a regular file")
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
        raise ValueError("an object has a key twice")
    return things


def _checksum_or_none(record: dict[str, Any]) -> str | None:
    try:
        return checksum(record)
    except (ValueError, RecursionError):  # numbers that JSON lacks
        return None


def _foreign(data: bytes, error: Exception) -> str:
    for beginning, what in _BEGINNINGS.items():
        if data.startswith(beginning):
            return f", but {what}; nothing in it was run"
    return f": {str(error).splitlines()[0][:200]}" if str(error) else ""


def write(
    folder: str | Path, content: Mapping[Any, Any], *, kind: str, overwrite: bool = False
) -> None:
    """Write a nested structure to a folder, as ``record.json`` and ``tensors.safetensors``.

    The folder is written under a hidden name, synced to disk and then renamed. A process killed at
    any time leaves the complete folder or none. If it replaces a folder, it leaves the old or the
    new one. The next write removes its temporary files.

    Args:
        folder: folder to write. Missing parent folders are created. The folder may exist if it is
            empty.
        content: dictionaries whose keys are strings or integers, lists, tuples, strings, numbers,
            Booleans, None, tensors and numpy arrays, nested at most 100 deep. All are restored
            exactly, bit by bit. Tensors are restored on the CPU and without gradients.
        kind: any word for the kind of content. ``read`` needs the same word.
        overwrite: whether to replace a folder of the same kind.

    Raises:
        TypeError: The content has a value of an unsupported type. The message gives its path.
        ValueError: The content is nested more than 100 deep, or contains itself, or its record is
            larger than 32 MiB.
        FileExistsError: The folder exists, and ``overwrite`` is False or it is not a folder of this
            kind.
        OSError: Writing failed, for example because of a full disk or a missing permission. The
            previous folder is unchanged.

    Example:
        See :func:`pyro_vae.serialization._folder.read`.
    """
    if not isinstance(content, Mapping) or not isinstance(kind, str):
        raise TypeError(
            "content must be a dictionary and kind a string, got "
            f"{type(content).__name__} and {type(kind).__name__}"
        )
    plain, named = encode(content)
    # Serialize to bytes. If safetensors wrote the file, its errors would not report a full disk.
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
            f"the record must have at most {MAX_RECORD} bytes, got {len(text)}: store long lists "
            "as tensors"
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
    """Return True if there is a folder to replace; raise FileExistsError if it must be kept."""
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
            f"{folder} is not replaced, because it is not a folder of the kind {kind!r} alone: "
            "remove it yourself, or pass another name"
        )
    return True


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    temporary = hidden(folder, WRITING)
    try:
        temporary.mkdir()
        yield temporary
    finally:  # after success it has its final name, and nothing is removed
        shutil.rmtree(temporary, ignore_errors=True)


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Sync the entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(temporary: Path, folder: Path, replaces: bool) -> None:
    """Rename the temporary folder to its final name, or restore the previous state on an error."""
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
