import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, assert_within

import pyro_vae as pv
from pyro_vae.evaluation.information import DiagonalGaussians, gaussian_information


def as_full_covariance(oracle):
    """The same guide, told to Pyro in a way that only running it can score."""

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = (x - oracle.mu.to(x.dtype)) @ oracle.v.T.to(x.dtype)
            pyro.sample("z", dist.MultivariateNormal(mean, oracle.s.to(x.dtype)))

    return guide


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("scored", [False, True])
def test_surgery_of_the_linear_gaussian_model(dtype, num_particles, scored):
    oracle = LinearGaussian(d=2, D=5, noise=2.0, dtype=dtype)
    count = 3001  # no multiple of the batch
    x = oracle.sample(count)
    guide = as_full_covariance(oracle) if scored else oracle.guide
    surgery = pv.elbo_surgery(oracle.model, guide, x, num_particles=num_particles, seed=2)
    errors = surgery.standard_errors
    shift = oracle.finite_data_shift(count)
    assert shift < 0.004  # small enough for its second order to be all of it
    evidence = oracle.log_evidence(x)
    # Given the data, the ELBO's only error is that of the draws; the rest varies with the data.
    assert_within(surgery.elbo, evidence.mean().item() - oracle.gap, errors["elbo"])
    assert_within(surgery.rate, oracle.mutual_information + oracle.marginal_kl, errors["rate"])
    assert_within(
        surgery.mutual_information,
        oracle.mutual_information - shift,
        errors["mutual_information"],
    )
    assert_within(surgery.marginal_kl, oracle.marginal_kl + shift, errors["marginal_kl"])
    assert surgery.elbo == pytest.approx(-surgery.distortion - surgery.rate, rel=1e-12)
    assert surgery.rate == pytest.approx(
        surgery.mutual_information + surgery.marginal_kl, rel=1e-12
    )
    assert surgery.log_n == pytest.approx(math.log(count))


def test_marginal_kl_is_told_apart_from_nothing():
    """A prior that is off by a known amount: KL(N(0, Q) || N(0, I)) is large, and found."""
    oracle = LinearGaussian(d=1, D=3)
    x = 2 * (oracle.sample(4000) - oracle.mu) + oracle.mu  # twice the spread that the model has
    surgery = pv.elbo_surgery(oracle.model, oracle.guide, x, seed=0)
    q = (4 * oracle.v @ oracle.covariance @ oracle.v.T + oracle.s).item()
    expected = 0.5 * (q - 1 - math.log(q))
    assert_within(surgery.marginal_kl, expected, surgery.standard_errors["marginal_kl"], 4.5)
    assert surgery.marginal_kl > 20 * surgery.standard_errors["marginal_kl"]


def test_matrix_products_equal_the_scored_pairs():
    """Two latents, one on the positive reals, through a guide that was made for the model."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((a.sum(-1) + b)[..., None], 1.0).to_event(1), obs=x)

    x = torch.randn(60, 1)
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(1, [8]))
    guide(x)
    with torch.no_grad():
        guide.built["head"].weight.mul_(5)
    parts = [DiagonalGaussians.read(guide, (rows,)) for rows in x.split(25)]
    q = DiagonalGaussians.concatenate(parts)
    assert q.sites == ("a", "b")
    assert not q.real
    codes = q.codes({"a": torch.zeros(4, 60, 2), "b": torch.zeros(4, 60)})
    normal = torch.distributions.Normal(q.loc, q.scale)
    pairs = normal.log_prob(codes.unsqueeze(2)).sum(-1)  # (K, N, N)
    own = pairs.diagonal(dim1=1, dim2=2)
    expected = (own - pairs.logsumexp(2) + math.log(60)).mean(0)
    torch.testing.assert_close(gaussian_information(q, codes), expected, rtol=1e-9, atol=1e-9)

    fast = pv.elbo_surgery(model, guide, x, num_particles=200, seed=0)

    # The same density, in a form that is not read as a Gaussian.
    masked = pyro.poutine.mask(guide, mask=torch.tensor(True))
    masked_model = pyro.poutine.mask(model, mask=torch.tensor(True))
    assert not DiagonalGaussians.describe(masked, (x,))
    slow = pv.elbo_surgery(masked_model, masked, x, num_particles=200, seed=0)
    # The same data: only the draws differ. 200 of them for each of 60 data.
    assert fast.mutual_information == pytest.approx(slow.mutual_information, abs=0.05)
    assert fast.rate == pytest.approx(slow.rate, abs=0.05)


def test_hierarchical_guides_are_scored_and_not_taken_for_mean_field():
    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x):  # the exact posterior, top down
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x / 3, (2 / 3) ** 0.5))
            pyro.sample("z1", dist.Normal((x + z2) / 2, 0.5**0.5))

    x = (torch.randn(1500) * 3**0.5).double()
    assert not DiagonalGaussians.describe(guide, (x,))
    surgery = pv.elbo_surgery(model, guide, x, num_particles=2, seed=0)
    # I[x, (z1, z2)] = h(x) - h(x|z1) = log(3) / 2, and with the exact posterior q_agg is p.
    errors = surgery.standard_errors
    assert_within(surgery.mutual_information, 0.5 * math.log(3), errors["mutual_information"])
    assert abs(surgery.marginal_kl) < 4 * errors["marginal_kl"] + 0.01


@pytest.mark.parametrize("vectorize", [True, False])
def test_guides_that_look_at_the_shape_of_what_they_drew(vectorize):
    """Codes are given to the guide with the data's dimension, as its own draws have it."""
    refine = torch.nn.Linear(2, 1).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z2, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x / 3, 1.0).to_event(1))
            if vectorize:
                seen = torch.cat([x.expand(*z1.shape[:-1], 1), z1], -1)
            else:
                seen = torch.cat([x, z1], 1)
            pyro.sample("z2", dist.Normal(refine(seen), 0.8).to_event(1))

    x = torch.randn(30, 1).double()
    surgery = pv.elbo_surgery(model, guide, x, vectorize_particles=vectorize, seed=0)
    assert 0 < surgery.mutual_information < surgery.log_n
    table = pv.compare({"a": (model, guide)}, x, num_particles=20, vectorize_particles=vectorize)
    assert table.entries[0].surgery is not None


def test_a_bijection_that_differs_from_datum_to_datum_is_scored():
    """N(x, 0.5) told as a standard normal through an affine map that holds x."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def told(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            inverse = dist.transforms.AffineTransform(-2 * x, 2.0, event_dim=1).inv
            pyro.sample("z", dist.TransformedDistribution(base, [inverse]))

    def plain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    x = 3 * torch.randn(200, 2)
    a, b = (pv.elbo_surgery(model, g, x, num_particles=50, seed=0) for g in (told, plain))
    assert a.mutual_information == pytest.approx(b.mutual_information, abs=0.05)
    assert a.mutual_information > 2


def test_surgery_of_a_latent_whose_base_has_another_event_shape():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.LKJCholesky(3, 1.0))
            pyro.sample("x", dist.Normal(c.sum((-1, -2)).unsqueeze(-1), 1.0).to_event(1), obs=x)

    x = torch.randn(20, 1)
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(1, [8]))
    surgery = pv.elbo_surgery(model, guide, x, seed=0)
    assert 0 <= surgery.mutual_information < surgery.log_n


def test_mutual_information_saturates_at_log_n():
    """Well separated codes: each names its datum, and no more can be said of N data."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-3).to_event(1))

    surgery = pv.elbo_surgery(model, guide, torch.randn(200, 5), seed=0)
    assert surgery.mutual_information == pytest.approx(surgery.log_n, abs=1e-6)


def test_control_variate_leaves_the_identity_and_cuts_the_error():
    oracle = LinearGaussian(d=2, D=5)
    surgery = pv.elbo_surgery(oracle.model, oracle.guide, oracle.sample(2000), seed=0)
    errors = surgery.standard_errors
    assert errors["marginal_kl"] < 0.3 * errors["mutual_information"]


def test_guides_that_cannot_be_scored():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    planar = dist.transforms.Planar(2)

    def flow(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x, 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    with pytest.raises(ValueError, match="guide site 'z' cannot be scored"):
        pv.elbo_surgery(model, flow, torch.randn(10, 2))


def test_surgery_prints_its_terms():
    oracle = LinearGaussian()
    text = str(pv.elbo_surgery(oracle.model, oracle.guide, oracle.sample(50)))
    assert "mutual_information" in text
    assert "±" in text
