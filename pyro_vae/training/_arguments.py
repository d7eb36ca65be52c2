"""Check the arguments of a fit and convert each of them to one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyro_vae._utils.checks import positive_integer, positive_number, require_word
from pyro_vae.training._checkpoints import Checkpoint, Checkpoints
from pyro_vae.training._nonfinite import Skip
from pyro_vae.training._step import BOTH

_LEARNING_RATE = 1e-3


def check_arguments(
    *,
    epochs: int,
    clip_norm: float | None,
    patience: int | None,
    validation: Any,
) -> None:
    """Raise an error if an argument is out of range or ``patience`` lacks validation data.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or ``patience`` is passed without validation data.
    """
    positive_integer("epochs", epochs)
    if clip_norm is not None:
        positive_number("clip_norm", clip_norm)
    if patience is not None:
        positive_integer("patience", patience)
        if validation is None:
            raise ValueError("patience needs validation data. Pass validation=")


def skip_limit_of(on_nonfinite: str | Skip) -> int:
    """Return the number of NaN or infinite steps that may be skipped.

    Raises:
        ValueError: ``on_nonfinite`` is not ``"raise"``, ``"skip"`` or a :class:`Skip`.
    """
    if isinstance(on_nonfinite, Skip):
        return on_nonfinite.limit
    other = "a pv.training.Skip with a limit"
    require_word("on_nonfinite", on_nonfinite, ("raise", "skip"), other)
    return Skip().limit if on_nonfinite == "skip" else 0


def learning_rate_of(
    learning_rate: float | Mapping[str, float] | None, optimizer: Callable | None
) -> float | Mapping[str, float] | None:
    """Return the learning rates of the default optimizer, None for another optimizer.

    Raises:
        TypeError: A learning rate is not a number.
        ValueError: A learning rate is out of range. A dictionary has other keys than the two
            programs. Or ``optimizer`` is passed too.
    """
    if optimizer is not None and not isinstance(learning_rate, Mapping | None):
        raise ValueError(
            f"learning_rate={learning_rate!r} is for the default optimizer, and optimizer is "
            "passed too. Set the rate in optimizer, for example "
            "optimizer=functools.partial(torch.optim.SGD, lr=0.1), and leave learning_rate out"
        )
    if learning_rate is None:
        return _LEARNING_RATE if optimizer is None else None
    if not isinstance(learning_rate, Mapping):
        return positive_number("learning_rate", learning_rate)
    if set(learning_rate) != {"model", "guide"}:
        raise ValueError(
            "learning_rate must be a number, or a dictionary with one for 'model' and one for "
            "'guide', got "
            f"{dict(learning_rate)}"
        )
    if optimizer is not None:
        raise ValueError(
            "two learning rates are for the default optimizer, and optimizer is passed too. Set "
            "the rates in optimizer, and leave learning_rate out"
        )
    for name, value in learning_rate.items():
        positive_number(f"learning_rate[{name!r}]", value)
    return learning_rate


def alternation_of(guide_steps: int | None, model_steps: int | None) -> list[str]:
    """Return the program that each step of one cycle trains."""
    if guide_steps is None and model_steps is None:
        return [BOTH]
    guide_steps = positive_integer("guide_steps", 1 if guide_steps is None else guide_steps)
    model_steps = positive_integer("model_steps", 1 if model_steps is None else model_steps)
    return ["guide"] * guide_steps + ["model"] * model_steps


def checkpoints_of(checkpoint: str | Path | Checkpoint | None) -> Checkpoints | None:
    """Return the checkpoints of the run, None without ``checkpoint``.

    Raises:
        TypeError: ``checkpoint`` is neither a folder nor a :class:`Checkpoint`.
        OSError: The folder cannot be created.
    """
    if checkpoint is None:
        return None
    settings = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    return Checkpoints(settings)
