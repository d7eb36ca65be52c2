"""Losses that a guide adds (pyro.factor, observed auxiliary sites) are not part of log q."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

import pyro_vae as pv
from pyro_vae import objectives as O

KINDS = ("factor", "observed", "global factor", "scaled", "inner plate", "masked")


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def make(kind):
    """Return a guide with a loss; its density is the exact posterior, shifted by a parameter."""

    def guide(x):
        shift = pyro.param("shift", torch.tensor(0.3))
        rate = pyro.param("rate", torch.tensor(0.7))
        loss = -3.0 * rate * torch.cos(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2 + shift, 0.5**0.5))
            if kind == "factor":
                pyro.factor("loss", loss, has_rsample=True)
            elif kind == "observed":
                infer = {"is_auxiliary": True}
                pyro.sample("t", dist.Normal(rate, 1.0), obs=x, infer=infer)
            elif kind == "scaled":
                with poutine.scale(scale=0.25):
                    pyro.factor("loss", loss, has_rsample=True)
            elif kind == "inner plate":
                with pyro.plate("inner", 3, dim=-2):
                    pyro.factor("loss", loss * torch.ones(3, 1), has_rsample=True)
            elif kind == "masked":
                with poutine.mask(mask=x > 0):
                    pyro.factor("loss", loss, has_rsample=True)
        if kind == "global factor":
            pyro.factor("loss", loss.sum(), has_rsample=True)

    return guide


def expected_loss(kind, x):
    rate = 0.7
    factor = -3.0 * rate * torch.cos(x)
    return {
        "factor": factor.sum(),
        "observed": dist.Normal(rate, 1.0).log_prob(x).sum(),
        "global factor": factor.sum(),
        "scaled": 0.25 * factor.sum(),
        "inner plate": 3 * factor.sum(),
        "masked": factor[x > 0].sum(),
    }[kind].item()


@pytest.mark.filterwarnings("ignore:.*found no value of pyro.param")
@pytest.mark.parametrize("kind", KINDS)
def test_evidence_and_surgery_ignore_the_loss(kind):
    x = torch.randn(30)
    plain, guide = make("plain"), make(kind)
    options = {"num_particles": 20, "seed": 0, "progress": False}
    expected = pv.evidence(model, plain, x, **options)
    found = pv.evidence(model, guide, x, **options)
    torch.testing.assert_close(found.values, expected.values)
    expected = pv.elbo_surgery(model, plain, x, **options)
    found = pv.elbo_surgery(model, guide, x, **options)
    for name in ("elbo", "distortion", "rate", "mutual_information", "marginal_kl"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-5), name
    for num_particles in (1, 4):
        torch.manual_seed(0)
        expected = pv.terms(model, plain, x, num_particles=num_particles)
        torch.manual_seed(0)
        t = pv.terms(model, guide, x, num_particles=num_particles)
        torch.testing.assert_close(t.log_weight, expected.log_weight)
        torch.testing.assert_close(t.kl, expected.kl)


OBJECTIVES = {
    "elbo": O.ELBO(),
    "elbo, particles": O.ELBO(4),
    "mean field": O.MeanFieldELBO(4),
    "iwae": O.IWAE(4),
    "dreg": O.DReG(4),
    "landing": O.StickingTheLanding(4),
    "beta": O.BetaELBO(0.5, num_particles=4),
    "score function": O.ScoreFunction(4),
    "wake-sleep": O.ReweightedWakeSleep(4),
    "one by one": O.IWAE(4, vectorize_particles=False),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_adds_the_loss(kind, objective):
    x = torch.randn(30)
    losses, gradients = [], []
    for which in ("plain", kind):
        pyro.clear_param_store()
        torch.manual_seed(0)
        loss = objective.differentiable_loss(model, make(which), x)
        loss.backward()
        losses.append(loss.item())
        store = pyro.get_param_store()
        gradients.append({name: store[name].unconstrained().grad for name in store})
    assert losses[1] - losses[0] == pytest.approx(expected_loss(kind, x), rel=1e-3, abs=1e-3)
    rate = torch.tensor(0.7, requires_grad=True)
    log_p_t = dist.Normal(rate, 1.0).log_prob(x).sum() if kind == "observed" else None
    expected = expected_loss(kind, x) / 0.7
    if log_p_t is not None:
        expected = torch.autograd.grad(log_p_t, rate)[0].item()
    assert gradients[1]["rate"].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    torch.testing.assert_close(gradients[0]["shift"], gradients[1]["shift"])


@pytest.mark.parametrize("kind", KINDS)
def test_elbo_matches_pyro(kind):
    x = torch.randn(30)
    values = []
    for objective in (Trace_ELBO(), O.ELBO()):
        pyro.clear_param_store()
        torch.manual_seed(0)
        value = objective.loss_and_grads(model, make(kind), x)
        gradients = [pyro.get_param_store()[n].unconstrained().grad for n in ("rate", "shift")]
        values.append((float(value), *map(float, gradients)))
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("discrete", [False, True])
def test_loss_of_latents_has_the_gradient_of_its_expectation(discrete):
    """The gradient goes through reparameterized samples, or else through the score."""
    x = torch.zeros(2000)

    def guide(x):
        shift = pyro.param("shift", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            q = dist.Normal(shift, 1.0)
            z = pyro.sample("z", q.has_rsample_(False) if discrete else q)
            pyro.factor("loss", z**2, has_rsample=True)

    names = ("elbo", "score function", "wake-sleep") if discrete else tuple(OBJECTIVES)
    for name in names:
        found = []
        for with_loss in (True, False):
            program = guide if with_loss else poutine.block(guide, hide=["loss"])
            pyro.clear_param_store()
            torch.manual_seed(0)
            OBJECTIVES[name].differentiable_loss(model, program, x).backward()
            found.append(pyro.get_param_store()["shift"].grad.item())
        # d E[z^2] / d shift = 2 shift; its standard error from 2000 draws at most (scores).
        error = (40 if discrete else 4) ** 0.5 / 2000**0.5
        assert abs((found[0] - found[1]) / 2000 - 0.6) < 4 * error, name  # false alarm: 6e-5


def test_loss_is_averaged_over_an_enumerated_site():
    """A classifier's loss in the guide, as in semi-supervised models."""
    table = torch.randn(3)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(table[y], 1.0), obs=x)

    logits = torch.randn(3)

    def guide(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.factor("loss", table[y] ** 2, has_rsample=True)

    x = torch.randn(5)
    found = O.ELBO().loss(model, guide, x)
    q = logits.softmax(0)
    log_joint = dist.Normal(table, 1.0).log_prob(x[:, None]) - torch.tensor(3.0).log()
    elbo = (q * (log_joint - logits.log_softmax(0))).sum(-1)
    exact = -(elbo - (q * table**2).sum()).sum()
    assert found == pytest.approx(exact.item(), rel=1e-5)
    assert TraceEnum_ELBO().loss(model, guide, x) == pytest.approx(exact.item(), rel=1e-5)


def test_site_observed_in_both_programs_is_predicted():
    """The model observes a treatment and the guide models it, as in causal autoencoders."""

    def model(x, t):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("t", dist.Normal(z, 1.0), obs=t)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, t):
        with pyro.plate("data", len(x)):
            infer = {"is_auxiliary": True}
            pyro.sample("t", dist.Normal(x, 1.0), obs=t, infer=infer)
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x, t = torch.randn(200), torch.randn(200)
    predicted = pv.terms(model, guide, x, t, num_particles=5).predict()
    assert predicted["t"].shape == (5, 200)
    # t' = z + noise, z ~ N(x / 2, 1)
    error = (predicted["t"] - x / 2).mean().abs()
    assert error < 4 * 2**0.5 / 1000**0.5
    idata = pv.to_arviz(model, guide, (x, t), num_draws=5)
    assert idata.posterior_predictive["t"].shape[-1] == 200


def test_factor_does_not_give_a_delta_guide_a_density():
    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Delta(x / 2))
            pyro.factor("loss", z**2, has_rsample=True)

    with pytest.raises(ValueError, match="one point"):
        pv.evidence(model, guide, torch.randn(5))


@pytest.mark.parametrize("objective", [O.ELBO(), O.ScoreFunction()], ids=["elbo", "score"])
def test_global_loss_of_discrete_latents_has_a_score_gradient(objective):
    x = torch.tensor([0.5, -1.0, 2.0])
    a = torch.tensor(0.2, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("c", dist.Bernoulli(0.3)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=a * x))
        if c.dim() == 1:
            pyro.factor("loss", (3 * c).sum(), has_rsample=False)

    q = torch.sigmoid(a * x)
    values = torch.tensor([0.0, 1.0])
    log_joint = torch.tensor([0.7, 0.3]).log() + dist.Normal(values, 1.0).log_prob(x[:, None])
    both = torch.stack([1 - q, q], -1)
    exact = -(both * (log_joint - both.log())).sum() + 3 * q.sum()
    (expected,) = torch.autograd.grad(exact, a)
    found = torch.stack([
        torch.autograd.grad(objective.differentiable_loss(model, guide, x), a)[0]
        for _ in range(1500)
    ])  # fmt: skip
    assert abs(found.mean() - expected) < 4 * found.std() / 1500**0.5  # false alarm: 6e-5
