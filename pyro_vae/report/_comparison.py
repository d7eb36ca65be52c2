"""The result of a comparison: methods with one or more runs, and the table of their differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pyro_vae._utils.checks import check_call
from pyro_vae._utils.extras import require
from pyro_vae._utils.numbers_text import with_error
from pyro_vae.evaluation import CollapseReport, Evidence, Surgery
from pyro_vae.evaluation._log_evidence import FEWEST_JUDGED
from pyro_vae.report._advice import advice
from pyro_vae.report._diagnosis import Diagnosis
from pyro_vae.report._differences import Difference, difference, mean_of_runs, not_worse
from pyro_vae.training import Fit

if TYPE_CHECKING:
    import pandas as pd

TERMS = ("distortion", "rate", "mutual_information", "marginal_kl")
_VALUES = {"log_evidence": "log_evidence", "elbo": "elbos"}  # attributes of an entry
_DIFFERENCES = (
    "difference",
    "standard_error",
    "low",
    "high",
    "p_value",
    "is_told_apart",
    "elbo_difference",
    "elbo_error",
)
_MANY = 0.1  # share of unreliable data points from which a log p(x) has a note


@dataclass(frozen=True)
class Run:
    """One pair of a comparison.

    Args:
        evidence: log p(x) of the held-out data.
        surgery: the terms of the ELBO; None if they cannot be computed.
        note: the reason why ``surgery`` is None.
        collapse: the activity of the latents; None if it cannot be computed.
        fit: the fit of the pair; None if it is not known.
    """

    evidence: Evidence
    surgery: Surgery | None
    note: str
    collapse: CollapseReport | None
    fit: Fit | None


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Args:
        name: name of the method.
        runs: its pairs, one for each training seed, in the order of the seeds.
        num_parameters: number of trainable values in model and guide of the first run.
        pictures: a few held-out x, their reconstructions (E[x|z] for z from the guide) and as many
            samples (E[x|z] for z from the prior), for the first run. None if the model does not
            observe x.
    """

    name: str
    runs: tuple[Run, ...]
    num_parameters: int
    pictures: tuple[Tensor, Tensor, Tensor] | None

    @cached_property
    def log_evidence(self) -> Tensor:
        """Log p(x_n) of each run, shape (S, N)."""
        return torch.stack([run.evidence.values for run in self.runs])

    @cached_property
    def elbos(self) -> Tensor:
        """The ELBO of x_n in each run, shape (S, N). NaN if the estimator is not importance."""
        return torch.stack(
            [
                run.evidence.mean_log_weights
                if run.evidence.method == "importance"
                else torch.full_like(run.evidence.values, math.nan)
                for run in self.runs
            ]
        )

    @cached_property
    def mean(self) -> Difference:
        """The mean log p(x) over runs and data, with its error, as its difference from zero."""
        return mean_of_runs(self.log_evidence)

    @property
    def seeds(self) -> list[int] | None:
        """The seeds of the fits. None if a seed is not known, or if two are equal."""
        known = [run.fit.seed for run in self.runs if run.fit is not None]
        seeds = [seed for seed in known if seed is not None]
        return seeds if len(set(seeds)) == len(self.runs) else None

    @property
    def has_equal_seeds(self) -> bool:
        """Whether two fits have the same seed."""
        seeds = [run.fit.seed for run in self.runs if run.fit is not None]
        known = [seed for seed in seeds if seed is not None]
        return len(set(known)) < len(known)

    @property
    def unreliable_share(self) -> float:
        """The share of estimates of log p(x) whose k-hat is above 0.7 or NaN.

        It is NaN if k-hat is not available, as with fewer than 21 particles.
        """
        return _mean(run.evidence.unreliable_share for run in self.runs)

    @property
    def untrusted_share(self) -> float:
        """The share of unreliable estimates; see :attr:`pyro_vae.evaluation.Evidence.untrusted`."""
        return _mean(run.evidence.untrusted.double().mean().item() for run in self.runs)

    @property
    def elbo(self) -> float:
        """The mean ELBO of the held-out data, over runs and data."""
        return _mean(run.evidence.elbo for run in self.runs)

    @property
    def num_active(self) -> float:
        """The mean number of active units over the runs. NaN if it is not known."""
        return _mean(
            math.nan if run.collapse is None else run.collapse.num_active for run in self.runs
        )

    def term(self, name: str) -> float:
        """Return the mean of a term of the surgery over the runs. NaN without a surgery."""
        return _mean(getattr(run.surgery, name, math.nan) for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`: methods on the same held-out data, by decreasing log p(x).

    Show it in a terminal with ``rich.print(comparison)`` or ``print(comparison)``.

    Args:
        entries: results of the methods, one entry per method.
        num_train: number of data points of the ELBO surgery.
        image_shape: (height, width) of a row of data, if it is an image.
    """

    entries: tuple[Entry, ...]
    num_train: int
    image_shape: tuple[int, int] | None = None

    @property
    def num_data(self) -> int:
        """The number of held-out data points."""
        return self.entries[0].log_evidence.shape[1]

    def difference(
        self,
        name: str,
        other: str | None = None,
        *,
        quantity: Literal["log_evidence", "elbo"] = "log_evidence",
    ) -> Difference:
        r"""Return the log p(x) of a method minus that of another, the best by default.

        If a data point has a low density under both methods, this cancels in the difference. Runs
        with the same training seeds are paired too. The standard error includes the spread of the
        seeds, if a method has several runs. With a single run of both, it is that of the two
        trained pairs: :math:`s_d / \sqrt N` for
        :math:`d_n = \log \hat p(x_n) - \log \hat p'(x_n)`.

        Args:
            name: name of a method.
            other: name of the other method.
            quantity: ``"log_evidence"`` for log p(x), or ``"elbo"`` for the ELBO of the held-out
                data.

        Returns:
            The :class:`Difference`. Its mean and error are zero for a method and itself.

        Raises:
            ValueError: There is no method of that name, or no such quantity.
        """
        if quantity not in _VALUES:
            raise ValueError(f"quantity must be one of {list(_VALUES)}, got {quantity!r}")
        one, two = self._entry(name), self._entry(other or self.entries[0].name)
        if one is two:
            return Difference(0.0, 0.0, math.inf, len(one.runs) > 1)
        paired = one.seeds is not None and one.seeds == two.seeds and len(one.runs) > 1
        values = [getattr(entry, _VALUES[quantity]) for entry in (one, two)]
        return difference(*values, paired=paired)

    @cached_property
    def best(self) -> list[str]:
        """The methods that cannot be told from the best at 95%, the best first.

        Each method is compared with the best by a t test. The p-values are corrected for the
        number of comparisons (Holm 1979). Methods whose log p(x) is not finite are left out, unless
        that of all methods is not.
        """
        finite = [entry.name for entry in self.entries if math.isfinite(entry.mean.mean)]
        names = finite or [entry.name for entry in self.entries]
        kept = not_worse({name: self.difference(name) for name in names[1:]})
        return [names[0], *(name for name in names[1:] if name in kept)]

    def differences_from(self, name: str) -> pd.DataFrame:
        """Return the differences of all other methods from one, such as a baseline.

        Args:
            name: name of the method.

        Returns:
            A table with one row per other method, in nats per data point. The columns are
            ``difference`` of log p(x), its ``standard_error``, the ends ``low`` and ``high`` of its
            95% interval, ``p_value``, ``is_told_apart``, ``elbo_difference`` and ``elbo_error``.
            ``is_told_apart`` is whether the log p(x) differs at 95%, corrected for the number of
            rows (Holm 1979).

        Raises:
            ValueError: There is no method of that name.
        """
        import pandas as pd

        baseline = self._entry(name).name
        names = [entry.name for entry in self.entries if entry.name != baseline]
        found = {each: self.difference(each, baseline) for each in names}
        kept = not_worse(found)
        rows = []
        for each in names:
            elbo = self.difference(each, baseline, quantity="elbo")
            rows.append(
                (
                    found[each].mean,
                    found[each].standard_error,
                    *found[each].interval,
                    found[each].p_value,
                    each not in kept,
                    elbo.mean,
                    elbo.standard_error,
                )
            )
        return pd.DataFrame(rows, pd.Index(names, name="name"), _DIFFERENCES)

    def advice(self, diagnosis: Diagnosis, baseline: str) -> list[str]:
        """Return whether each line of a verdict came true in this comparison.

        A line of the verdict such as ``"prior: up to 3.4 nats; try VampPrior"`` is tested by the
        methods with the same first word, such as ``"prior: VampPrior"``.

        Args:
            diagnosis: the diagnosis of the baseline, from ``pv.diagnose``.
            baseline: name of the method that was diagnosed.

        Returns:
            One or more sentences for each line of the verdict, in its order.

        Raises:
            ValueError: There is no method of that name.
        """
        return advice(self, diagnosis.verdict, baseline)

    def to_dataframe(self) -> pd.DataFrame:
        """Return a table with one row per method.

        Log-densities and the terms of the ELBO are in nats per data point, averaged over runs.
        """
        import pandas as pd

        return pd.DataFrame([self._row(entry) for entry in self.entries]).set_index("name")

    def to_html(
        self,
        path: str | Path,
        diagnosis: Diagnosis | None = None,
        facts: Mapping[str, str] | None = None,
        *,
        baseline: str | None = None,
    ) -> Path:
        """Write a self-contained HTML page with tables, curves, reconstructions and samples.

        Args:
            path: path of the page.
            diagnosis: a diagnosis from ``pv.diagnose``, which the page shows first.
            facts: further facts of the comparison by name, such as ``{"data set": "digits"}``.
                Sizes, seeds, versions, the date and the time of the fits are added.
            baseline: name of the method that was diagnosed. The page then has the differences of
                all other methods from it, and says whether the advice of the diagnosis came true.

        Returns:
            The path.

        Raises:
            ImportError: The extra ``report`` is not installed.
            ValueError: There is no method with the name of the baseline.
        """
        check_call(Comparison.to_html, locals())
        require("jinja2", "report", "to_html")
        require("matplotlib", "report", "to_html")
        from pyro_vae.report._html import render

        path = Path(path)
        path.write_text(render(self, diagnosis, facts or {}, baseline), encoding="utf-8")
        return path

    @property
    def notes(self) -> list[str]:
        """Sentences on the limits of this comparison."""
        found = []
        single = [entry.name for entry in self.entries if len(entry.runs) == 1]
        if single:
            methods = "each method" if len(single) == len(self.entries) else _listed(single)
            found.append(
                f"One run of {methods}: the errors are those of the trained pairs and show nothing "
                "of how a method varies between seeds. Pass a list of fits per method."
            )
        two = [entry.name for entry in self.entries if len(entry.runs) == 2]
        if two:
            found.append(
                f"Two runs of {_listed(two)}: a 95% interval of paired differences covers less, "
                "about 88% in simulations. Use at least three runs."
            )
        repeated = [entry.name for entry in self.entries if entry.has_equal_seeds]
        if repeated:
            found.append(
                f"Runs of {_listed(repeated)} have the same seed, so they are not independent and "
                "their errors may be too small. Fit each run with its own seed."
            )
        infinite = [e.name for e in self.entries if not math.isfinite(e.mean.mean)]
        if infinite:
            found.append(
                f"log p(x) of {_listed(infinite)} is NaN or infinite for some data points, so the "
                "method cannot be compared."
            )
        if self.num_data == 1:
            found.append("The errors are unknown, because there is only one held-out data point.")
        unknown = [e for e in self.entries if math.isnan(e.unreliable_share)]
        counts = {run.evidence.num_particles for entry in unknown for run in entry.runs}
        if few := [count for count in counts if count < FEWEST_JUDGED]:
            found.append(
                f"k̂ is not available. It needs at least {FEWEST_JUDGED} importance weights for "
                f"each data point, and there are {min(few)}."
            )
        unreliable = [e.name for e in self.entries if e.untrusted_share > _MANY]
        if unreliable:
            found.append(
                f"The estimate of log p(x) is unreliable for many data points of "
                f"{_listed(unreliable)}, and probably too low. Use more particles, or "
                "method=pv.evaluation.AIS()."
            )
        surgeries = [(e.name, run.surgery) for e in self.entries for run in e.runs]
        if of_parts := [(name, each) for name, each in surgeries if each and each.num_scored]:
            names = list(dict.fromkeys(name for name, _ in of_parts))
            count = min(each.num_scored for _, each in of_parts)
            error = max(each.standard_errors["mutual_information"] for _, each in of_parts)
            found.append(
                f"The mutual information and the marginal KL of {_listed(names)} are estimated "
                f"from the samples of {count} data points. Their errors are up to {error:.2f} nats."
            )
        found += [
            f"{entry.name} has no ELBO surgery: {entry.runs[0].note}."
            for entry in self.entries
            if entry.runs[0].note
        ]
        return found

    def _entry(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise ValueError(
            f"name must be one of {[entry.name for entry in self.entries]}, got {name!r}"
        )

    def _row(self, entry: Entry) -> dict[str, object]:
        found = self.difference(entry.name)
        fits = [run.fit for run in entry.runs if run.fit is not None]
        return {
            "name": entry.name,
            "runs": len(entry.runs),
            "log_evidence": entry.mean.mean,
            "standard_error": entry.mean.standard_error,
            "difference": found.mean,
            "difference_error": found.standard_error,
            "degrees_of_freedom": found.degrees_of_freedom,
            "is_best": entry.name in self.best,
            "test_elbo": entry.elbo,
            "gap": entry.mean.mean - entry.elbo,
            "unreliable_share": entry.unreliable_share,
            **{term: entry.term(term) for term in ("elbo", *TERMS)},
            "active_units": entry.num_active,
            "log_n": entry.term("log_n"),
            "num_parameters": entry.num_parameters,
            "epochs": _mean(len(fit.history) for fit in fits) if fits else 0,
            "seconds": sum(fit.seconds for fit in fits) if fits else math.nan,
        }

    def __rich__(self) -> Group:
        frame = self.to_dataframe()
        held_out = _table(
            f"{self.num_data} held-out data points, nats per data point",
            ("method", "runs", "log p(x)", "difference", "best", "ELBO", "gap", "k̂>0.7"),
            "best: not told from the best at 95% (Holm). gap = log p(x) - ELBO",
        )
        surgery = _table(
            f"ELBO surgery of {self.num_train} data points, nats per data point",
            ("method", "distortion", "rate", "MI", "marginal KL", "active units"),
            "-ELBO = distortion + rate, rate = MI (mutual information) + marginal KL",
        )
        for row in frame.itertuples():
            is_first = row.Index == self.entries[0].name
            held_out.add_row(
                Text(row.Index),
                str(row.runs),
                with_error(row.log_evidence, row.standard_error),
                "" if is_first else with_error(row.difference, row.difference_error),
                "yes" if row.is_best else "no",
                _shown(row.test_elbo),
                _shown(row.gap),
                "-" if math.isnan(row.unreliable_share) else f"{row.unreliable_share:.1%}",
            )
            surgery.add_row(
                Text(row.Index),
                *(_shown(getattr(row, term)) for term in TERMS),
                _shown(row.active_units, 1 if row.active_units % 1 else 0),
            )
        return Group(held_out, "", surgery, *(Text(f"\n{note}") for note in self.notes))

    def __repr__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _table(title: str, headers: tuple[str, ...], caption: str) -> Table:
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    # In a narrow terminal, the widest column is folded first. No digit is cut off.
    table.add_column(headers[0], overflow="fold")
    for header in headers[1:]:
        table.add_column(header, justify="right", overflow="fold")
    return table


def _shown(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
