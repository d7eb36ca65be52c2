"""An objective counts training steps in every kind of loop, and does not count evaluations."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from pyro.infer import SVI, Trace_ELBO

import pyro_vae as pv
from pyro_vae import objectives as o


def by_svi(objective, model, guide, x, steps):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=objective)
    for _ in range(steps):
        svi.step(x)
    svi.evaluate_loss(x)


def by_module(objective, model, guide, x, steps):
    loss_fn = objective(model, guide)
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(x).backward()
        optimizer.step()
    with torch.inference_mode():
        loss_fn(x)


def by_differentiable_loss(objective, model, guide, x, steps):
    for _ in range(steps):
        objective.differentiable_loss(model, guide, x).backward()
    with torch.no_grad():
        objective.differentiable_loss(model, guide, x)


def by_fit(objective, model, guide, x, steps, capture=False):
    pv.fit(model, guide, x, objective=objective, epochs=steps // 5, batch_size=10, validation=x,
           capture=capture, progress=False)  # fmt: skip


def by_captured_fit(objective, model, guide, x, steps):
    by_fit(objective, model, guide, x, steps, capture=True)


@pytest.mark.parametrize(
    "train", [by_svi, by_module, by_differentiable_loss, by_fit, by_captured_fit]
)
def test_each_step_is_counted_once(train, binary, without_compiler):
    model, guide = make_pair()
    guide(binary)
    objective = o.BetaELBO(o.Linear(steps=20))
    objective.loss(model, guide, binary)
    pv.gradient_noise(model, guide, binary, [objective], repeats=2)
    train(objective, model, guide, binary, 10)
    objective.loss(model, guide, binary)
    assert objective.step == 10


def test_gradient_noise_keeps_the_current_schedule_weight(binary):
    """If the schedule advanced between repeats, an exact gradient would have a variance."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([16]).to_event(1), obs=x + 0 * z[:, None])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    objective = o.BetaELBO(o.Linear(steps=4, start=1.0, end=3.0))
    noise = pv.gradient_noise(model, guide, binary, [objective], repeats=4)
    assert noise.table.standard_deviation.max() == 0
    assert objective.step == 0


def test_loss_module_follows_the_schedule(binary):
    model, guide = make_pair()
    guide(binary)
    loss_fn = o.BetaELBO(o.Linear(steps=4))(model, guide)
    for beta in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        torch.manual_seed(1)
        found = loss_fn(binary).item()
        torch.manual_seed(1)
        assert found == pytest.approx(o.BetaELBO(beta).loss(model, guide, binary), rel=1e-5)


def test_schedule_may_return_the_step_counter(binary):
    class Step(o.Schedule):
        def __call__(self, step):
            return step

    model, guide = make_pair()
    objective = o.BetaELBO(Step())
    for _ in range(3):
        objective(model, guide)(binary).backward()
    assert objective.step == 3


def test_running_average_counts_training_steps_only(binary):
    model, guide = make_pair()
    guide(binary)
    objective = o.ScoreFunction(2, "average")
    loss_fn, expected = objective(model, guide), 0.0
    for _ in range(3):
        expected += 0.1 * (-loss_fn(binary).item() / len(binary) - expected)
        objective.loss(model, guide, binary)
        with torch.no_grad():
            loss_fn(binary)
    assert objective.average.item() == pytest.approx(expected, rel=1e-5)


def warnings_of(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in seen]


def test_parameters_created_after_reading_warn(binary):
    model, guide = make_pair()
    loss_fn = o.ELBO()(model, guide)
    assert warnings_of(lambda: loss_fn(binary)) == []
    before = len(list(loss_fn.parameters()))
    assert warnings_of(lambda: loss_fn(binary)) == []
    assert before == len({*model.parameters(), *guide.parameters()})

    late = o.ELBO()(*make_pair())
    list(late.parameters())
    (text,) = warnings_of(lambda: late(binary))
    assert "'guide.built.head." in text
    assert "Call this module once before" in text
    assert warnings_of(lambda: late(binary)) == []  # warned once


def test_parameters_of_plain_functions_warn(binary):
    def model(x):
        loading = pyro.param("loading", torch.ones(16))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = z[..., None] * loading
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(16, [4]))
    loss_fn = o.ELBO()(model, guide)
    loss_fn(binary)
    list(loss_fn.parameters())
    (text,) = warnings_of(lambda: loss_fn(binary))
    assert "'loading'" in text


def test_pyros_objectives_return_their_module(binary):
    model, guide = make_pair()
    assert Trace_ELBO()(model, guide)(binary).requires_grad
