"""Validation uses the same bound over the whole run, and one ELBO for all objectives."""

import copy
import functools
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from oracles import LinearGaussian

import pyro_vae as pv
from pyro_vae import objectives as o
from pyro_vae.serialization._folder import read, write
from pyro_vae.training._checkpoints import KIND
from pyro_vae.training._losses import loss_value


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


OF_ONE_KIND = [
    o.ELBO,
    o.MeanFieldELBO,
    o.IWAE,
    o.DReG,
    o.TVO,
    functools.partial(o.CIWAE, 0.5),
    functools.partial(o.Renyi, 0.3),
    functools.partial(o.BetaELBO, 0.2),
    functools.partial(o.BetaELBO, o.Linear(7)),
    functools.partial(o.CUBO, 2.0),
    functools.partial(o.MIWAE, 1),
]


def last_elbo(pair, x, validation, objective, **options):
    options = {**HELD, "epochs": 2, "capture": False, **options}
    history = pv.fit(*pair, x, objective=objective, validation=validation, **options).history
    return history.validation_elbo.iloc[-1], history.validation_loss.iloc[-1]


def linear_gaussian_pair():
    exact = LinearGaussian(dtype=torch.float32)
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), pv.likelihoods.Normal(Linear(2, 5)))
    with torch.no_grad():
        model.likelihood.decoder.net.weight.copy_(exact.weight)
    return model, pv.guides.AmortizedNormal(model, pv.nets.MLP(5, [8])), exact.sample(60)


class Linear(torch.nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.net = torch.nn.Linear(*sizes)

    def forward(self, z):
        return self.net(z)


def test_validation_elbo_is_the_same_for_all_objectives():
    """With a negligible learning rate and the same noise, all fits have the same ELBO."""
    *pair, x = linear_gaussian_pair()
    pair[1](x)  # creates its head, so all fits draw the same noise
    found = [last_elbo(pair, x[:40], x[40:], make(num_particles=3))[0] for make in OF_ONE_KIND]
    np.testing.assert_allclose(found, found[0], rtol=1e-5)
    t = pv.terms(*pair, x[40:], num_particles=2000)
    elbo = (t.log_likelihood - t.kl).mean(0).mean().item()
    error = t.log_likelihood.var(0).sum().sqrt().item() / 20 / 3**0.5
    assert abs(found[0] - elbo) < 4 * error


@pytest.mark.parametrize(
    "objective",
    [pyro.infer.Trace_ELBO(), pyro.infer.TraceMeanField_ELBO(), o.ELBO(), o.IWAE(50)],
    ids=lambda value: type(value).__name__,
)
def test_validation_elbo_agrees_with_more_particles(objective):
    *pair, x = linear_gaussian_pair()
    found, _ = last_elbo(pair, x[:40], x[40:], objective)
    t = pv.terms(*pair, x[40:], num_particles=2000)
    elbo = (t.log_likelihood - t.kl).mean(0).mean().item()
    particles = getattr(objective, "num_particles", 1)
    error = t.log_likelihood.var(0).sum().sqrt().item() / 20 / particles**0.5
    assert abs(found - elbo) < 4 * error


class Twice(o.ELBO):
    """An objective that computes the terms of two losses."""

    def differentiable_loss(self, model, guide, *args):
        each = super().differentiable_loss(model, guide, *args)
        return each / 2 + super().differentiable_loss(model, guide, *args) / 2


class NoisyDecoder(torch.nn.Module):
    """A decoder whose random numbers come from Python and torch, also in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.net = pv.nets.MLP(2, [8], 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z):
        self.calls += 1
        return self.net(z) + random.random() + torch.rand(()) + 0.01 * self.calls  # noqa: S311


@pytest.mark.parametrize("objective", [pyro.infer.Trace_ELBO, Twice, functools.partial(o.IWAE, 3)])
def test_validation_elbo_does_not_change_the_fit(objective, binary, monkeypatch):
    def fitted():
        torch.manual_seed(5)
        random.seed(6)
        model = pv.LatentVariableModel(
            pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(NoisyDecoder())
        )
        guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(16, [8]))
        options = {"batch_size": 10, "epochs": 3, "seed": 0, "capture": False, "progress": False}
        fit = pv.fit(model, guide, binary, objective=objective(), validation=binary[:30], **options)
        return fit.history, [t.clone() for m in (model, guide) for t in m.state_dict().values()]

    history, tensors = fitted()
    assert np.isfinite(history.validation_elbo).all()
    monkeypatch.setattr(
        "pyro_vae.training._step.loss_and_elbo",
        lambda objective, *args: (loss_value(objective, *args), math.nan),
    )
    without, expected = fitted()
    assert without.validation_elbo.isna().all()
    for name in ("loss", "validation_loss"):
        assert history[name].tolist() == without[name].tolist()
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_validation_elbo_has_no_losses_of_the_guide(binary):
    model, inner = make_pair()

    def guide(x):
        inner(x)
        with pyro.plate("data", len(x)):
            pyro.factor("extra", torch.full((len(x),), -3.0), has_rsample=True)

    elbo, loss = last_elbo((model, guide), binary, binary[:30], o.MeanFieldELBO())
    assert elbo == pytest.approx(-loss - 3.0, rel=1e-5)


def test_validation_elbo_includes_global_latents():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 200, subsample=x):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(1.0))
        pyro.sample("mean", dist.Normal(loc, 0.1))
        with pyro.plate("data", 200, subsample=x):
            pyro.sample("z", dist.Normal(x / 2 + loc / 2, 0.7))

    x = torch.randn(200) + 1
    elbo, loss = last_elbo((model, guide), x, x[:30], o.MeanFieldELBO())
    assert elbo == pytest.approx(-loss, rel=1e-5)


def test_validation_elbo_of_labeled_data_has_no_classification_loss():
    x, y = torch.randn(40, 5), torch.randint(-1, 3, (40,))
    found = []
    for objective in (o.SemiSupervisedELBO(50.0), o.ELBO()):
        torch.manual_seed(2)
        joined, mlp = pv.nets.Joined, pv.nets.MLP
        likelihood = pv.likelihoods.Normal(joined(mlp(5, [8], 5)))
        model = pv.models.SemiSupervisedModel(3, pv.priors.StandardNormal(2), likelihood)
        guide = pv.guides.SemiSupervisedGuide(model, mlp(5, [8], 3), joined(mlp(8, [8])))
        found.append(last_elbo((model, guide), (x, y), (x[:20], y[:20]), objective))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] > found[1][1] + 5


def test_validation_elbo_is_nan_without_validation_and_for_points(binary):
    model, guide = make_pair()
    assert pv.fit(model, guide, binary, **HELD).history.validation_elbo.isna().all()
    points = pv.guides.AmortizedDelta(model, pv.nets.MLP(16, [8]))
    elbo, loss = last_elbo((model, points), binary, binary[:30], o.InfoVAE())
    assert math.isnan(elbo)
    assert math.isfinite(loss)


def test_run_of_an_older_version_resumes_without_its_elbo(binary, tmp_path):
    torch.manual_seed(2)
    options = {**HELD, "validation": binary[:30], "capture": False}
    folder = tmp_path / "run"
    pv.fit(*make_pair(), binary, checkpoint=folder, **(options | {"epochs": 2}))
    last = max(folder.iterdir())
    content = read(last, kind=KIND)
    columns = content["history"]["columns"]
    content["history"]["columns"] = [each for each in columns if each[0] != "validation_elbo"]
    write(last, content, kind=KIND, overwrite=True)
    assert "validation_elbo" not in pv.load_checkpoint(folder).history
    checkpoint = pv.training.Checkpoint(folder, resume=True)
    history = pv.fit(*make_pair(), binary, checkpoint=checkpoint, **options).history
    assert history.validation_elbo.isna().tolist() == [True, True, False, False]
    assert history.columns[:3].tolist() == ["loss", "validation_loss", "validation_elbo"]


@pytest.mark.parametrize("objective", [o.ELBO(), o.IWAE(3)], ids=str)
def test_validation_does_not_change_training(binary, objective):
    losses = []
    for validation in (None, binary[:7], binary):
        torch.manual_seed(2)
        fit = pv.fit(*make_pair(), binary, objective=copy.deepcopy(objective), epochs=3,
                     batch_size=10, validation=validation, seed=0, progress=False)  # fmt: skip
        losses.append(fit.history.loss.tolist())
    assert losses[0] == losses[1] == losses[2]
