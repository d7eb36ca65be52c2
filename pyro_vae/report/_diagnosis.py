"""The result of a diagnosis: a ledger in nats per data point, and a verdict in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pyro_vae._utils.numbers_text import with_error

if TYPE_CHECKING:
    import pandas as pd

LEAST_LOSS = 0.05  # nats per data point
LEAST_ERRORS = 2.0  # standard errors
IGNORED_INFORMATION = 0.1  # nats


@dataclass(frozen=True)
class LedgerEntry:
    """One line of a ledger.

    Args:
        name: name of the quantity.
        value: in nats per data point, or in ``unit``. NaN if it is unknown.
        standard_error: for the population of the data. NaN if it is unknown.
        note: what the quantity is, or the reason why it is unknown.
        unit: the unit of the value.
    """

    name: str
    value: float
    standard_error: float
    note: str
    unit: str = "nats"

    @property
    def is_loss(self) -> bool:
        """Whether the value is above 0.05 and above two standard errors."""
        return self.value > LEAST_LOSS and self.value > LEAST_ERRORS * self.standard_error


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`pyro_vae.diagnose`.

    Show it in a terminal with ``rich.print(diagnosis)`` or ``print(diagnosis)``.

    Args:
        entries: the lines of the ledger.
        num_train: number of training data points of the gaps, the prior and the decoder.
        num_test: number of test data points.
    """

    entries: tuple[LedgerEntry, ...]
    num_train: int
    num_test: int

    def __getitem__(self, name: str) -> LedgerEntry:
        """Return the line of the ledger with a name.

        Raises:
            KeyError: There is no such line.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"no entry {name!r}. The entries are {[e.name for e in self.entries]}")

    @property
    def possible_losses(self) -> list[LedgerEntry]:
        """The lines of the ledger for what a change may recover, also if they are small or NaN."""
        return [entry for entry in self.entries if entry.name in _ADVICE]

    @property
    def losses(self) -> list[LedgerEntry]:
        """The losses that a change can recover, the largest first.

        A loss is listed if it is above 0.05 nats and above two standard errors.
        """
        found = [entry for entry in self.possible_losses if entry.is_loss]
        return sorted(found, key=lambda entry: -entry.value)

    @property
    def verdict(self) -> list[str]:
        """Sentences on what to change, the largest loss first."""
        if self.losses:
            return [*map(self._advice, self.losses)]
        none = f"No part loses more than {LEAST_LOSS} nats that this diagnosis can find."
        if all(entry.name != "decoder gain" for entry in self.entries):
            none += " The decoder was not examined (refit=False)."
        return [none]

    @property
    def notes(self) -> list[str]:
        """Sentences on the limits of this diagnosis."""
        unknown: dict[str, list[str]] = {}  # names by reason
        for entry in self.entries:
            if math.isnan(entry.value):
                unknown.setdefault(entry.note, []).append(entry.name)
        found = [
            f"{'; '.join(names)} {'is' if len(names) == 1 else 'are'} unknown: {reason}."
            for reason, names in unknown.items()
        ]
        unreliable = self["unreliable log p(x)"].value
        if unreliable > 0.1:
            found.append(
                f"log p(x) is unreliable for {unreliable:.0%} of the test data and probably too "
                "low. The approximation gap is then too low as well."
            )
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """Return a table with one row per entry: value, standard_error, unit and note."""
        import pandas as pd

        rows = [
            {
                "name": entry.name,
                "value": entry.value,
                "standard_error": entry.standard_error,
                "unit": entry.unit,
                "note": entry.note,
            }
            for entry in self.entries
        ]
        return pd.DataFrame(rows).set_index("name")

    def _advice(self, entry: LedgerEntry) -> str:
        change = _ADVICE[entry.name]
        if entry.name == "decoder gain" and self["mutual information"].value < IGNORED_INFORMATION:
            change = _ADVICE_IF_IGNORED
        part, bound, advice = change
        return f"{part}: {bound} {entry.value:.2f} ± {entry.standard_error:.2f} nats. {advice}"

    def __rich__(self) -> Group:
        table = Table(
            title=f"{self.num_test} test and {self.num_train} training data points, nats per data "
            "point",
            title_justify="left",
            box=None,
            padding=(0, 1, 0, 0),
        )
        table.add_column("quantity", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("meaning")
        for entry in self.entries:
            table.add_row(Text(entry.name), entry_text(entry), Text(entry.note))
        verdict = [
            Text(f"{number}. {sentence}") for number, sentence in enumerate(self.verdict, start=1)
        ]
        return Group(table, "", *verdict, *(Text(f"\n{note}") for note in self.notes))

    def __repr__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())

    def __iter__(self) -> Iterator[LedgerEntry]:
        return iter(self.entries)


def entry_text(entry: LedgerEntry, plus_minus: str = "±") -> str:
    """Return the value of an entry with its standard error, as text."""
    if math.isnan(entry.value):
        return "-"
    if entry.unit == "share":
        return f"{entry.value:.1%}"
    if entry.unit == "units":
        return f"{entry.value:.0f}"
    return with_error(entry.value, entry.standard_error, plus_minus=plus_minus)


# By entry: the part of the pair, the kind of bound, and the change to try.
_ADVICE = {
    "approximation gap": (
        "guide",
        "its family costs",
        "Try a flow posterior, such as AmortizedFlow, or AmortizedMultivariateNormal.",
    ),
    "inference gap": (
        "guide",
        "its family and encoder cost",
        "Train longer, or try another guide.",
    ),
    "amortization gap, training": (
        "encoder",
        "its errors cost",
        "Train longer, or try a larger encoder.",
    ),
    "encoder overfitting": (
        "encoder overfits",
        "it costs a further",
        "Try more data, dropout in the encoder, or training that stops earlier.",
    ),
    "model overfitting": (
        "model overfits",
        "test data lose",
        "Try more data, a smaller decoder, or training that stops earlier.",
    ),
    "prior gain": (
        "prior",
        "a better one gains up to",
        "Try VampPrior or MixtureOfNormals.",
    ),
    "decoder gain": (
        "decoder",
        "a larger one gains at least",
        "Try a larger decoder, or another likelihood.",
    ),
}
_ADVICE_IF_IGNORED = (
    "decoder ignores the latents",
    "one that uses them gains at least",
    "Look for an error in the decoder, or lower the weight of the KL early in the training.",
)
