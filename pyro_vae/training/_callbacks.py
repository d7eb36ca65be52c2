"""Callbacks of a fit, which run after each epoch, after each checkpoint and after the fit."""

from __future__ import annotations

import contextlib
import inspect
import numbers
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_vae._utils.code_names import PACKAGE, package
from pyro_vae._utils.distributed import gather
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.random import restored_generators, restored_generators_of_python, seeded

if TYPE_CHECKING:
    from pyro_vae.training._fit import Fit

AfterEpoch = Callable[[int, Mapping[str, float]], Mapping[str, float] | None]


class StopTraining(Exception):  # noqa: N818 - not an error
    """Exception that a callback raises in ``after_epoch`` to end the fit after this epoch.

    :func:`pyro_vae.fit` catches it and returns the fit. The other callbacks still see the epoch.
    With ``patience``, the pair then has the parameters of its best epoch so far, otherwise those of
    this epoch. In a group of processes, all stop after this epoch, also if one process alone raises
    it. A checkpoint records the stop. So a resumed run stays stopped, as it does after
    ``patience``. To train further, fit the returned pair again.

    Args:
        reason: the cause, which :class:`~pyro_vae.training.Fit` shows.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> def stop_below_100_nats(epoch, row):
        ...     if row["loss"] < 100:
        ...         raise pv.training.StopTraining("the loss is below 100 nats")
        >>> x = torch.bernoulli(torch.full((50, 16), 0.5))
        >>> fit = pv.fit(model, guide, x, after_epoch=stop_below_100_nats, progress=False)
        >>> len(fit.history), fit.stop_reason
        (1, 'the loss is below 100 nats')
    """

    def __init__(self, reason: str = "a callback raised StopTraining"):
        super().__init__(reason)
        self.reason = str(reason)


class Callback:
    """Run code after each epoch, after each checkpoint and after the fit, by a subclass.

    The methods do nothing here. Override those that you need. :func:`pyro_vae.fit` calls its
    ``callbacks`` in order. Their random numbers do not change those of the fit. A callback that
    raises an error ends the fit with this error.

    In a group of processes, each process calls its own callbacks. So pass a logger in the first
    process only. A callback that calls a function of the library must be passed in all processes.

    If a fit is killed or interrupted during an epoch, the resumed run repeats the end of this
    epoch. So ``after_epoch`` may see the number of an epoch twice.

    Example:
        >>> import torch, pyro_vae as pv
        >>> class Printed(pv.training.Callback):
        ...     def after_epoch(self, epoch, row):
        ...         print(f"epoch {epoch}, {row['skipped']:g} steps skipped")
        ...
        ...     def after_fit(self, fit):
        ...         print(f"{len(fit.history)} epochs")
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> x = torch.bernoulli(torch.full((50, 16), 0.5))
        >>> fit = pv.fit(model, guide, x, epochs=2, callbacks=[Printed()], progress=False)
        epoch 1, 0 steps skipped
        epoch 2, 0 steps skipped
        2 epochs
    """

    def after_epoch(self, epoch: int, row: Mapping[str, float]) -> Mapping[str, float] | None:
        """Run after each epoch. Raise :class:`~pyro_vae.training.StopTraining` to end the fit.

        The random numbers are the same in each epoch.

        Args:
            epoch: number of the epoch, from 1.
            row: this epoch's row of the history, by the columns of
                :class:`~pyro_vae.training.Fit`, with the columns of earlier callbacks.

        Returns:
            Numbers by name, which become columns of the history, or None. A number may be a tensor
            without dimensions, such as ``evidence(...).values.mean()``.
        """

    def after_checkpoint(self, path: Path) -> None:
        """Run after each checkpoint, in the process that wrote it.

        Args:
            path: the checkpoint, a folder. :func:`pyro_vae.load_checkpoint` reads it.
        """

    def after_fit(self, fit: Fit) -> None:
        """Run at the end of a fit, also if it was stopped or interrupted, but not after an error.

        If a finished run is resumed, it runs again.

        Args:
            fit: the fit that :func:`pyro_vae.fit` returns, or ``.partial`` of an interrupted fit.
        """

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state of the callback for checkpoints.

        Returns:
            A dictionary of numbers, strings, tensors, and lists and dictionaries of them.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict` in a resumed fit.

        Args:
            state: the state in the checkpoint. Without one, the method is not called.
        """


class Callbacks:
    """The callbacks of one fit.

    Args:
        after_epoch: Function to call before the callbacks, or None.
        callbacks: The user's callbacks, or None.
        reserved: The columns of the history that callbacks must not return.

    Raises:
        TypeError: ``after_epoch`` or a method does not take its arguments, or a callback is not a
            :class:`Callback`.
    """

    def __init__(
        self,
        after_epoch: AfterEpoch | None,
        callbacks: Sequence[Callback] | None,
        *,
        reserved: Sequence[str],
    ):
        self._callbacks = [] if after_epoch is None else [_AfterEpoch(after_epoch)]
        self._callbacks += _checked(callbacks)
        self._reserved = frozenset(reserved)

    @property
    def have_user_code(self) -> bool:
        """Whether a function or a callback of the user is among them."""
        return any(
            isinstance(each, _AfterEpoch) or package(type(each)) != PACKAGE
            for each in self._callbacks
        )

    def after_epoch(
        self, epoch: int, row: Mapping[str, float], seed: int
    ) -> tuple[dict[str, float], str | None]:
        """Call all callbacks. All processes of a group must call this method.

        Args:
            epoch: The finished epoch.
            row: The row of the history.
            seed: The seed of each callback's random numbers.

        Returns:
            The columns of the callbacks, and the reason to stop or None. The reason is the same in
            all processes.

        Raises:
            RuntimeError: A callback of another process has failed.
        """
        try:
            columns, reason = self._after_epoch(epoch, row, seed)
        except Exception as error:
            gather((None, first_line(error)))  # so that the other processes do not wait for this
            raise
        for process, (wanted, failure) in enumerate(gather((reason, None))):
            if failure is not None:
                raise RuntimeError(
                    f"a callback of process {process} failed in epoch {epoch}: {failure}"
                )
            reason = wanted if reason is None else reason
        return columns, reason

    def after_checkpoint(self, path: Path) -> None:
        """Call all callbacks after a checkpoint. Its time must not change any random numbers.

        Raises:
            RuntimeError: A callback raised :class:`StopTraining`.
        """
        for each in self._callbacks:
            with restored_generators(), restored_generators_of_python():
                _without_stop(each.after_checkpoint, path)

    def after_fit(self, fit: Fit) -> None:
        """Call all callbacks after the fit.

        Raises:
            RuntimeError: A callback raised :class:`StopTraining`.
        """
        for each in self._callbacks:
            with restored_generators():
                _without_stop(each.after_fit, fit)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the callbacks that have one, by class and number."""
        states = {name: each.state_dict() for name, each in self._named().items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore the states of the callbacks that the checkpoint has."""
        for name, each in self._named().items():
            if name in states:
                each.load_state_dict(states[name])

    def _after_epoch(
        self, epoch: int, row: Mapping[str, float], seed: int
    ) -> tuple[dict[str, float], str | None]:
        columns: dict[str, float] = {}
        stops: list[StopTraining] = []
        for each in self._callbacks:
            with seeded(seed), _collected(stops):
                found = each.after_epoch(epoch, MappingProxyType({**row, **columns}))
                columns |= self._columns_of(found, columns)
        return columns, stops[0].reason if stops else None

    def _columns_of(self, found: Any, columns: Mapping[str, float]) -> dict[str, float]:
        found = {} if found is None else found
        if not isinstance(found, Mapping) or not all(
            isinstance(n, str) and _is_number(v) for n, v in found.items()
        ):
            raise TypeError(
                f"after_epoch must return a dictionary of numbers by name, or None, got {found!r}"
            )
        if taken := found.keys() & (self._reserved | columns.keys()):
            raise ValueError(
                f"after_epoch must not return {sorted(taken)}. The history has columns of these "
                "names. Choose others"
            )
        return {name: float(value) for name, value in found.items()}

    def _named(self) -> dict[str, Callback]:
        seen: Counter[str] = Counter()
        named = {}
        for each in self._callbacks:
            name = type(each).__qualname__
            seen[name] += 1
            named[f"{name} {seen[name]}"] = each
        return named


class _AfterEpoch(Callback):
    """The callback of the function ``fit(after_epoch=...)``."""

    def __init__(self, function: AfterEpoch):
        if not callable(function):
            raise TypeError(
                f"after_epoch must be a function after_epoch(epoch, row), got {function!r}"
            )
        _require_arguments("after_epoch", function, "(epoch, row)")
        self._function = function

    def after_epoch(self, epoch: int, row: Mapping[str, float]) -> Mapping[str, float] | None:
        return self._function(epoch, row)


def _is_number(value: Any) -> bool:
    """Return whether a value is a real number, also as a tensor without dimensions."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    return isinstance(value, numbers.Real)


def check_after_epoch(function: AfterEpoch | None) -> None:
    """Raise TypeError if ``after_epoch`` is neither None nor a function of an epoch and its row."""
    if function is not None:
        _AfterEpoch(function)


def _checked(callbacks: Any) -> list[Callback]:
    if callbacks is None:
        return []
    if not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks must be a list of pv.training.Callback, got {callbacks!r}")
    for each in callbacks:
        if not isinstance(each, Callback):
            raise TypeError(
                "each of callbacks must be an object of a subclass of pv.training.Callback, got "
                f"{each!r}. Pass a function (epoch, row) as after_epoch="
            )
        name = type(each).__name__
        _require_arguments(f"{name}.after_epoch", each.after_epoch, "(epoch, row)")
        _require_arguments(f"{name}.after_checkpoint", each.after_checkpoint, "(path)")
        _require_arguments(f"{name}.after_fit", each.after_fit, "(fit)")
    return list(callbacks)


def _require_arguments(name: str, function: Callable, arguments: str) -> None:
    """Raise TypeError if a function cannot be called with as many arguments as the text names."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function of C without a signature
        return
    try:
        signature.bind(*arguments.split(","))
    except TypeError:
        is_method = "." in name
        written = f"(self, {arguments[1:]}" if is_method else arguments
        raise TypeError(
            f"{name} must take {arguments}, but takes {signature}. Write "
            f"def {name.rpartition('.')[2]}{written}: ..."
        ) from None


@contextlib.contextmanager
def _collected(stops: list[StopTraining]) -> Iterator[None]:
    """Append a StopTraining to the list instead of raising it."""
    try:
        yield
    except StopTraining as stop:
        stops.append(stop)


def _without_stop(method: Callable[[Any], None], argument: Any) -> None:
    try:
        method(argument)
    except StopTraining as stop:
        raise RuntimeError(
            f"a callback raised StopTraining in {method.__name__}. Raise it in after_epoch"
        ) from stop
