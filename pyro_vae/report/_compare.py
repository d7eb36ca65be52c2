"""Compare fitted pairs on the same held-out data, with paired differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of, evaluation_mode, parameter_store, parameters_of
from pyro_vae._programs.validation import check_pair
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.extras import require
from pyro_vae._utils.progress import task
from pyro_vae.datasets._minibatches import Data, Minibatches
from pyro_vae.evaluation import Evidence, Surgery, evidence, generate, reconstruct
from pyro_vae.evaluation._log_evidence import standard_error
from pyro_vae.evaluation._surgery.surgery import surgery_or_reason
from pyro_vae.report._distinct import Candidate, require_distinct
from pyro_vae.training import Fit

if TYPE_CHECKING:
    import pandas as pd

PICTURES = 10


@dataclass(frozen=True)
class Entry:
    """One pair of a comparison.

    Args:
        name: name of the pair.
        evidence: log p(x) of the held-out data.
        surgery: the terms of the ELBO; None if they cannot be computed.
        note: the reason why ``surgery`` is None.
        fit: the fit of the pair; None if it is not known.
        num_parameters: number of trainable values in model and guide.
        pictures: a few held-out x, their reconstructions (E[x|z] for z from the guide) and as many
            samples (E[x|z] for z from the prior). None if the model does not observe x.
    """

    name: str
    evidence: Evidence
    surgery: Surgery | None
    note: str
    fit: Fit | None
    num_parameters: int
    pictures: tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`: pairs on the same held-out data, by decreasing log p(x).

    Show it in a terminal with ``rich.print(comparison)`` or ``print(comparison)``.

    Args:
        entries: results of the pairs, one entry per pair.
        num_train: number of data points of the ELBO surgery.
        image_shape: (height, width) of a row of data, if it is an image.
    """

    entries: tuple[Entry, ...]
    num_train: int
    image_shape: tuple[int, int] | None = None

    def difference(self, name: str) -> tuple[float, float]:
        r"""Return a pair's log p(x) minus that of the best pair, and the standard error.

        With :math:`d_n = \log \hat p(x_n) - \log \hat p_{best}(x_n)`, they are the mean
        :math:`\bar d` and :math:`s_d / \sqrt N`, in nats per data point. Both are zero for the best
        pair. If a data point has a low density under both pairs, this cancels in the difference.

        Raises:
            ValueError: There is no pair of that name.
        """
        for entry in self.entries:
            if entry.name == name:
                paired = entry.evidence.values - self.entries[0].evidence.values
                return paired.mean().item(), standard_error(paired)
        raise ValueError(
            f"name must be one of {[entry.name for entry in self.entries]}, got {name!r}"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Return a table with one row per pair.

        Log-densities and the terms of the ELBO are in nats per data point.
        """
        import pandas as pd

        return pd.DataFrame([self._row(entry) for entry in self.entries]).set_index("name")

    def to_html(self, path: str | Path) -> Path:
        """Write a self-contained HTML page with table, curves, reconstructions and samples.

        Raises:
            ImportError: The extra ``report`` is not installed.
        """
        require("jinja2", "report", "to_html")
        require("matplotlib", "report", "to_html")
        from pyro_vae.report._html import render

        path = Path(path)
        path.write_text(render(self), encoding="utf-8")
        return path

    def _row(self, entry: Entry) -> dict[str, object]:
        difference, difference_error = self.difference(entry.name)
        surgery, fit = entry.surgery, entry.fit
        return {
            "name": entry.name,
            "log_evidence": entry.evidence.mean,
            "standard_error": entry.evidence.standard_error,
            "difference": difference,
            "difference_error": difference_error,
            "unreliable_share": entry.evidence.unreliable_share,
            **{
                term: getattr(surgery, term, float("nan"))
                for term in ("elbo", "distortion", "rate", "mutual_information", "marginal_kl")
            },
            "log_n": getattr(surgery, "log_n", float("nan")),
            "num_parameters": entry.num_parameters,
            "epochs": len(fit.history) if fit else 0,
            "seconds": fit.seconds if fit else float("nan"),
        }

    def __rich__(self) -> Table:
        table = Table(
            title=f"{len(self.entries[0].evidence.values)} held-out data points, "
            "nats per data point",
            caption=f"Surgery of {self.num_train} data points: -ELBO = distortion + rate, "
            "rate = mutual information + marginal KL",
            box=None,  # eight columns must fit in eighty characters
            padding=(0, 1, 0, 0),
        )
        table.add_column("pair", no_wrap=True)
        for header in ("log p(x)", "difference", "k̂>0.7", "dist.", "rate", "MI", "mKL"):
            table.add_column(header, justify="right", no_wrap=True)
        for row in self.to_dataframe().itertuples():
            best = row.Index == self.entries[0].name
            table.add_row(
                Text(row.Index),
                f"{row.log_evidence:.2f}±{row.standard_error:.2f}",
                "best" if best else f"{row.difference:.2f}±{row.difference_error:.2f}",
                f"{row.unreliable_share:.1%}",
                *(
                    "-" if math.isnan(value) else f"{value:.2f}"
                    for value in (row.distortion, row.rate, row.mutual_information, row.marginal_kl)
                ),
            )
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def compare(
    pairs: Mapping[str, Fit | tuple[Program, Program]],
    data: Data,
    *,
    train: Data | None = None,
    num_particles: int = 1000,
    vectorize_particles: bool | None = None,
    image_shape: tuple[int, int] | None = None,
    plate: str | None = None,
    seed: int | None = 0,
    progress: bool | Progress = False,
) -> Comparison:
    r"""Compare fitted pairs on the same held-out data.

    Pairs are compared by log p(x) of each data point, estimated by importance sampling. For each
    data point, k-hat shows how reliable the estimate is. ELBOs should not be compared, because the
    gap between ELBO and log p(x) differs from pair to pair. The terms of ELBO surgery show in which
    part of the ELBO the pairs differ.

    A fit trains its pair in place. So the second fit of a pair changes the result of the first fit,
    also if two pairs share only a network. An error is raised for such pairs. Two pairs may share a
    part that is frozen or that only one fit has trained.

    Args:
        pairs: dictionary from names to pairs, each ``(model, guide)`` or a
            :class:`pyro_vae.training.Fit`. For a Fit, the report also shows its history.
        data: held-out data, as in :func:`pyro_vae.fit`.
        train: data for the surgery, usually the training set. The default is the held-out data.
        num_particles: importance samples per data point.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        image_shape: (height, width) of a row of data, for pictures in the report.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: seed of all samples.
        progress: show progress bars, or add them to a rich Progress.

    Returns:
        The :class:`Comparison`, with the best pair first.

    Raises:
        ValueError: There are no pairs. Data or an argument are invalid, or a pair breaks a rule
            (docs/contract.md). Pairs share trained parameters. A later fit changed the pair of a
            Fit. All of these are raised before the first estimate.
        TypeError: ``pairs`` is not a dictionary.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def good_model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z + 5.0, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0.0, 1.5))
        >>> x = 5 + 2**0.5 * torch.randn(100)
        >>> comparison = pv.compare({"at 0": (model, guide), "at 5": (good_model, guide)}, x)
        >>> comparison.entries[0].name
        'at 5'
    """
    check_call(compare, locals())
    if not isinstance(pairs, Mapping):
        raise TypeError(
            "pairs must be a dictionary of pairs or Fits by name, such as {'a': (model, guide)}, "
            f"got {type(pairs).__name__}"
        )
    if not pairs:
        raise ValueError("pairs must have at least one pair, got an empty dictionary")
    num_particles = positive_integer("num_particles", num_particles)
    if image_shape is not None:
        image_shape = _checked_shape(image_shape)
    pairs = {str(name): pair for name, pair in pairs.items()}
    held_out = Minibatches(data, 100).in_memory()
    surgery_data = held_out if train is None else Minibatches(train, 100, name="train").in_memory()
    fits = {name: pair if isinstance(pair, Fit) else None for name, pair in pairs.items()}
    programs_of = {
        name: (pair.model, pair.guide) if isinstance(pair, Fit) else _unpack(name, pair)
        for name, pair in pairs.items()
    }
    for programs in programs_of.values():
        name_data_plate(plate, *programs)
    if image_shape is not None and math.prod(image_shape) != held_out[0][0].numel():
        raise ValueError(
            f"image_shape {image_shape} does not fit data of shape {tuple(held_out[0].shape)}. "
            "Pass a height and a width whose product is the number of values of a data point"
        )
    candidates, num_parameters = [], {}
    for name, (model, guide) in programs_of.items():
        for each in (surgery_data, held_out):
            parameters = _check(model, guide, each)
        num_parameters[name] = sum(p.numel() for p in parameters)
        candidates.append(Candidate(name, model, guide, fits[name], parameters))
    require_distinct(candidates)
    entries = []
    with task(progress, "evaluate", len(pairs)) as advance:
        for name, (model, guide) in programs_of.items():
            estimate = evidence(
                model,
                guide,
                held_out,
                num_particles=num_particles,
                vectorize_particles=vectorize_particles,
                seed=seed,
                progress=progress,
                description=f"{name}: evidence",
            )
            surgery, note = surgery_or_reason(
                model,
                guide,
                surgery_data,
                vectorize_particles=vectorize_particles,
                seed=seed,
                progress=progress,
                description=f"{name}: surgery",
            )
            entries.append(
                Entry(
                    name,
                    estimate,
                    surgery,
                    note,
                    fits[name],
                    num_parameters[name],
                    _pictures(model, guide, held_out, seed),
                )
            )
            advance(1)
    entries.sort(key=lambda entry: -entry.evidence.mean)
    return Comparison(tuple(entries), len(surgery_data[0]), image_shape)


def _checked_shape(image_shape: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(image_shape, tuple | list) or len(image_shape) != 2:
        raise TypeError(f"image_shape must be (height, width), got {image_shape!r}")
    return tuple(positive_integer("each size in image_shape", size) for size in image_shape)


def _pictures(
    model: Program, guide: Program, columns: tuple[Tensor, ...], seed: int | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    x, *covariates = (column[:PICTURES] for column in columns)
    try:
        reconstructions = reconstruct(model, guide, x, *covariates, seed=seed)
        return x, reconstructions, generate(model, x, *covariates, guide=guide, seed=seed)
    except ValueError:  # the model does not observe x, or needs another number of rows
        return None


def _unpack(name: str, pair) -> tuple[Program, Program]:
    try:
        model, guide = pair
    except (TypeError, ValueError):
        raise ValueError(
            f"pair {name!r} must be (model, guide) or a Fit, got {type(pair).__name__}"
        ) from None
    return model, guide


def _check(model: Program, guide: Program, columns: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the trainable parameters; raise ValueError if the pair breaks the contract."""
    data = Minibatches(columns, 100, device=device_of(model, guide))
    with parameter_store(model, guide), evaluation_mode(model, guide):
        trace = check_pair(model, guide, data.first(), data, weighs=True)
        both = parameters_of(model, guide, trace).values()
        return list(dict.fromkeys(itertools.chain(*both)))
