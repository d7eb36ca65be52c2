"""Fit, diagnose and compare the methods of one command."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

import pyro_vae as pv
from pyro_vae._utils.distributed import num_processes, rank
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.random import seeded
from pyro_vae.cli._arms import Arm
from pyro_vae.cli._data import Splits
from pyro_vae.cli._results import ResultFolder, rows_of, runs_of, safe_names


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of all methods.

    Args:
        seeds: training seeds; the first is also the seed of the evaluation.
        fit: arguments of :func:`pyro_vae.fit`.
        evidence_particles: importance samples per test data point.
        checkpoint: folder for checkpoints, or None.
    """

    seeds: Sequence[int]
    fit: Mapping[str, Any]
    evidence_particles: int
    checkpoint: Path | None


def compare_arms(
    arms: Sequence[Arm],
    data: Splits,
    settings: Settings,
    output: Path,
    facts: Mapping[str, str],
    console: Console,
) -> None:
    """Fit all methods, diagnose the first, compare them, print and write the results.

    Args:
        arms: the methods. The first is the baseline.
        data: training, validation and test data.
        settings: settings of the fits and of the evaluation.
        output: folder of the results.
        facts: facts of the command, for the page.
        console: console for the results.
    """
    baseline, names = arms[0].name, [arm.name for arm in arms]
    if is_first := rank() == 0:
        results = ResultFolder(output)
        folders = results.pair_folders(names)
    with seeded(settings.seeds[0]):  # evaluation needs the data as in training
        train = data.train if data.transform is None else data.transform(data.train)
    with progress_bar(console=console) as bar:
        fits = {baseline: _fit(arms[0], names, data, settings, bar)}
        diagnosis = _diagnose(fits[baseline][0], train, data.test, settings.seeds[0], bar)
        console.print(Text(f"Diagnosis of {baseline}, seed {settings.seeds[0]}\n", "bold"))
        console.print(diagnosis if not isinstance(diagnosis, str) else Text(diagnosis))
        for arm in arms[1:]:
            fits[arm.name] = _fit(arm, names, data, settings, bar)
        comparison = pv.compare(
            fits,
            data.test,
            train=train,
            num_particles=settings.evidence_particles,
            image_shape=data.image_shape,
            seed=settings.seeds[0],
            progress=bar,
        )
    if isinstance(diagnosis, str):
        diagnosis = None
    console.print(Text("\nComparison\n", "bold"))
    console.print(comparison)
    differences = comparison.differences_from(baseline)
    advice = [] if diagnosis is None else comparison.advice(diagnosis, baseline)
    if len(differences):
        console.print(differences_table(comparison, baseline))
    for line in advice:
        console.print(Text(line))
    if not is_first:
        return
    comparison.to_html(
        output / "report.html", diagnosis, facts, baseline=baseline if len(arms) > 1 else None
    )
    comparison.to_dataframe().drop(columns="seconds").to_csv(output / "table.csv")
    results.write_json(
        {
            "facts": facts,
            "diagnosis": None
            if diagnosis is None
            else {
                "method": baseline,
                "entries": rows_of(diagnosis.to_dataframe()),
                "verdict": list(diagnosis.verdict),
            },
            "comparison": {
                "methods": rows_of(comparison.to_dataframe().drop(columns="seconds")),
                "best": comparison.best,
                "notes": comparison.notes,
            },
            "differences": {"from": baseline, "methods": rows_of(differences)},
            "advice": advice,
            "runs": runs_of(comparison),
        }
    )
    for name, folder in folders.items():
        fit = fits[name][0]
        notes = {"name": name, **facts, "seed": fit.seed}
        folder.parent.mkdir(exist_ok=True)
        try:
            pv.save(folder, fit.model, fit.guide, history=fit.history, notes=notes, overwrite=True)
        except (ValueError, TypeError) as error:  # a program that cannot be saved
            console.print(Text(f"{name} is not saved: {first_line(error)}"))


def _fit(
    arm: Arm, names: Sequence[str], data: Splits, settings: Settings, bar: Progress
) -> list[pv.training.Fit]:
    """Fit one pair for each seed: in parallel processes, or with a group of processes for each."""
    checkpoint = None
    if settings.checkpoint is not None:
        checkpoint = settings.checkpoint / safe_names(names)[names.index(arm.name)]
    options = {
        **settings.fit,
        "validation": data.validation,
        "transform": data.transform,
        **arm.options,
    }
    try:
        if num_processes() == 1:
            return pv.fit_seeds(
                arm.make_pair,
                data.train,
                seeds=list(settings.seeds),
                checkpoint=checkpoint,
                progress=bar,
                description=arm.name,
                **options,
            )
        return [_fit_in_group(arm, seed, data, options, checkpoint, bar) for seed in settings.seeds]
    except (RuntimeError, ValueError) as error:  # the user's code may raise errors of any type
        if isinstance(error, FloatingPointError):
            raise
        raise ValueError(f"cannot fit {arm.name!r}: {error}") from error


def _fit_in_group(
    arm: Arm,
    seed: int,
    data: Splits,
    options: Mapping[str, Any],
    checkpoint: Path | None,
    bar: Progress,
) -> pv.training.Fit:
    with seeded(seed):
        model, guide = arm.make_pair()
    return pv.fit(
        model,
        guide,
        data.train,
        seed=seed,
        checkpoint=None
        if checkpoint is None
        else pv.training.Checkpoint(checkpoint / f"seed-{seed}", resume=True),
        progress=bar,
        description=f"{arm.name}, seed {seed}",
        **options,
    )


def _diagnose(
    fit: pv.training.Fit, train: Tensor, test: Tensor, seed: int, bar: Progress
) -> Any | str:
    """Return the diagnosis of a fit, or the reason why its pair cannot be diagnosed."""
    try:
        return pv.diagnose(fit.model, fit.guide, train, test, seed=seed, progress=bar)
    except ValueError as error:
        return f"There is no diagnosis: {first_line(error)}."


def differences_table(comparison: pv.report.Comparison, baseline: str) -> RenderableType:
    """Return a table of the differences of all methods from a baseline."""
    table = Table(
        title=f"\nDifferences from {baseline}, nats per data point",
        caption="told apart: log p(x) differs at 95% (Holm)\n",
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for header in ("log p(x)", "95% interval", "told apart", "ELBO"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in comparison.differences_from(baseline).itertuples():
        table.add_row(
            Text(row.Index),
            f"{row.difference:+.2f}±{row.standard_error:.2f}",
            f"{row.low:+.2f} to {row.high:+.2f}",
            "yes" if row.is_told_apart else "no",
            "-"
            if math.isnan(row.elbo_difference)
            else f"{row.elbo_difference:+.2f}±{row.elbo_error:.2f}",
        )
    return table
