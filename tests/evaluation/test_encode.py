"""Encodings against closed forms, quadrature and the guide's own samples, for all guides.

Sampled values may differ from their expectation by 4.5 standard errors, in 1 of 100,000 cases.
"""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Rows, Stream
from guide_table import DENSITIES, Model, local_guides, make
from pyro import poutine
from pyro.infer import autoguide
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae._utils.numerics import softplus_scale

CLOSED = {"normal", "multivariate normal", "low rank", "mixture", "hierarchical"}
ALL = {"enumerate": "parallel"}
SIGMAS = 4.5


def near(found, expected, error):
    return bool(((found - expected).abs() <= SIGMAS * error + 1e-5).all())


def own_samples(guide, name, x, count):
    """Sample a guide on copies of each row, with Pyro alone: (count, B, ...)."""
    with torch.no_grad():
        value = poutine.trace(guide).get_trace(x.repeat(count, 1)).nodes[name]["value"]
    return value.unflatten(0, (count, len(x)))


def agrees(encoding, samples):
    """Compare the moments of an encoding with samples of the guide."""
    samples = samples.double()
    mean, var = samples.mean(0), samples.var(0)
    error = (var / len(samples) + encoding.standard_error.double() ** 2).sqrt()
    of_var = ((samples - mean) ** 4).mean(0).sub(var**2).clamp(min=0).sqrt()
    count = encoding.num_particles or math.inf
    of_var = of_var * math.sqrt(1 / len(samples) + 1 / count)
    return near(encoding.mean, mean, error) and near(encoding.std**2, var, 1.5 * of_var)


@pytest.mark.parametrize("name", DENSITIES)
def test_all_guides_agree_with_their_samples(name):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 5)
    guide = make(name, model, x, spread=2.0)
    found = pv.encode(model, guide, x, seed=1)
    assert found.method == ("closed form" if name in CLOSED else "samples")
    assert found.mean.shape == found.std.shape == (3, 2)
    assert agrees(found, own_samples(guide, "z", x, 5000))


@pytest.mark.parametrize("name", ["normal", "mixture", "planar", "hierarchical"])
def test_one_dimension_agrees_with_quadrature(name):
    torch.manual_seed(1)
    model, x = Model((1,)), torch.randn(2, 5)
    guide = make(name, model, x, spread=1.5)
    found = pv.encode(model, guide, x, seed=1)
    grid = torch.linspace(-12, 12, 2401).reshape(-1, 1, 1).expand(-1, 2, 1)
    given = poutine.condition(guide, data={"z": grid.flatten(0, 1)})
    with torch.no_grad():
        trace = poutine.trace(given).get_trace(x.repeat(2401, 1))
        trace.compute_log_prob()
    density = trace.nodes["z"]["log_prob"].exp().reshape(2401, 2, 1).double()
    density = density / density.sum(0)
    mean = (density * grid).sum(0)
    std = (density * (grid - mean).square()).sum(0).sqrt()
    assert near(found.mean, mean, found.standard_error + 1e-5)
    torch.testing.assert_close(
        found.std.double(), std, rtol=1e-3 if name in CLOSED else 0.2, atol=0
    )


def test_gaussian_guide_gives_its_own_parameters_exactly():
    model, x = Model(), torch.randn(250, 5)
    guide = make("normal", model, x)
    loc, raw = guide.parameters_of(x).detach().chunk(2, -1)
    found = pv.encode(model, guide, x, batch_size=100)
    torch.testing.assert_close(found.mean, loc)
    torch.testing.assert_close(found.std, softplus_scale(raw))
    assert found.samples is None
    assert found.num_particles == 0
    assert not found.standard_error.any()


def two(x):
    """A real latent a and a positive latent b."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Gamma(2.0, 1.0))
        loc = (a.sum(-1) + b).unsqueeze(-1).expand(*b.shape, 5)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def encoder():
    return pv.nets.MLP(5, [7])


SEVERAL_ERROR = (
    r"^the guide must have one latent .*, but it has \['.', '.'\]. Pass one of them as site"
)
SEVERAL = {
    "normal": (pv.guides.AmortizedNormal, {"a", "b"}),
    "joint": (pv.guides.AmortizedMultivariateNormal, {"a", "b"}),
    "joint flow": (
        functools.partial(pv.guides.AmortizedFlow, flow=pv.flows.Planar, length=2), set()
    ),
    "joint mixture": (functools.partial(pv.guides.AmortizedMixture, components=2), {"a"}),
    "bottom-up": (pv.guides.HierarchicalGuide, {"b"}),
    "top-down": (functools.partial(pv.guides.HierarchicalGuide, order="top-down"), {"a"}),
    "points": (pv.guides.AmortizedDelta, {"a", "b"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_several_latents(name):
    """Closed forms are used for the marginal of a site alone, also behind a bijection."""
    torch.manual_seed(0)
    make_guide, closed = SEVERAL[name]
    guide, x = make_guide(two, encoder()), torch.randn(3, 5)
    for site in ("a", "b"):
        found = pv.encode(two, guide, x, site=site, seed=0)
        assert (found.method == "closed form") == (site in closed)
        assert agrees(found, own_samples(guide, site, x, 5000))
    with pytest.raises(ValueError, match=SEVERAL_ERROR):
        pv.encode(two, guide, x)
    with pytest.raises(ValueError, match=r"one of the latents of the guide, .*got site='c'"):
        pv.encode(two, guide, x, site="c")


def test_marginal_over_earlier_latents():
    """The second latent is Gaussian given the first, and its marginal is known."""

    def pair(x, data=None):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x, 1.0))
            b = pyro.sample("b", dist.Normal(2 * a + x, 0.5))
            c = pyro.sample(
                "c", dist.Categorical(probs=torch.stack([b.sigmoid(), 1 - b.sigmoid()], -1))
            )
            if data is not None:
                pyro.sample("x", dist.Normal(b + c, 1.0), obs=data)

    x = torch.randn(150)
    model = lambda x: pair(torch.zeros(len(x)), x)  # noqa: E731
    found = pv.encode(model, pair, x, site="b", seed=0, num_samples=1500)
    assert found.method == "samples"
    assert found.num_particles == 1500
    assert near(found.mean, 3 * x, math.sqrt(4.25 / 1500))
    assert near(found.std, math.sqrt(4.25), math.sqrt(4.25 / 3000))
    torch.testing.assert_close(found.samples.mean(0), found.mean, rtol=1e-4, atol=1e-4)
    z = torch.linspace(-6, 6, 500).unsqueeze(-1)
    weight = (-z.square() / 2).softmax(0)
    share = (weight * (3 * x + math.sqrt(4.25) * z).sigmoid()).sum(0)
    levels = pv.encode(model, pair, x, site="c", seed=0)
    assert levels.mean.shape == (150, 2)
    assert near(levels.mean[:, 0], share, (share * (1 - share) / 1000).sqrt() + 1e-3)


def test_levels_are_probabilities():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer=dict(ALL))
            h = pyro.sample("h", dist.OneHotCategorical(torch.ones(3)))
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(c + h[..., 0] + k, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=x), infer=dict(ALL))
            pyro.sample("h", dist.OneHotCategorical(logits=-x))
            pyro.sample("k", dist.Bernoulli(logits=x[:, 0]))

    x = torch.randn(6, 3)
    expected = {"c": x.softmax(-1), "h": (-x).softmax(-1), "k": x[:, 0].sigmoid()}
    for site, p in expected.items():
        found = pv.encode(model, guide, x, site=site, num_samples=2)
        torch.testing.assert_close(found.mean, p)
        torch.testing.assert_close(found.std, (p * (1 - p)).sqrt())
        assert found.samples.shape == ((2, 6, 3) if site == "h" else (2, 6))
        assert found.discrete
    alone = pv.guides.AmortizedDelta  # the model of a mixture sums out c
    mixture = pv.models.MixtureModel(
        pv.priors.MixtureOfNormals(2, components=3), pv.likelihoods.Normal(pv.nets.MLP(2, [4], 3))
    )
    with pytest.raises(ValueError, match=r"The model sums out \['c'\]"):
        pv.encode(mixture, alone(mixture, pv.nets.MLP(3, [4])), x, site="c")


def test_angles_have_a_mean_direction():
    def model(x, earlier=False):
        with pyro.plate("data", len(x)):
            if earlier:
                pyro.sample("noise", dist.Normal(0.0, 1.0))
            angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
            both = torch.stack([angle.cos(), angle.sin()], -1)
            pyro.sample("x", dist.Normal(both, 1.0).to_event(1), obs=x)

    def guide(x, earlier=False):
        with pyro.plate("data", len(x)):
            shift = 0.0
            if earlier:
                shift = pyro.sample("noise", dist.Normal(torch.zeros(len(x)), 1e-3))
            pyro.sample("angle", dist.VonMises(math.pi + shift, 4.0))

    x = torch.randn(4, 2)
    exact = pv.encode(model, guide, x)
    pair = (functools.partial(program, earlier=True) for program in (model, guide))
    sampled = pv.encode(*pair, x, site="angle", seed=0)
    assert (exact.method, sampled.method) == ("closed form", "samples")
    for found in (exact, sampled):
        offset = torch.remainder(found.mean, 2 * math.pi) - math.pi
        assert near(offset, 0.0, found.standard_error + 1e-5)
    torch.testing.assert_close(sampled.std, exact.std, rtol=0.15, atol=0)


def test_mean_directions_can_be_decoded():
    """A von Mises location of ten is outside of the values of the latent."""

    def model(x):
        with pyro.plate("data", len(x)):
            angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(angle, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("angle", dist.VonMises(10.0 + 5 * x, 4.0))

    x = torch.randn(6)
    codes = pv.encode(model, guide, x)
    assert codes.method == "closed form"
    torch.testing.assert_close(pv.decode(model, codes.mean), codes.mean)
    torch.testing.assert_close(codes.mean.cos(), (10.0 + 5 * x).cos(), rtol=0, atol=1e-5)
    assert pv.interpolate(model, guide, x[:3], x[3:], num=3).abs().max() <= torch.pi


def test_inner_plates_and_other_dimensions_have_the_data_first():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            t = pyro.sample("t", dist.Normal(torch.zeros(1, 2), 1.0).to_event(1))
            with pyro.plate("words", 5, dim=-1):
                w = pyro.sample("w", dist.Normal(t[..., 0], 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("t", dist.Normal(x[:, None, :2], 1.0).to_event(1))
            with pyro.plate("words", 5, dim=-1):
                pyro.sample("w", dist.Normal(x + 1, 0.5))

    x = torch.randn(7, 5)
    for site, expected in (("t", x[:, :2]), ("w", x + 1)):
        found = pv.encode(model, guide, x, site=site, num_samples=3, batch_size=4)
        torch.testing.assert_close(found.mean, expected)
        assert found.samples.shape == (3, *expected.shape)


def test_guides_of_other_kinds():
    """Local, semi-amortized, semi-supervised and sequence guides."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 5)
    for guide in local_guides(model, x):
        found = pv.encode(model, guide, x, num_samples=300, num_particles=300, seed=0)
        gap = found.samples.mean(0) - found.mean
        assert near(gap, 0.0, found.std / math.sqrt(300))
    refined = pv.guides.SemiAmortized(make("normal", model, x), steps=1)
    codes = [pv.encode(model, refined, x, seed=seed) for seed in (0, 0, 1)]
    assert codes[0].method == "closed form"  # of one refinement
    assert torch.equal(codes[0].mean, codes[1].mean)
    assert not torch.equal(codes[0].mean, codes[2].mean)
    images = torch.rand(5, 16).round()
    labels = torch.tensor([0, 1, 2, -1, -1])
    partly = pv.models.SemiSupervisedModel(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.Joined(pv.nets.MLP(5, [4], 16))),
        classes=3,
    )
    guide = pv.guides.SemiSupervisedGuide(
        partly, pv.nets.MLP(16, [8], 3), pv.nets.Joined(pv.nets.MLP(19, [8]))
    )
    q_y = pv.encode(partly, guide, images, labels, site="y_missing")
    missing = labels == -1  # y_missing is masked where the label is known
    expected = guide.classify(images).probs.detach()
    torch.testing.assert_close(q_y.mean[missing], expected[missing])
    assert q_y.mean[~missing].isnan().all()
    z = pv.encode(partly, guide, images, labels, site="z", batch_size=3, seed=0)
    assert z.method == "samples"  # z depends on the missing labels of the second minibatch
    assert not z.standard_error[:3].any()
    assert (z.standard_error[3:] > 0).all()
    assert pv.encode(partly, guide, images[:3], labels[:3], site="z").method == "closed form"
    system = pv.models.SequenceModel(
        pv.priors.StandardNormal(2),
        lambda z: dist.Normal(0.9 * z, 0.4).to_event(1),
        lambda z: dist.Normal(z, 0.1).to_event(1),
    )
    steps, lengths = torch.randn(3, 2, 2), torch.tensor([2, 1, 2])
    guide = pv.guides.SequenceGuide(system)
    methods = [
        pv.encode(system, guide, steps, lengths, site=s, seed=0).method for s in ("z_1", "z_2")
    ]
    assert methods == ["closed form", "samples"]


@pytest.mark.parametrize("kind", ["AutoNormal", "AutoDelta", "AutoMultivariateNormal"])
def test_guides_of_pyro(kind):
    """Their latents are functions of an auxiliary site, which may be global."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pyro.clear_param_store()
    x = torch.randn(6)
    guide = getattr(autoguide, kind)(model, init_loc_fn=autoguide.init_to_value(values={"z": x}))
    guide(x)
    found = pv.encode(model, guide, x, seed=0, num_samples=2)
    assert near(found.mean, x, found.standard_error + 1e-5)
    assert (found.std < 0.2).all()
    assert (found.method == "closed form") == (kind == "AutoDelta")


def test_global_latents_are_averaged():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 200, subsample=x):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        mean = pyro.sample("mean", dist.Normal(3.0, 1.0))
        with pyro.plate("data", 200, subsample=x):
            pyro.sample("z", dist.Normal(mean + x, 1.0))

    x = torch.randn(7)
    found = pv.encode(model, guide, x, seed=0)
    assert near(found.mean, x + 3, found.standard_error)
    assert near(found.std**2, 2.0, 2 * math.sqrt(2 / 1000))


def test_scales_and_masks_do_not_change_the_posterior():
    """The masks are for rows, and for numbers of an event. Masked numbers have no posterior."""
    torch.manual_seed(0)
    x, shown = torch.randn(6, 2), torch.tensor([True, False])

    def latents(x, loc):
        with poutine.mask(mask=x[:, 0] > 0):
            pyro.sample("row", dist.Normal(loc[..., 0], 0.5))
        return pyro.sample("z", dist.Normal(loc, 0.5).mask(shown).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = latents(x, torch.zeros_like(x))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            latents(x, x)

    scaled = [poutine.scale(program, 0.3) for program in (model, guide)]
    for site, expected, kept in (("z", x, shown.expand(6, 2)), ("row", x[:, 0], x[:, 0] > 0)):
        found = pv.encode(*scaled, x, site=site, num_samples=500, seed=0)
        assert torch.equal(found.masked, ~kept)
        torch.testing.assert_close(found.mean[kept], expected[kept])
        assert near(found.samples.mean(0)[kept], expected[kept], 0.5 / math.sqrt(500))
        parts = (found.mean, found.std, found.standard_error, *found.samples)
        assert all(torch.equal(part.isnan(), ~kept) for part in parts)


def test_steps_after_the_end_of_a_sequence_have_no_codes():
    """The levels of a step are masked too. Their samples are integers, which are -1 there."""
    torch.manual_seed(0)
    x, lengths = torch.randn(7, 3, 2), torch.tensor([3, 1, 2, 3, 1, 2, 3])
    sequences = pv.models.SequenceModel(
        prior=pv.priors.StandardNormal(2),
        transition=lambda z: dist.Normal(0.9 * z, 0.4).to_event(1),
        likelihood=lambda z: dist.Normal(z, 0.5).to_event(1),
    )
    guide = pv.guides.SequenceGuide(sequences, recurrent=4, hidden=[])
    for step in (1, 2, 3):
        found = pv.encode(sequences, guide, x, lengths, site=f"z_{step}", num_samples=2, seed=0)
        ended = (lengths < step).unsqueeze(-1).expand(7, 2)
        assert torch.equal(found.masked, ended)
        for part in (found.mean, found.std, found.standard_error, *found.samples):
            assert torch.equal(part.isnan(), ended)
        count = int((lengths < step).sum())
        assert (f"NaN in {count} masked data points" in repr(found)) == (count > 0)
        assert "nan" not in repr(found)
    # A row with a code decodes to it, and the path of a row without one is decoded from samples.
    mean = pv.decode(sequences, {"z_3": found.mean}, lengths, x=x[:1], seed=0)
    torch.testing.assert_close(mean[lengths == 3, 2], found.mean[lengths == 3])
    path = pv.interpolate(sequences, guide, x, x, lengths, site="z_2", num=2, seed=0)
    assert path.isfinite().all()

    def level(lengths, logits):
        with poutine.mask(mask=lengths > 1):
            pyro.sample("c", dist.Categorical(logits=logits))

    def levels(x, lengths):
        with pyro.plate("data", len(x)):
            level(lengths, x[:, 0])

    def model(x, lengths):
        with pyro.plate("data", len(x)):
            level(lengths, torch.zeros(2))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2), obs=x)

    found = pv.encode(model, levels, x, lengths, num_samples=3, seed=0)
    assert found.mean.shape == found.masked.shape == (7, 2)
    assert torch.equal(found.masked[:, 0], lengths == 1)
    assert torch.equal(found.samples == -1, (lengths == 1).expand(3, 7))


def masked_pair():
    """z is masked where the covariate is False. The guide has a code far away there."""

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.prior = pv.priors.StandardNormal(2)

        def forward(self, x, has_z):
            with pyro.plate("data", len(x)):
                with poutine.mask(mask=has_z):
                    z = pyro.sample("z", self.prior())
                mean = z * has_z.unsqueeze(-1)
                pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x, has_z):
        far = 50.0 * (~has_z).unsqueeze(-1)
        with pyro.plate("data", len(x)), poutine.mask(mask=has_z):
            pyro.sample("z", dist.Normal(x / 2 + far, 0.5**0.5).to_event(1))

    return Masked(), guide


@pytest.mark.parametrize("first", [True, False])
def test_priors_are_fitted_to_the_codes_of_data_that_have_them(first):
    """The guide is exact for z ~ N(0, 1), so the fitted mean is zero within 5 standard errors."""
    torch.manual_seed(0)
    model, guide = masked_pair()
    has_z = (torch.arange(200) < 100) == first
    x = 2**0.5 * torch.randn(200, 2)
    fitted = pv.evaluation.refit_prior(model, guide, (x, has_z), components=1, seed=0)
    assert (fitted.prior().loc.abs() < 5 * math.sqrt(2 / 100)).all()
    codes = pv.evaluation.refit_prior(model, guide, (x, has_z), kind="aggregated").prior()
    direct = pv.priors.AggregatedPosterior(guide, (x, has_z))()
    for each in (codes, direct):
        torch.testing.assert_close(each.mean, x[has_z].mean(0) / 2)
    none = torch.zeros(200, dtype=torch.bool)
    for call in (pv.evaluation.refit_prior, lambda m, g, d: pv.priors.AggregatedPosterior(g, d)):
        with pytest.raises(ValueError, match=r"masks latent.* 'z' of all data points"):
            call(model, guide, (x, none))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_prior_gain_of_masked_latents_is_unknown():
    model, guide = masked_pair()
    data = (torch.randn(60, 2), torch.arange(60) < 30)
    found = pv.diagnose(model, guide, data, data, num_particles=30, refit=False)
    assert "masks latents of 30 of 60 data points" in found["prior gain"].note


def test_moments_that_do_not_exist_are_not_finite():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Cauchy(x, 1.0))

    found = pv.encode(model, guide, torch.randn(3), num_samples=2)
    assert found.mean.isnan().all()
    assert not found.std.isfinite().any()
    assert found.samples.isfinite().all()


def test_all_kinds_of_data_give_one_result():
    model, x = Model(), torch.randn(10, 5)
    guide = make("normal", model, x)
    expected = pv.encode(model, guide, x).mean
    for data in (x.numpy(), (x,), TensorDataset(x), Rows(x), Stream(x), DataLoader(Rows(x), 4),
                 np.asfortranarray(x.numpy())):  # fmt: skip
        torch.testing.assert_close(pv.encode(model, guide, data, batch_size=3).mean, expected)


def test_covariates_and_missing_data():
    class Encoder(torch.nn.Module):
        def forward(self, x, y):
            return torch.cat([x.where(x.isfinite(), 0), y.unsqueeze(-1)], -1)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            p = dist.Normal(z.expand(*z.shape[:-1], 3) + y.unsqueeze(-1), 1.0).mask(x.isfinite())
            pyro.sample("x", p.to_event(1), obs=x.where(x.isfinite(), 0))

    x, y = torch.randn(20, 3), torch.randn(20)
    x[torch.rand(20, 3) < 0.3] = torch.nan
    guide = pv.guides.AmortizedNormal(model, Encoder())
    found = [pv.encode(model, guide, x, y), pv.encode(model, guide, (x, y.numpy()), batch_size=7)]
    assert found[0].mean.isfinite().all()
    torch.testing.assert_close(found[0].mean, found[1].mean)
    with pytest.raises(ValueError, match="x has NaN or infinite values"):
        pv.encode(Model(data=3), make("normal", Model(data=3), x.nan_to_num()), x)


def test_no_decoder_runs_for_the_samples():
    rows = []
    model, x = Model(), torch.randn(6, 5)
    guide = make("planar", model, x)

    def counted(x):
        rows.append(len(x))
        return model(x)

    pv.encode(counted, guide, x, num_samples=2000, seed=0)
    assert len(rows) < 20


def test_seed_and_state(pair, binary):
    model, guide = pair
    guide.encoder.append(torch.nn.Dropout(0.5))
    found = []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        found.append(pv.encode(model, guide, binary, num_samples=4, batch_size=20, seed=seed))
        assert torch.equal(state, torch.get_rng_state())
        assert guide.training
    assert torch.equal(found[0].samples, found[1].samples)
    assert not torch.equal(found[0].samples, found[2].samples)
    assert torch.equal(found[0].mean, found[2].mean)
    assert len(found[0]) == 50
    assert repr(found[0]) == (
        "Encoding of 'z': 50 data points of shape (2,); mean and std in closed form; 4 samples each"
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda guide, x: pv.interpolate(two, guide, x[:1], x[1:2]),
        lambda guide, x: pv.plots.traversals(two, guide, x, image_shape=(1, 5)),
        lambda guide, x: pv.plots.aggregated_posterior(two, guide, x),
    ],
    ids=["interpolate", "traversals", "aggregated_posterior"],
)
def test_callers_of_encode_are_not_named_encode(call):
    with pytest.raises(ValueError, match=SEVERAL_ERROR):
        call(pv.guides.AmortizedNormal(two, encoder()), torch.randn(3, 5))
