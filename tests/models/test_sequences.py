"""Sequences of unequal lengths: a linear-Gaussian closed form, padding, and the guide."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same
from oracles import assert_within
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae import flows, guides
from pyro_vae.guides import _families as families


class StateSpace(nn.Module):
    """z_1 ~ N(m, P), z_t ~ N(F z_{t-1}, Q), x_t ~ N(C z_t, R), in closed form (Kalman 1960).

    The weights are random. ``exact`` is the posterior, from a backward information filter.
    """

    def __init__(self, d=2, D=3):  # noqa: N803
        super().__init__()
        weights = {
            "m": normal(d),
            "F": 0.9 * torch.linalg.qr(normal(d, d))[0],
            "C": normal(D, d),
            **{name: covariance(n) for name, n in (("P", d), ("Q", d), ("R", D))},
        }
        for name, value in weights.items():
            self.register_buffer(name, value)

    def prior(self):
        return dist.MultivariateNormal(self.m, self.P)

    def transition(self, z):
        return dist.MultivariateNormal(z @ self.F.mT, self.Q)

    def likelihood(self, z):
        return dist.MultivariateNormal(z @ self.C.mT, self.R)

    def model(self):
        return pv.models.SequenceModel(self.prior, self.transition, self.likelihood)

    def sample(self, batch_size, num_steps):
        z, steps = self.prior().sample((batch_size,)), []
        for _ in range(num_steps):
            steps.append(self.likelihood(z).sample())
            z = self.transition(z).sample()
        return torch.stack(steps, 1)

    def log_evidence(self, x, lengths):
        """Return log p(x_1, ..., x_length) from the Kalman filter, (B,)."""
        mean, covariance, total = self.m.expand(len(x), -1), self.P, torch.zeros(())
        for t in range(x.shape[1]):
            predicted = self.C @ covariance @ self.C.mT + self.R
            p_x = dist.MultivariateNormal(mean @ self.C.mT, predicted)
            total = torch.where(t < lengths, total + p_x.log_prob(x[:, t]), total)
            gain = covariance @ self.C.mT @ predicted.inverse()
            mean = mean + (x[:, t] - mean @ self.C.mT) @ gain.mT
            covariance = covariance - gain @ self.C @ covariance
            mean, covariance = mean @ self.F.mT, self.F @ covariance @ self.F.mT + self.Q
        return total

    def exact(self, x, lengths):
        """Sample from the guide p(z_1|x) prod p(z_t|z_{t-1}, x_t, ..., x_length).

        The density of x_{t+1}, ... given z_t is exp(-z'Lz/2 + b'z) up to a constant.
        """
        eye = torch.eye(len(self.m), dtype=x.dtype)
        information = torch.zeros(len(x), *eye.shape, dtype=x.dtype)
        linear = torch.zeros(len(x), len(self.m), dtype=x.dtype)
        seen, ahead = self.R.inverse() @ self.C, []
        for t in reversed(range(x.shape[1])):
            inside = (t < lengths).to(x.dtype).unsqueeze(-1)
            information = information + inside.unsqueeze(-1) * (self.C.mT @ seen)
            linear = linear + inside * (x[:, t] @ seen)
            ahead.insert(0, (information, linear))
            kept = self.F.mT @ torch.linalg.inv(eye + information @ self.Q)
            linear = (kept @ linear.unsqueeze(-1)).squeeze(-1)
            information = kept @ information @ self.F
        z = None
        with pyro.plate("data", len(x)):
            for t, (information, linear) in enumerate(ahead):
                before = self.prior() if t == 0 else self.transition(z)
                precision = before.precision_matrix + information
                b = (before.precision_matrix @ before.loc.unsqueeze(-1)).squeeze(-1) + linear
                q = dist.MultivariateNormal(
                    torch.linalg.solve(precision, b.unsqueeze(-1)).squeeze(-1),
                    precision_matrix=precision,
                )
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t + 1}", q)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def covariance(n):
    square = normal(n, n)
    return 0.3 * torch.eye(n) + 0.3 * square @ square.mT


class Chain(nn.Module):
    """A sequence model of binary data with random networks, and its guide."""

    def __init__(self, d=2, D=3, **options):  # noqa: N803
        super().__init__()
        self.moves = pv.nets.MLP(d, [5], d)
        self.decoder = pv.nets.MLP(d, [5], D)
        prior, likelihood = pv.priors.StandardNormal(d), pv.likelihoods.Bernoulli(self.decoder)
        self.model = pv.models.SequenceModel(prior, self.transition, likelihood)
        options = {"recurrent": 6, "hidden": [5], **options}
        self.guide = guides.SequenceGuide(self.model, **options)

    def transition(self, z):
        return dist.Normal(self.moves(z), 0.5).to_event(1)


def binary(batch_size=6, num_steps=5):
    lengths = torch.randint(1, num_steps + 1, (batch_size,))
    lengths[:2] = torch.tensor([num_steps, 1])
    x = torch.bernoulli(torch.full((batch_size, num_steps, 3), 0.5))
    return x, lengths


def padded_with(x, lengths, values):
    inside = torch.arange(x.shape[1]) < lengths.unsqueeze(-1)
    return torch.where(inside.unsqueeze(-1), x, values)


def test_weights_of_the_exact_posterior_equal_the_evidence():
    system = StateSpace()
    x, lengths = system.sample(6, 5), torch.tensor([5, 1, 3, 2, 5, 4])
    expected = system.log_evidence(x, lengths)
    t = pv.terms(system.model(), system.exact, x, lengths, num_particles=4)
    torch.testing.assert_close(t.log_weight, expected.expand(4, 6), rtol=0, atol=1e-9)


def test_fitted_guide_matches_the_kalman_filter_evidence():
    system = StateSpace()
    x, lengths = system.sample(300, 4), torch.randint(1, 5, (300,))
    model = system.model()
    guide = guides.SequenceGuide(model, recurrent=16, hidden=[], family=families.MultivariateNormal)
    guide(x, lengths)
    test, exact = (x[:40], lengths[:40]), system.log_evidence(x[:40], lengths[:40])

    def elbo():
        with torch.no_grad():
            t = pv.terms(model, guide, *test, num_particles=50)
        return (t.log_likelihood - t.kl).mean(0)

    before = (exact - elbo()).mean()
    pv.fit(model, guide, (x, lengths), epochs=15, batch_size=30, learning_rate=0.02, seed=0,
           progress=False, capture=False)  # fmt: skip
    gaps = exact - elbo()
    assert 0 < gaps.mean() < before / 10
    estimate = pv.evidence(model, guide, test, num_particles=2000, seed=0)
    assert estimate.unreliable_share < 0.1
    assert_within(estimate.mean, exact.mean().item(), estimate.monte_carlo_error)
    tighter = -pv.objectives.IWAE(num_particles=50).loss(model, guide, *test) / 40
    error = estimate.monte_carlo_error * (2000 / 50) ** 0.5
    assert exact.mean() - gaps.mean() < tighter < exact.mean() + 4 * error


@pytest.mark.parametrize("padding", ["random", "infinite", "nan"])
def test_padding_values_are_ignored(padding):
    chain = Chain()
    x, lengths = binary()
    chain.guide(x, lengths)
    values = {"random": torch.randn_like(x), "infinite": torch.inf, "nan": torch.nan}[padding]

    def terms_and_gradients(x):
        torch.manual_seed(1)
        t = pv.terms(chain.model, chain.guide, x, lengths, num_particles=3)
        t.log_weight.sum().backward()
        gradients = [p.grad.clone() for p in chain.parameters()]
        chain.zero_grad()
        return [t.log_likelihood, t.log_prior, t.log_guide, *gradients]

    padded = padded_with(x, lengths, values)
    assert not torch.equal(padded, x)
    for one, other in zip(*map(terms_and_gradients, (x, padded)), strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_padded_sequence_scores_like_the_unpadded_sequence():
    chain = Chain()
    x, lengths = binary()
    t = pv.terms(chain.model, chain.guide, x, lengths, num_particles=3)
    for row, length in enumerate(lengths):
        given = {f"z_{t}": v[:, row : row + 1] for t, v in enumerate(t.samples.values(), 1)}
        given = dict(list(given.items())[:length])
        guide = poutine.condition(chain.guide, data=given)
        alone = x[row : row + 1, :length]
        model, of_guide = poutine.condition(chain.model, data=given), poutine.trace(guide)
        nodes = poutine.trace(model).get_trace(alone).nodes, of_guide.get_trace(alone).nodes
        for found, expected in zip(nodes, (t.log_joint, t.log_guide), strict=True):
            steps = [n for n in found.values() if n["type"] == "sample" and n["name"][:2] in "z_x_"]
            total = sum(step["fn"].log_prob(step["value"]) for step in steps)
            torch.testing.assert_close(total, expected[:, row : row + 1])


def test_guide_factor_depends_on_current_and_later_data_and_previous_latent():
    chain = Chain()
    x, lengths = binary(3, 6)
    lengths = torch.tensor([6, 4, 5])
    x.requires_grad_()
    z = {f"z_{t}": torch.randn(3, 2, requires_grad=True) for t in range(1, 7)}
    trace = poutine.trace(poutine.condition(chain.guide, data=z)).get_trace(x, lengths)
    trace.compute_log_prob()
    for t in range(1, 7):
        log_q = trace.nodes[f"z_{t}"]["log_prob"]
        assert torch.equal(log_q != 0, t <= lengths)
        found, *latents = torch.autograd.grad(
            log_q.sum(), [x, *z.values()], retain_graph=True, allow_unused=True
        )
        step = torch.arange(1, 7)
        expected = (step >= t) & (step <= lengths.unsqueeze(-1)) & (t <= lengths).unsqueeze(-1)
        assert torch.equal(found.abs().sum(-1) > 0, expected)
        assert [g is not None and bool(g.any()) for g in latents] == [
            s in (t - 1, t) for s in range(1, 7)
        ]


def test_model_factor_depends_on_its_step_and_the_previous_latent():
    chain = Chain()
    x, lengths = binary(3, 4)
    z = {f"z_{t}": torch.randn(3, 2, requires_grad=True) for t in range(1, 5)}
    trace = poutine.trace(poutine.condition(chain.model, data=z)).get_trace(x, lengths)
    trace.compute_log_prob()
    for t in range(1, 5):
        for site, expected in ((f"z_{t}", {t - 1, t}), (f"x_{t}", {t})):
            log_p = trace.nodes[site]["log_prob"].sum()
            found = torch.autograd.grad(log_p, [*z.values()], retain_graph=True, allow_unused=True)
            assert {s for s, g in enumerate(found, 1) if g is not None and g.any()} == expected - {
                0
            }


def test_guide_accepts_minibatches_of_any_number_of_steps():
    chain = Chain()
    chain.guide(torch.zeros(2, 1, 3))
    parameters = sum(p.numel() for p in chain.guide.parameters())
    for steps in (3, 7, 2):
        x, lengths = binary(4, steps)
        for arguments in ((x,), (x, lengths)):
            t = pv.terms(chain.model, chain.guide, *arguments, num_particles=2)
            assert list(t.samples) == [f"z_{t}" for t in range(1, steps + 1)]
            assert t.log_weight.isfinite().all()
    assert parameters == sum(p.numel() for p in chain.guide.parameters())
    data = [(binary(5, steps)) for steps in (4, 2, 4, 3)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    fit = pv.fit(chain.model, chain.guide, loader, epochs=2, progress=False, capture=False)
    assert len(fit.history) == 2


FAMILIES = {
    "normal": families.Normal,
    "multivariate normal": families.MultivariateNormal,
    "mixture": families.Mixture,
    "planar": functools.partial(families.Transformed, flow=flows.Planar, length=2),
    "coupling, shared": functools.partial(
        families.Transformed, flow=flows.AffineCoupling, length=2, amortized=False
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float64) for name in FAMILIES),
        ("normal", torch.float32),
        *(
            pytest.param(name, torch.float32, marks=pytest.mark.slow)
            for name in FAMILIES
            if name != "normal"
        ),
    ],
    ids=str,
)
def test_every_parameter_has_a_gradient_for_each_family(name, dtype):
    chain = Chain(family=FAMILIES[name]).to(dtype)
    x, lengths = binary(5, 4)
    x = x.to(dtype)
    pv.objectives.ELBO(3).loss_and_grads(chain.model, chain.guide, x, lengths)
    for parameter in chain.parameters():
        assert parameter.dtype == dtype
        assert parameter.grad.abs().sum() > 0
    t = pv.terms(chain.model, chain.guide, x, lengths, num_particles=6)
    given = poutine.condition(chain.guide, data=t.samples)
    with pyro.plate("_particles", 6, dim=-2):
        trace = poutine.trace(given).get_trace(x, lengths)
    trace.compute_log_prob()
    again = sum(trace.nodes[name]["log_prob"] for name in t.samples)
    torch.testing.assert_close(again, t.log_guide, rtol=1e-3, atol=2e-3)


def test_sequence_guide_with_other_supports_and_shapes():
    """Positive matrices as latents, counts as data, and an encoder of single steps."""
    loading = torch.randn(2, 3).softmax(-1)
    model = pv.models.SequenceModel(
        prior=lambda: dist.LogNormal(torch.zeros(2, 2), 1.0).to_event(2),
        transition=lambda z: dist.Gamma(z + 0.1, 1.0).to_event(2),
        likelihood=lambda z: dist.Poisson(z @ loading).to_event(2),
    )
    x, lengths = torch.randint(0, 4, (5, 3, 2, 3)), torch.tensor([3, 1, 2, 3, 1])

    class Encoder(nn.Module):
        def forward(self, x):
            assert x.shape[1:] == (2, 3)
            return x.float().log1p()

    for encoder in (None, Encoder()):
        guide = guides.SequenceGuide(model, encoder)
        with pyro.validation_enabled(True):
            t = pv.terms(model, guide, x, lengths, num_particles=4)
        assert t.samples["z_2"].shape == (4, 5, 2, 2)
        assert (t.samples["z_2"] > 0).all()
        assert t.log_weight.isfinite().all()
    locs = []
    for size in (1e-20, 1e-10):  # the network receives their logarithms
        given = poutine.condition(guide, data={"z_1": torch.full((5, 2, 2), size)})
        q = poutine.trace(given).get_trace(x, lengths).nodes["z_2"]["fn"]
        locs.append(q.base_dist.base_dist.loc)
    assert not torch.allclose(*locs)


def test_sequence_guide_with_an_inner_plate():
    """A custom model with two chains per data point, of different lengths."""

    def model(x, lengths):
        z = torch.zeros(())
        with pyro.plate("data", len(x), dim=-2), pyro.plate("chains", 2, dim=-1):
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"level_{t}", dist.Normal(0.8 * z, 1.0))
                    pyro.sample(f"seen_{t}", dist.Normal(z, 0.5), obs=x[:, t])

    x, lengths = torch.randn(5, 4, 2), torch.tensor([[4, 1], [2, 3], [1, 1], [4, 4], [3, 2]])
    guide = guides.SequenceGuide(model)
    t = pv.terms(model, guide, x, lengths, num_particles=3)
    assert t.samples["level_2"].shape == (3, 5, 2)
    drawn = poutine.trace(guide).get_trace(x, lengths)
    expected = torch.arange(4)[:, None, None] < lengths
    found = torch.stack([drawn.nodes[f"level_{t}"]["mask"] for t in range(4)])
    assert torch.equal(found, expected)
    changed_past_both, changed_past_one = x.clone(), x.clone()
    for row, length in enumerate(lengths.amax(-1)):
        changed_past_both[row, length:] = torch.nan
    changed_past_one[0, 3] += 1.0
    given = {name: node["value"] for name, node in drawn.nodes.items() if "level" in name}
    scored = [
        poutine.trace(poutine.condition(guide, data=given)).get_trace(each, lengths).log_prob_sum()
        for each in (x, changed_past_both, changed_past_one)
    ]
    assert torch.equal(scored[0], scored[1])
    assert not torch.allclose(scored[0], scored[2])


def test_sequence_model_with_other_guides_and_objectives():
    chain = Chain()
    x, lengths = binary()
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(15, 8))
    by_site = guides.HierarchicalGuide(
        chain.model, _WithoutCovariates(encoder), order="top-down", history=1
    )
    for guide in (by_site, chain.guide):
        for objective in (pv.objectives.ELBO(2), pv.objectives.IWAE(num_particles=3)):
            loss = objective.loss_and_grads(chain.model, guide, x, lengths)
            assert torch.isfinite(torch.as_tensor(loss))
        estimate = pv.evidence(chain.model, guide, (x, lengths), num_particles=50, seed=0)
        assert estimate.values.isfinite().all()
        with pytest.raises(ValueError, match="'z_2' has a mask that differs between data points"):
            pv.elbo_surgery(chain.model, guide, (x, lengths))
    surgery = pv.elbo_surgery(chain.model, chain.guide, x, seed=0)  # equal lengths, so no masks
    assert surgery.elbo == pytest.approx(-surgery.distortion - surgery.rate)


class _WithoutCovariates(nn.Module):
    """An encoder that ignores covariates."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, *covariates):
        return self.network(x)


def test_kl_is_analytic_without_masks():
    chain = Chain()
    x, _ = binary()
    t = pv.terms(chain.model, chain.guide, x)
    assert not torch.allclose(t.kl, t.log_guide - t.log_prior)
    lengths = torch.full((6,), 5)
    t = pv.terms(chain.model, chain.guide, x, lengths)
    torch.testing.assert_close(t.kl, t.log_guide - t.log_prior)


@pytest.mark.parametrize("with_lengths", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_captured_steps_equal_eager_steps(with_lengths, without_compiler):
    x, lengths = binary(40, 4)
    data = (x, lengths) if with_lengths else x

    def make():
        chain = Chain()
        return chain.model, chain.guide

    check_same(make, data, execution="captured, not compiled", epochs=2)


def test_fit_lowers_the_loss_reproducibly():
    x, lengths = binary(60, 4)
    x = padded_with(x[:, :1].expand(-1, 4, -1).clone(), lengths, 7.0)  # outside the support
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        chain = Chain()
        fit = pv.fit(chain.model, chain.guide, (x, lengths), validation=(x, lengths), epochs=8,
                     batch_size=20, learning_rate=0.02, seed=0, progress=False)  # fmt: skip
        losses.append(fit.history.loss.values)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.3


def test_state_dict_loads_before_the_first_call():
    chain, other = Chain(), Chain()
    x, lengths = binary()
    chain.guide(x, lengths)
    other.guide.load_state_dict(chain.guide.state_dict())
    torch.manual_seed(0)
    expected = chain.guide(x, lengths)
    other.guide(x, lengths)  # creates its networks
    torch.manual_seed(0)
    for name, value in other.guide(x, lengths).items():
        assert torch.equal(value, expected[name])


def test_model_returns_its_sequences():
    chain = Chain()
    x, lengths = binary()
    assert torch.equal(chain.model(x), x)
    assert torch.equal(chain.model(x, lengths), padded_with(x, lengths, x[:, :1]))
    with pyro.plate("_particles", 4, dim=-2):
        drawn = poutine.uncondition(chain.model)(x)
    assert drawn.shape == (4, *x.shape)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5, 1, 6, 2], r"lie in 1 to 5.*got 6 in row 2"),
        ([5, 0, 4, 2], r"lie in 1 to 5.*got 0 in row 1"),
        ([5, 1, 2], r"shape \(4,\).*got \(3,\)"),
        ([[5, 1, 2, 3]], r"shape \(4,\).*got \(1, 4\)"),
    ],
)
def test_invalid_lengths_are_refused(lengths, message):
    chain = Chain()
    x = torch.zeros(4, 5, 3)
    with pyro.validation_enabled(True), pytest.raises(ValueError, match=message):
        chain.model(x, torch.tensor(lengths))
    with pytest.raises(ValueError, match=message if len(lengths) == 4 else "must be of one length"):
        pv.fit(chain.model, chain.guide, (x, torch.tensor(lengths)), batch_size=4, progress=False)


def test_invalid_length_in_a_late_minibatch_is_refused():
    chain = Chain()
    x, lengths = binary(20, 3)
    lengths[-1] = 4
    for run in (pv.fit, pv.evidence):
        with pytest.raises(ValueError, match=r"lie in 1 to 3.*got 4 in row"):
            run(chain.model, chain.guide, (x, lengths), batch_size=5)


def test_generate_and_reconstruct_sequences():
    system = StateSpace()
    x, lengths = system.sample(300, 4), torch.full((300,), 4)
    drawn = pv.generate(system.model(), x, lengths)
    shown = pv.reconstruct(system.model(), system.exact, x, lengths)
    assert drawn.shape == shown.shape == x.shape
    assert (shown - x).square().mean() < 0.8 * (drawn - x).square().mean()


def test_lengths_and_data_of_other_types_and_shapes_are_refused():
    chain = Chain()
    x = torch.zeros(4, 5, 3)
    with pytest.raises(TypeError, match=r"integers, got torch.float32"):
        chain.model(x, torch.ones(4))
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        chain.model(x, [1, 2, 3, 4])
    for wrong in (x[:, 0, 0], x[:, :0]):
        with pytest.raises(ValueError, match=r"shape \(B, T"):
            chain.model(wrong)


def test_sequence_guide_refuses_models_that_are_not_sequences(pair):
    x = torch.zeros(4, 5, 3)
    with pytest.raises(ValueError, match="recurrent must be at least 1"):
        guides.SequenceGuide(pair[0], recurrent=0)
    with pytest.raises(ValueError, match=r"one latent for each step.*\['z'\].*HierarchicalGuide"):
        guides.SequenceGuide(pair[0])(torch.zeros(4, 16))
    grows = pv.models.SequenceModel(
        prior=pv.priors.StandardNormal(2),
        transition=lambda z: dist.Normal(z.repeat_interleave(2, -1), 1.0).to_event(1),
        likelihood=lambda z: dist.Normal(z.sum(-1, keepdim=True).expand(-1, 3), 1.0).to_event(1),
    )
    with pytest.raises(ValueError, match=r"'z_1' and 'z_2' differ.*\(2,\) and \(4,\)"):
        guides.SequenceGuide(grows)(x)
    bounded = pv.models.SequenceModel(
        prior=pv.priors.StandardNormal(3),
        transition=lambda z: dist.LogNormal(z, 1.0).to_event(1),
        likelihood=lambda z: dist.Normal(z, 1.0).to_event(1),
    )
    with pytest.raises(ValueError, match="'z_1' and 'z_2' differ in shape, plates or support"):
        guides.SequenceGuide(bounded)(x)
