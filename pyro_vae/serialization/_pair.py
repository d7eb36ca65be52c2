"""`save` and `load`: a pair of programs in one folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_vae._programs import parameters as programs
from pyro_vae._programs.pair_state import require_parameters
from pyro_vae._programs.pair_trace import Program
from pyro_vae.serialization._folder import UnreadableFile, read, write
from pyro_vae.serialization._pair_state import (
    differences,
    load_state,
    make_heads,
    memory_of,
    module_tensors,
    recipe_of,
    state_of,
    versions,
)
from pyro_vae.serialization._recipe import rebuild

if TYPE_CHECKING:
    import pandas as pd
from pyro_vae._utils.checks import check_call, shown

KIND = "pair"


@dataclass(frozen=True)
class Saved:
    """A pair that was loaded.

    Args:
        model: program of p(x, z), with its parameters.
        guide: program of q(z|x), with its parameters.
        history: of its fit, if it was saved with it.
        notes: as they were given.
        versions: of ``pyro_vae``, ``torch``, ``pyro-ppl`` and ``python`` that it was saved with,
            and the ``date``.
    """

    model: Program
    guide: Program
    history: pd.DataFrame | None
    notes: dict[str, Any]
    versions: dict[str, str]


def save(
    folder: str | Path,
    model: Program,
    guide: Program,
    *,
    history: pd.DataFrame | None = None,
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a pair in a folder of two files: ``record.json`` and ``tensors.safetensors``.

    The tensors are all parameters and buffers, by names such as
    ``model.likelihood.decoder.0.weight``, and the values of ``pyro.param``. The record tells how
    programs made of this library's classes and of torch's layers are made, so that :func:`load`
    makes them again; other programs are to be passed to it. No code is saved, and nothing pickled.

    Args:
        folder: to make. A crash or a full disk leaves what was there before.
        model: program of p(x, z).
        guide: program of q(z|x).
        history: a data frame to keep with them, such as that of :class:`pyro_vae.training.Fit`.
        notes: whatever else is to be kept: dictionaries, lists, strings, numbers, tensors, arrays.
        overwrite: whether to replace a pair that was saved there.

    Raises:
        FileExistsError: there is something that is not to be replaced.
        OSError: it could not be written.
        TypeError: the notes hold something else; a ``pyro.param`` has a constraint without a name.
        ValueError: the guide has loaded values that wait for its first call; a parameter belongs to
            a module that no name leads to, and would be missing.

    Example:
        >>> import tempfile, torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.bernoulli(torch.full((50, 16), 0.5))
        >>> fit = pv.fit(model, guide, x, batch_size=10, epochs=1, progress=False)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     pv.save(f"{place}/pair", model, guide, history=fit.history, notes={"seed": 7})
        ...     saved = pv.load(f"{place}/pair")
        >>> before = pv.evidence(model, guide, x, seed=0)
        >>> after = pv.evidence(saved.model, saved.guide, x, seed=0)
        >>> torch.equal(before.values, after.values), saved.notes
        (True, {'seed': 7})
    """
    check_call(save, locals())
    check_folder(folder)
    programs.require_programs(model, guide)
    with programs.parameter_store(model, guide):
        require_parameters(model, guide)
    content = state_of(model, guide)
    content |= {
        "versions": versions(),
        "notes": _notes(notes),
        "history": None if history is None else dataframe_to_dict(history),
        "recipe": recipe_of(model, guide, content),
    }
    write(folder, content, kind=KIND, overwrite=overwrite)


def load(
    folder: str | Path,
    model: Program | None = None,
    guide: Program | None = None,
    *,
    device: str | torch.device = "cpu",
) -> Saved:
    """Load a pair that :func:`save` has saved.

    Args:
        folder: where it is.
        model: program to put the parameters into, in place, made as the one that was saved. If not
            given, it is made as the record tells; a program that is code of your own must be given.
        guide: likewise. A guide of this library is made for the model that is given.
        device: where the parameters go.

    Returns:
        The pair, with its history and notes. It gives the numbers of the pair that was saved, to
        the bit.

    Raises:
        UnreadableFile: a file is missing, damaged, or none of such a folder; nothing in it was run.
            It is a ValueError.
        ValueError: a program must be given; or what was given has other parameters than what was
            saved, and it is told which.

    Example:
        See :func:`save`.
    """
    check_call(load, locals())
    check_folder(folder)
    return made(lambda: _read(Path(folder)), folder, model, guide, device)


def _notes(notes: Mapping[str, Any] | None) -> dict[str, Any]:
    if notes is not None and not isinstance(notes, Mapping):
        raise TypeError(f"notes must be a dictionary, got {shown(notes)}")
    return dict(notes or {})


def made(
    read: Callable[[], Mapping[str, Any]],
    folder: str | Path,
    model: Program | None,
    guide: Program | None,
    device: str | torch.device,
) -> Saved:
    """Make the pair of a folder that was read; arguments and errors are those of :func:`load`.

    Args:
        read: gives what :func:`save` has written.
        folder: for messages.
        model: see :func:`load`.
        guide: see :func:`load`.
        device: see :func:`load`.
    """
    given = {name: p for name, p in (("model", model), ("guide", guide)) if p is not None}
    for name, program in given.items():
        if not callable(program):
            raise TypeError(f"{name} must be a Pyro program, called with x; got {program!r}")
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {error}") from error
    content = read()
    try:
        return _loaded(content, given, device)
    except _NotGivenError as error:
        raise ValueError(f"{folder} is not loaded: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise UnreadableFile(
            f"{folder} holds no pair that this pyro_vae can make: {reason}. If another version "
            "saved it, take that; or pass model and guide."
        ) from error


def _read(folder: Path) -> dict[str, Any]:
    try:
        return read(folder, kind=KIND)
    except UnreadableFile as error:
        if "step-" in folder.name or any(folder.glob("step-*")):
            raise UnreadableFile(
                f"{folder} has checkpoints of a fit: load its pair by pyro_vae.load_checkpoint"
            ) from error
        raise


def check_folder(folder: str | Path) -> None:
    """Refuse what names no folder."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be the name of a folder, got {folder!r}")


class _NotGivenError(ValueError):
    pass


def _loaded(content: Mapping[str, Any], given: dict[str, Program], device: torch.device) -> Saved:
    wanted = {n: why for n, why in content["recipe"]["given"].items() if n not in given}
    if wanted:
        raise _NotGivenError(f"pass {' and '.join(wanted)} to load: {'; '.join(wanted.values())}")
    tensors, memory = content["tensors"], memory_of(content["tensors"])
    pair = rebuild(content["recipe"], memory=memory, **given)
    model, guide = pair["model"], pair["guide"]
    programs.require_programs(model, guide)
    make_heads(model, guide, content["heads"], memory)
    if found := differences(module_tensors(model, guide), tensors):
        message = f"the programs have other parameters than were saved. {found}"
        if not given:
            raise ValueError(message)
        raise _NotGivenError(f"{message}. Make them as they were then.")
    load_state(model, guide, content, device)
    history = content["history"]
    return Saved(
        model=model,
        guide=guide,
        history=None if history is None else dict_to_dataframe(history),
        notes=content["notes"],
        versions=content["versions"],
    )


def dataframe_to_dict(frame: pd.DataFrame) -> dict[str, Any]:
    """Return the structure of a data frame.

    Raises:
        ValueError: two columns have one name.
    """
    import pandas as pd

    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()].to_list()
        raise ValueError(f"history must have a name for each column, got {twice} twice")
    default = isinstance(frame.index, pd.RangeIndex) and frame.index.equals(
        pd.RangeIndex(len(frame))
    )
    return {
        "columns": [(name, _of_values(frame[name])) for name in frame.columns],
        "rows": len(frame),
        "index": None if default else _of_values(frame.index),
        "index_name": frame.index.name,
    }


def dict_to_dataframe(structure: dict[str, Any]) -> pd.DataFrame:
    """Return the data frame of a structure."""
    import pandas as pd

    rows, index = structure["rows"], structure["index"]
    index = pd.RangeIndex(rows) if index is None else pd.Index(index)
    columns = {name: pd.Series(values, index=index) for name, values in structure["columns"]}
    frame = pd.DataFrame(columns, index=index)
    frame.index.name = structure["index_name"]
    return frame


def _of_values(values: pd.Series | pd.Index) -> np.ndarray | list[Any]:
    return values.to_list() if values.dtype.kind not in "biufc" else values.to_numpy()
