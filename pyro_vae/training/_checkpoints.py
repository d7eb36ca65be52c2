"""Checkpoints of a run in one folder: when to write, which to keep, which to resume from."""

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
_SHARE_OF_TIME = 0.02  # the largest share of the fit's time for writing
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """Settings of the checkpoints of a fit, for ``fit(checkpoint=...)``.

    Args:
        folder: The folder of the checkpoints. ``fit`` creates it if it does not exist.
        seconds: The shortest time between two checkpoints. If writing would take more than a
            fiftieth of the time of the fit, the time between checkpoints is longer.
        keep: The number of checkpoints that stay in the folder. Older ones are removed.
        resume: Resume from the last checkpoint in the folder that can be read, if there is one.
            If False, ``fit`` raises an error for a folder that has checkpoints.

    Raises:
        TypeError: The type of an argument differs from its annotation.
        ValueError: The folder is an empty string, ``seconds`` is infinite or NaN, or ``keep`` is
            less than 1.

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
                "checkpoint must be a folder (a str or Path) or a pv.training.Checkpoint, got "
                f"{self.folder!r}"
            )
        if not os.fspath(self.folder):
            raise ValueError('checkpoint must name a folder, got "". Pass "." for this folder')
        if not isinstance(self.resume, bool):
            raise TypeError(f"resume must be True or False, got {self.resume!r}")
        real_number("seconds", self.seconds)
        object.__setattr__(self, "folder", Path(self.folder))
        object.__setattr__(self, "keep", positive_integer("keep", self.keep))


class Checkpoints:
    """The checkpoints of one run, in folders such as ``step-000000000100``.

    In a group of processes, the first process writes and all processes read.

    Args:
        settings: The settings of the checkpoints. The folder is created if it does not exist.

    Raises:
        OSError: The folder cannot be created.
    """

    def __init__(self, settings: Checkpoint):
        self._settings = settings
        self.folder = Path(settings.folder)
        self._due = 0.0
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def due(self) -> bool:
        """Whether the next checkpoint is due."""
        return time.monotonic() >= self._due

    def begin(self) -> dict[str, Any] | None:
        """Return the last readable checkpoint to resume from, None if the folder has none.

        Later checkpoints that cannot be read are renamed.

        Raises:
            ValueError: The folder has checkpoints, but ``resume`` is False.
            UnreadableFile: The folder has checkpoints, but none of them can be read.
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
            raise ValueError(
                f"the first process cannot use the folder {self.folder}. See its error"
            )
        if rank() > 0 and said[0] >= 0:
            content = read(self._path(int(said[0])), kind=KIND)
        return content

    def write(self, content: Callable[[], Mapping[str, Any]], steps: int) -> Path | None:
        """Write a checkpoint. Remove the oldest ones, and any of a later step.

        Args:
            content: Makes the content of the checkpoint. All processes call it.
            steps: The number of steps of the run so far.

        Returns:
            The checkpoint, or None in other processes than the first.

        Raises:
            OSError: The checkpoint cannot be written, for example on a full disk. Earlier
                checkpoints are intact.
            TypeError: The content has a value that cannot be written.
        """
        began = time.monotonic()
        found = content()
        if rank() > 0:
            return None
        newest = self._path(steps)
        write(newest, found, kind=KIND, overwrite=True)
        paths = paths_in(self.folder)
        last = paths.index(newest) + 1
        for path in (*paths[: max(0, last - self._settings.keep)], *paths[last:]):
            shutil.rmtree(path, ignore_errors=True)
        took = time.monotonic() - began
        self._due = time.monotonic() + max(self._settings.seconds, took / _SHARE_OF_TIME)
        return newest

    def _last_whole(self) -> tuple[int, dict[str, Any] | None]:
        self._clear()
        if not self._settings.resume and paths_in(self.folder):
            raise ValueError(
                f"{self.folder} has the checkpoints of a run. To resume it, pass checkpoint="
                f"pv.training.Checkpoint({str(self.folder)!r}, resume=True). Or pass another folder"
            )
        path, content, broken = last_whole(self.folder)
        for other, problem in broken.items():
            aside = other.with_name(f"unreadable-{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
            warnings.warn(
                f"the run resumes from an earlier checkpoint, because {problem}", stacklevel=2
            )
        return (-1 if path is None else int(path.name.removeprefix(_PREFIX))), content

    def _path(self, steps: int) -> Path:
        return self.folder / f"{_PREFIX}{steps:012d}"

    def _clear(self) -> None:
        """Remove the incomplete checkpoints of a killed process."""
        for path in self.folder.glob(f".{_PREFIX}*"):
            clear(self.folder / path.name[1:].split(".")[0])


def paths_in(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.iterdir() if re.fullmatch(_PREFIX + r"\d+", p.name))


def last_whole(
    folder: Path,
) -> tuple[Path | None, dict[str, Any] | None, dict[Path, UnreadableFile]]:
    """Read the last checkpoint of a folder that can be read.

    Returns:
        The path and the content of this checkpoint, None if the folder has no checkpoint. The
        third value has the errors of later checkpoints by path.

    Raises:
        UnreadableFile: The folder has checkpoints, but none of them can be read.
        FileNotFoundError: The folder does not exist.
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
