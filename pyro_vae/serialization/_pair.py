"""`save` and `load`: a model and guide in one folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_vae._programs.pair_state import require_parameters
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import parameter_store, require_programs
from pyro_vae._utils.messages import first_line, program_name
from pyro_vae._utils.user_warnings import warn_user
from pyro_vae._utils.versions import versions
from pyro_vae.serialization._folder import UnreadableFile, read, write
from pyro_vae.serialization._pair_state import (
    differences,
    digests_of_others,
    load_state,
    make_heads,
    memory_of,
    module_tensors,
    recipe_of,
    state_of,
    warn_of_others,
)
from pyro_vae.serialization._recipe import rebuild
from pyro_vae.serialization._registry import NOT_READABLE

if TYPE_CHECKING:
    import pandas as pd
from pyro_vae._utils.checks import check_call, shown

KIND = "pair"


@dataclass(frozen=True)
class Saved:
    """A loaded pair.

    Args:
        model: program of p(x, z), with its parameters.
        guide: program of q(z|x), with its parameters.
        history: the history of the fit if saved, or None.
        notes: the notes as passed to :func:`save`.
        versions: versions of ``pyro_vae``, ``torch``, ``pyro-ppl`` and ``python`` when saved, and
            the ``date``.
    """

    model: Program
    guide: Program
    history: pd.DataFrame | None
    notes: dict[str, Any]
    versions: dict[str, str]

    def __repr__(self) -> str:
        pair = f"{program_name(self.model)} and {program_name(self.guide)}"
        epochs = "" if self.history is None else f", fitted for {len(self.history)} epochs"
        notes = f", notes: {', '.join(self.notes)}" if self.notes else ""
        of = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"saved pair of {pair}{epochs}{notes} ({of})"


def save(
    folder: str | Path,
    model: Program,
    guide: Program,
    *,
    history: pd.DataFrame | None = None,
    notes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a pair to a folder of two files, ``record.json`` and ``tensors.safetensors``.

    The tensors are all parameters and buffers, with names such as
    ``model.likelihood.decoder.0.weight``, and the values of ``pyro.param``. For programs made of
    this library's classes and of torch's layers, the record has the constructor arguments, so that
    :func:`load` can rebuild them. Other programs must be passed to :func:`load`. So must programs
    with layers whose arguments torch does not keep, such as ``nn.TransformerEncoderLayer``; a
    warning names them. No code is saved or pickled.

    Args:
        folder: folder to create. After a crash or a full disk, its previous content is unchanged.
        model: program of p(x, z).
        guide: program of q(z|x).
        history: data frame to save with the pair, such as that of :class:`pyro_vae.training.Fit`.
        notes: other values to save: dictionaries, lists, strings, numbers, tensors, arrays.
        overwrite: whether to replace a pair saved in the same folder.

    Raises:
        FileExistsError: The folder exists, and ``overwrite`` is False or it is not a saved pair.
        OSError: Writing failed.
        TypeError: The notes have a value of another type. Or the constraint of a ``pyro.param`` has
            no name.
        ValueError: The guide has loaded values that it uses only at its first call. Or a parameter
            belongs to a module that no name reaches, and so cannot be saved.

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
    require_programs(model, guide)
    with parameter_store(model, guide):
        require_parameters(model, guide)
    content = state_of(model, guide)
    content |= {
        "versions": versions(),
        "notes": _notes(notes),
        "history": None if history is None else dataframe_to_dict(history),
        "recipe": recipe_of(model, guide, content),
        "digests": digests_of_others(model, guide),
    }
    for name, why in content["recipe"]["given"].items():
        if why.endswith(NOT_READABLE):
            warn_user(
                f"pv.load will need {name}={name}, because {why}. Keep the code that makes it."
            )
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
        folder: folder of the pair.
        model: program built like the saved one, whose parameters are replaced in place. By default
            it is rebuilt from the record. Pass it if it is your own code.
        guide: the same for the guide. A guide of this library is rebuilt for the given model.
        device: device of the parameters.

    Returns:
        The pair, with its history and notes. Its results equal those of the saved pair, bit by bit.
        Tensors that are neither parameters nor buffers are not saved. A warning names those that
        differ.

    Raises:
        UnreadableFile: A file is missing, damaged or not part of a saved pair. Nothing in it was
            run. UnreadableFile is a ValueError.
        ValueError: A program must be passed but is missing. Or a passed program has other
            parameters than the saved one; the message names them.

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
    """Return the pair of a folder's content. Other arguments and errors are as in :func:`load`.

    Args:
        read: function that returns the content that :func:`save` has written.
        folder: folder name for error messages.
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
        raise ValueError(f"device {device!r} cannot be used here: {first_line(error)}") from error
    content = read()
    try:
        return _loaded(content, given, device)
    except _NotGivenError as error:
        raise ValueError(f"{folder} is not loaded: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise UnreadableFile(
            f"{folder} has no pair that this pyro_vae can rebuild: {reason}. If another version "
            "saved it, use that version; or pass model and guide."
        ) from error


def _read(folder: Path) -> dict[str, Any]:
    try:
        return read(folder, kind=KIND)
    except UnreadableFile as error:
        if "step-" in folder.name or any(folder.glob("step-*")):
            raise UnreadableFile(
                f"{folder} has checkpoints of a fit: load its pair with pyro_vae.load_checkpoint"
            ) from error
        raise


def check_folder(folder: str | Path) -> None:
    """Raise TypeError if the argument is not a path."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a string or path, got {folder!r}")


class _NotGivenError(ValueError):
    pass


def _loaded(content: Mapping[str, Any], given: dict[str, Program], device: torch.device) -> Saved:
    wanted = {n: why for n, why in content["recipe"]["given"].items() if n not in given}
    if wanted:
        raise _NotGivenError(f"pass {' and '.join(wanted)} to load: {'; '.join(wanted.values())}")
    tensors, memory = content["tensors"], memory_of(content["tensors"])
    pair = rebuild(content["recipe"], memory=memory, **given)
    model, guide = pair["model"], pair["guide"]
    require_programs(model, guide)
    make_heads(model, guide, content["heads"], memory)
    if found := differences(module_tensors(model, guide), tensors):
        message = f"the programs have other parameters than the saved ones. {found}"
        if not given:
            raise ValueError(message)
        raise _NotGivenError(
            f"{message}. Build them like the saved ones. If a program makes parameters at its "
            "first call, as Pyro's AutoGuides do, call it once on a minibatch before."
        )
    load_state(model, guide, content, device)
    if saved := content.get("digests"):  # not in older folders
        warn_of_others("in the saved pair", saved, digests_of_others(model, guide))
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
        ValueError: Two columns have the same name.
    """
    import pandas as pd

    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()].to_list()
        raise ValueError(f"history must have distinct column names, got {twice} twice")
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
