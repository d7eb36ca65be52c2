"""Results print as short summaries with units, also in a notebook, which shows ``repr``."""

import dataclasses
import io
import re

import pyro
import pytest
import torch
from conftest import make_pair
from public_calls import call
from rich.console import Console

import pyro_vae as pv
from pyro_vae._utils.progress import progress_bar

# The most lines of each result, and a text that it has.
RESULTS = {
    "collapse_report": (5, "nats per data point"),
    "compare": (20, "nats per data point"),
    "diagnose": (24, "nats per data point"),
    "elbo_surgery": (9, "nats per data point"),
    "evidence": (1, "nats"),
    "fit": (5, "nats per data point"),
    "gradient_noise": (5, "nats per data point"),
    "inference_gaps": (9, "nats per data point"),
    "prior_holes": (2, "nats"),
    "rate_distortion": (4, "nats per data point"),
    "sandwich": (1, "nats"),
    "terms": (1, "terms of 5 data points and 2 particles; latent sites: z"),
    "load": (1, "saved pair of LatentVariableModel and AmortizedNormal"),
    "load_checkpoint": (1, "fitted for 1 epochs"),
    "datasets.load": (1, "digits: 1297 training, 200 validation and 300 test images of 8 x 8"),
    "datasets.load_labels": (1, "1297 training, 200 validation and 300 test labels"),
}


@pytest.mark.filterwarnings("ignore")  # of estimates from five rows
@pytest.mark.parametrize("name", RESULTS)
def test_result_prints_as_a_short_summary(name):
    lines, text = RESULTS[name]
    result = call(name)
    shown = str(result)
    assert repr(result) == shown
    assert len(shown.splitlines()) <= lines
    assert shown == shown.rstrip()
    assert text in shown
    assert not re.search(r"tensor\(|object at 0x", shown)


def test_estimates_of_gaps_have_their_unit():
    values = torch.tensor([1.0, 3.0])
    estimate = pv.evaluation.Estimate(values, torch.zeros(2))
    assert repr(estimate) == "2.000 ± 1.000 nats (2 data)"


OPTIONS = {"batch_size": 10, "seed": 7, "progress": False, "capture": False}


def test_fit_prints_its_best_epoch(binary):
    pair = make_pair()
    held_out = binary[:20]
    options = {"validation": held_out, "patience": 2, "learning_rate": 0.5, "epochs": 40}
    fit = pv.fit(*pair, binary, **OPTIONS | options)
    best = fit.history.loc[fit.best_epoch]
    assert repr(fit).splitlines() == [
        "Fit of LatentVariableModel and AmortizedNormal, seed 7",
        f"  epochs      {len(fit.history)}; stopped early: no lower validation loss in 2 epochs",
        f"  parameters  of epoch {fit.best_epoch}, the best",
        f"  loss        {best.loss:.2f}, validation {best.validation_loss:.2f}, "
        f"ELBO {best.validation_elbo:.2f} nats per data point",
        f"  time        {fit.seconds:.1f} s, eager: capture=False",
    ]


@pytest.mark.parametrize(("steps", "ended"), [(10, True), (11, False)])
def test_fit_prints_that_a_warm_up_is_longer(binary, steps, ended):
    objective = pv.objectives.BetaELBO(pv.objectives.Linear(steps))
    fit = pv.fit(*make_pair(), binary, objective=objective, epochs=2, **OPTIONS)  # 10 steps
    assert fit.schedules_ended == ended
    assert ("schedules   not at their last values" in repr(fit)) != ended


def test_fit_reports_no_end_of_schedules_without_one(binary):
    class Square(pv.objectives.Schedule):
        def __call__(self, step):
            return step**2

    class Table(pv.objectives.Schedule):
        def __call__(self, step):
            return torch.linspace(0, 1, 100)[step.long()]  # fails at later steps

    schedules = [pv.objectives.BetaELBO(schedule()) for schedule in (Square, Table)]
    for objective in (*schedules, None, pyro.infer.Trace_ELBO()):
        fit = pv.fit(*make_pair(), binary[:20], objective=objective, epochs=1, **OPTIONS)
        assert fit.schedules_ended


def test_fit_without_an_epoch_prints(binary):
    """As that of a fit that was interrupted in its first epoch."""
    fit = pv.fit(*make_pair(), binary, epochs=1, **OPTIONS)
    empty = dataclasses.replace(fit, history=fit.history[:0], best_epoch=0)
    assert "loss        unknown, before the first epoch" in repr(empty)


def test_programs_are_named(binary):
    model, guide = make_pair()

    def program(x):
        return model(x)

    fit = pv.fit(program, guide, binary, epochs=1, **OPTIONS)
    assert repr(fit).startswith("Fit of program and AmortizedNormal")


def test_progress_of_a_fit_has_units(binary):
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    with progress_bar(console=console) as progress:
        pv.fit(
            *make_pair(), binary, validation=binary, epochs=1, **OPTIONS | {"progress": progress}
        )
    assert re.search(r"loss [\d.]+, validation [\d.]+ nats", text.getvalue())


def test_loss_module_shows_its_objective():
    loss_fn = pv.objectives.IWAE(num_particles=3)(*make_pair())
    assert "(objective): IWAE(num_particles=3)" in repr(loss_fn)
    assert "(model): LatentVariableModel(" in repr(loss_fn)
