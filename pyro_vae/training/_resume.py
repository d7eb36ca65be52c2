"""The settings that a resumed run must share with the run before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyro.infer

from pyro_vae._utils.referenced_objects import referenced_objects
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.serialization._folder import UnreadableFile

# Settings that older checkpoints do not have, with the values of their runs.
_OF_OLDER_CHECKPOINTS = {"precision": "highest"}


def settings_of_run(
    batches: Minibatches, held_out: Minibatches | None, objective: pyro.infer.ELBO
) -> dict[str, Any]:
    """Return the settings of data and objective that a resumed run must share."""
    of_objective = {
        name: repr(value)
        for name, value in referenced_objects(objective=objective)
        if isinstance(value, bool | int | float | str) and "._" not in name
    }
    return {
        "batch_size": batches.batch_size,
        "number of data": batches.num_data,
        "data": batches.digest(),
        "validation": None if held_out is None else [held_out.num_data, held_out.digest()],
        "objective": type(objective).__qualname__,
        "particles of the objective": getattr(objective, "num_particles", None),
        "numbers of the objective": of_objective,
    }


def require_settings(saved: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if a checkpoint is from a run with other settings.

    Raises:
        ValueError: A setting differs. The message names it.
    """
    saved = _OF_OLDER_CHECKPOINTS | {"seed": here.get("seed")} | dict(saved)
    for name, value in here.items():
        then = saved.get(name)
        if name in saved and then == value:
            continue
        if isinstance(then, dict) and isinstance(value, dict):
            name, then, value = _first_difference(then, value)
        raise ValueError(
            f"{folder} has the checkpoints of a run with {name} {then}, but here it is {value}. "
            "Pass the arguments of that run, or another folder"
        )


def _first_difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, Any, Any]:
    """Return the first key at which two unequal dictionaries differ, and both values."""
    keys = sorted({*one, *other}, key=lambda key: (len(key), key))  # a class before its numbers
    name = next(k for k in keys if one.get(k, "missing") != other.get(k, "missing"))
    return name, one.get(name, "missing"), other.get(name, "missing")


@contextlib.contextmanager
def resuming_from(folder: Path) -> Iterator[None]:
    """Raise UnreadableFile if a checkpoint lacks an entry, or an entry has the wrong type.

    Raises:
        UnreadableFile: The block failed on such an entry.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UnreadableFile(
            f"{folder} has no checkpoint that this version of pyro_vae can resume: {error!r}. Pass "
            "another folder, or use the version that wrote it"
        ) from error
