"""What a folder holds, what stands beside it while it is written, and the error if it is damaged.

A folder is written under a hidden name beside its own, which tells the host and the process that
write it, and what for::

    .run.<host>.<process>.<random>.writing     becomes run
    .run.<host>.<process>.<random>.replaced    was run before
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

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
