"""Fit, diagnose and compare the methods of one command."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

import pyro_vae as pv
from pyro_vae._utils.distributed import rank
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.numbers_text import with_error
from pyro_vae._utils.progress import progress_bar, task
from pyro_vae._utils.random import seeded
from pyro_vae._utils.threads import torch_threads
from pyro_vae.cli._fits import Plan, fits_of
from pyro_vae.cli._results import ResultFolder, diagnosis_of, rows_of, runs_of

# The diagnosis before a comparison is shorter than that of ``pyro-vae diagnose``: fewer data points
# for the gaps and gains, fewer importance samples, short ascents, and no networks are trained.
_QUICK = {
    "num_data": 200,
    "num_particles": 500,
    "refit": False,
    "ascent": pv.evaluation.Ascent(
        learning_rate=0.02, num_particles=4, window=25, patience=3, max_steps=300
    ),
    "capture": False,
}


def compare_arms(
    plan: Plan,
    evidence_particles: int,
    output: Path,
    facts: Mapping[str, str],
    console: Console,
) -> None:
    """Fit all methods, diagnose the first, compare them, print and write the results.

    Args:
        plan: the fits. The first method is the baseline, and the first seed that of the evaluation.
        evidence_particles: importance samples per test data point.
        output: folder of the results.
        facts: facts of the command, for the page.
        console: console for the results.
    """
    arms, data, seed = plan.arms, plan.data, plan.seeds[0]
    baseline, names = arms[0].name, [arm.name for arm in arms]
    if is_first := rank() == 0:
        results = ResultFolder(output)
        folders = results.pair_folders(names)
    with seeded(seed):  # evaluation needs the data as in training
        train = data.train if data.transform is None else data.transform(data.train)
    with progress_bar(console=console) as bar:
        with fits_of(plan, bar) as fits_when_finished:
            fits = {baseline: fits_when_finished(arms[0])}
            diagnosis = _diagnose(fits[baseline][0], train, data.test, seed, bar)
            console.print(Text(f"Diagnosis of {baseline}, seed {seed}\n", "bold"))
            console.print(diagnosis if not isinstance(diagnosis, str) else Text(diagnosis))
            fits |= {arm.name: fits_when_finished(arm) for arm in arms[1:]}
        # Threads that share a core with another program would spend most of their time in waiting.
        with torch_threads(max(1, torch.get_num_threads() // 2)):
            comparison = pv.compare(
                fits,
                data.test,
                train=train,
                num_particles=evidence_particles,
                image_shape=data.image_shape,
                seed=seed,
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
            else {"method": baseline, **diagnosis_of(diagnosis)},
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


def _diagnose(
    fit: pv.training.Fit, train: Tensor, test: Tensor, seed: int, bar: Progress
) -> pv.report.Diagnosis | str:
    """Return the diagnosis of a fit, or the reason why its pair cannot be diagnosed."""
    try:
        # The worker processes use the other cores.
        with task(bar, "diagnose", 1) as advance, torch_threads(1):
            found = pv.diagnose(fit.model, fit.guide, train, test, seed=seed, **_QUICK)
            advance(1)
            return found
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
    table.add_column("method", overflow="fold")
    for header in ("log p(x)", "95% interval", "told apart", "ELBO"):
        table.add_column(header, justify="right", overflow="fold")
    for row in comparison.differences_from(baseline).itertuples():
        table.add_row(
            Text(row.Index),
            with_error(row.difference, row.standard_error, "+"),
            "-" if math.isnan(row.low) else f"{row.low:+.2f} to {row.high:+.2f}",
            "yes" if row.is_told_apart else "no",
            "-"
            if math.isnan(row.elbo_difference)
            else with_error(row.elbo_difference, row.elbo_error, "+"),
        )
    return table
