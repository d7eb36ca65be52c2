"""Prior holes under Gaussian aggregated posteriors, whose level sets are ellipsoids."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, assert_within

import pyro_vae as pv
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.evaluation._prior_holes import _share_below
from pyro_vae.evaluation._surgery.aggregate import Aggregate


def chi_square_below(level, dimensions):
    return torch.special.gammainc(torch.tensor(dimensions / 2), torch.tensor(level / 2)).item()


def rotated(d, spread, prior_scale=1.0, as_full_covariance=False):
    """Return a pair with q(z|x) = N(spread x, (1 - spread^2) I); q_agg tends to N(0, I)."""

    def model(x):
        with pyro.plate("data", len(x)):
            p = dist.Normal(x.new_zeros(d), prior_scale)
            z = pyro.sample("z", p.to_event(1))
            pyro.sample("x", dist.Normal(2 * z, 1.0).to_event(1), obs=x)

    def guide(x):
        scale = (1 - spread**2) ** 0.5
        q = dist.Normal(spread * x, scale).to_event(1)
        if as_full_covariance:
            q = dist.MultivariateNormal(spread * x, scale**2 * torch.eye(d, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    return model, guide


@pytest.mark.parametrize("as_full_covariance", [False, True])
@pytest.mark.parametrize("spread", [0.3, 0.9, 0.999])
def test_share_equals_the_quantile_for_a_matching_prior(spread, as_full_covariance):
    """This also holds when posteriors hardly overlap and q_agg consists of spikes."""
    model, guide = rotated(2, spread, as_full_covariance=as_full_covariance)
    count, repeats, quantile = 300, 12 if not as_full_covariance else 4, 0.1
    found = [
        pv.prior_holes(
            model, guide, torch.randn(count, 2), num_samples=400, quantile=quantile, seed=seed
        )
        for seed in range(repeats)
    ]
    shares = torch.tensor([each.share for each in found])
    errors = torch.tensor([each.standard_error for each in found])
    # Two binomials of 400 draws, plus the dependence of draws on the data.
    assert abs(shares.mean() - quantile) < 4.5 * (errors.square().sum().sqrt() / repeats + 0.003)
    expected = (2 * quantile * (1 - quantile) / 400) ** 0.5
    assert 0.6 * expected < errors.mean() < 1.6 * expected


@pytest.mark.parametrize("prior_scale", [0.5, 1.5, 3.0])
def test_share_matches_the_closed_form(prior_scale):
    """log q_agg falls with |z|, so the share is the prior mass beyond the quantile's radius."""
    d, quantile = 3, 0.05
    model, guide = rotated(d, 0.5, prior_scale)
    holes = pv.prior_holes(
        model, guide, torch.randn(4000, d), num_samples=4000, quantile=quantile, seed=0
    )
    levels = torch.distributions.Chi2(torch.tensor(float(d))).sample((200_000,))
    level = levels.quantile(1 - quantile).item()  # error: about 0.5% of the tail probability
    assert chi_square_below(level, d) == pytest.approx(1 - quantile, abs=0.003)
    share = 1 - chi_square_below(level / prior_scale**2, d)
    assert_within(holes.share, share, holes.standard_error + 0.01 * share + 1e-4)
    log_density = -0.5 * level - 1.5 * math.log(2 * math.pi)
    assert holes.threshold == pytest.approx(log_density, abs=0.3)


def test_latents_in_holes_are_sorted_and_below_the_threshold():
    model, guide = rotated(2, 0.5, prior_scale=2.0)
    x = torch.randn(500, 2)
    holes = pv.prior_holes(model, guide, x, num_samples=900, seed=3, batch_size=70)
    count = round(900 * holes.share)
    z = holes.latents["z"]
    assert z.shape == (count, 2)
    assert 0 < count < 900
    torch.testing.assert_close(holes.decoded, 2 * z)
    q = pv.distributions.MixtureOfDiagNormals(
        torch.zeros(500), 0.5 * x, torch.full((500, 2), 0.75**0.5)
    )
    log_q = q.log_prob(z.double())
    assert (log_q.diff() >= 0).all()  # lowest density first
    assert (log_q < holes.threshold).all()
    p = dist.Normal(torch.zeros(2).double(), 2.0).to_event(1)
    torch.testing.assert_close(holes.log_ratio, p.log_prob(z.double()) - log_q, atol=1e-5, rtol=0)
    below = (holes.log_aggregate_of_prior < holes.threshold).double().mean()
    assert below.item() == pytest.approx(holes.share)
    assert f"{100 * holes.share:.1f}" in str(holes)
    again = pv.prior_holes(model, guide, x, num_samples=900, seed=3, batch_size=70)
    assert torch.equal(again.latents["z"], z)


def test_aggregate_log_prob_without_one_posterior():
    loc, z = torch.randn(5, 2), torch.randn(7, 2)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.3).to_event(1))

    def joint(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x, 0.09 * torch.eye(2)))

    without = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    pairs = dist.Normal(loc, 0.3).to_event(1).log_prob(z.unsqueeze(1)).double()
    kept = torch.ones(7, 5, dtype=torch.bool).scatter(1, without.unsqueeze(1), False)
    expected = pairs[kept].reshape(7, 4).logsumexp(1) - math.log(4)
    for program in (guide, joint):
        q_agg = Aggregate(program, Minibatches(loc, 2), plate_nesting=1, vectorize_particles=True)
        torch.testing.assert_close(
            q_agg.log_prob({"z": z}, without=without), expected, atol=1e-4, rtol=1e-5
        )
        torch.testing.assert_close(
            q_agg.log_prob({"z": z}), pairs.logsumexp(1) - math.log(5), atol=1e-4, rtol=1e-5
        )


def test_share_below_a_quantile_is_unbiased_for_few_draws():
    """For two samples of one distribution, the expected share equals the quantile."""
    count, quantile = 20, 0.1
    shares = torch.stack(
        [_share_below(torch.rand(50), torch.rand(count), quantile)[0] for _ in range(4000)]
    )
    assert abs(shares.mean() - quantile) < 4.5 * shares.std() / 4000**0.5  # 0.0046


def test_prior_holes_refuses_a_guide_with_a_random_density():
    model, _ = rotated(2, 0.5)
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(2, [8]))
    moving = pv.guides.SemiAmortized(guide, steps=5, step_size=0.1)
    with pytest.raises(ValueError, match="differs from run to run"):
        pv.prior_holes(model, moving, torch.randn(60, 2), num_samples=100, seed=0)


def test_prior_holes_without_an_observed_x():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
            pyro.sample("total", dist.Normal(z, 1.0), obs=x.sum(-1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x.sum(-1), 0.8))

    holes = pv.prior_holes(model, guide, torch.randn(50, 3), num_samples=200, seed=0)
    assert holes.decoded is None
    assert 0 < holes.share < 1


def test_intervals_cover_the_share():
    """Compare with a long run on the same data, for a prior of the wrong scale."""
    model, guide = rotated(1, 0.5, prior_scale=2.0)
    x = torch.randn(400, 1)
    truth = pv.prior_holes(model, guide, x, num_samples=40_000, quantile=0.1, seed=0).share
    hits = 0
    for seed in range(40):
        holes = pv.prior_holes(model, guide, x, num_samples=500, quantile=0.1, seed=seed + 1)
        hits += abs(holes.share - truth) < 1.96 * holes.standard_error
    assert hits >= 33  # fewer about once in 3,000 runs if 95% is right


@pytest.mark.parametrize("name", ["mixture model", "hierarchical", "two sites", "planar", "IAF"])
def test_prior_holes_are_finite_for_every_kind_of_pair(name, binary):
    net = pv.nets.MLP
    likelihood = pv.likelihoods.Bernoulli(net(2, [8], 16))
    if name == "mixture model":
        model = pv.models.MixtureModel(pv.priors.MixtureOfNormals(2, components=3), likelihood)
        guide = pv.guides.AmortizedNormal(model, net(16, [8]))
    elif name in ("hierarchical", "two sites"):

        def model(x):
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
                z = pyro.sample("z", dist.Normal(a, 1.0).to_event(1))
                pyro.sample("x", likelihood(z), obs=x)

        make = pv.guides.HierarchicalGuide if name == "hierarchical" else pv.guides.AmortizedNormal
        guide = make(model, net(16, [8]))
    else:
        layer = pv.flows.Planar if name == "planar" else pv.flows.InverseAutoregressive
        model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
        guide = pv.guides.AmortizedFlow(model, net(16, [8]), flow=layer, length=2)
    holes = pv.prior_holes(model, guide, binary, num_samples=200, seed=0, progress=True)
    count = round(200 * holes.share)
    assert holes.decoded.shape == (count, 16)
    assert all(len(value) == count for value in holes.latents.values())
    assert holes.log_ratio.isfinite().all()
    assert holes.log_aggregate_of_prior.isfinite().all()


def test_prior_holes_refuses_bad_arguments_and_unscorable_guides():
    oracle = LinearGaussian()
    x = oracle.sample(20)
    with pytest.raises(ValueError, match=r"too close to 0 or 1 .* num_samples to at least 100"):
        pv.prior_holes(oracle.model, oracle.guide, x, num_samples=20)
    with pytest.raises(ValueError, match="quantile must lie between 0 and 1"):
        pv.prior_holes(oracle.model, oracle.guide, x, quantile=1.0)
    with pytest.raises(TypeError, match="num_samples must be a whole number"):
        pv.prior_holes(oracle.model, oracle.guide, x, num_samples=1e3)
    with pytest.raises(ValueError, match="at least two data points"):
        pv.prior_holes(oracle.model, oracle.guide, x[:1])
    flow = dist.transforms.Planar(2)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    with pytest.raises(ValueError, match="cannot be scored"):
        pv.prior_holes(oracle.model, guide, x.float())
