"""Compare objectives that weight parts of the KL with their definitions."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same
from conftest import make_pair
from oracles import LinearGaussian
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae import objectives as o
from pyro_vae.objectives._aggregated import squared_mmd


class Gaussian:
    """Two latents of different sizes, independent given x, and their exact KLs."""

    def __init__(self):
        self.loc = {"a": torch.randn(5, 2), "b": torch.randn(5)}
        self.scale = {"a": torch.rand(5, 2) + 0.2, "b": torch.rand(5) + 0.2}
        self.x = torch.randn(5)

    def model(self, x):
        with pyro.plate("data", 5):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a.sum(-1) + b, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", 5):
            pyro.sample("a", dist.Normal(self.loc["a"], self.scale["a"]).to_event(1))
            pyro.sample("b", dist.Normal(self.loc["b"], self.scale["b"]))

    def kl(self, name):
        """Return the KL of each dimension in closed form."""
        loc, scale = self.loc[name], self.scale[name]
        return 0.5 * (scale**2 + loc**2 - 1) - scale.log()

    def kls(self):
        """Return the KL of each site and data point."""
        return {"a": self.kl("a").sum(-1), "b": self.kl("b")}

    def loss(self, objective, seed=0):
        torch.manual_seed(seed)
        return objective.loss(self.model, self.guide, self.x)

    def likelihood(self, seed=0):
        torch.manual_seed(seed)
        return pv.terms(self.model, self.guide, self.x).log_likelihood.sum().item()


@pytest.fixture
def gaussian():
    torch.manual_seed(0)
    return Gaussian()


def test_beta_elbo_weights_the_kl(gaussian):
    kl = sum(k.sum() for k in gaussian.kls().values()).item()
    for beta in (0.0, 1.0, 3.5):
        expected = -gaussian.likelihood() + beta * kl
        assert gaussian.loss(o.BetaELBO(beta)) == pytest.approx(expected, rel=1e-5)
    assert gaussian.loss(o.BetaELBO(1.0)) == gaussian.loss(o.MeanFieldELBO())


def test_free_bits_floor_the_kl_per_site_or_dimension(gaussian):
    kls = gaussian.kls()
    least = kls["a"].mean().item() * 0.99  # above the KL of b, below the KL of a
    assert kls["b"].mean() < least
    cases = {
        ("site", "batch"): sum(5 * k.mean().clamp(min=least) for k in kls.values()),
        ("site", "data_point"): sum(k.clamp(min=least).sum() for k in kls.values()),
        ("dimension", "batch"): sum(5 * gaussian.kl(n).mean(0).clamp(min=least).sum() for n in kls),
        ("dimension", "data_point"): sum(gaussian.kl(n).clamp(min=least).sum() for n in kls),
    }
    for (per, over), floored in cases.items():
        expected = -gaussian.likelihood() + floored.item()
        assert gaussian.loss(o.FreeBits(least, per, over)) == pytest.approx(expected, rel=1e-5)


def test_free_bits_have_no_gradient_below_the_floor(gaussian):
    gaussian.scale["b"] = torch.full((5,), 0.9, requires_grad=True)
    gaussian.loc["b"] = torch.full((5,), 0.1, requires_grad=True)
    x, gaussian.x = gaussian.x, gaussian.x.clone()

    def gradient(objective):
        torch.manual_seed(1)
        loss = objective.differentiable_loss(gaussian.model, gaussian.guide, x)
        return torch.autograd.grad(loss, [gaussian.loc["b"], gaussian.scale["b"]])

    free = gradient(o.FreeBits(100.0))
    without = gradient(o.BetaELBO(0.0))
    for one, other in zip(free, without, strict=True):
        torch.testing.assert_close(one, other)


def test_capacity_elbo_penalizes_the_distance_of_the_kl_from_its_target(gaussian):
    kl = sum(gaussian.kls().values()).mean().item()
    for target in (0.5 * kl, 2.0 * kl):
        expected = -gaussian.likelihood() + 5 * 7.0 * abs(kl - target)
        assert gaussian.loss(o.CapacityELBO(target, 7.0)) == pytest.approx(expected, rel=1e-5)


def test_free_bits_refuse_parts_of_a_joint_density(pair, binary):
    model, _ = pair
    guide = pv.guides.AmortizedFlow(model, pv.nets.MLP(16, [8]), length=2)
    o.FreeBits(0.5).loss(model, guide, binary)  # with one latent, its KL is the total KL
    with pytest.raises(ValueError, match="cannot compute the KL of each dimension"):
        o.FreeBits(0.5, per="dimension").loss(model, guide, binary)
    gaussian = Gaussian()
    guide = pv.guides.AmortizedFlow(gaussian.model, pv.nets.MLP(1, [8]), length=2)
    with pytest.raises(ValueError, match="one joint density"):
        o.FreeBits(0.5).loss(gaussian.model, lambda x: guide(x.unsqueeze(-1)), gaussian.x)


def test_schedules_return_their_documented_values():
    def values(schedule, steps):
        return [round(schedule(torch.tensor(float(step))).item(), 6) for step in steps]

    assert values(o.Linear(4, 1.0, 3.0), range(6)) == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert values(o.Cyclical(4, 0.5), range(9)) == [0, 0.5, 1, 1, 0, 0.5, 1, 1, 0]
    assert values(o.Constant(0.3), (0, 7)) == [0.3, 0.3]


def test_fit_advances_the_schedule_once_per_step(pair, binary):
    """Training steps call the schedule at 0, 1, ..., 9."""
    seen = []

    class Noted(o.Linear):
        def __call__(self, step):
            if torch.is_grad_enabled():
                seen.append(step.item())
            return super().__call__(step)

    objective = o.BetaELBO(Noted(steps=10))
    pv.fit(*pair, binary, objective=objective, validation=binary, batch_size=10, epochs=2,
           capture=False, progress=False)  # fmt: skip
    assert list(dict.fromkeys(seen)) == [float(step) for step in range(10)]
    assert objective.step == 10


SCHEDULED = [
    o.BetaELBO(o.Linear(12)),
    o.BetaELBO(o.Cyclical(6)),
    o.CapacityELBO(o.Linear(12, 0.0, 5.0)),
]


@pytest.mark.parametrize("objective", SCHEDULED, ids=str)
def test_captured_fit_follows_schedules_like_an_eager_fit(objective, binary, without_compiler):
    steps = objective.step

    def make():
        steps.zero_()
        return make_pair()

    check_same(make, binary, double=True, objective=objective, execution="captured, not compiled")


def one_latent(count, dtype=torch.float64):
    oracle = LinearGaussian(dtype=dtype)
    return oracle, oracle.sample(count)


def test_beta_tcvae_with_unit_weights_equals_the_elbo():
    torch.manual_seed(5)
    oracle, x = one_latent(12)
    torch.manual_seed(6)
    parts = o.BetaTCVAE(1.0, 1.0, 1.0, num_data=500).loss(oracle.model, oracle.guide, x)
    torch.manual_seed(6)
    assert parts == pytest.approx(o.ELBO().loss(oracle.model, oracle.guide, x), rel=1e-12)


def test_beta_tcvae_parts_match_their_definitions():
    torch.manual_seed(7)
    oracle, x = one_latent(4)
    t = pv.terms(oracle.model, oracle.guide, x)
    z = t.samples["z"][0]
    q = torch.distributions.Normal((x - oracle.mu) @ oracle.v.T, oracle.s.diagonal().sqrt())
    shares = torch.full((4, 4), 29 / 30 / 3, dtype=torch.float64)
    shares[range(4), range(4)] = 1 / 30
    for b in range(4):
        each = torch.stack([q.log_prob(z[b])[c] for c in range(4)])  # (c, d)
        log_q = (shares[b] * each.sum(-1).exp()).sum().log()
        log_marginals = (shares[b].unsqueeze(-1) * each.exp()).sum(0).log().sum()
        expected = (
            each[b].sum() - log_q,
            log_q - log_marginals,
            log_marginals - torch.distributions.Normal(0.0, 1.0).log_prob(z[b]).sum(),
        )
        for part, truth in zip(o.BetaTCVAE(num_data=30).parts(t), expected, strict=True):
            torch.testing.assert_close(part[0, b], truth)


def test_beta_tcvae_parts_match_closed_forms():
    """With all data in the batch, only the expectation over them is estimated."""
    torch.manual_seed(8)
    oracle, x = one_latent(1500)
    t = pv.terms(oracle.model, oracle.guide, x)
    information, correlation, dimension_wise = o.BetaTCVAE(num_data=1500).parts(t)
    q = oracle.aggregated_covariance
    variances = q.diagonal()
    shift = oracle.finite_data_shift(1500)
    truths = (
        oracle.mutual_information - shift,
        0.5 * (variances.log().sum() - q.logdet()).item(),
        0.5 * (variances - 1 - variances.log()).sum().item(),
    )
    for part, truth in zip((information, correlation, dimension_wise), truths, strict=True):
        error = part.std().item() / 1500**0.5
        assert abs(part.mean().item() - truth) < 4.5 * error + shift


def test_beta_tcvae_refuses_missing_num_data_and_unsupported_pairs(pair, binary):
    model, guide = pair
    with pytest.raises(ValueError, match="Pass num_data="):
        o.BetaTCVAE().loss(model, guide, binary)
    with pytest.raises(ValueError, match="at least 2 data points in a minibatch, got 1"):
        o.BetaTCVAE(num_data=10).loss(model, guide, binary[:1])
    gaussian = Gaussian()
    with pytest.raises(ValueError, match="needs one latent site"):
        o.BetaTCVAE(num_data=10).loss(gaussian.model, gaussian.guide, gaussian.x)


def test_squared_mmd_matches_its_definition_and_is_unbiased():
    torch.manual_seed(9)
    x, y = torch.randn(4, 3), torch.randn(5, 3) + 1

    def kernel(a, b):
        return sum(6 * s / (6 * s + ((a - b) ** 2).sum()) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    within_x = sum(kernel(x[i], x[j]) for i in range(4) for j in range(4) if i != j) / 12
    within_y = sum(kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(kernel(a, b) for a in x for b in y) / 20
    torch.testing.assert_close(squared_mmd(x, y), within_x + within_y - 2 * across)
    same = torch.stack([squared_mmd(torch.randn(20, 3), torch.randn(20, 3)) for _ in range(500)])
    assert abs(same.mean()) < 4.5 * same.std() / 500**0.5


def test_info_vae_trains_a_deterministic_encoder(binary, pair):
    model, _ = pair
    guide = pv.guides.AmortizedDelta(model, pv.nets.MLP(16, [8]))
    fit = pv.fit(model, guide, binary, objective=o.InfoVAE(), epochs=30, batch_size=25,
                 learning_rate=1e-2, seed=0, progress=False)  # fmt: skip
    assert fit.history.loss.iloc[-1] < fit.history.loss.iloc[0]
    with pytest.raises(ValueError, match="one point"):
        o.InfoVAE(alpha=0.5).loss(model, guide, binary)


def test_info_vae_equals_the_elbo_at_alpha_zero_and_lambda_one(gaussian):
    """At alpha = 0 and lambda = 1, the MMD has weight zero."""
    assert gaussian.loss(o.InfoVAE(0.0, 1.0)) == pytest.approx(gaussian.loss(o.MeanFieldELBO()))


def test_kl_of_sites_and_dimensions(gaussian):
    t = pv.terms(gaussian.model, gaussian.guide, gaussian.x)
    for name in ("a", "b"):
        q = torch.distributions.Normal(gaussian.loc[name], gaussian.scale[name])
        exact = kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        torch.testing.assert_close(t.kl_of_dimensions()[name][0], exact)
        torch.testing.assert_close(t.kl_of_sites()[name][0], exact.reshape(5, -1).sum(-1))


def test_mmd_has_a_gradient_for_a_learned_prior():
    loc = torch.tensor(3.0, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    loss = o.InfoVAE().differentiable_loss(model, guide, torch.randn(200))
    (gradient,) = torch.autograd.grad(loss, loc)
    assert gradient > 0  # the prior's mean is too large


def test_sleep_phase_refuses_autoguides(pair, binary):
    model, _ = pair
    guide = pyro.infer.autoguide.AutoNormal(model)
    guide(binary)
    with pytest.raises(ValueError, match="as in Pyro's AutoGuides"):
        o.ReweightedWakeSleep(2, sleep=1.0).loss(model, guide, binary)


def test_sample_joint_refuses_transposed_observations():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mean(1), 0.5))

    with pytest.raises(ValueError, match="obs= is not an argument of the programs"):
        pv.terms(model, guide, torch.randn(5, 3)).sample_joint().log_guide()


def test_custom_gradients_need_held_samples(pair, binary):
    t = pv.terms(*pair, binary)
    with pytest.raises(ValueError, match="set hold_samples = True"):
        o.gradient(t, joint=torch.ones(1, 50))
    with pytest.raises(ValueError, match="pass hold_samples=True"):
        t.path(torch.ones(1, 50))


@pytest.mark.parametrize("make", [
    lambda: pv.objectives.BetaELBO(-1.0),
    lambda: pv.objectives.CapacityELBO(-1.0),
    lambda: pv.objectives.BetaTCVAE(-6.0),
    lambda: pv.objectives.BetaTCVAE(dimension_wise=-1.0),
    lambda: pv.objectives.InfoVAE(alpha=0.0, scale=0.5),
    lambda: pv.objectives.InfoVAE(alpha=-3.0, scale=3.0),
], ids=["beta", "capacity", "tc", "dimension", "scale", "alpha"])  # fmt: skip
def test_weights_that_would_reward_a_distance_are_refused(make):
    with pytest.raises(ValueError, match=r"not be negative|at least 1, got"):
        make()


def test_weights_at_the_limit_are_accepted():
    pv.objectives.BetaELBO(0.0)
    pv.objectives.InfoVAE(alpha=0.9, scale=0.1)
    pv.objectives.BetaTCVAE(0.0, mutual_information=-1.0, dimension_wise=0.0)


@pytest.mark.parametrize(
    "schedule",
    [
        o.Constant(-1.0),
        o.Linear(10, 0.0, -5.0),
        o.Linear(10, -1.0, 5.0),
        o.Cyclical(10, start=-3.0),
        o.Cyclical(1000, 1.0, start=1.0, end=-0.1),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
@pytest.mark.parametrize("make", [o.BetaELBO, o.CapacityELBO])
def test_schedules_with_negative_values_are_refused(make, schedule):
    with pytest.raises(ValueError, match="must be a schedule of numbers of at least 0, got"):
        make(schedule)


def test_schedules_may_reach_zero():
    for schedule in (o.Constant(0.0), o.Linear(10, 5.0, 0.0), o.Cyclical(10, end=0.0)):
        o.BetaELBO(schedule), o.CapacityELBO(schedule)
