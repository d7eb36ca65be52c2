"""The error for NaN and infinite values, and the search for their first site."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae._programs.data_plate import Program, known_frame, known_names
from pyro_vae._programs.outside import log_prob_on, support_to_check
from pyro_vae._programs.sites import is_factor
from pyro_vae._utils.checks import positive_integer
from pyro_vae._utils.distributed import gather
from pyro_vae.training._gradients import numbers_of

_ROWS_SHOWN = 10


@dataclass(frozen=True)
class Skip:
    """Skip the update of a step whose loss or gradient is NaN or infinite.

    Pass a ``Skip`` as ``fit(on_nonfinite=...)``. The history counts the skipped steps.

    Args:
        limit: The number of steps that a run may skip. The next such step raises an error.

    Raises:
        TypeError: ``limit`` is not a whole number.
        ValueError: ``limit`` is less than 1.

    Example:
        >>> import pyro_vae as pv
        >>> pv.training.Skip(limit=10)
        Skip(limit=10)
    """

    limit: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", positive_integer("limit", self.limit))


class NonFiniteError(FloatingPointError):
    """A loss or a gradient of a fit is NaN or infinite. The pair has its state before that step.

    With ``patience``, the pair has its state of the best epoch so far.

    Args:
        what: The cause, for the message.
        epoch: The epoch, from 1.
        step: The step of the epoch, from 1.
        site: The first sample site with NaN or infinite numbers, None if all are finite.
        parameter: The first parameter that is NaN or infinite after the step, or has such a
            gradient. None if only the loss is NaN or infinite.
        rows: The row numbers of the minibatch in the data, None if the data are a stream.
        bad: The rows with NaN or infinite numbers at the site, counted from 0 in the minibatch.
        folder: The folder of a checkpoint just before the step, with the minibatch. To reproduce
            the error, pass ``checkpoint=pv.training.Checkpoint(folder, resume=True)`` to ``fit``,
            with the same other arguments.
        excludes: Whether a sample of the guide has a density of zero under the model, for the
            message.
    """

    def __init__(
        self,
        what: str,
        *,
        epoch: int,
        step: int,
        site: str | None,
        parameter: str | None,
        rows: Tensor | None,
        bad: Tensor | None,
        folder: Path | None = None,
        excludes: bool = False,
    ):
        self.what, self.epoch, self.step = what, epoch, step
        self.site, self.parameter, self.rows, self.bad = site, parameter, rows, bad
        self.folder, self.excludes = folder, excludes
        lines = [f"{what} in epoch {epoch}, step {step}"]
        if bad is not None and len(bad):
            lines.append(f"The site is NaN or infinite in rows {shown_rows(bad)} of the minibatch")
            if rows is not None:
                lines[-1] += f", which are rows {shown_rows(rows[bad])} of the data"
        elif rows is not None:
            lines.append(f"The minibatch has rows {shown_rows(rows)} of the data")
        if excludes:
            lines.append(
                "A sample of the guide has a density of zero under the model. It is outside of the "
                "support of a latent, or a factor excludes it. Use a guide without such samples"
            )
        lines.append(
            "The parameters have their values before that step. Lower the learning rate, set "
            'clip_norm, look for a scale that falls to zero, or pass on_nonfinite="skip"'
        )
        if folder is not None:
            again = f"pv.training.Checkpoint({str(folder)!r}, resume=True)"
            lines.append(f"To reproduce the error, pass checkpoint={again}")
        super().__init__(". ".join(lines) + ".")

    def __reduce__(self) -> tuple[Any, ...]:  # an exception is pickled by its one message otherwise
        return functools.partial(type(self), self.what, **self._arguments()), ()

    def without_folder(self) -> NonFiniteError:
        """Return the same error without the folder of a checkpoint that will be removed."""
        return type(self)(self.what, **(self._arguments() | {"folder": None}))

    def _arguments(self) -> dict[str, Any]:
        names = ("epoch", "step", "site", "parameter", "rows", "bad", "folder", "excludes")
        return {name: getattr(self, name) for name in names}


class FirstNonFiniteSite(Messenger):
    """Record the first sample site with NaN or infinite numbers, and its rows of the minibatch.

    Args:
        *programs: The programs that run, whose plates of the data points have known names.

    Attributes:
        name: The name of the site, None if all sites are finite.
        what: A description of the number. It is in a parameter of the distribution, in the value
            or in the log-density.
        bad: The rows with such numbers, None if the site is outside the plate ``"data"``.
        excludes: Whether it is a latent of the model outside of its support, or a factor of minus
            infinity in the model.
        has_nonfinite_numbers: Whether a parameter is NaN, or a value is NaN or infinite, at this
            site or a later one. A log-density alone does not count, because it is infinite outside
            the support.
    """

    def __init__(self, *programs: Program):
        super().__init__()
        self._plates = known_names(*programs)
        self.name: str | None = None
        self.what = ""
        self.bad: Tensor | None = None
        self.excludes = False
        self._latents: set[str] = set()
        self._in_model = False
        self.has_nonfinite_numbers = False

    def of_all(self, row_offset: int) -> FirstNonFiniteSite:
        """Copy the result of the first process that found a site to all processes.

        Args:
            row_offset: The number of rows of the minibatch in processes of lower rank.
        """
        rows = None if self.bad is None else self.bad + row_offset
        for name, what, bad, excludes in gather((self.name, self.what, rows, self.excludes)):
            if name is not None:
                self.name, self.what, self.bad, self.excludes = name, what, bad, excludes
                break
        return self

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"]:
            self._in_model |= msg["name"] in self._latents  # first in the guide
            self._latents.add(msg["name"])
        if self.has_nonfinite_numbers or type(msg["fn"]).__name__ == "_Subsample":
            return
        for what, values in _numbers(msg):
            # An infinite parameter, such as a logit, may be intended. Its effect is checked.
            parameter = what.startswith("parameter")
            finite = ~values.detach().isnan() if parameter else values.detach().isfinite()
            if not finite.all():
                self.has_nonfinite_numbers = what != "the log-density"
                if self.name is None:
                    self.name = msg["name"]
                    self.what = f"{what} of site {self.name!r} is {values[~finite][0].item()}"
                    self.excludes = what == "the log-density" and self._is_excluded(msg, values)
                    self.bad = _rows(msg, finite, self._plates)
                return

    def _is_excluded(self, msg: dict[str, Any], log_prob: Tensor) -> bool:
        limited = is_factor(msg) or (
            not msg["is_observed"] and support_to_check(msg, msg) is not None
        )
        return self._in_model and limited and bool(log_prob.isneginf().any())


def _numbers(msg: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters, the value and the log-density of a site, in this order."""
    base = msg["fn"]
    while hasattr(base, "base_dist"):
        base = base.base_dist
    for name in base.arg_constraints:
        if isinstance(parameter := vars(base).get(name), Tensor):
            yield f"parameter {name!r}", parameter
    support = None if msg["is_observed"] else support_to_check(msg, msg)
    log_prob = msg["fn"].log_prob(msg["value"]) if support is None else log_prob_on(support, msg)
    if msg["mask"] is not None:
        log_prob = log_prob.where(torch.as_tensor(msg["mask"]), 0.0)
    # An observed site with a finite log-density may have masked missing data.
    if not (msg["is_observed"] and log_prob.isfinite().all()):
        yield "the value", msg["value"]
    yield "the log-density", log_prob


def _rows(msg: dict[str, Any], finite: Tensor, plates: frozenset[str]) -> Tensor | None:
    """Return the rows with NaN or infinite numbers, None if the site is outside the data plate."""
    frame, batch = known_frame(msg, plates), len(msg["fn"].batch_shape)
    if frame is None or finite.dim() < batch or batch < -frame.dim:
        return None
    along = batch + frame.dim
    if finite.shape[along] != frame.size:
        return None
    return (~finite.movedim(along, 0).reshape(frame.size, -1).all(1)).nonzero()[:, 0].cpu()


def first_non_finite(tensors: Mapping[str, Tensor | None]) -> str | None:
    """Return the name of the first tensor with NaN or infinite numbers, None without any."""
    for name, tensor in tensors.items():
        if tensor is not None and not numbers_of(tensor).isfinite().all():
            return name
    return None


def shown_rows(numbers: Tensor) -> str:
    """Format row numbers for a message, at most ten of them."""
    shown = ", ".join(map(str, numbers[:_ROWS_SHOWN].tolist()))
    return f"[{shown}{', ...' if len(numbers) > _ROWS_SHOWN else ''}]"
