"""Enumerated discrete latents, compared with explicit sums and Pyro's TraceEnum_ELBO."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import assert_within
from pyro.infer import TraceEnum_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import objectives as o

ALL = {"enumerate": "parallel"}


class Mixture(nn.Module):
    """c in 0, 1, 2; z ~ N(mean[c], 1), or z = 1; x ~ N(loading[c] z + mean[c], 0.8^2)."""

    def __init__(self, *, in_guide, continuous=True, full=None):
        super().__init__()
        self.in_guide, self.continuous, self.full = in_guide, continuous, full
        self.logits = nn.Parameter(torch.randn(3))
        self.mean, self.loading = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.head, self.shift = nn.Linear(1, 3), nn.Parameter(torch.randn(3))
        self.slope = nn.Parameter(torch.randn(()))

    def plate(self, x):
        return pyro.plate("data", self.full or len(x), subsample=x if self.full else None)

    def p_x(self, c, z):
        return dist.Normal(self.loading[c] * z + self.mean[c], 0.8)

    def model(self, x):
        with self.plate(x):
            c = pyro.sample("c", dist.Categorical(logits=self.logits), infer=dict(ALL))
            z = 1.0
            if self.continuous:
                z = pyro.sample("z", dist.Normal(self.mean[c], 1.0))
            pyro.sample("x", self.p_x(c, z), obs=x)

    def guide(self, x):
        with self.plate(x):
            loc = self.slope * x
            if self.in_guide:
                logits = self.head(x.unsqueeze(-1))
                c = pyro.sample("c", dist.Categorical(logits=logits), infer=dict(ALL))
                loc = loc + self.shift[c]
            if self.continuous:
                pyro.sample("z", dist.Normal(loc, 1.5))

    def values(self):
        return [p for p in self.parameters() if p.requires_grad]


def gradients(loss, pair):
    found = torch.autograd.grad(loss, pair.values(), allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten()
         for p, g in zip(pair.values(), found, strict=True)]
    )  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def log_joint(pair, x, z, c):
    log_p = dist.Categorical(logits=pair.logits).log_prob(torch.tensor(c))
    if pair.continuous:
        log_p = log_p + dist.Normal(pair.mean[c], 1.0).log_prob(z)
    return log_p + pair.p_x(c, z).log_prob(x)


@pytest.mark.parametrize("k", [1, 4])
def test_latent_enumerated_only_in_the_model_is_summed_out(k):
    pair, x = Mixture(in_guide=False), torch.randn(6)
    t = pv.terms(pair.model, pair.guide, x, num_particles=k)
    z = t.samples["z"]
    assert z.shape == (k, 6)
    expected = torch.stack([log_joint(pair, x, z, c) for c in range(3)]).logsumexp(0)
    torch.testing.assert_close(t.log_joint, expected)
    prior = torch.stack(
        [pair.logits.log_softmax(0)[c] + dist.Normal(pair.mean[c], 1.0).log_prob(z)
         for c in range(3)]
    ).logsumexp(0)  # fmt: skip
    torch.testing.assert_close(t.log_prior, prior)
    torch.testing.assert_close(t.log_likelihood, expected - prior)


@pytest.mark.parametrize("k", [1, 4])
def test_latent_enumerated_in_the_guide_is_averaged(k):
    """Each value of c has its own sample of z. The result is the average under q(c|x)."""
    pair, x = Mixture(in_guide=True), torch.randn(6)
    t = pv.terms(pair.model, pair.guide, x, num_particles=k)
    assert t.log_weight.shape == (k, 6)
    drawn = t._first.guide["z"].site["value"]
    assert drawn.shape == ((3, 6) if k == 1 else (3, k, 6))
    log_q = pair.head(x.unsqueeze(-1)).log_softmax(-1)
    total = 0.0
    for c, z in enumerate(drawn):
        log_w = log_joint(pair, x, z, c) - log_q[:, c]
        log_w = log_w - dist.Normal(pair.slope * x + pair.shift[c], 1.5).log_prob(z)
        total = total + log_q[:, c].exp() * log_w
    torch.testing.assert_close(t.log_weight, total.reshape(k, 6))


@pytest.mark.parametrize("in_guide", [True, False])
@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("full", [None, 30])
def test_expected_gradient_matches_trace_enum_elbo(in_guide, continuous, full):
    pair, x = Mixture(in_guide=in_guide, continuous=continuous, full=full), torch.randn(6)
    if not in_guide and not continuous:
        ours = o.ELBO().differentiable_loss(pair.model, pair.guide, x)
        expected = torch.stack([log_joint(pair, x, 1.0, c) for c in range(3)]).logsumexp(0)
        torch.testing.assert_close(ours, -expected.sum() * (full or 6) / 6)
        return
    particles, count = (10, 40) if continuous else (1, 2)
    theirs = TraceEnum_ELBO(particles, vectorize_particles=continuous, max_plate_nesting=1)

    def sampled(objective):
        return torch.stack(
            [gradients(objective.differentiable_loss(pair.model, pair.guide, x), pair)
             for _ in range(count)]
        )  # fmt: skip

    a, b = sampled(o.ELBO(particles)), sampled(theirs)
    if not continuous:
        torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a[0], a[1])
        return
    error = (a.var(0) / count + b.var(0) / count).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error + 1e-5).all()


def exact_evidence(pair, x):
    """Return log p(x): a sum over c of Gaussian integrals over z."""
    total = []
    for c in range(3):
        loc = pair.loading[c] * pair.mean[c] + pair.mean[c]
        scale = (pair.loading[c] ** 2 + 0.8**2).sqrt()
        total.append(pair.logits.log_softmax(0)[c] + dist.Normal(loc, scale).log_prob(x))
    return torch.stack(total).logsumexp(0)


@pytest.mark.parametrize("objective", [o.IWAE(500), o.DReG(500), o.VIMCO(500)], ids=str)
def test_importance_weighted_bounds_reach_the_exact_evidence(objective):
    pair, x = Mixture(in_guide=False), torch.randn(6)
    losses = torch.tensor([objective.loss(pair.model, pair.guide, x) for _ in range(40)])
    truth = exact_evidence(pair, x).sum().item()
    assert_within(-losses.mean().item(), truth, losses.std().item() / 40**0.5 + 0.01)
    evidence = pv.evidence(pair.model, pair.guide, x, num_particles=2000, seed=0, progress=False)
    assert evidence.values.sum().item() == pytest.approx(truth, abs=0.3)


def sampling(pair):
    """Return the pair with its discrete latent sampled instead of enumerated."""
    return [
        pyro.poutine.infer_config(program, lambda site: {"enumerate": None})
        for program in (pair.model, pair.guide)
    ]


def test_vimco_bound_tends_to_the_exact_evidence():
    """The discrete latent is sampled instead of enumerated."""
    pair, x = Mixture(in_guide=True, continuous=False), torch.randn(6)

    truth = torch.stack([log_joint(pair, x, 1.0, c) for c in range(3)]).logsumexp(0).sum()
    pair_of = sampling(pair)
    found = []
    for k in (2, 200):
        losses = torch.tensor([o.VIMCO(k).loss(*pair_of, x) for _ in range(60)])
        found.append(-losses.mean())
        error = losses.std() / 60**0.5
    assert found[0] < found[1]
    assert abs(found[1] - truth) < 4.5 * error + 0.01


def test_vimco_gradient_matches_enumeration_of_both_particles():
    pair, x = Mixture(in_guide=True, continuous=False), torch.randn(2)
    pair_of = sampling(pair)
    log_q = pair.head(x.unsqueeze(-1)).log_softmax(-1)
    log_p = torch.stack([log_joint(pair, x, 1.0, c) for c in range(3)], -1)
    log_w = log_p - log_q
    bound = 0.0
    for a in range(3):
        for b in range(3):
            weight = (log_q[:, a] + log_q[:, b]).exp()
            bound = bound + weight * (torch.logaddexp(log_w[:, a], log_w[:, b]) - math.log(2))
    truth = gradients(bound.sum(), pair)
    rows = x.repeat_interleave(400)
    found = torch.stack(
        [-gradients(o.VIMCO(2).differentiable_loss(*pair_of, rows), pair) / 400 for _ in range(60)]
    )
    error = found.std(0) / 60**0.5
    assert ((found.mean(0) - truth).abs() < 4.5 * error + 1e-6).all()


def test_observation_may_depend_on_two_enumerated_latents():
    weights = torch.randn(2, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.3), infer=dict(ALL))
            b = pyro.sample("b", dist.Categorical(torch.ones(3) / 3), infer=dict(ALL))
            pyro.sample("x", dist.Normal(weights[a.long(), b], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Bernoulli(torch.sigmoid(x)), infer=dict(ALL))

    x = torch.randn(5)
    t = pv.terms(model, guide, x)
    total = 0.0
    for a in range(2):
        q = dist.Bernoulli(torch.sigmoid(x)).log_prob(torch.tensor(float(a)))
        log_p = dist.Bernoulli(0.3).log_prob(torch.tensor(float(a)))
        log_x = torch.stack([dist.Normal(weights[a, b], 1.0).log_prob(x) for b in range(3)])
        total = total + q.exp() * (log_p + log_x.logsumexp(0) - math.log(3) - q)
    torch.testing.assert_close(t.log_weight[0], total)


@pytest.mark.parametrize("in_guide", [True, False])
def test_captured_fit_with_enumeration_matches_eager(in_guide, without_compiler):
    x = torch.randn(60)
    fits = []
    for capture in (True, False):
        torch.manual_seed(1)
        pair = Mixture(in_guide=in_guide)
        fit = pv.fit(pair.model, pair.guide, x, epochs=4, batch_size=20, seed=2, capture=capture,
                     progress=False)  # fmt: skip
        fits.append((fit, torch.cat([p.detach().flatten() for p in pair.parameters()])))
    assert fits[0][0].execution == "captured, not compiled"
    torch.testing.assert_close(fits[0][1], fits[1][1])


def test_unsupported_enumeration_is_refused_by_name():
    pair, x = Mixture(in_guide=True), torch.randn(6)
    with pytest.raises(ValueError, match="averages over all values of site 'c'"):
        o.IWAE(4).loss(pair.model, pair.guide, x)
    with pytest.raises(ValueError, match="the guide enumerates site 'c'"):
        _ = pv.terms(pair.model, pair.guide, x).samples
    sequential = pyro.poutine.infer_config(pair.guide, lambda site: {"enumerate": "sequential"})
    with pytest.raises(ValueError, match='only "parallel" is supported'):
        o.ELBO().loss(pair.model, sequential, x)

    def outside(x):
        c = pyro.sample("c", dist.Bernoulli(0.5), infer=dict(ALL))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    with pytest.raises(ValueError, match='must be inside the plate "data"'):
        o.ELBO().loss(outside, lambda x: None, torch.randn(5))


def scaled_mixture(scales, *, in_guide):
    """Return a mixture whose label, latent and observation have scales."""
    of_c, of_z, of_x = scales
    loc, logits = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def model(x):
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=of_z):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.scale(scale=of_c):
                infer = {} if in_guide else dict(ALL)
                c = pyro.sample("c", dist.Categorical(logits=logits), infer=infer)
            with pyro.poutine.scale(scale=of_x):
                pyro.sample("x", dist.Normal(z + loc[c], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=of_z):
                z = pyro.sample("z", dist.Normal(x / 2 + loc[0] / 9, 1.2))
            if in_guide:
                with pyro.poutine.scale(scale=of_c):
                    rows = torch.stack([z, -z, x], -1)
                    pyro.sample("c", dist.Categorical(logits=rows), infer=dict(ALL))

    return model, guide, [loc, logits]


@pytest.mark.parametrize(
    ("scales", "in_guide"),
    [
        ((0.1, 0.1, 0.1), True),
        ((0.3, 1.0, 1.0), True),  # a weight of one KL divergence
        ((0.3, 2.0, 0.7), True),
        ((0.5, 0.5, 0.5), False),
        ((0.5, 2.0, 0.5), False),
        ((torch.tensor(0.2), 1.0, 1.0), True),
    ],
)
def test_scaled_sums_equal_those_of_pyro(scales, in_guide):
    x = torch.randn(6)
    model, guide, parameters = scaled_mixture(scales, in_guide=in_guide)
    found = []
    for elbo in (o.ELBO(), TraceEnum_ELBO(max_plate_nesting=1)):
        elbo.loss(model, guide, x)  # the first call finds the enumerated sites by a further run
        torch.manual_seed(0)
        loss = elbo.differentiable_loss(model, guide, x)
        found.append([loss, *torch.autograd.grad(loss, parameters)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sum_of_the_model_alone_has_one_scale():
    x = torch.randn(6)
    model, guide, _ = scaled_mixture((0.5, 1.0, 0.7), in_guide=False)
    with pytest.raises(ValueError, match=r"sites 'c' and 'x' are in one sum .* scales 0.5 and 0.7"):
        o.ELBO().loss(model, guide, x)
    model, guide, _ = scaled_mixture((torch.rand(6), 1.0, 1.0), in_guide=True)
    with pytest.raises(ValueError, match=r"its scale has shape \(6,\).*pv.unscaled\(guide\)"):
        o.ELBO().loss(model, guide, x)


@pytest.mark.parametrize("in_guide", [True, False])
def test_a_scaled_sum_has_no_evidence_until_it_is_unscaled(in_guide):
    x = torch.randn(6)
    torch.manual_seed(5)
    model, guide, (loc, logits) = scaled_mixture((0.5, 0.5, 0.5), in_guide=in_guide)
    with pytest.raises(ValueError, match="scale"):
        pv.evidence(model, guide, x)
    found = pv.evidence(pv.unscaled(model), pv.unscaled(guide), x, num_particles=20_000, seed=0)
    of_c = dist.Categorical(logits=logits)
    exact = dist.MixtureSameFamily(of_c, dist.Normal(loc, 2**0.5)).log_prob(x).double().detach()
    errors = found.monte_carlo_errors.clamp(min=1e-4)
    assert (~found.untrusted).sum() >= 4
    assert ((found.values - exact).abs() < 6 * errors)[~found.untrusted].all()


@pytest.mark.parametrize("in_guide", [True, False])
def test_masked_sites_add_nothing(in_guide):
    """The probabilities of a masked enumerated site also sum to one."""
    x, mask = torch.randn(3), torch.tensor([True, False, True])
    scale = nn.Parameter(torch.tensor(0.7))

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.mask(mask=mask):
                c = pyro.sample("c", dist.Categorical(torch.ones(4) / 4), infer=dict(ALL))
                pyro.sample("y", dist.Normal(scale * c, 1.0), obs=x)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            if in_guide:
                with pyro.poutine.mask(mask=mask):
                    logits = torch.arange(4.0).expand(3, 4)
                    pyro.sample("c", dist.Categorical(logits=logits), infer=dict(ALL))

    found = pv.terms(model, guide, x).log_weight[0]
    of_x = dist.Normal(0.0, 2**0.5).log_prob(x)
    log_p = torch.stack([dist.Normal(scale * c, 1.0).log_prob(x) for c in range(4)]) - math.log(4)
    of_y = log_p.logsumexp(0)
    if in_guide:
        log_q = torch.arange(4.0).log_softmax(0).unsqueeze(-1)
        of_y = (log_q.exp() * (log_p - log_q)).sum(0)
    torch.testing.assert_close(found, of_x + torch.where(mask, of_y, 0.0))


def test_values_of_zero_guide_probability_add_nothing():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2), infer=dict(ALL))
            low = torch.tensor([0.0, 5.0])[c]  # x = 1 is outside the support at c = 1
            pyro.sample("x", dist.Uniform(low, low + 2.0, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            logits = torch.tensor([0.0, -math.inf]).expand(len(x), 2)
            pyro.sample("c", dist.Categorical(logits=logits), infer=dict(ALL))

    found = pv.terms(model, guide, torch.ones(3)).log_joint
    torch.testing.assert_close(found, torch.full((1, 3), -2 * math.log(2)))


def pair_with_shared_parent():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5), infer=dict(ALL))
            a = pyro.sample("a", dist.Normal(10 * c - 5, 1.0))
            b = pyro.sample("b", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(a + b + c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x, 1.0))
            pyro.sample("b", dist.Normal(0.0, 1.0))

    return model, guide, torch.randn(5)


def test_latents_with_a_summed_out_parent_have_no_separate_kl():
    model, guide, x = pair_with_shared_parent()
    for per in ("site", "dimension"):
        with pytest.raises(ValueError, match="the KL of each"):
            o.FreeBits(0.5, per=per).loss(model, guide, x)
    torch.manual_seed(1)
    distance = o.InfoVAE(1.0, 1.0).loss(model, guide, x)
    torch.manual_seed(1)
    assert distance != -pv.terms(model, guide, x).log_likelihood.sum().item()


def test_num_samples_is_refused_by_name():
    pair, x = Mixture(in_guide=True), torch.randn(6)
    sampled = pyro.poutine.infer_config(pair.guide, lambda site: {"num_samples": 5})
    with pytest.raises(ValueError, match="num_samples draws"):
        o.ELBO().loss(pair.model, sampled, x)


@pytest.mark.parametrize("scope", [range, lambda n: pyro.markov(range(n))], ids=["loop", "markov"])
@pytest.mark.parametrize("length", [4, 30])
def test_a_chain_is_summed_out_step_by_step(scope, length):
    """A hidden Markov model, with a table of 3**30 entries if it were summed at once."""
    torch.manual_seed(3)
    states = 3
    start, step = torch.randn(states).log_softmax(-1), torch.randn(states, states).log_softmax(-1)
    mean = torch.randn(states)

    def model(x):
        with pyro.plate("sequences", len(x)):
            logits = start
            for t in scope(length):
                c = pyro.sample(f"c{t}", dist.Categorical(logits=logits), infer=dict(ALL))
                pyro.sample(f"x{t}", dist.Normal(mean[c], 1.0), obs=x[:, t])
                logits = step[c]

    x = torch.randn(5, length)
    forward = start + dist.Normal(mean, 1.0).log_prob(x[:, :1])
    for t in range(1, length):
        emission = dist.Normal(mean, 1.0).log_prob(x[:, t : t + 1])
        forward = (forward.unsqueeze(-1) + step).logsumexp(1) + emission
    found = pv.terms(model, lambda x: None, x)
    torch.testing.assert_close(found.log_likelihood[0], forward.logsumexp(-1), rtol=1e-4, atol=1e-4)
    evidence = pv.evidence(model, lambda x: None, x, num_particles=1, progress=False)
    assert evidence.mean == pytest.approx(forward.logsumexp(-1).mean().item(), rel=1e-4)


def test_prior_of_a_sampled_latent_is_summed_over_its_parent():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.4), infer=dict(ALL))
            d = pyro.sample("d", dist.Bernoulli(0.2 + 0.5 * c))
            pyro.sample("x", dist.Normal(d, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("d", dist.Bernoulli(0.5))

    t = pv.terms(model, guide, torch.randn(4))
    d = t.samples["d"]
    p = 0.6 * 0.2 + 0.4 * 0.7
    torch.testing.assert_close(t.log_prior, dist.Bernoulli(p).log_prob(d))


def test_sites_independent_of_enumerated_values_are_unchanged():
    """The score of a scaled discrete site has no scale."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.4), infer=dict(ALL))
            with pyro.poutine.scale(scale=0.5):
                pyro.sample("d", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=0.5):
            pyro.sample("d", dist.Bernoulli(0.8))

    t = pv.terms(model, guide, torch.randn(4), num_particles=3)
    log_q = dist.Bernoulli(0.8).log_prob(t.samples["d"])
    torch.testing.assert_close(t.score, log_q)
    torch.testing.assert_close(t.log_guide, 0.5 * log_q)


@pytest.mark.parametrize("infer", [{}, {"enumerate": "parallel"}], ids=["drawn", "enumerated"])
def test_a_sequential_plate_is_refused_by_name(infer):
    def model(x):
        for i in pyro.plate("data", len(x)):
            c = pyro.sample(f"c{i}", dist.Categorical(torch.ones(2)), infer=infer)
            pyro.sample(f"x{i}", dist.Normal(c.float(), 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            if not infer:
                pyro.sample(f"c{i}", dist.Categorical(torch.ones(2)))

    for call in (pv.terms, pv.objectives.ELBO().loss, pv.evidence, pv.elbo_surgery):
        with pytest.raises(ValueError, match="no site is inside a vectorized plate"):
            call(model, guide, torch.randn(3))


@pytest.mark.parametrize("in_guide", [False, True])
def test_table_larger_than_memory_is_refused_in_the_guide_and_avoided_in_the_model(in_guide):
    torch.manual_seed(1)
    start, step, mean = torch.randn(5), torch.randn(5, 5), torch.randn(5)
    length = 13  # 5**13 entries: 5 GiB for each row

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c0", dist.Categorical(logits=start), infer=dict(ALL))
            for t in range(1, length):
                c = pyro.sample(f"c{t}", dist.Categorical(logits=step[c]), infer=dict(ALL))
            pyro.sample("x", dist.Normal(mean[c], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for t in range(length if in_guide else 0):
                pyro.sample(f"c{t}", dist.Categorical(logits=start), infer=dict(ALL))

    if in_guide:
        with pytest.raises(ValueError, match=r"'c0', .*'c12'.* has 1220703125 entries for each"):
            pv.terms(model, guide, torch.randn(2))
    else:  # summed out one by one
        assert pv.terms(model, guide, torch.randn(2)).log_weight.isfinite().all()
    length = 5
    exact = pv.terms(model, guide, x := torch.randn(3))
    if not in_guide:
        logits = start.log_softmax(-1)
        for _ in range(1, length):
            logits = (logits.unsqueeze(-1) + step.log_softmax(-1)).logsumexp(0)
        expected = (logits + dist.Normal(mean, 1.0).log_prob(x.unsqueeze(-1))).logsumexp(-1)
        torch.testing.assert_close(exact.log_weight.squeeze(0), expected)


def exact_pair():
    """Return a mixture of Gaussians over (c, z), and its exact posterior, which enumerates c."""
    mean, probs = torch.tensor([-1.0, 2.0]), torch.tensor([0.3, 0.7])

    def model(x):
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Categorical(probs), infer=dict(ALL))
            z = pyro.sample("z", dist.Normal(mean[c], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        logits = probs.log() + dist.Normal(mean, 2**0.5).log_prob(x.unsqueeze(-1))
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=logits), infer=dict(ALL))
            pyro.sample("z", dist.Normal((x + mean[c]) / 2, 0.5**0.5))

    def log_evidence(x):
        return (probs.log() + dist.Normal(mean, 2**0.5).log_prob(x.unsqueeze(-1))).logsumexp(-1)

    return model, guide, log_evidence


def test_evaluation_samples_the_sites_that_the_guide_enumerates():
    """With the exact posterior, each log-weight equals log p(x)."""
    model, guide, log_evidence = exact_pair()
    x = torch.randn(30)
    evidence = pv.evidence(model, guide, x, num_particles=3, progress=False)
    torch.testing.assert_close(evidence.values.float(), log_evidence(x), rtol=1e-4, atol=1e-4)
    many = torch.randn(500)
    surgery = pv.elbo_surgery(model, guide, many, seed=0, progress=False)
    # The rate of z given c is analytic, so the ELBO has a sampling error of about 0.01.
    assert surgery.elbo == pytest.approx(log_evidence(many).mean().item(), abs=0.06)
    container = pv.to_arviz(model, guide, x, num_draws=4)
    assert set(np.unique(container["posterior"]["c"].values)) <= {0, 1}
    comparison = pv.compare({"exact": (model, guide)}, x, num_particles=3)
    assert comparison.entries[0].runs[0].evidence.mean == pytest.approx(evidence.mean, rel=1e-4)
    loss = o.ELBO().loss(model, guide, x)  # training still averages over c
    assert loss == pytest.approx(-log_evidence(x).sum().item(), rel=1e-4)
    with pytest.raises(ValueError, match="averages over all values of site 'c'"):
        o.IWAE(3).loss(model, guide, x)
