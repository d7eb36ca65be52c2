"""The parts of the results of ``pyro_vae.report`` that plots read. That folder imports this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from pyro_vae._utils.checks import shown
from pyro_vae.evaluation import Surgery


@runtime_checkable
class Comparison(Protocol):
    """The result of :func:`pyro_vae.compare`.

    Args:
        entries: one for each method, the best first.
    """

    @property
    def entries(self) -> Sequence[Any]: ...

    def difference(self, name: str) -> Any:
        """Return the log p(x) of a method minus that of the best."""


@runtime_checkable
class Diagnosis(Protocol):
    """The result of :func:`pyro_vae.diagnose`.

    Args:
        possible_losses: the lines of the ledger that can be losses.
    """

    @property
    def possible_losses(self) -> Sequence[Any]: ...


@runtime_checkable
class RateDistortion(Protocol):
    """The result of :func:`pyro_vae.rate_distortion`.

    Args:
        table: one row per beta.
        entropy: a lower bound of rate plus distortion.
        refit: ``"guide"`` or ``"both"``.
    """

    @property
    def table(self) -> Any: ...
    @property
    def entropy(self) -> float: ...
    @property
    def refit(self) -> str: ...


def require_result(name: str, value: Any, kind: type, source: str) -> None:
    """Raise TypeError if an argument is not a result with the parts of ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be the result of {source}, got {shown(value)}")


def surgeries_of(results: Any) -> dict[str, list[Surgery]]:
    """Return the surgeries of each method by its name; methods without surgery are left out.

    Args:
        results: a surgery, a dictionary of surgeries or lists of surgeries, or a comparison.

    Raises:
        TypeError: The argument has another type.
        ValueError: There is no surgery, or a method has none.
    """
    if isinstance(results, Comparison) and not isinstance(results, Mapping):
        named = {e.name: [run.surgery for run in e.runs] for e in results.entries}
        named = {name: found for name, found in named.items() if None not in found}
    elif isinstance(results, Mapping):
        named = {str(name): _as_list(each, Surgery) for name, each in results.items()}
    else:
        named = {"": _as_list(results, Surgery)}
    for name, found in named.items():
        if not all(isinstance(each, Surgery) for each in found):
            raise TypeError(
                "results must be a result of pv.elbo_surgery, a dictionary of such results or "
                f"lists of them by name, or a comparison, got {type(found[0]).__name__}"
            )
        if not found:
            raise ValueError(f"results must have a surgery for each name, got none for {name!r}")
    if not named:
        raise ValueError("results must have at least one surgery, got none")
    return named


def fits_of(fits: Any) -> dict[str, list[Any]]:
    """Return the fits of each method by its name; methods without fits are left out.

    Args:
        fits: a fit, a list of fits, a dictionary of these, or a comparison.

    Raises:
        TypeError: The argument has another type.
        ValueError: There is no fit, a list is empty, or a fit has no epoch.
    """
    if isinstance(fits, Comparison) and not isinstance(fits, Mapping):
        runs = {entry.name: [run.fit for run in entry.runs] for entry in fits.entries}
        runs = {name: [f for f in found if f is not None] for name, found in runs.items()}
        named = {name: [f for f in found if len(f.history)] for name, found in runs.items()}
        named = {name: found for name, found in named.items() if found}
    elif isinstance(fits, Mapping):
        named = {str(name): _as_list(each, object) for name, each in fits.items()}
    else:
        named = {"": _as_list(fits, object)}
    for name, found in named.items():
        wrong = [each for each in found if not hasattr(each, "history")]
        if wrong:
            raise TypeError(
                "fits must be a fit, a list of fits, a dictionary of these by name, or a "
                f"comparison, got {type(wrong[0]).__name__}"
            )
        if not found or not all(len(each.history) for each in found):
            raise ValueError(
                "fits must have fits with at least one epoch for each name, got "
                f"{'no fit' if not found else 'an empty history'} for {name!r}"
            )
    if not named:
        raise ValueError("fits must have at least one fit, got none")
    return named


def _as_list(value: Any, kind: type) -> list[Any]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return list(value) if is_list and (kind is object or not isinstance(value, kind)) else [value]
