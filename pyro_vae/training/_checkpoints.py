"""Checkpoints of a run in one folder: when to write, which to keep, which to go on from."""

from __future__ import annotations

import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyro_vae._utils.checks import positive_integer, real_number
from pyro_vae._utils.distributed import broadcast_from_first, rank
from pyro_vae.serialization._folder import UnreadableFile, clear, read, write

KIND = "checkpoint of a fit"
_SHARE_OF_TIME = 0.02  # that writing may take
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """Settings of the checkpoints of a fit, for ``fit(checkpoint=...)``.

    Args:
        folder: The folder of the checkpoints. ``fit`` creates it if it does not exist.
        seconds: The shortest time between two checkpoints. Writing takes at most a fiftieth of
            the time of a fit, so this time may become longer.
        keep: The number of checkpoints that stay in the folder. Older ones are removed.
        resume: Resume from the last checkpoint in the folder that can be read, if there is one.
            Without it, ``fit`` refuses a folder that holds checkpoints.

    Raises:
        TypeError: An argument is of another type than its annotation says.
        ValueError: ``seconds`` is infinite or NaN, or ``keep`` is less than 1.

    Example:
        >>> import pyro_vae as pv
        >>> checkpoint = pv.training.Checkpoint("run", seconds=600, resume=True)
        >>> checkpoint.keep
        3
    """

    folder: str | Path
    seconds: float = 60.0
    keep: int = 3
    resume: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike):
            raise TypeError(
                "checkpoint must be a folder, given as str or Path, or a pv.training.Checkpoint of "
                f"one, got {self.folder!r}"
            )
        if not isinstance(self.resume, bool):
            raise TypeError(f"resume must be True or False, got {self.resume!r}")
        real_number("seconds", self.seconds)
        object.__setattr__(self, "folder", Path(self.folder))
        object.__setattr__(self, "keep", positive_integer("keep", self.keep))


class Checkpoints:
    """The checkpoints of one run, ``step-000000000100`` and the like.

    Of the processes of a group, the first writes, and all read.

    Args:
        settings: Folder, times and number of the checkpoints. The folder is created.

    Raises:
        OSError: The folder cannot be created, or nothing can be written to it.
    """

    def __init__(self, settings: Checkpoint):
        self._settings = settings
        self.folder = Path(settings.folder)
        self._due = 0.0
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def due(self) -> bool:
        """Whether it is time for another."""
        return time.monotonic() >= self._due

    def begin(self) -> dict[str, Any] | None:
        """Return the last whole checkpoint, to resume from; None if the folder has none.

        Later checkpoints, which cannot be read, get another name.

        Raises:
            ValueError: There is a checkpoint, but the settings do not ask to resume.
            UnreadableFile: There are checkpoints, but none of them can be read.
        """
        step, content, problem = -1, None, None
        if rank() == 0:
            try:
                step, content = self._last_whole()
            except ValueError as error:
                problem = error
        said = broadcast_from_first(torch.tensor([step, int(problem is not None)]))
        if problem is not None:
            raise problem
        if said[1]:
            raise ValueError(f"the first process cannot begin with {self.folder}: see its error")
        if rank() > 0 and said[0] >= 0:
            content = read(self._path(int(said[0])), kind=KIND)
        return content

    def write(self, content: Callable[[], Mapping[str, Any]], steps: int) -> None:
        """Write one; remove the oldest, and those of a later time that the run went back from.

        Args:
            content: makes what to write; all processes call it.
            steps: how many steps the run has taken.

        Raises:
            OSError: the disk is full, say; the checkpoints before are whole.
            TypeError: something in it cannot be written.
        """
        began = time.monotonic()
        found = content()
        if rank() > 0:
            return
        newest = self._path(steps)
        write(newest, found, kind=KIND, overwrite=True)
        paths = paths_in(self.folder)
        last = paths.index(newest) + 1
        for path in (*paths[: max(0, last - self._settings.keep)], *paths[last:]):
            shutil.rmtree(path, ignore_errors=True)
        took = time.monotonic() - began
        self._due = time.monotonic() + max(self._settings.seconds, took / _SHARE_OF_TIME)

    def _last_whole(self) -> tuple[int, dict[str, Any] | None]:
        self._clear()
        if not self._settings.resume and paths_in(self.folder):
            raise ValueError(
                f"{self.folder} has the checkpoints of a run. To resume it, pass checkpoint="
                f"pv.training.Checkpoint({str(self.folder)!r}, resume=True). Or name another folder"
            )
        path, content, broken = last_whole(self.folder)
        for other, problem in broken.items():
            aside = other.with_name(f"unreadable-{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
            warnings.warn(f"going on from an earlier checkpoint: {problem}", stacklevel=2)
        return (-1 if path is None else int(path.name.removeprefix(_PREFIX))), content

    def _path(self, steps: int) -> Path:
        return self.folder / f"{_PREFIX}{steps:012d}"

    def _clear(self) -> None:
        """Remove what a process that was killed has left half written."""
        for path in self.folder.glob(f".{_PREFIX}*"):
            clear(self.folder / path.name[1:].split(".")[0])


def paths_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the oldest first."""
    return sorted(p for p in folder.iterdir() if re.fullmatch(_PREFIX + r"\d+", p.name))


def last_whole(
    folder: Path,
) -> tuple[Path | None, dict[str, Any] | None, dict[Path, UnreadableFile]]:
    """Read the last checkpoint of a folder that is whole.

    Returns:
        Its path and content, None if there is no checkpoint at all; and what is wrong with those
        behind it.

    Raises:
        UnreadableFile: there are some, but none that can be read.
        FileNotFoundError: there is no such folder.
    """
    broken: dict[Path, UnreadableFile] = {}
    for path in reversed(paths_in(folder)):
        try:
            content = read(path, kind=KIND)
        except UnreadableFile as problem:
            broken[path] = problem
            continue
        return path, content, broken
    if broken:
        raise next(iter(broken.values()))
    return None, None, broken
