"""Masks of latents, by poutine or by the distribution, must agree in model and guide."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_table import DENSITIES
from pyro import poutine

import pyro_vae as pv
from pyro_vae import guides, objectives

MASK = torch.tensor([True, False, True, True, False, True])


def masked_by_poutine(fn, mask):
    with poutine.mask(mask=mask):
        return pyro.sample("z", fn.to_event(1))


def masked_outside(fn, mask):
    return pyro.sample("z", fn.to_event(1).mask(mask))


def masked_inside(fn, mask):
    mask = mask if isinstance(mask, bool) else mask.unsqueeze(-1)
    return pyro.sample("z", fn.mask(mask).to_event(1))


WAYS = {f.__name__: f for f in (masked_by_poutine, masked_outside, masked_inside)}
MASKS = {"rows": MASK, "all": False, "none": True, "a tensor of one": torch.tensor(False)}
LOADING = torch.tensor([[1.0, -0.5], [0.3, 0.8]])


def pair(way, mask, way_of_guide=None, mask_of_guide=None):
    way_of_guide = way if way_of_guide is None else way_of_guide
    mask_of_guide = mask if mask_of_guide is None else mask_of_guide

    def model(x):
        with pyro.plate("data", len(x)):
            z = WAYS[way](dist.Normal(torch.zeros(2), 1.0).expand([len(x), 2]), mask)
            if mask is not True:
                z = z * torch.as_tensor(mask).unsqueeze(-1)
            pyro.sample("x", dist.Normal(z @ LOADING, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            WAYS[way_of_guide](dist.Normal(0.4 * x, 0.7), mask_of_guide)

    return model, guide


def log_evidence(x, mask):
    """Return log p(x), where masked z are zero."""
    covariance = LOADING.T @ LOADING + torch.eye(2)
    with_z = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(x)
    return torch.where(torch.as_tensor(mask), with_z, dist.Normal(0.0, 1.0).log_prob(x).sum(-1))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("of_guide", WAYS)
@pytest.mark.parametrize("way", WAYS)
def test_equal_masks_are_accepted_in_any_form(way, of_guide, mask):
    x = torch.randn(6, 2)
    model, guide = pair(way, mask, of_guide)
    found = pv.evidence(model, guide, x, num_particles=4000, seed=0, progress=False)
    expected = log_evidence(x, mask)
    errors = torch.as_tensor(found.monte_carlo_errors) + 1e-5
    assert ((torch.as_tensor(found.values) - expected).abs() < 5 * errors).all()
    exact = torch.distributions.kl_divergence(dist.Normal(0.4 * x, 0.7), dist.Normal(0.0, 1.0)).sum(
        -1
    )
    exact = torch.where(torch.as_tensor(mask), exact, 0.0)
    for num_particles in (1, 3):
        t = pv.terms(model, guide, x, num_particles=num_particles)
        assert not t.kl[:, exact == 0].any()
    loss = objectives.MeanFieldELBO(3000).loss(model, guide, x)
    assert loss > -expected.sum() - 0.5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", [~MASK, False, torch.tensor(False)], ids=["rows", "all", "one"])
def test_different_masks_are_refused(way, other):
    x = torch.randn(6, 2)
    model, guide = pair(way, MASK, mask_of_guide=other)
    for call in (
        lambda: pv.evidence(model, guide, x, num_particles=5),
        lambda: pv.terms(model, guide, x, num_particles=3),
        lambda: pv.elbo_surgery(model, guide, x),
        lambda: objectives.ELBO().loss(model, guide, x),
        lambda: pv.fit(model, guide, x, epochs=1, batch_size=6, progress=False),
    ):
        with pytest.raises(ValueError, match="'z' has one mask in the model and another"):
            call()


@pytest.mark.parametrize("way", WAYS)
def test_mask_in_only_one_program_is_refused(way):
    x = torch.randn(6, 2)
    for masks, first in (((MASK, True), "model"), ((True, MASK), "guide")):
        model, guide = pair(way, masks[0], mask_of_guide=masks[1])
        with pytest.raises(ValueError, match=f"masked in the {first} and not"):
            pv.evidence(model, guide, x, num_particles=5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mask", [MASK, False], ids=["rows", "all"])
@pytest.mark.parametrize("name", ["normal", "multivariate normal", "planar", "hierarchical"])
def test_library_guides_apply_the_mask_of_the_model(name, mask, way):
    model, _ = pair(way, mask)
    x = torch.randn(6, 2)
    guide = DENSITIES[name](model, pv.nets.MLP(2, [5]))
    t = pv.terms(model, guide, x, num_particles=4)
    hidden = ~torch.as_tensor(mask).expand(6)
    assert not t.log_prior[:, hidden].any()
    assert not t.log_guide[:, hidden].any()
    assert t.log_guide[:, ~hidden].all()
    expected = dist.Normal(0.0, 1.0).log_prob(t.samples["z"]).sum(-1)
    torch.testing.assert_close(t.log_prior[:, ~hidden], expected[:, ~hidden])


def test_library_guides_refuse_a_mask_inside_the_event():
    def model(x):
        with pyro.plate("data", len(x)):
            mask = torch.tensor([True, False])
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).mask(mask).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="masks single numbers"):
        guides.AmortizedNormal(model, pv.nets.MLP(2, [4]))(torch.randn(3, 2))


@pytest.mark.parametrize("way", ["poutine", "distribution"])
def test_masked_enumerated_site_sums_to_one(way):
    """In masked rows, all values have the same probability, as under poutine.mask."""
    table = torch.randn(3)

    def model(x):
        with pyro.plate("data", len(x)):
            fn, infer = dist.Categorical(torch.tensor([0.7, 0.2, 0.1])), {"enumerate": "parallel"}
            if way == "poutine":
                with poutine.mask(mask=MASK):
                    y = pyro.sample("y", fn, infer=infer)
            else:
                y = pyro.sample("y", fn.expand([6]).mask(MASK), infer=infer)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + table[y], 1.0), obs=x)

    guide = guides.AmortizedNormal(model, torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1))))
    x = torch.randn(6)
    weights = torch.where(MASK[:, None], torch.tensor([0.7, 0.2, 0.1]), torch.full((3,), 1 / 3))
    exact = (weights.log() + dist.Normal(table, 2**0.5).log_prob(x[:, None])).logsumexp(-1)
    found = pv.evidence(model, guide, x, num_particles=5000, seed=0)
    errors = torch.as_tensor(found.monte_carlo_errors)
    assert ((torch.as_tensor(found.values) - exact).abs() < 5 * errors + 1e-4).all()


def _padded(x, m):
    with pyro.plate("data", len(x)), poutine.mask(mask=m):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _guide_with_padding(far):
    def guide(x, m):
        with pyro.plate("data", len(x)), poutine.mask(mask=m):
            pyro.sample("z", dist.Normal(torch.where(m, x / 2, far * x), 0.5**0.5))

    return guide


PADDED = (torch.randn(200), torch.arange(200) % 3 > 0)


def test_padding_does_not_change_a_collapse_report():
    near, far = (
        pv.collapse_report(_padded, _guide_with_padding(far), PADDED, seed=0).units
        for far in (0.0, 100.0)
    )
    assert near.equals(far)
    x, m = PADDED
    only = (x[m], m[m])
    expected = pv.collapse_report(_padded, _guide_with_padding(0.0), only, seed=0).units
    error = near.activity_error.item() + expected.activity_error.item()
    assert abs(near.activity.item() - expected.activity.item()) < 4 * error


def test_a_number_that_is_masked_in_all_data_is_not_used():
    kept = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(kept).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        loc = torch.stack([x / 2, 9 * x, 0 * x], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7).mask(kept).to_event(1))

    units = pv.collapse_report(model, guide, torch.randn(300), seed=0).units
    assert units.active.tolist() == [True, False, False]
    assert units.activity.isna().tolist() == [False, True, False]


@pytest.mark.parametrize("objective", [
    objectives.ELBO(), objectives.MeanFieldELBO(), objectives.StickingTheLanding(),
    objectives.ScoreFunction(3), objectives.BetaELBO(2.0), objectives.FreeBits(0.5),
    objectives.CapacityELBO(1.0, 2.0), objectives.InfoVAE(), objectives.InfoVAE(0.5),
    objectives.IWAE(3), objectives.DReG(3), objectives.VIMCO(3), objectives.CIWAE(0.5, 3),
    objectives.MIWAE(3, 2), objectives.PIWAE(3, 2), objectives.Renyi(0.5, 3), objectives.TVO(),
    objectives.CUBO(2.0, 3), objectives.ReweightedWakeSleep(3, sleep=1.0),
], ids=repr)  # fmt: skip
def test_padding_does_not_change_a_loss(objective):
    losses = []
    for far in (0.0, 100.0):
        torch.manual_seed(0)
        losses.append(objective.loss(_padded, _guide_with_padding(far), *PADDED))
    assert losses[0] == losses[1]


def test_masked_scalar_latents_are_diagnosed():
    options = {"num_data": 40, "num_particles": 20, "refit": False, "seed": 0}
    found = pv.diagnose(_padded, _guide_with_padding(0.0), PADDED, PADDED, **options)
    assert "masks latents of" in repr(found)


@pytest.mark.parametrize("how", ["handler", "distribution"])
def test_annealing_when_a_latent_is_masked_everywhere(how):
    def masked(fn):
        return fn.mask(False) if how == "distribution" else fn

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=how == "distribution"):
                pyro.sample("w", masked(dist.Normal(x.new_zeros(len(x)), 1.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            with poutine.mask(mask=how == "distribution"):
                pyro.sample("w", masked(dist.Normal(x, 1.0)))

    x = torch.randn(6)
    ais = pv.evaluation.AIS(num_chains=4, num_temperatures=4)
    found = pv.evidence(model, guide, x, method=ais, seed=0).values
    expected = dist.Normal(0.0, 2**0.5).log_prob(x)  # the guide is the posterior
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_distance_of_infovae_is_unbiased_with_masks():
    """The guide is the prior. The two samples of a row have the same mask, so they are paired."""
    kept = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0], [1, 1], [0, 0]]).bool()

    def model(x, m):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).mask(m).to_event(1))
            pyro.sample("x", dist.Normal(0 * z[..., 0], 1.0), obs=x)

    def guide(x, m):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).mask(m).to_event(1))

    x = torch.randn(6)
    log_likelihood = dist.Normal(0.0, 1.0).log_prob(x).sum()
    objective = objectives.InfoVAE(1.0, 1.0)
    found = torch.tensor([objective.loss(model, guide, x, kept) for _ in range(1500)])
    distance = (found + log_likelihood) / 6
    assert distance.mean().abs() < 4 * distance.std() / 1500**0.5  # false alarm: 6e-5


def test_a_mask_of_a_latent_that_depends_on_a_summed_latent():
    mask = torch.rand(6, 3) < 0.5

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            c = pyro.sample("c", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            with pyro.plate("inner", 3, dim=-1), poutine.mask(mask=mask[: len(x)]):
                z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x)

    def guide(x):
        data, inner = pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1)
        with data, inner, poutine.mask(mask=mask[: len(x)]):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.randn(6, 1)
    for count in (1, 4):
        terms = pv.terms(model, guide, x, num_particles=count)
        assert torch.equal(terms.masked_numbers()["z"], ~mask)
    assert math.isfinite(pv.objectives.InfoVAE().loss(model, guide, x))
    report = pv.collapse_report(model, guide, x, seed=0)
    assert report.num_active >= 1
