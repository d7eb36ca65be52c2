"""Validation uses the same bound over the whole run, for any schedule of the objective."""

import functools

import numpy as np
import pytest
import torch
from conftest import make_pair
from oracles import LinearGaussian

import pyro_vae as pv
from pyro_vae import objectives as o


class Sigmoid(o.Schedule):
    def __call__(self, step):
        return 1.5 * torch.sigmoid((step - 20.0) / 5.0)


class Cosine(o.Schedule):
    def __call__(self, step):
        return 0.6 * (1 - torch.cos(step * torch.pi / 30))


class Squared(o.Linear):
    def __call__(self, step):
        return super().__call__(step) ** 2


class Rising(o.Schedule):
    def __call__(self, step):
        return step / 1000


class Declared(Rising):
    def last_value(self):
        return 2.0


@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (o.Constant(0.3), 0.3),
        (o.Linear(4, 1.0, 3.0), 3.0),
        (o.Linear(2**25, 4.0, 1.0), 1.0),
        (o.Cyclical(7, 1.0, 0.2, 0.9), 0.9),
        (Sigmoid(), 1.5),
        (Cosine(), 1.2),
        (Squared(10, 0.0, 2.0), 4.0),
        (Declared(), 2.0),
    ],
)
def test_last_value_of_a_schedule(schedule, last):
    assert schedule.last_value() == pytest.approx(last, rel=2e-4)


def test_schedule_without_a_last_value_is_refused_only_with_validation(pair, binary):
    with pytest.raises(ValueError, match=r"neither ends nor repeats: .* a method last_value"):
        pv.fit(*pair, binary, objective=o.BetaELBO(Rising()), validation=binary, progress=False)
    pv.fit(*pair, binary, objective=o.BetaELBO(Rising()), epochs=1, progress=False)


HELD = {"epochs": 4, "batch_size": 10, "learning_rate": 1e-9, "seed": 0, "progress": False}


@pytest.mark.parametrize(
    ("scheduled", "fixed"),
    [
        (lambda: o.BetaELBO(o.Linear(13)), lambda: o.BetaELBO(1.0)),
        (lambda: o.BetaELBO(o.Cyclical(6, end=0.8), 2), lambda: o.BetaELBO(0.8, 2)),
        (lambda: o.BetaELBO(Sigmoid()), lambda: o.BetaELBO(1.5)),
        (lambda: o.BetaELBO(Cosine()), lambda: o.BetaELBO(1.2)),
        (lambda: o.CapacityELBO(o.Linear(13, 0.0, 4.0)), lambda: o.CapacityELBO(4.0)),
    ],
)
def test_validation_uses_the_last_value_of_the_schedule(scheduled, fixed, binary):
    """With a negligible learning rate, a loss changes only with its weight."""
    check_validation(scheduled, fixed, binary, capture=False)


def test_validation_with_captured_steps_uses_the_last_value(binary, without_compiler):
    scheduled = functools.partial(o.BetaELBO, o.Linear(13))
    check_validation(scheduled, o.BetaELBO, binary, capture=True)


def check_validation(scheduled, fixed, binary, *, capture):
    pair = make_pair()
    pair[1](binary)  # creates its head, so that all fits draw the same noise
    options = {**HELD, "validation": binary[:30], "capture": capture}
    history = pv.fit(*pair, binary, objective=scheduled(), **options).history
    expected = pv.fit(*pair, binary, objective=fixed(), **options).history
    assert "validation_loss_scheduled" not in expected
    losses = history.validation_loss.to_numpy()
    np.testing.assert_allclose(losses, expected.validation_loss, rtol=1e-4)
    assert np.ptp(losses) < 1e-4 < np.ptp(history.validation_loss_scheduled)


def test_scheduled_validation_loss_uses_the_current_weight(binary):
    pair = make_pair()
    pair[1](binary)  # creates its head, so all fits draw the same noise
    options = {**HELD, "validation": binary[:30], "capture": False}
    free, whole = (
        pv.fit(*pair, binary, objective=o.BetaELBO(beta), **options).history.validation_loss
        for beta in (0.0, 1.0)
    )
    found = pv.fit(*pair, binary, objective=o.BetaELBO(o.Linear(16)), **options).history
    weights = np.minimum(5 * np.arange(1, 5) / 16, 1.0)  # after each epoch of five steps
    expected = free + weights * (whole - free)
    np.testing.assert_allclose(found.validation_loss_scheduled, expected, rtol=1e-4)


def test_patience_starts_after_the_warm_up():
    """With weight zero the scheduled loss is lowest, but the bound is not at its best."""
    x = LinearGaussian(dtype=torch.float32).sample(60)
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Normal(pv.nets.MLP(2, [16], 5))
    )
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(5, [16]))
    result = pv.fit(
        model, guide, x[:40], objective=o.BetaELBO(o.Linear(steps=120), 4), validation=x[40:],
        batch_size=20, epochs=90, patience=10, learning_rate=0.02, seed=0, capture=False,
        progress=False,
    )  # fmt: skip
    losses, scheduled = (
        result.history[name] for name in ("validation_loss", "validation_loss_scheduled")
    )
    assert result.best_epoch == losses[60:].idxmin()  # the warm-up is over after 60 epochs
    assert len(losses) >= 60 + 10
    assert scheduled.idxmin() < 60
    held_out = pv.terms(model, guide, x[40:], num_particles=500)
    elbo = (held_out.log_likelihood - held_out.kl).mean(0)
    found = -elbo.mean().item()  # the restored pair at full weight
    error = held_out.log_likelihood.var(0).sum().sqrt().item() / 20 / 500**0.5
    noise = held_out.log_likelihood.var(0).sum().sqrt().item() / 20 / 4**0.5
    assert abs(found - losses[result.best_epoch]) < 4 * (error + noise)


def test_nested_objective_advances_with_the_outer_objective(pair, binary):
    class Half(o.ELBO):
        def __init__(self):
            super().__init__()
            self.inner = o.BetaELBO(o.Linear(10))

        def bound(self, terms):
            return (super().bound(terms) + self.inner.bound(terms)) / 2

    objective = Half()
    result = pv.fit(*pair, binary, objective=objective, validation=binary, **HELD)
    assert objective.step == objective.inner.step == 20
    assert np.ptp(result.history.validation_loss) < 1e-4
    assert "validation_loss_scheduled" in result.history
    objective(*pair)(binary).backward()
    assert objective.step == objective.inner.step == 21


def test_resumed_run_has_the_same_history(binary, tmp_path):
    histories = []
    for folder, legs in (("whole", [6]), ("parts", [2, 6])):
        checkpoint = pv.training.Checkpoint(tmp_path / folder, resume=True)
        for epochs in legs:
            torch.manual_seed(2)
            result = pv.fit(
                *make_pair(), binary[:40], objective=o.BetaELBO(o.Linear(12)), epochs=epochs,
                validation=binary[40:], patience=4, batch_size=10, learning_rate=0.02, seed=0,
                capture=False, progress=False, checkpoint=checkpoint,
            )  # fmt: skip
        histories.append(result.history.drop(columns="seconds"))
    assert histories[0].equals(histories[1])


class Rise(o.Schedule):
    def __call__(self, step):
        return ((step - 100) / 10).sigmoid()


class Wave(o.Schedule):
    def __call__(self, step):
        return 0.5 - 0.5 * (step / 50).cos()


@pytest.mark.parametrize(
    ("schedule", "before", "after"),
    [
        (o.Linear(100), 98, 100),
        (o.Linear(100, 4.0, 1.0), 98, 100),
        (o.Linear(100, 1.0, 0.0), 98, 100),
        (o.Cyclical(100, rise=0.4), 39, 40),
        (Rise(), 140, 150),
        (Wave(), 140, 200),
    ],
    ids=lambda value: repr(value).partition(" object at ")[0],
)
def test_has_settled_after_the_schedule_reached_its_last_value(schedule, before, after):
    objective = o.BetaELBO(schedule)
    for step, expected in ((0, False), (before, False), (after, True), (10 * after, True)):
        objective.step.fill_(step)
        assert objective.has_settled() is expected, step
    assert o.ELBO().has_settled()


@pytest.mark.parametrize("held", ["list", "dict", "tuple"])
def test_objectives_in_a_container_advance_and_are_validated(binary, held):
    class Outer(o.Objective):
        def __init__(self):
            super().__init__()
            inner = o.BetaELBO(o.Linear(10))
            self.parts = {"list": [inner], "tuple": (inner,), "dict": {"a": inner}}[held]

        @property
        def inner(self):
            return self.parts["a"] if held == "dict" else self.parts[0]

        def bound(self, terms):
            return self.inner.bound(terms)

    pair, outer = make_pair(), Outer()
    history = pv.fit(
        *pair, binary, objective=outer, validation=binary, epochs=3, batch_size=20, progress=False
    ).history
    assert outer.inner.step == outer.step > 0
    assert "validation_loss_scheduled" in history
    assert outer.with_last_values().inner.beta.last_value() == 1.0


def test_falling_cycle_is_validated_at_its_highest_value():
    assert o.Cyclical(100, start=4.0, end=1.0).last_value() == 4.0
    assert o.BetaELBO(o.Cyclical(100, start=4.0, end=1.0)).has_settled()
