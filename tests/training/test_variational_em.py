"""E-steps and M-steps on the linear-Gaussian VAE, whose maximum likelihood is known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from oracles import LinearGaussian
from torch import nn

import pyro_vae as pv


class Linear(nn.Module):
    """x = W z + mean + e, and q(z|x) = N(V (x - mean), one covariance for all x)."""

    def __init__(self, x, d=2):
        super().__init__()
        self.mean = x.mean(0)
        self.weight = nn.Parameter(torch.randn(x.shape[1], d, dtype=x.dtype))
        self.log_s2 = nn.Parameter(torch.zeros((), dtype=x.dtype))
        self.v = nn.Parameter(0.1 * torch.randn(d, x.shape[1], dtype=x.dtype))
        self.factor = nn.Parameter(torch.eye(d, dtype=x.dtype))

    def model(self, x):
        d = self.weight.shape[1]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d, dtype=x.dtype), 1.0).to_event(1))
            loc = z @ self.weight.T + self.mean
            pyro.sample("x", dist.Normal(loc, (0.5 * self.log_s2).exp()).to_event(1), obs=x)

    def guide(self, x):
        scale_tril = self.factor.tril(-1) + torch.diag(self.factor.diagonal().abs())
        loc = (x - self.mean) @ self.v.T
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    @torch.no_grad()
    def e_step(self):
        """Set q to the posterior (Tipping & Bishop 1999, eq. 25)."""
        s2, eye = self.log_s2.exp(), torch.eye(self.weight.shape[1], dtype=self.weight.dtype)
        m = self.weight.T @ self.weight + s2 * eye
        self.v.copy_(torch.linalg.solve(m, self.weight.T))
        self.factor.copy_(torch.linalg.cholesky(s2 * m.inverse()))

    @torch.no_grad()
    def m_step(self, x):
        """Maximize E_q[log p(x, z)] (Tipping & Bishop 1999, eq. 27-28)."""
        centered = x - self.mean
        z = centered @ self.v.T
        second = len(x) * self.factor @ self.factor.T + z.T @ z
        weight = torch.linalg.solve(second, z.T @ centered).T
        rest = centered.square().sum() - 2 * (z * (centered @ weight)).sum()
        s2 = (rest + (second @ weight.T @ weight).trace()) / centered.numel()
        self.weight.copy_(weight)
        self.log_s2.copy_(s2.log())


def maximum_likelihood(x, d=2):
    """Return W W' and s2 from the eigenvalues of the covariance (Tipping & Bishop 1999)."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    s2 = values[:-d].mean()
    top = vectors[:, -d:]
    return top @ torch.diag(values[-d:] - s2) @ top.T, s2


def evidence(x, product, s2):
    covariance = product + s2 * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.distributions.MultivariateNormal(x.mean(0), covariance).log_prob(x).mean().item()


def test_evidence_never_decreases_under_exact_em_steps():
    torch.manual_seed(0)
    x = LinearGaussian().sample(400)
    pair = Linear(x)
    evidences = []
    for _ in range(300):
        pair.e_step()
        with torch.no_grad():  # q is the posterior: each log-weight is log p(x)
            weights = pv.terms(pair.model, pair.guide, x).log_weight
        evidences.append(weights.mean().item())
        exact = evidence(x, pair.weight @ pair.weight.T, pair.log_s2.exp())
        assert evidences[-1] == pytest.approx(exact, abs=1e-9)
        pair.m_step(x)
    steps = torch.tensor(evidences).diff()
    assert steps.min() > -1e-10
    product, s2 = maximum_likelihood(x)
    torch.testing.assert_close(pair.weight @ pair.weight.T, product, rtol=0, atol=1e-3)
    assert evidences[-1] == pytest.approx(evidence(x, product, s2), abs=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        pv.objectives.MeanFieldELBO(),
        pytest.param(pv.objectives.StickingTheLanding(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_alternating_steps_reach_the_maximum_likelihood(objective):
    torch.manual_seed(1)
    x = LinearGaussian(noise=0.4).sample(500)
    pair = Linear(x)
    for learning_rate in (0.05, 0.01, 0.002):
        pv.fit(pair.model, pair.guide, x, objective=objective, epochs=300, batch_size=500,
               learning_rate=learning_rate, guide_steps=2, model_steps=1, seed=0,
               progress=False)  # fmt: skip
    product, s2 = maximum_likelihood(x)
    found = pair.weight.detach() @ pair.weight.detach().T
    assert (found - product).norm() < 0.05 * product.norm()
    assert pair.log_s2.exp().item() == pytest.approx(s2.item(), rel=0.05)
    reached = evidence(x, found, pair.log_s2.exp().detach())
    assert reached == pytest.approx(evidence(x, product, s2), abs=0.01)


def snapshot(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(
    ("options", "model_moves", "guide_moves"),
    [
        ({}, True, True),
        ({"guide_steps": 10}, False, True),  # five steps, none of them the model's
        ({"guide_steps": 1, "model_steps": 1}, True, True),
        ({"guide_steps": 2, "model_steps": 2}, True, True),
    ],
)
def test_guide_steps_and_model_steps_select_which_program_moves(
    capture, options, model_moves, guide_moves, binary, without_compiler
):
    model, guide = make_pair()
    guide(binary)
    before = snapshot(model), snapshot(guide)
    pv.fit(model, guide, binary, epochs=1, batch_size=10, capture=capture, progress=False,
           **options)  # fmt: skip
    assert bool((snapshot(model) != before[0]).any()) is model_moves
    assert bool((snapshot(guide) != before[1]).any()) is guide_moves


class Recorded(torch.optim.SGD):
    """An SGD that records at each step which parameters have a gradient."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.01)
        self.moved = []

    def step(self, closure):
        loss = closure()
        parameters = self.param_groups[0]["params"]
        self.moved.append({id(p) for p in parameters if p.grad is not None})
        super().step()
        return loss


def test_each_step_moves_one_program(binary):
    model, guide = make_pair()
    guide(binary)
    made = []

    def optimizer(parameters):
        made.append(Recorded(parameters))
        return made[0]

    pv.fit(model, guide, binary, epochs=2, batch_size=10, guide_steps=2, model_steps=1,
           optimizer=optimizer, progress=False)  # fmt: skip
    of_model, of_guide = (set(map(id, p.parameters())) for p in (model, guide))
    assert made[0].moved == [of_guide, of_guide, of_model] * 3 + [of_guide]


def test_model_and_guide_use_their_own_learning_rates(binary):
    model, guide = make_pair()
    guide(binary)
    before = snapshot(model), snapshot(guide)
    fit = pv.fit(model, guide, binary, epochs=1, batch_size=50, progress=False,
                 learning_rate={"model": 1e-2, "guide": 1e-4})  # fmt: skip
    moved = [(snapshot(p) - b).abs().max().item() for p, b in zip((model, guide), before,
                                                                 strict=True)]  # fmt: skip
    assert moved == pytest.approx([1e-2, 1e-4], rel=1e-2)  # Adam's first step is its rate
    assert fit.history.learning_rate.iloc[0] == 1e-2


def test_shared_parameters_move_in_all_steps():
    shared = nn.Linear(1, 1)

    def model(x):
        pyro.module("shared", shared)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(shared(z.unsqueeze(-1)), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("shared", shared)
        scale = pyro.param("scale", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shared(x).squeeze(-1), scale))

    before = snapshot(shared)
    pv.fit(model, guide, torch.randn(20, 1), epochs=1, batch_size=20, guide_steps=5,
           progress=False)  # fmt: skip
    assert (snapshot(shared) != before).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide_steps": 0}, "guide_steps must be at least 1"),
        ({"model_steps": 0}, "model_steps must be at least 1"),
        ({"learning_rate": {"model": 1e-3}}, "one for 'model' and one for 'guide'"),
        ({"learning_rate": {"model": 1e-3, "guide": -1.0}}, r"learning_rate\['guide'\] must be"),
        (
            {"learning_rate": {"model": 1.0, "guide": 1.0}, "optimizer": torch.optim.SGD},
            "two learning rates are for the default optimizer",
        ),
    ],
)
def test_steps_and_rates_out_of_range_are_refused(options, message, binary):
    with pytest.raises(ValueError, match=message):
        pv.fit(*make_pair(), binary, progress=False, **options)


class GuideThatHoldsItsModel(nn.Module):
    """A guide that holds the model as a submodule."""

    def __init__(self, model):
        super().__init__()
        self.model, self.encoder = model, nn.Linear(16, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


def under_one_name():
    """Return plain functions that both register one module."""
    vae = nn.ModuleDict({"decoder": nn.Linear(2, 16), "encoder": nn.Linear(16, 2)})

    def model(x):
        pyro.module("vae", vae)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=vae["decoder"](z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("vae", vae)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(vae["encoder"](x), 0.5).to_event(1))

    return model, guide, vae["decoder"], vae["encoder"]


def guide_with_model():
    model, _ = make_pair()
    guide = GuideThatHoldsItsModel(model)
    return model, guide, model, guide.encoder


@pytest.mark.parametrize("make", [under_one_name, guide_with_model])
def test_parameters_held_by_both_belong_to_the_program_that_uses_them(make, binary):
    model, guide, decoder, encoder = make()
    before = snapshot(decoder), snapshot(encoder)
    pv.fit(model, guide, binary, epochs=1, batch_size=10, guide_steps=100, progress=False)
    assert torch.equal(snapshot(decoder), before[0])
    assert not torch.equal(snapshot(encoder), before[1])
    before = snapshot(decoder), snapshot(encoder)
    pv.fit(model, guide, binary, epochs=1, batch_size=50, progress=False,
           learning_rate={"model": 1e-2, "guide": 1e-4})  # fmt: skip
    assert (snapshot(decoder) - before[0]).abs().max().item() == pytest.approx(1e-2, rel=0.01)
    assert (snapshot(encoder) - before[1]).abs().max().item() == pytest.approx(1e-4, rel=0.01)


def test_parameters_created_later_use_the_learning_rate_of_the_fit():
    class Late(nn.Module):
        def model(self, x):
            loc = pyro.param("late", torch.tensor(0.0)) if self.training else torch.tensor(0.0)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + loc, 1.0), obs=x)

    late, scale = Late(), torch.tensor(0.5)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    for epochs in (1, 2):  # found at the end of the first run, trained in the second
        pv.fit(late.model, guide, torch.full((20,), 5.0), epochs=epochs, batch_size=20,
               learning_rate=0.1, seed=0, capture=False, progress=False)  # fmt: skip
    with pv.parameter_store(late.model, guide):
        assert pyro.param("late").item() > 0.09


def test_only_moving_parameters_are_clipped():
    """A large model gradient must not shrink the guide's step."""

    def model(x):
        w = pyro.param("w", torch.tensor(100.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w, 0.01), obs=x + 0 * z)

    def guide(x):
        m = pyro.param("m", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, 1.0))

    pv.fit(model, guide, torch.zeros(10), objective=pv.objectives.MeanFieldELBO(), epochs=1,
           batch_size=10, guide_steps=5, clip_norm=10.0, progress=False,
           optimizer=lambda p: torch.optim.SGD(p, lr=0.1))  # fmt: skip
    with pv.parameter_store(model, guide):
        assert pyro.param("m").item() == pytest.approx(0.9, abs=1e-5)
