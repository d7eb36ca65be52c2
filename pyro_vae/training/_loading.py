"""Load the pair of a finished or unfinished fit from its checkpoints."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch

from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.checks import check_call
from pyro_vae.serialization._folder import RECORD, UnreadableFile, read
from pyro_vae.serialization._pair import (
    Saved,
    check_folder,
    dataframe_to_dict,
    dict_to_dataframe,
    made,
)
from pyro_vae.training._checkpoints import KIND, last_whole

_TRIES = 5  # attempts to read


def load_checkpoint(
    folder: str | Path,
    model: Program | None = None,
    guide: Program | None = None,
    *,
    device: str | torch.device = "cpu",
) -> Saved:
    """Load the pair of a fit from its last checkpoint.

    If the fit has ``patience``, the pair has its state of the best epoch so far. To resume the fit
    itself, pass ``checkpoint=pv.training.Checkpoint(folder, resume=True)`` to ``fit``.

    Args:
        folder: The folder that ``fit`` received as ``checkpoint``, or one checkpoint in it.
        model: See :func:`pyro_vae.load`.
        guide: See :func:`pyro_vae.load`.
        device: The device of the parameters.

    Returns:
        The pair, with the history of the finished epochs.

    Raises:
        FileNotFoundError: The folder has no checkpoint, or does not exist.
        UnreadableFile: The folder has checkpoints, but none can be read. It is a ValueError.
        ValueError: A program must be passed, or has other parameters than the fitted one.

    Example:
        >>> import tempfile, torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.bernoulli(torch.full((50, 16), 0.5))
        >>> with tempfile.TemporaryDirectory() as run:
        ...     fit = pv.fit(
        ...         model, guide, x, batch_size=10, epochs=2, checkpoint=run, progress=False
        ...     )
        ...     saved = pv.load_checkpoint(run)
        >>> torch.equal(saved.model.likelihood.decoder[0].bias, model.likelihood.decoder[0].bias)
        True
        >>> len(saved.history)
        2
    """
    check_call(load_checkpoint, locals())
    check_folder(folder)
    return made(lambda: _content(Path(folder)), folder, model, guide, device)


def _content(folder: Path) -> dict[str, Any]:
    """Return the content that :func:`pyro_vae.save` would write."""
    path, checkpoint = _read(folder)
    try:
        history = dict_to_dataframe(checkpoint["history"]).set_index("epoch")
        tensors = checkpoint["trainer"]["tensors"]
        return {
            **checkpoint["pair"],
            "tensors": tensors if checkpoint["best"] is None else checkpoint["best"],
            "history": dataframe_to_dict(history),
            "notes": {},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableFile(
            f"{path} has no checkpoint with a pair: {error!r}. Pass another folder"
        ) from error


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the last checkpoint. Try again if a run is replacing it."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(UnreadableFile, FileNotFoundError):
            return _read_once(folder)
        time.sleep(0.02)
    return _read_once(folder)


def _read_once(folder: Path) -> tuple[Path, dict[str, Any]]:
    if (folder / RECORD).exists():  # a single checkpoint
        return folder, read(folder, kind=KIND)
    path, checkpoint, _ = last_whole(folder) if folder.is_dir() else (None, None, {})
    if path is None:
        raise FileNotFoundError(
            f"the folder {folder} has no checkpoint of a fit, or does not exist. Check its name"
        )
    return path, checkpoint
