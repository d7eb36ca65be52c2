"""Whether the advice of a diagnosis came true in a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyro_vae.report._differences import LEVEL, Difference

if TYPE_CHECKING:
    from pyro_vae.report._comparison import Comparison


def advice(comparison: Comparison, verdict: Sequence[str], baseline: str) -> list[str]:
    """Return whether each line of a verdict came true; see :meth:`Comparison.advice`."""
    rows = comparison.differences_from(baseline)
    return [f"{_quoted(line)}: {_result(comparison, rows, line, baseline)}" for line in verdict]


def _quoted(line: str) -> str:
    """Return the first sentence of a line, in quotation marks."""
    first, *_ = line.split(". ")
    return f'"{first.rstrip(".")}"'


def _subject(text: str) -> str | None:
    """Return the word before the colon, in small letters. None without a colon."""
    subject, colon, _ = text.partition(":")
    return subject.strip().lower() if colon else None


def _result(comparison: Comparison, rows, line: str, baseline: str) -> str:
    subject = _subject(line)
    tested = [name for name in rows.index if subject is not None and _subject(name) == subject]
    if not tested:
        return "not tested here."
    return " ".join(_result_of(comparison, rows, name, baseline) for name in tested)


def _result_of(comparison: Comparison, rows, name: str, baseline: str) -> str:
    row = rows.loc[name]
    text = f"{name} changed log p(x) by {row.difference:+.2f} ± {row.standard_error:.2f} nats"
    elbo = comparison.difference(name, baseline, quantity="elbo")
    if elbo.mean == elbo.mean:  # not NaN
        text += f" and the ELBO by {elbo.mean:+.2f} ± {elbo.standard_error:.2f}"
    return f"{text}. {_outcome(row, elbo)}"


def _outcome(row, elbo: Difference) -> str:
    if row.is_told_apart:
        return "It came true." if row.difference > 0 else "It did not come true."
    if elbo.mean > 0 and elbo.p_value < 1 - LEVEL:
        return "It came true for the ELBO, but log p(x) cannot be told from that of the baseline."
    return "It is not confirmed: log p(x) cannot be told from that of the baseline."
