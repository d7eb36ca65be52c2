import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from oracles import LinearGaussian
from torch import nn

import pyro_vae as pv
from pyro_vae import objectives as o


class OneLatent(nn.Module):
    """x ~ N(w z, 1) and q = N(m + x/2, 1): the gradients of w and m are Gaussian integrals."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.m = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.m + x / 2, 1.0))


def test_gradient_moments_match_closed_forms():
    """d/dw (x - w z) z and d/dm -> (x - w z) w - z, with z ~ N(a, 1), a = m + x/2."""
    pair, x = OneLatent(), torch.tensor([0.7], dtype=torch.float64)
    noise = pv.gradient_noise(pair.model, pair.guide, x, [o.ELBO()], repeats=2000, seed=0)
    moments = noise.moments["ELBO()"]
    a = 0.3 + 0.35
    model, guide = moments["model"], moments["guide"]
    mean_w = 0.7 * a - (a**2 + 1)
    variance_w = (0.7 - 2 * a) ** 2 + 2  # of x z - z^2
    assert abs(model.mean.item() - mean_w) < 4.5 * (variance_w / 2000) ** 0.5
    assert model.variance.item() == pytest.approx(variance_w, rel=0.15)
    mean_m, variance_m = 0.7 - 2 * a, 4.0  # w = 1; log q does not depend on m along z
    assert abs(guide.mean.item() - mean_m) < 4.5 * (variance_m / 2000) ** 0.5
    assert guide.variance.item() == pytest.approx(variance_m, rel=0.15)
    assert guide.signal_to_noise == pytest.approx(abs(mean_m) / 2, rel=0.3)


def test_bias_is_distinguished_from_noise():
    torch.manual_seed(1)
    pair, x = OneLatent(), torch.randn(5, dtype=torch.float64)
    noise = pv.gradient_noise(
        pair.model,
        pair.guide,
        x,
        {"same": o.StickingTheLanding(), "scaled": o.BetaELBO(3.0), "scores": o.ScoreFunction(4)},
        reference=o.ELBO(200),
        repeats=400,
        seed=1,
    )
    table = noise.table
    for name in ("same", "scores"):
        for program in ("model", "guide"):
            row = table.loc[name, program]
            assert row.bias < 3 * row.bias_noise
    row = table.loc["scaled", "guide"]
    assert row.bias > 10 * row.bias_noise
    # twice the KL's gradient, which is a = m + x/2
    excess = 2 * (0.3 + x / 2).mean().abs().item()
    assert row.bias == pytest.approx(excess, rel=0.2)


class LinearPair(nn.Module):
    """A linear-Gaussian pair with slightly perturbed weights."""

    def __init__(self, oracle):
        super().__init__()
        self.oracle = oracle
        self.weight = nn.Parameter(oracle.weight + 0.05 * torch.randn_like(oracle.weight))
        self.v = nn.Parameter(oracle.v + 0.05 * torch.randn_like(oracle.v))

    def model(self, x):
        with self.oracle.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = z @ self.weight.T + self.oracle.mu
            pyro.sample("x", dist.Normal(loc, self.oracle.s2.sqrt()).to_event(1), obs=x)

    def guide(self, x):
        with self.oracle.plate(x):
            loc = (x - self.oracle.mu) @ self.v.T
            pyro.sample("z", dist.Normal(loc, self.oracle.s.diagonal().sqrt()).to_event(1))


def test_iwae_guide_gradients_lose_signal_with_particles_and_dreg_gains():
    """Rainforth et al. (2018): the guide's signal-to-noise ratio is O(K^-1/2)."""
    torch.manual_seed(2)
    oracle = LinearGaussian()
    oracle.s = 2 * oracle.s  # wider than the posterior, so weights are bounded
    x = oracle.sample(8)
    pair = LinearPair(oracle)
    ratios = {}
    for k in (1, 16, 256):
        objectives = {f"IWAE {k}": o.IWAE(k), f"DReG {k}": o.DReG(k)}
        table = pv.gradient_noise(pair.model, pair.guide, x, objectives, repeats=150, seed=3).table
        for name in objectives:
            ratios[name] = table.signal_to_noise[name, "guide"]
    assert ratios["IWAE 256"] < 0.5 * ratios["IWAE 1"]
    assert ratios["DReG 256"] > ratios["DReG 16"] > ratios["DReG 1"]


def test_table_labels_objectives_and_programs(binary):
    model, guide = make_pair()
    guide(binary)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    objectives = [o.ELBO(), pyro.infer.Trace_ELBO(), o.CUBO(2, 4)]
    noise = pv.gradient_noise(model, guide, binary, objectives[:1] + objectives[2:], repeats=5,
                              seed=0)  # fmt: skip
    table = noise.table
    assert list(table.index.names) == ["objective", "program"]
    assert table.norm[str(objectives[2]), "model"] == 0
    assert "signal_to_noise" in str(noise)
    after = [p.detach() for p in (*model.parameters(), *guide.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    again = pv.gradient_noise(model, guide, binary, objectives[:1], repeats=5, seed=0)
    torch.testing.assert_close(
        again.moments[str(objectives[0])]["model"].mean,
        noise.moments[str(objectives[0])]["model"].mean,
    )


def test_gradient_noise_refuses_bad_arguments(binary):
    pair = make_pair()
    with pytest.raises(ValueError, match="repeats must be at least 2"):
        pv.gradient_noise(*pair, binary, [o.ELBO()], repeats=1)
    with pytest.raises(ValueError, match="at least one"):
        pv.gradient_noise(*pair, binary, [])
    with pytest.raises(ValueError, match="must have different names"):
        pv.gradient_noise(*pair, binary, [o.ELBO(), o.ELBO()])
    with pytest.raises(TypeError, match=r"must be of type pyro\.infer\.ELBO"):
        pv.gradient_noise(*pair, binary, ["ELBO"])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([len(x), 16]).to_event(1),
                        obs=x)  # fmt: skip

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="no parameters"):
        pv.gradient_noise(model, guide, binary, [o.ELBO()])


def test_gradient_noise_leaves_the_pair_and_objectives_unchanged(binary):
    model, _ = make_pair()
    encoder = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 8), nn.Tanh())
    guide = pv.guides.AmortizedNormal(model, encoder)
    guide(binary)
    objective = o.ScoreFunction(1, "average")
    before = encoder[0].running_mean.clone(), objective.average.clone()
    pv.gradient_noise(model, guide, binary.numpy(), [objective], repeats=3)
    assert torch.equal(encoder[0].running_mean, before[0])
    assert torch.equal(objective.average, before[1])
    with pytest.raises(TypeError, match="with a differentiable_loss"):
        pv.gradient_noise(model, guide, binary, [pyro.infer.RenyiELBO()])


def test_gradients_are_per_data_point_for_any_plate_scale():
    norms = []
    for full in (None, 1000):
        w = nn.Parameter(torch.tensor(1.0))

        def model(x, full=full, w=w):
            pyro.module("w", nn.ParameterList([w]))
            with pyro.plate("data", full or len(x), subsample=x if full else None):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)

        def guide(x, full=full):
            with pyro.plate("data", full or len(x), subsample=x if full else None):
                pyro.sample("z", dist.Normal(x / 2, 1.0))

        x = torch.linspace(-1, 1, 10)
        noise = pv.gradient_noise(model, guide, x, {"": o.ELBO()}, repeats=20, seed=0)
        norms.append(noise.table.norm["", "model"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_gradient_noise_checks_the_pair_as_fit_does():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z @ pyro.param("w", torch.ones(2, 5))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(2)), 1.0).to_event(1))

    objectives = [pv.objectives.ELBO()]
    pv.gradient_noise(model, guide, torch.randn(7, 5), objectives, repeats=2)
    with pytest.raises(ValueError, match="observes a value of shape"):
        pv.gradient_noise(model, guide, torch.randn(5), objectives, repeats=2)
    with pytest.raises(ValueError, match="NaN"):
        pv.gradient_noise(model, guide, torch.full((7, 5), torch.nan), objectives, repeats=2)


def test_a_bound_without_a_gradient_is_refused():
    unused = torch.nn.Linear(1, 1)

    def program(x, observed):
        pyro.module("unused", unused)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pair = (lambda x: program(x, True), lambda x: program(x, False))
    with pytest.raises(ValueError, match="depends on no parameter"):
        pv.gradient_noise(*pair, torch.randn(5), {"elbo": pv.objectives.ELBO()}, repeats=2)
