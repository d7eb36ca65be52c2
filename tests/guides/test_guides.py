import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae._programs.latent_sites import latent_sites
from pyro_vae._utils.numerics import inverse_softplus_scale
from pyro_vae.evaluation._scoring import guide_log_prob
from pyro_vae.guides import AmortizedNormal

# Distributions of latents by name, of every support and several event shapes.
LATENTS = {
    "real": lambda: dist.Normal(0.0, 1.0),
    "vector": lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1),
    "image": lambda: dist.Normal(torch.zeros(1, 4, 4), 1.0).to_event(3),
    "positive": lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
    "unit": lambda: dist.Beta(2.0, 3.0),
    "interval": lambda: dist.Uniform(-1.0, 3.0),
    "simplex": lambda: dist.Dirichlet(torch.ones(4)),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
    "cholesky": lambda: dist.LKJCholesky(3, 1.0),
    "simplexes": lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1),
}


def model_with(*names):
    def model(x):
        with pyro.plate("data", len(x)):
            total = 0.0
            for name in names:
                p = LATENTS[name]()
                z = pyro.sample(name, p)
                total = total + (z.flatten(-p.event_dim) if p.event_dim else z[..., None]).sum(-1)
            pyro.sample("x", dist.Normal(total.unsqueeze(-1), 1.0).expand_by([]).to_event(1), obs=x)

    return model


def guide_for(model, x, hidden=8):
    guide = AmortizedNormal(model, pv.nets.MLP(x.shape[1], [hidden]).to(x.dtype))
    guide(x)
    return guide


@pytest.mark.parametrize("name", LATENTS)
@pytest.mark.parametrize("num_particles", [1, 4])
def test_density_at_a_sample_matches_the_terms(name, num_particles):
    """Scoring inverts the bijection; sampling uses its cache."""
    torch.set_default_dtype(torch.float64)
    try:
        model, x = model_with(name), torch.randn(5, 1)
        guide = guide_for(model, x)
        t = pv.terms(model, guide, x, num_particles=num_particles)
        assert t.samples[name].shape == (num_particles, 5, *LATENTS[name]().event_shape)
        values = {name: t.samples[name].flatten(0, 1)}
        scores = guide_log_prob(guide, (x,), values, plate_nesting=1)
        own = scores.reshape(num_particles, 5, 5).diagonal(dim1=1, dim2=2)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(own, t.log_guide, rtol=1e-7, atol=1e-7)
    assert LATENTS[name]().support.check(t.samples[name].float()).all()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("real", -30, 30), ("unit", 0, 1), ("interval", -1, 3), ("positive_scalar", 0, 400)],
)
def test_density_integrates_to_one(name, low, high):
    LATENTS["positive_scalar"] = lambda: dist.Exponential(1.0)
    try:
        model, x = model_with(name), torch.randn(3, 1)
        guide = guide_for(model, x)
        edges = torch.linspace(0, 1, 400_001, dtype=torch.float64) ** (3 if high == 400 else 1)
        edges = low + (high - low) * edges
        middles = (edges[1:] + edges[:-1]) / 2
        density = guide_log_prob(guide, (x,), {name: middles.float()}, plate_nesting=1).exp()
    finally:
        del LATENTS["positive_scalar"]
    total = (density.double() * edges.diff().unsqueeze(1)).sum(0)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), rtol=2e-3, atol=0)


def test_gradient_reaches_every_parameter():
    model, x = model_with(*LATENTS), torch.randn(5, 1)
    guide = guide_for(model, x)
    pv.objectives.ELBO(3).differentiable_loss(model, guide, x).backward()
    rows = guide.built["head"].weight.grad
    assert (rows.abs().sum(1) > 0).all()
    for name, p in guide.named_parameters():
        assert p.grad.abs().max() > 0, name


def test_guide_supports_nested_plates_and_any_data_dimension():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("words", 3, dim=-1):
                w = pyro.sample("w", dist.Dirichlet(torch.ones(4)))
                pyro.sample("x", dist.Normal(z.sum(-1) + w[..., 0], 1.0), obs=x)

    x = torch.randn(5, 3)
    guide = guide_for(model, x)
    values = guide(x)
    assert values["z"].shape == (5, 1, 2)
    assert values["w"].shape == (5, 3, 4)
    for num_particles in (1, 6):
        t = pv.terms(model, guide, x, num_particles=num_particles)
        assert t.samples["z"].shape == (num_particles, 5, 2)
        assert t.samples["w"].shape == (num_particles, 5, 3, 4)
    # The latents of a data point depend only on its own row of x.
    with torch.no_grad():
        guide.built["head"].weight.mul_(10)
        means = {}
        for rows in (x, x.flip(0)):
            sites = poutine.trace(guide).get_trace(rows).nodes
            means[rows is x] = sites["z"]["fn"].base_dist.loc.squeeze(1)
    torch.testing.assert_close(means[True], means[False].flip(0))


def test_subsampled_data_plate_scales_the_guide_as_the_model():
    def model(x):
        with pyro.plate("data", 1000, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    guide = guide_for(model, torch.randn(10, 1))
    assert pv.terms(model, guide, torch.randn(7, 1)).scale == pytest.approx(1000 / 7)


def test_global_latents_are_left_to_another_guide():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((z + mean).unsqueeze(-1), 1.0).to_event(1), obs=x)

    local = AmortizedNormal(model, pv.nets.MLP(1, [8]))
    shared = pyro.infer.autoguide.AutoNormal(poutine.block(model, expose=["mean"]))

    class Both(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.shared, self.local = shared, local

        def forward(self, x):
            self.shared(x)
            self.local(x)

    x = torch.randn(200, 1) + 3
    guide = Both()
    fit = pv.fit(model, guide, x, epochs=200, batch_size=200, learning_rate=0.05, progress=False)
    assert fit.history.loss.iloc[-1] < fit.history.loss.iloc[0]
    assert shared.median()["mean"].item() == pytest.approx(3, abs=0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 9])
def test_terms_keep_the_dtype_for_any_batch_size(dtype, batch):
    model, guide = make_pair()
    model.to(dtype)
    guide.encoder.to(dtype)
    t = pv.terms(model, guide, torch.ones(batch, 16, dtype=dtype), num_particles=2)
    assert t.log_weight.dtype == dtype
    assert t.log_weight.shape == (2, batch)


def test_copied_guide_is_independent_and_loads_a_state_dict():
    _, guide = make_pair()
    x = torch.ones(3, 16)
    guide(x)
    twin = copy.deepcopy(guide)
    with torch.no_grad():
        twin.built["head"].bias.add_(1.0)
    assert not torch.equal(twin.built["head"].bias, guide.built["head"].bias)
    twin.load_state_dict(guide.state_dict())
    for a, b in zip(twin.parameters(), guide.parameters(), strict=True):
        assert torch.equal(a, b)


def test_new_guide_starts_at_unit_scale():
    _, guide = make_pair()
    x = torch.zeros(3, 16)
    guide(x)
    with torch.no_grad():
        guide.built["head"].weight.zero_()
        guide.built["head"].bias.zero_()
    q = poutine.trace(guide).get_trace(x).nodes["z"]["fn"].base_dist
    torch.testing.assert_close(q.scale, torch.ones(3, 2))


def test_covariates_reach_the_encoder():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = pv.nets.MLP(3, [8])

        def forward(self, x, y):
            return self.net(torch.cat([x, y], -1))

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + y, 1.0).to_event(1), obs=x)

    guide = AmortizedNormal(model, Encoder())
    x, y = torch.randn(50, 2), torch.randn(50, 1)
    pv.fit(model, guide, (x, y), epochs=60, batch_size=10, learning_rate=0.01, progress=False)
    estimate = pv.evidence(model, guide, (x, y), num_particles=500, seed=0)
    exact = dist.Normal(y.expand(50, 2), 2**0.5).log_prob(x).sum(-1)
    assert (estimate.values - exact).abs().max() < 1


def no_latent(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1), obs=x)


def discrete_latent(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(c.float().unsqueeze(-1), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (no_latent, "no latent site in the plate \"data\"; its sites are \\['x'\\]"),
        (discrete_latent, "latent site 'c' has the support IntegerInterval"),
    ],
)
def test_models_without_continuous_latents_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        latent_sites(model, torch.randn(5, 1))


def test_encoder_output_of_wrong_shape_is_refused():
    class Mixer(nn.Module):
        def forward(self, x):
            return x.mean(0)

    model, _ = make_pair()
    with pytest.raises(ValueError, match=r"features of shape \(5, F\)"):
        AmortizedNormal(model, Mixer())(torch.ones(5, 16))


def test_bounds_of_a_support_work_for_any_batch_size():
    """The model's plate expands Uniform's bounds to the batch that the guide was built on."""
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Uniform(-1.0, 3.0))
            b = pyro.sample("b", dist.Uniform(low, high).to_event(1))
            pyro.sample("x", dist.Normal((a + b.sum(-1))[..., None], 1.0).to_event(1), obs=x)

    guide = guide_for(model, torch.randn(5, 1))
    for batch in (9, 1, 5):
        for num_particles in (1, 3):
            t = pv.terms(model, guide, torch.randn(batch, 1), num_particles=num_particles)
            assert t.samples["b"].shape == (num_particles, batch, 2)
            assert ((t.samples["b"] > low) & (t.samples["b"] < high)).all()
            assert ((t.samples["a"] > -1) & (t.samples["a"] < 3)).all()


def test_support_that_differs_between_data_points_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Uniform(torch.zeros(len(x)), x[:, 0].abs() + 0.1))
            pyro.sample("x", dist.Normal(a[..., None], 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="support of latent site 'a' differs between data points"):
        guide_for(model, torch.randn(5, 1))


def test_guide_built_on_all_data_accepts_a_minibatch():
    def model(x):
        with pyro.plate("data", 40, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    guide = guide_for(model, torch.randn(40, 1))
    assert pv.terms(model, guide, torch.randn(10, 1)).scale == 4.0


def test_inner_plate_that_subsamples_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            with pyro.plate("words", 6, subsample_size=2):
                pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="plate 'words', which subsamples 2 of 6"):
        guide_for(model, torch.randn(5, 1))


def test_state_dict_is_loaded_before_the_first_call():
    model, guide = make_pair()
    x = torch.ones(3, 16)
    guide(x)
    fresh = AmortizedNormal(model, pv.nets.MLP(16, [8]))
    fresh.load_state_dict(guide.state_dict())
    q = [poutine.trace(g).get_trace(x).nodes["z"]["fn"].base_dist.loc for g in (guide, fresh)]
    assert torch.equal(*q)
    narrow = AmortizedNormal(make_pair(latent=3)[0], pv.nets.MLP(16, [8]))
    narrow.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="another model or encoder"):
        narrow(x)


def widen(guide):
    """Set a guide to N(0, 1), wider than the posteriors, so that the weights vary."""
    with torch.no_grad():
        for p in guide.built["head"].parameters():
            p.zero_()


@pytest.mark.parametrize("num_particles", [1, 3])
def test_guide_applies_the_masks_of_the_model(num_particles):
    """Padded latents: the guide masks the sites that the model masks."""

    def model(x, lengths):
        kept = torch.arange(3).unsqueeze(-1) < lengths
        with pyro.plate("data", len(x)), pyro.plate("time", 3), poutine.mask(mask=kept):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    class Rows(nn.Module):
        def forward(self, x, lengths):
            return x

    x, lengths = torch.randn(4, 3), torch.tensor([1, 2, 3, 1])
    guide = AmortizedNormal(model, Rows())
    for rows in (slice(0, 4), slice(1, 3)):
        t = pv.terms(model, guide, x[rows], lengths[rows], num_particles=num_particles)
        z = t.samples["z"]  # (K, B, 3)
        kept = torch.arange(3) < lengths[rows].unsqueeze(-1)
        expected = (kept * dist.Normal(0.0, 1.0).log_prob(z)).sum(-1)
        torch.testing.assert_close(t.log_prior, expected)
        assert (t.kl[:, lengths[rows] == 3] != 0).all()
    widen(guide)
    estimate = pv.evidence(model, guide, (x, lengths), num_particles=20_000, seed=0)
    kept = torch.arange(3) < lengths.unsqueeze(-1)
    exact = (kept * dist.Normal(0.0, 2**0.5).log_prob(x)).sum(-1)
    assert ((estimate.values - exact).abs() < 4.5 * estimate.monte_carlo_errors).all()
    with pytest.raises(ValueError, match="has a mask that differs between data points"):
        pv.elbo_surgery(model, guide, (x, lengths))


def test_evidence_with_obs_mask_matches_the_closed_form():
    seen = torch.tensor([True, False, True, True])

    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0], obs_mask=seen)

    class Rows(nn.Module):
        def forward(self, x, seen):
            return x

    guide = AmortizedNormal(model, Rows())
    x = torch.randn(4, 1)
    guide(x, seen)
    with torch.no_grad():  # N(0, 2^2), twice as wide as the prior, so that the weights vary
        guide.built["head"].weight.zero_()
        guide.built["head"].bias.copy_(torch.tensor([0.0, inverse_softplus_scale(2.0)] * 2))
    estimate = pv.evidence(model, guide, (x, seen), num_particles=20_000, seed=0)
    exact = seen * dist.Normal(0.0, 2**0.5).log_prob(x[:, 0])
    assert ((estimate.values - exact).abs() < 4.5 * estimate.monte_carlo_errors).all()
