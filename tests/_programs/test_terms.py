import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, assert_within
from pyro import poutine

import pyro_vae as pv
from pyro_vae.evaluation._scoring import guide_log_prob


def nested_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("words", 3):
            w = pyro.sample("w", dist.Normal(z, 1.0).mask(x[:, 0] > 0))
        mean = w.sum(-2, keepdim=True).unsqueeze(-1).expand(*w.shape[:-2], 1, len(x), 2)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def nested_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.sum(-1), 0.5))
        with pyro.plate("words", 3):
            pyro.sample("w", dist.Normal(x[:, 0], 0.7).mask(x[:, 0] > 0))


@pytest.mark.parametrize("num_particles", [1, 7])
@pytest.mark.parametrize("vectorize", [True, False])
def test_log_weights_are_the_evidence_when_the_guide_is_the_posterior(num_particles, vectorize):
    oracle = LinearGaussian(exact=True)
    x = oracle.sample(11)
    t = pv.terms(
        oracle.model, oracle.guide, x, num_particles=num_particles, vectorize_particles=vectorize
    )
    for part in (t.log_likelihood, t.log_prior, t.log_guide, t.kl):
        assert part.shape == (num_particles, 11)
    torch.testing.assert_close(t.log_weight, oracle.log_evidence(x).expand(num_particles, 11))


@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize("vectorize", [True, False])
def test_terms_of_nested_plates_are_summed_per_data_point(num_particles, vectorize):
    x = torch.randn(6, 2)
    t = pv.terms(
        nested_model, nested_guide, x, num_particles=num_particles, vectorize_particles=vectorize
    )
    z, w = t.samples["z"], t.samples["w"]
    assert z.shape == (num_particles, 6)
    assert w.shape == (num_particles, 6, 3)
    kept = (x[:, 0] > 0).float()
    normal = torch.distributions.Normal
    log_prior = normal(0.0, 1.0).log_prob(z)
    log_prior = log_prior + kept * normal(z.unsqueeze(-1), 1.0).log_prob(w).sum(-1)
    log_guide = normal(x.sum(-1), 0.5).log_prob(z)
    log_guide = log_guide + kept * normal(x[:, :1], 0.7).log_prob(w).sum(-1)
    log_likelihood = normal(w.sum(-1, keepdim=True), 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(t.log_prior, log_prior)
    torch.testing.assert_close(t.log_guide, log_guide)
    torch.testing.assert_close(t.log_likelihood, log_likelihood)
    assert t.predict()["x"].shape == (num_particles, 6, 2)


def test_vectorized_and_sequential_particles_have_equal_moments():
    oracle = LinearGaussian()
    x = oracle.sample(1).expand(20, -1)
    draws = [
        pv.terms(
            oracle.model, oracle.guide, x, num_particles=100, vectorize_particles=flag
        ).log_weight.flatten()
        for flag in (True, False)
    ]
    for moment in (1, 2):
        a, b = (draw**moment for draw in draws)
        error = ((a.var() + b.var()) / 2000).sqrt().item()
        assert_within(a.mean().item(), b.mean().item(), error)


@pytest.mark.parametrize("num_particles", [1, 4])
def test_kl_is_sampled_if_it_has_no_closed_form(num_particles):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("known", dist.Normal(0.0, 1.0))
            pyro.sample("unknown", dist.StudentT(3.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("known", dist.Normal(x, 0.5))
            pyro.sample("unknown", dist.Normal(x, 2.0))

    x = torch.randn(5)
    t = pv.terms(model, guide, x, num_particles=num_particles)
    normal = torch.distributions.Normal
    known = torch.distributions.kl_divergence(normal(x, 0.5), normal(0.0, 1.0))
    u = t.samples["unknown"]
    sampled = normal(x, 2.0).log_prob(u) - torch.distributions.StudentT(3.0).log_prob(u)
    torch.testing.assert_close(t.kl, known + sampled)


def scaled_latent(x, scale=0.5, mask=True):
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=scale), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def scaled_guide(x, scale=0.5, mask=True):
    with pyro.plate("data", len(x)), poutine.scale(scale=scale), poutine.mask(mask=mask):
        pyro.sample("z", dist.Normal(x, 0.5))


def test_scale_in_both_programs_stays_in_the_terms():
    x = torch.randn(5)
    t = pv.terms(scaled_latent, scaled_guide, x)
    z = t.samples["z"]
    torch.testing.assert_close(t.log_prior, 0.5 * dist.Normal(0.0, 1.0).log_prob(z))
    kl = torch.distributions.kl_divergence(dist.Normal(x, 0.5), dist.Normal(0.0, 1.0))
    torch.testing.assert_close(t.kl, 0.5 * kl.unsqueeze(0))
    assert t.scaled_sites == ["z"]


@pytest.mark.parametrize(("model_scale", "guide_scale"), [(0.5, 1.0), (1.0, 0.5)])
def test_scale_in_only_one_program_is_refused(model_scale, guide_scale):
    model = functools.partial(scaled_latent, scale=model_scale)
    guide = functools.partial(scaled_guide, scale=guide_scale)
    with pytest.raises(ValueError, match=f"scaled by {model_scale:g} in the model and by"):
        pv.terms(model, guide, torch.randn(5))


def test_mask_in_only_one_program_is_refused():
    mask = torch.tensor([True, False, True])
    for model_mask, guide_mask, where in ((mask, True, "model"), (True, mask, "guide")):
        model = functools.partial(scaled_latent, mask=model_mask)
        guide = functools.partial(scaled_guide, mask=guide_mask)
        with pytest.raises(ValueError, match=f"masked in the {where} and not in"):
            pv.terms(model, guide, torch.randn(3))
    t = pv.terms(
        functools.partial(scaled_latent, mask=mask),
        functools.partial(scaled_guide, mask=mask.clone()),
        torch.randn(3),
    )
    assert t.log_prior[0, 1] == t.log_guide[0, 1] == t.kl[0, 1] == 0.0


def test_kl_of_an_autoguide_includes_the_jacobian():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Exponential(torch.ones(len(x))))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    guide = pyro.infer.autoguide.AutoNormal(model)
    t = pv.terms(model, guide, torch.randn(5))
    torch.testing.assert_close(t.kl, t.log_guide - t.log_prior)


def test_scale_of_a_subsampled_data_plate_is_not_in_the_terms():
    def model(x):
        with pyro.plate("data", 1000, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1000, subsample=x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(7)
    t = pv.terms(model, guide, x, num_particles=3)
    assert t.scale == pytest.approx(1000 / 7)
    assert not t.scaled_sites
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    torch.testing.assert_close(t.log_weight, exact.expand(3, 7))


def test_deterministic_sites_and_factors():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.factor("tilt", 0.3 * x)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.deterministic("sum", z.sum())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(4)
    t = pv.terms(model, guide, x)
    assert t.global_sites == []
    exact = dist.Normal(0.0, 2**0.5).log_prob(x) + 0.3 * x
    torch.testing.assert_close(t.log_weight, exact.unsqueeze(0))


def test_guide_is_scored_at_given_values_for_all_pairs():
    x = torch.randn(4, 2)
    values = {"z": torch.randn(3), "w": torch.randn(3, 3)}
    scores = guide_log_prob(nested_guide, (x,), values, plate_nesting=2)
    normal = torch.distributions.Normal
    expected = normal(x.sum(-1), 0.5).log_prob(values["z"][:, None])
    scores_of_words = normal(x[:, :1], 0.7).log_prob(values["w"][:, None]).sum(-1)
    expected = expected + (x[:, 0] > 0) * scores_of_words
    torch.testing.assert_close(scores, expected)


def test_dimension_without_a_plate_is_refused():
    """A sum over an inner plate without keepdim moves the particles to its dimension."""

    def model(x):
        with pyro.plate("data", len(x)):
            with pyro.plate("words", 3):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w.sum(-2), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), pyro.plate("words", 3):
            pyro.sample("w", dist.Normal(x, 0.7))

    pv.terms(model, guide, torch.randn(6))
    with pytest.raises(
        ValueError, match=r"site 'x' has batch shape .* no plate at its dimension -2"
    ):
        pv.terms(model, guide, torch.randn(6), num_particles=5, vectorize_particles=True)


def test_particles_in_the_dimension_of_a_plate_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            with pyro.plate("words", 3):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("out", 3):
                pyro.sample("x", dist.Normal(w.sum(-2), 1.0), obs=x.expand(3, len(x)))

    def guide(x):
        with pyro.plate("data", len(x)), pyro.plate("words", 3):
            pyro.sample("w", dist.Normal(x, 0.7))

    with pytest.raises(ValueError, match=r"Shape mismatch inside plate\('out'\)"):
        pv.terms(model, guide, torch.randn(6), num_particles=3, vectorize_particles=True)


@pytest.mark.parametrize(
    "call",
    [
        pv.terms,
        functools.partial(pv.terms, num_particles=3),
        pv.objectives.ELBO().loss,
        pv.objectives.IWAE(3).loss,
    ],
    ids=["terms", "particles", "ELBO", "IWAE"],
)
def test_a_likelihood_without_to_event_is_refused_with_advice(call, pair):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(x.shape), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"must be \(5,\)\..* declare them with .to_event\(n\)"):
        call(model, pair[1], torch.randn(5, 16))


@pytest.mark.parametrize("call", [pv.terms, pv.fit], ids=["terms", "fit"])
def test_the_advice_on_the_data_plate_is_not_for_other_plates(call, pair):
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with pyro.plate("steps", 4, dim=-2):
                pyro.sample("x", dist.Normal(z.sum(-1).expand(x.T.shape), 1.0), obs=x.T)

    with pytest.raises(ValueError, match=r"plate\('steps'\) at site x dim -2, 4 vs 16") as caught:
        call(model, pair[1], torch.randn(5, 16))
    assert "In the plate 'data'" not in str(caught.value)


def test_observations_and_factors_in_the_data_plate():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("tilt", z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand_by([]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.randn(4, 1)
    t = pv.terms(model, guide, x, num_particles=3)
    assert t.observations.keys() == t.predict().keys() == {"x", "y"}
    assert torch.equal(t.observations["x"], x)
    assert torch.equal(t.observations["y"], torch.zeros(4))
    assert t.predict()["y"].shape == (3, 4)


def test_distribution_mask_in_only_one_program_is_refused():
    mask = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(mask))
            pyro.sample("x", dist.Normal(z, 1.0).mask(mask), obs=x)

    with pytest.raises(ValueError, match="masked in the model and not in the guide"):
        pv.terms(model, guide_inside, torch.randn(3))


def test_latent_not_determined_by_an_auxiliary_site_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("w", dist.Delta(v))
            pyro.sample("z", dist.Normal(v, 1.0))

    with pytest.raises(ValueError, match="auxiliary site 'v', and not all latents beside it"):
        pv.terms(model, guide, torch.randn(3))


def test_delta_guide_has_an_elbo_but_no_evidence():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    x = torch.randn(5)
    joint = dist.Normal(0.0, 1.0).log_prob(x / 2) + dist.Normal(x / 2, 1.0).log_prob(x)
    loss = pv.objectives.ELBO().loss(latent_inside, guide, x)
    assert loss == pytest.approx(-joint.sum().item(), rel=1e-5)
    for call in (pv.evidence, pv.elbo_surgery, pv.to_arviz, pv.objectives.IWAE(3).loss):
        with pytest.raises(ValueError, match="gives latent site 'z' one point"):
            call(latent_inside, guide, x)


def test_predictions_keep_deterministic_sites():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = pyro.deterministic("mean", 2 * z)
            pyro.sample("x", dist.Normal(mean, 0.01), obs=x)

    x = torch.randn(6)
    t = pv.terms(model, guide_inside, x, num_particles=4)
    assert t.predict()["x"].shape == (4, 6)
    assert (t.predict()["x"] - 2 * t.samples["z"]).abs().max() < 0.1
    assert pv.reconstruct(model, guide_inside, x).shape == (6,)


def latent_outside(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def latent_inside(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_outside(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))


def guide_inside(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))


def guide_other_name(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))
        pyro.sample("zz", dist.Normal(x, 1.0))


def guide_without(x):
    pass


def guide_other_size(x):
    with pyro.plate("data", 2 * len(x), subsample=x):
        pyro.sample("z", dist.Normal(x, 1.0))


def guide_auxiliary(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(a, 1.0))


def model_without_data(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def model_that_broadcasts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = z.unsqueeze(-1).expand(*z.shape, 7)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x.unsqueeze(-1))


def model_other_plate(x):
    with pyro.plate("first rows", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:3])


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (latent_inside, guide_without, "latent site 'z' of the model is missing in the guide"),
        (latent_inside, guide_other_name, "the guide samples site 'zz'"),
        (latent_inside, guide_outside, 'inside the plate "data" in the model and outside'),
        (latent_outside, guide_inside, 'outside the plate "data" in the model and inside'),
        (latent_inside, guide_auxiliary, "auxiliary site 'a', and not all latents beside it"),
        (model_without_data, guide_inside, "the model observes nothing"),
        (guide_inside, latent_inside, "the guide observes site 'x'"),
        (model_that_broadcasts, guide_inside, r"events of shape \(7,\), but its value .* \(5, 1\)"),
        (latent_inside, guide_other_size, 'the plate "data" has size 5'),
        (model_other_plate, model_other_plate, "plates are, by size, {'first rows': 3}"),
    ],
)
def test_invalid_pairs_are_refused_by_name(model, guide, message):
    guide = poutine.block(guide, hide=["x"]) if guide is model_other_plate else guide
    with pytest.raises(ValueError, match=message):
        pv.terms(model, guide, torch.randn(5))


def test_require_independent_data_names_global_latents():
    t = pv.terms(latent_outside, guide_outside, torch.randn(5), num_particles=3)
    assert t.global_sites == ["z"]
    assert t.log_weight_global.shape == (3,)
    with pytest.raises(ValueError, match="site 'z' is outside"):
        t.require_independent_data("IWAE")


def test_num_particles_must_be_positive():
    with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
        pv.terms(latent_inside, guide_inside, torch.randn(5), num_particles=0)


@pytest.mark.parametrize("how", ["view", "flatten", "batch norm", "bilinear"])
def test_decoder_without_particle_dimensions_is_refused_where_they_are_required(how):
    """The decoders flatten the particles into the batch, or use them as channels."""
    linear, norm = torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4).eval()
    bilinear = torch.nn.Bilinear(2, 2, 4)
    decoders = {
        "view": lambda z: linear(z).view(-1, 4),
        "flatten": lambda z: linear(z.flatten(0, -2)),
        "batch norm": lambda z: norm(linear(z)),
        "bilinear": lambda z: bilinear(z, torch.ones(20, 2)),
    }

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = decoders[how](z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    x = torch.rand(20, 4).round()
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(4, [8]))
    at_once = {"vectorize_particles": True}
    calls = (
        lambda: pv.terms(model, guide, x, num_particles=3, **at_once),
        lambda: pv.objectives.IWAE(3, **at_once).loss(model, guide, x),
        lambda: pv.evidence(model, guide, x, num_particles=30, **at_once),
        lambda: pv.elbo_surgery(model, guide, x, num_particles=3, **at_once),
    )
    for call in calls:
        with pytest.raises(ValueError, match="vectorize_particles=False") as caught:
            call()
        assert "Sites:" not in str(caught.value)  # the dump of all shapes that Pyro appends
    found = pv.evidence(model, guide, x, num_particles=30, vectorize_particles=False)
    assert found.values.isfinite().all()


def test_errors_of_guides_have_no_dump_of_shapes():
    """Messages from inside a guide end with the solution."""
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 4))
    )
    x = torch.rand(20, 4).round()
    cases = {
        "encoder must map": pv.guides.AmortizedNormal(model, torch.nn.Flatten(0)),
        "not in the data": pv.guides.LocalGuide(model, x[:5] + 1.0),
    }
    for message, guide in cases.items():
        for call in (pv.terms, pv.objectives.ELBO().loss, pv.evidence, pv.elbo_surgery):
            with pytest.raises(ValueError, match=message) as caught:
                call(model, guide, x)
            assert "Sites:" not in str(caught.value)


@pytest.mark.parametrize(
    ("prior", "posterior"),
    [
        (
            lambda x: dist.OneHotCategorical(torch.ones(3)),
            lambda x: dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), logits=x),
        ),
        (
            lambda x: dist.Bernoulli(torch.full((3,), 0.5)).to_event(1),
            lambda x: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=x).to_event(1),
        ),
        (
            lambda x: dist.Poisson(torch.ones(3)).to_event(1),
            lambda x: dist.Gamma(x.exp(), 1.0).to_event(1),
        ),
        (
            lambda x: dist.Gamma(torch.ones(3), 1.0).to_event(1),
            lambda x: dist.Poisson(x.exp()).to_event(1),
        ),
    ],
)
def test_a_probability_is_not_compared_with_a_density(prior, posterior):
    def program(distribution, x, observed):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", distribution(x))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    pair = (
        lambda x: program(prior, x, True),
        lambda x: program(posterior, x, False),
    )
    with pytest.raises(ValueError, match="A probability and a density cannot"):
        pv.terms(*pair, torch.randn(5, 3))


@pytest.mark.parametrize("point", [torch.ones(5), torch.zeros(5)])
def test_a_delta_is_accepted_for_a_discrete_latent(point):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(point))

    x = torch.randn(5)
    expected = dist.Bernoulli(0.3).log_prob(point) + dist.Normal(point, 1.0).log_prob(x)
    torch.testing.assert_close(pv.terms(model, guide, x).log_weight[0], expected)
