"""Compare the activity of latent units with closed forms, and check the verdict."""

import dataclasses
import itertools
import math
import re

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, assert_within
from torch import nn

import pyro_vae as pv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exact", [True, False])
def test_units_match_the_linear_gaussian_model(dtype, exact):
    """Var_x E_q[z_d] = (V C V')_dd and Var_q = S_dd, for both correlated and diagonal q."""
    oracle = LinearGaussian(d=3, D=5, exact=exact, dtype=dtype)
    report = pv.collapse_report(oracle.model, oracle.guide, oracle.sample(2000), seed=0)
    moved = (oracle.aggregated_covariance - oracle.s).diagonal()
    units = report.units.loc["z"]
    for unit, truth in enumerate(moved.tolist()):
        row = units.loc[unit]
        assert_within(row.activity, truth, row.activity_error)
        assert row.active == (truth > 0.01)
        # The mean of 2000 variances, from 50 draws each.
        assert row.posterior_variance == pytest.approx(oracle.s[unit, unit].item(), rel=0.03)
        assert row.prior_variance == pytest.approx(1.0, abs=1e-6)
    information, error = oracle.mutual_information, report.surgery.standard_errors
    shift = oracle.finite_data_shift(2000)
    assert report.information == report.surgery.mutual_information
    assert abs(report.information - information) < 4.5 * error["mutual_information"] + 2 * shift
    assert_within(report.rate, oracle.mutual_information + oracle.marginal_kl, error["rate"])
    assert units["kl"].isna().all() == exact
    if not exact:
        q = oracle.aggregated_covariance.diagonal()
        kl = 0.5 * (q - 1 - oracle.s.diagonal().log())  # the expected KL from a Gaussian to N(0, 1)
        assert units["kl"].sum() == pytest.approx(report.rate, rel=1e-4)
        assert units["kl"].tolist() == pytest.approx(kl.tolist(), rel=0.15)
    assert report.state == "healthy"


def test_activity_errors_match_the_spread_over_repeats():
    oracle = LinearGaussian(d=2, D=3)
    truth = (oracle.aggregated_covariance - oracle.s).diagonal()
    scores = []
    for seed in range(50):
        report = pv.collapse_report(
            oracle.model, oracle.guide, oracle.sample(150), num_particles=4, seed=seed
        )
        units = report.units
        scores.append((units["activity"].to_numpy() - truth.numpy()) / units["activity_error"])
    scores = torch.tensor([list(each) for each in scores])
    assert scores.mean(0).abs().max() < 4 / 50**0.5 + 0.1  # the errors correlate with the values
    assert 0.75 < scores.std() < 1.3


def test_sampling_noise_does_not_count_as_activity():
    """With two draws per data point, the means have variance 1/2 from sampling alone."""
    oracle = LinearGaussian(weight=torch.zeros(3, 2))
    report = pv.collapse_report(
        oracle.model, oracle.guide, oracle.sample(4000), num_particles=2, seed=0
    )
    rows = report.units
    assert (rows["activity"].abs() < 4.5 * rows["activity_error"]).all()
    assert rows["activity_error"].max() < 0.02
    assert rows["posterior_variance"].tolist() == pytest.approx([1.0, 1.0], rel=0.1)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_unused_units_are_detected_at_any_scale(scale):
    """Column 1 of W is zero; the scale of the latents is 1 or 30."""
    weight = torch.tensor([[1.0, 0.0], [-0.5, 0.0], [2.0, 0.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T / scale, 1.0).to_event(1), obs=x)

    def guide(x):
        used = scale * x @ weight[:, 0] / (1 + weight.square().sum())
        loc = torch.stack([used, 0.05 * scale * x[:, 0]], -1)  # the other unit: slightly noisy
        deviation = scale * torch.tensor([(1 / (1 + weight.square().sum())) ** 0.5, 1.0])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, deviation).to_event(1))

    x = torch.randn(1000, 1) * weight[:, 0] + torch.randn(1000, 3)
    report = pv.collapse_report(model, guide, x, num_particles=200, seed=0)
    assert report.units["active"].tolist() == [True, False]
    assert report.units["prior_variance"].tolist() == pytest.approx([scale**2] * 2)
    assert report.verdict.startswith("healthy: 1 of 2 units active, mutual information ")
    used, unused = report.units["kl"]
    assert used > 0.5
    assert unused < 0.02


def fitted(beta, decoder=None, epochs=8):
    torch.manual_seed(0)
    data = pv.datasets.load("digits").train
    decoder = pv.nets.MLP(4, [64], 64) if decoder is None else decoder
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(4), likelihood=pv.likelihoods.Bernoulli(decoder)
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(64, [64]))
    objective = pv.objectives.BetaELBO(beta)
    options = {"batch_size": 50, "learning_rate": 3e-3, "seed": 0, "progress": False}
    pv.fit(model, guide, data, objective=objective, epochs=epochs, capture=False, **options)
    return pv.collapse_report(model, guide, data, num_particles=20, seed=0)


def test_healthy_model_is_reported_as_healthy():
    report = fitted(beta=1.0)
    assert report.state == "healthy"
    assert report.num_active >= 2
    assert report.information > 1.0
    assert (report.units["posterior_variance"] < 0.7 * report.units["prior_variance"]).any()


class DecoderWithoutZ(nn.Module):
    """A decoder that ignores z."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(64))

    def forward(self, z):
        return self.logits.expand(*z.shape[:-1], 64)


@pytest.mark.parametrize("why", ["beta", "decoder"])
def test_collapsed_model_is_reported_as_collapsed(why):
    report = fitted(beta=10.0) if why == "beta" else fitted(1.0, DecoderWithoutZ())
    assert report.verdict.startswith("collapsed: 0 of 4 units active, mutual information 0.0")
    assert report.num_active == 0
    assert report.units["kl"].max() < 0.02
    ratio = report.units["posterior_variance"] / report.units["prior_variance"]
    assert (ratio - 1).abs().max() < 0.1
    assert str(report).startswith(report.verdict)


def test_active_units_without_information_are_collapsed():
    """Means move within a wide posterior: the unit is active but carries little information."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.2 * x, 1.0).to_event(1))  # information 0.02

    report = pv.collapse_report(model, guide, torch.randn(1000, 1), num_particles=200, seed=0)
    assert report.num_active == 1
    assert report.state == "collapsed"
    assert report.verdict == (
        "collapsed: mutual information 0.02 nats, below 0.1, "
        "though 1 of 1 units are above the activity threshold"
    )


def test_informative_units_with_constant_means_are_partly_collapsed():
    """The posterior's scale encodes the sign of x, and its mean is constant."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, torch.where(x > 0, 1.0, 0.02)).to_event(1))

    report = pv.collapse_report(model, guide, torch.randn(1000, 1), num_particles=50, seed=0)
    assert report.num_active == 0
    assert 0.3 < report.information < math.log(2)  # nearly one bit
    assert report.state == "partly collapsed"
    assert report.verdict.startswith(
        "partly collapsed: 0 of 1 units active, though mutual information 0."
    )


def test_verdict_agrees_with_its_numbers():
    """Two units of one latent and one unit of another; some are active."""
    oracle = LinearGaussian(d=2, D=3)
    surgery = pv.elbo_surgery(oracle.model, oracle.guide, oracle.sample(20), seed=0)
    index = pd.MultiIndex.from_tuples([("a", 0), ("a", 1), ("b", 0)], names=["site", "unit"])
    for active, information, informed in itertools.product(
        [(), (0,), (0, 1), (0, 1, 2)],
        [-0.004, 0.0, 0.0999999, 0.1, 2.5, math.inf, math.nan],
        [True, False],
    ):
        units = pd.DataFrame({"active": [unit in active for unit in range(3)]}, index)
        known = dataclasses.replace(surgery, mutual_information=information)
        report = pv.evaluation.CollapseReport(units, information, known if informed else None)
        line = report.verdict
        shown = re.fullmatch(
            r"([a-z ]+): (.*?)(mutual information|rate) (?P<nats>[-.\w]+) nats.*", line
        )
        assert shown[1] == report.state
        nats = float(shown["nats"])
        assert (nats < 0.1) == (information < 0.1)
        assert (", below 0.1" in line) == bool(nats < 0.1 and active)
        counts = re.findall(r"(\d) of (\d) units", line)
        assert sum(int(count) for count, _ in counts) == report.num_active == len(active)
        expected = "healthy" if len(active) == 3 else "partly collapsed"
        if nats < 0.1 or (not informed and not active):
            expected = "collapsed"
        assert report.state == expected
        disagree = nats < 0.1 if active else informed and not nats < 0.1
        assert (", though " in line) == disagree


def test_collapse_report_lists_the_sites_of_a_hierarchy():
    """x depends on "top" only; the positive latent "rate" below it is unused."""

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            rate = pyro.sample("rate", dist.LogNormal(0.5 * top[..., 0], 0.5))
            pyro.sample("x", dist.Normal(3 * top, 1.0).to_event(1), obs=x)
        return rate

    def guide(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.3 * x, 0.1**0.5).to_event(1))
            pyro.sample("rate", dist.LogNormal(torch.zeros(len(x)), 0.5 + 0 * top[..., 0]))

    x = 10**0.5 * torch.randn(800, 2)
    report = pv.collapse_report(model, guide, x, seed=0)
    assert report.state == "partly collapsed"
    assert "2 of 2 units active in top, 0 of 1 units active in rate" in report.verdict
    assert report.units.index.names == ["site", "unit"]
    # Var exp(y) for y ~ N(0, v), with v = 0.25 + 0.25 from the means and the variances.
    v = torch.tensor(0.5)
    variance = (v.expm1() * v.exp()).item()
    assert report.units.loc[("rate", 0), "prior_variance"] == pytest.approx(variance, rel=0.35)


def test_collapse_report_without_surgery_reports_the_rate():
    """The sites are masked, so the report gives the rate and the reason."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("a", dist.Normal(z, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        mask = x[:, 0] > 0
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))
            pyro.sample("a", dist.Normal(z, 1.0).to_event(1))

    def masked_model(x):
        with pyro.poutine.mask(mask=x[:, 0] > 0):
            model(x)

    report = pv.collapse_report(masked_model, guide, torch.randn(100, 1), seed=0)
    assert report.surgery is None
    assert "has a mask" in report.note
    assert f"no mutual information: {report.note}" in str(report)
    assert f"rate {report.rate:.2f} nats" in report.verdict


@pytest.mark.parametrize("guide", [pv.guides.AmortizedMixture, pv.guides.AmortizedFlow])
def test_collapse_report_accepts_mixture_priors_and_other_guides(guide, binary):
    model = pv.LatentVariableModel(
        prior=pv.priors.MixtureOfNormals(2, components=3),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
    )
    report = pv.collapse_report(model, guide(model, pv.nets.MLP(16, [8])), binary, seed=0)
    assert len(report.units) == 2
    assert (report.units["prior_variance"] > 0).all()
    assert report.units["kl"].isna().all()
    assert report.surgery.mutual_information <= report.surgery.log_n


def test_verdict_reports_saturation():
    oracle = LinearGaussian(d=4, weight=300 * torch.eye(4), noise=0.1)
    report = pv.collapse_report(oracle.model, oracle.guide, oracle.sample(40), seed=0)
    assert "(saturated: log N is 3.69)" in report.verdict


def test_collapse_report_refuses_numbers_out_of_range(pair, binary):
    with pytest.raises(ValueError, match="at least two data points"):
        pv.collapse_report(*pair, binary[:1])
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        pv.collapse_report(*pair, binary, num_particles=1)
    with pytest.raises(ValueError, match="threshold must be positive"):
        pv.collapse_report(*pair, binary, threshold=0.0)


def pair_whose_posterior_follows_its_prior(spread):
    """Return a pair where q(below|top, c) equals its prior, given a covariate and a used latent."""

    def model(x, c):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            below = pyro.sample("below", dist.Normal(top + spread * c, 1.0))
            pyro.sample("x", dist.Normal(top, 0.5), obs=x)
        return below

    def guide(x, c):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.8 * x, 0.2**0.5))
            pyro.sample("below", dist.Normal(top + spread * c, 1.0))

    c = torch.randn(400)
    return model, guide, (1.1 * torch.randn(400), c)


def test_unit_that_only_follows_a_latent_is_inactive():
    report = pv.collapse_report(*pair_whose_posterior_follows_its_prior(0.0), seed=0)
    assert report.units["active"].tolist() == [True, False]
    assert report.units.loc[("below", 0), "activity"] > 0.3  # although the mean moves
    assert report.state == "partly collapsed"
    assert "mutual information" in report.verdict


def test_unit_that_only_follows_covariates_is_inactive():
    report = pv.collapse_report(*pair_whose_posterior_follows_its_prior(2.0), seed=0)
    assert report.units["active"].tolist() == [True, False]

    def model(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(c, 0.1))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(c, 0.1))

    c = torch.randn(300)
    report = pv.collapse_report(model, guide, (c + torch.randn(300), c), seed=0)
    assert report.surgery.mutual_information > 1.0  # information shared with c
    assert report.verdict == "collapsed: 0 of 1 units active, rate 0.00 nats"


@pytest.mark.parametrize(
    "prior", [dist.Cauchy(0.0, 1.0), dist.StudentT(1.0, 0.0, 1.0), dist.StudentT(1.5, 0.0, 1.0)]
)
def test_collapse_report_accepts_priors_without_a_variance(prior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.9))

    report = pv.collapse_report(model, guide, 3 * torch.randn(300), seed=0)
    assert report.state == "healthy"
    assert not torch.tensor(report.units.loc[("z", 0), "prior_variance"]).isfinite()


@pytest.mark.parametrize("mixture", [False, True])
def test_prior_variance_of_an_angle_is_that_of_its_value(mixture):
    prior = dist.VonMises(torch.zeros(2) if mixture else 0.0, torch.tensor(0.01))
    if mixture:
        prior = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), prior)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z.sin(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(0.2 * x, torch.tensor(1.0)))

    report = pv.collapse_report(model, guide, torch.randn(600), num_particles=5, seed=0)
    # Nearly uniform between -pi and pi.
    assert report.units.loc[("z", 0), "prior_variance"] == pytest.approx(math.pi**2 / 3, rel=0.15)


def test_infinite_rate_is_reported():
    """The guide samples outside the prior's support; the information is still finite."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(-10.0, 10.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.45))

    report = pv.collapse_report(model, guide, 10 * torch.rand(200) - 5, seed=0)
    assert report.rate == math.inf
    assert 1.5 < report.information < 2.0
    assert report.verdict.startswith("healthy: 1 of 1 units active, mutual information 1.")
    assert "infinite rate: the guide has samples where the prior has no mass" in str(report.surgery)
    assert "rate nan nats" in dataclasses.replace(report, surgery=None, rate=math.nan).verdict


def test_non_finite_terms_raise_by_name():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.randn(30)
    x[20:] = 1e20
    for judge in (pv.collapse_report, pv.elbo_surgery):
        with pytest.raises(ValueError, match="log-likelihood is not finite for 10 of 30 data"):
            judge(model, guide, x, batch_size=10)


def test_collapse_report_refuses_unknown_estimators_and_improper_priors(pair, binary):
    with pytest.raises(ValueError, match='estimator must be "exact", '):
        pv.collapse_report(*pair, binary, estimator="all")

    def improper(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match=r"does not support sampling.*Replace improper priors"):
        pv.collapse_report(improper, guide, torch.randn(20))
