"""Compare hierarchical, mixture, semi-supervised and conditional models with exact sums."""

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same, needs_compiler
from oracles import assert_within
from torch import nn

import pyro_vae as pv
from pyro_vae._programs.validation import check_pair
from pyro_vae.datasets._minibatches import Minibatches

MLP, Joined = pv.nets.MLP, pv.nets.Joined


def bernoulli(*sizes, out=16):
    """Return a Bernoulli likelihood of tensors of the given sizes."""
    network = MLP(sum(sizes), [8], out)
    return pv.likelihoods.Bernoulli(Joined(network) if len(sizes) > 1 else network)


def gaussian(inputs, outputs):
    return pv.likelihoods.Normal(
        MLP(inputs, [8], 2 * outputs), scale=pv.likelihoods.ScaleFromDecoder()
    )


def hierarchy(skip=False):
    layers = [gaussian(2, 3), gaussian(3, 4)]
    if skip:
        layers[1] = pv.likelihoods.Normal(Joined(MLP(2 + 3, [8], 4)))
    likelihood = bernoulli(4, 3, 2) if skip else bernoulli(4)
    return pv.models.HierarchicalModel(pv.priors.StandardNormal(2), layers, likelihood, skip=skip)


def mixture():
    return pv.models.MixtureModel(pv.priors.MixtureOfNormals(2, components=3), bernoulli(2))


def semi_supervised(latent=2, classes=3):
    model = pv.models.SemiSupervisedModel(
        classes, pv.priors.StandardNormal(latent), bernoulli(latent, classes)
    )
    guide = pv.guides.SemiSupervisedGuide(
        model, classifier=MLP(16, [8], classes), encoder=Joined(MLP(16 + classes, [8]))
    )
    return model, guide


class TestHierarchicalModel:
    @pytest.mark.parametrize("k", [1, 5])
    def test_weights_of_a_linear_hierarchy_equal_the_evidence(self, k):
        """With the exact bottom-up posterior, every log-weight is log p(x)."""
        a, b = (torch.randn(*s, dtype=torch.float64) for s in ((3, 2), (5, 3)))
        down, out = nn.Linear(2, 3, bias=False).double(), nn.Linear(3, 5, bias=False).double()
        with torch.no_grad():
            down.weight.copy_(a)
            out.weight.copy_(b)
        model = pv.models.HierarchicalModel(
            pv.priors.StandardNormal(2).double(),
            [pv.likelihoods.Normal(down, scale=0.5).double()],
            pv.likelihoods.Normal(out, scale=0.7).double(),
        )
        eye = functools.partial(torch.eye, dtype=torch.float64)
        c1 = a @ a.T + 0.25 * eye(3)
        c0 = b @ c1 @ b.T + 0.49 * eye(5)

        def guide(x):
            s1 = torch.linalg.inv(c1.inverse() + b.T @ b / 0.49)
            s2 = torch.linalg.inv(eye(2) + a.T @ a / 0.25)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z_1", dist.MultivariateNormal(x @ (s1 @ b.T / 0.49).T, s1))
                pyro.sample("z_2", dist.MultivariateNormal(z @ (s2 @ a.T / 0.25).T, s2))

        x = torch.randn(6, 5, dtype=torch.float64)
        log_p = torch.distributions.MultivariateNormal(x.new_zeros(5), c0).log_prob(x)
        t = pv.terms(model, guide, x, num_particles=k)
        torch.testing.assert_close(t.log_weight, log_p.expand(k, 6), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        ("order", "skip"),
        [
            ("bottom-up", True),
            ("top-down", False),
            pytest.param("bottom-up", False, marks=pytest.mark.slow),
            pytest.param("top-down", True, marks=pytest.mark.slow),
        ],
    )
    def test_hierarchical_guides_infer_bottom_up_and_top_down(self, order, skip, binary):
        model = hierarchy(skip)
        guide = pv.guides.HierarchicalGuide(model, MLP(16, [8]), order=order)
        fit = pv.fit(model, guide, binary, epochs=10, batch_size=10, learning_rate=0.01,
                     progress=False)  # fmt: skip
        assert fit.history.loss.iloc[-1] < fit.history.loss.iloc[0]
        values = pv.evidence(model, guide, binary, num_particles=100, seed=0)
        assert values.mean > pv.elbo_surgery(model, guide, binary, seed=0).elbo
        assert pv.generate(model, binary).shape == binary.shape

    def test_skip_connections_pass_all_layers_to_the_likelihood(self):
        model = hierarchy(skip=True)
        with torch.no_grad():
            z = {f"z_{n}": torch.randn(4, d) for n, d in ((3, 2), (2, 3), (1, 4))}
            given = pyro.poutine.trace(pyro.poutine.condition(model, data=z))
            nodes = given.get_trace(torch.rand(4, 16).round()).nodes
            expected = model.likelihood(z["z_1"], z["z_2"], z["z_3"])
        assert torch.equal(nodes["x"]["fn"].mean, expected.mean)

    def test_hierarchical_model_refuses_invalid_layers(self):
        prior = pv.priors.StandardNormal(2)
        with pytest.raises(ValueError, match="single latent layer, use LatentVariableModel"):
            pv.models.HierarchicalModel(prior, [], bernoulli(2))
        with pytest.raises(TypeError, match="a sequence of modules"):
            pv.models.HierarchicalModel(prior, gaussian(2, 3), bernoulli(3))


class TestMixtureModel:
    def test_mixture_model_equals_a_model_with_a_mixture_prior(self, binary):
        model = mixture()
        summed = pv.LatentVariableModel(model.prior, model.likelihood)
        guide = pv.guides.AmortizedNormal(model, MLP(16, [8]))
        pv.fit(model, guide, binary, epochs=2, batch_size=10, progress=False)
        weights, gradients = [], []
        for program, enumerates in ((model, True), (summed, False)):
            torch.manual_seed(0)
            t = pv.terms(program, guide, binary, num_particles=3, plate_nesting=1,
                         enumerates=enumerates)  # fmt: skip
            weights.append(t.log_weight)
            parameters = [*model.parameters(), *guide.parameters()]
            gradients.append(torch.autograd.grad(t.log_weight.sum(), parameters))
        torch.testing.assert_close(*weights)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)

    def test_evidence_matches_quadrature(self):
        """The evidence is a sum over components of integrals on a grid of z."""
        model = pv.models.MixtureModel(pv.priors.MixtureOfNormals(1, components=3), bernoulli(1))
        x = torch.rand(4, 16).round()
        with torch.no_grad():
            model.prior.loc.mul_(4)
            axis = torch.linspace(-12, 12, 4801)
            p = model.prior()
            prior = sum(
                p.logits[c].exp() * dist.Normal(p.loc[c, 0], p.scale[c, 0]).log_prob(axis).exp()
                for c in range(3)
            )
            log_p_x = model.likelihood(axis[:, None, None]).log_prob(x)
            exact = (log_p_x + prior.log()[:, None]).logsumexp(0) + (axis[1] - axis[0]).log()
        guide = pv.guides.AmortizedNormal(model, MLP(16, [8]))
        found = pv.evidence(model, guide, x, num_particles=20_000, seed=0)
        for value, error, truth in zip(
            found.values, found.monte_carlo_errors, exact.tolist(), strict=True
        ):
            assert_within(value, truth, error, 4.5)

    def test_responsibilities_sum_to_one_and_follow_the_components(self):
        model = mixture()
        with torch.no_grad():
            model.prior.loc.copy_(torch.tensor([[-9.0, 0.0], [0.0, 0.0], [9.0, 0.0]]))
        found = model.prior.responsibilities(model.prior.loc)
        torch.testing.assert_close(found, torch.eye(3), atol=1e-6, rtol=0)


class OnAGrid:
    """M2 with a one-dimensional latent, summed over a fine grid of z."""

    def __init__(self, model, guide, x):
        self.axis = axis = torch.linspace(-9, 9, 2001, dtype=x.dtype)
        self.log_cell = (axis[1] - axis[0]).log()
        self.log_q_y = guide.classify(x).logits  # (B, C)
        log_p_y = dist.Categorical(logits=model.logits).logits
        classes = torch.eye(model.classes, dtype=x.dtype)
        z = axis[:, None, None]
        log_q, log_p = [], []
        for c, label in enumerate(classes):
            numbers = guide.built["head"](guide.encoder(x, label.expand(len(x), -1)))
            q_z = guide.built["posterior"].families[0](numbers.split(1, -1)).to_event(1)
            log_q.append(q_z.log_prob(z))
            log_p_z = dist.Normal(torch.zeros_like(axis), 1.0).log_prob(axis)[:, None]
            log_p_x = model.likelihood(z.expand(-1, len(x), 1), label.expand(len(x), -1))
            log_p.append(log_p_y[c] + log_p_z + log_p_x.log_prob(x))
        self.log_q, self.log_p = torch.stack(log_q, -1), torch.stack(log_p, -1)  # (Z, B, C)

    @property
    def log_evidence(self):
        """Return log p(x) without labels, shape (B,)."""
        return self.log_p.logsumexp((0, 2)) + self.log_cell

    def elbo(self, y):
        by_class = (self.log_q.exp() * (self.log_p - self.log_q)).sum(0) * self.log_cell.exp()
        unknown = (self.log_q_y.exp() * (by_class - self.log_q_y)).sum(-1)
        known = by_class.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(y >= 0, known, unknown)


class TestSemiSupervisedModel:
    def test_elbo_and_gradient_match_the_exact_sum(self):
        model, guide = (each.double() for each in semi_supervised(latent=1))
        x = torch.rand(5, 16, dtype=torch.float64).round()
        y = torch.tensor([-1, 2, 0, -1, -1])
        guide(x, y)
        parameters = [*model.parameters(), *guide.parameters()]
        exact = OnAGrid(model, guide, x).elbo(y).sum()
        expected = torch.autograd.grad(exact, parameters)
        objective = pv.objectives.ELBO(400)
        values, gradients = [], []
        for _ in range(30):
            loss = objective.differentiable_loss(model, guide, x, y)
            values.append(-loss.detach())
            gradients.append([-g for g in torch.autograd.grad(loss, parameters)])
        values = torch.stack(values)
        assert_within(values.mean(), exact, values.std() / 30**0.5, 4.5)
        for number, truth in enumerate(expected):
            each = torch.stack([g[number] for g in gradients])
            error = each.std(0) / 30**0.5
            assert ((each.mean(0) - truth).abs() < 6 * error + 1e-9).all()

    def test_fully_labeled_data_need_no_enumeration(self):
        """With all labels known, enumeration does not change the bound."""
        model, guide = semi_supervised()
        x, y = torch.rand(5, 16).round(), torch.tensor([0, 1, 2, 1, 0])
        bounds = [
            -pv.objectives.ELBO(500).loss(model, program, x, y) / 5
            for program in (guide, functools.partial(guide, enumerates=False))
        ]
        assert bounds[0] == pytest.approx(bounds[1], abs=0.1)
        drawn = functools.partial(guide, enumerates=False)
        assert pv.objectives.SemiSupervisedELBO(2.0).loss(model, drawn, x, y) > 0

    def test_evidence_samples_the_class(self):
        model, guide = semi_supervised(latent=1)
        x, y = torch.rand(4, 16).round(), torch.full((4,), -1)
        guide(x, y)
        with torch.no_grad():
            exact = OnAGrid(model, guide, x).log_evidence
        found = pv.evidence(model, guide, (x, y), num_particles=20_000, seed=0)
        for value, error, truth in zip(
            found.values, found.monte_carlo_errors, exact.tolist(), strict=True
        ):
            assert_within(value, truth, error, 4.5)
        with pytest.raises(ValueError, match="averages over all values of site 'y_missing'"):
            pv.objectives.IWAE(3).loss(model, guide, x, y)

    def test_semi_supervised_elbo_trains_the_classifier(self, binary):
        """Two kinds of rows, ten of them labeled."""
        model, guide = semi_supervised(classes=2)
        truth = (binary[:, :8].sum(1) > binary[:, 8:].sum(1)).long()
        y = torch.where(torch.arange(50) < 10, truth, -1)
        pv.fit(model, guide, (binary, y), objective=pv.objectives.SemiSupervisedELBO(5.0),
               epochs=60, batch_size=25, learning_rate=0.02, progress=False)  # fmt: skip
        found = guide.classify(binary[10:]).logits.argmax(-1)
        assert (found == truth[10:]).double().mean() > 0.9

    def test_loss_is_elbo_plus_classification_term(self):
        model, guide = semi_supervised()
        x, y = torch.rand(5, 16).round(), torch.tensor([-1, 1, -1, 2, 0])
        guide(x, y)
        losses = []
        for objective in (pv.objectives.SemiSupervisedELBO(3.0), pv.objectives.ELBO()):
            torch.manual_seed(0)
            losses.append(objective.loss(model, guide, x, y))
        logits = guide.classify(x).logits
        log_q = sum(logits[n, y[n]].item() for n in (1, 3, 4))
        assert losses[0] == pytest.approx(losses[1] - 3 * log_q, rel=1e-6)

    def test_later_minibatches_may_miss_labels(self):
        model, guide = semi_supervised()
        y = torch.tensor([0, 1, 2, 1, 0, -1, -1, -1, 2, -1])
        x = torch.rand(10, 16).round()
        check_pair(model, guide, (x[:5], y[:5]), Minibatches((x, y), 5))

    def test_generate_checks_labels(self):
        model, _ = semi_supervised()
        x = torch.rand(3, 16).round()
        assert pv.generate(model, x, torch.tensor([0, 2, -1])).shape == (3, 16)
        assert pv.generate(model, x.numpy(), np.array([0, 2, 1])).shape == (3, 16)
        with pytest.raises(ValueError, match=r"labels must lie in 0 to 2.*got 3 in row 1"):
            pv.generate(model, x, torch.tensor([0, 3, 1]))

    def test_semi_supervised_pairs_refuse_bad_labels_and_classifiers(self):
        model, guide = semi_supervised()
        x = torch.rand(5, 16).round()

        def fit(y):
            pv.fit(model, guide, (x, y), epochs=1, batch_size=5, progress=False)

        with pytest.raises(ValueError, match="labels must lie in 0 to 2"):
            fit(torch.tensor([0, 1, 3, -1, 2]))
        with pytest.raises(ValueError, match="labels must lie in 0 to 2"):
            fit(torch.tensor([0, 1, -2, -1, 2]))
        with pytest.raises(ValueError, match="labels must be integers"):
            fit(torch.rand(5))
        with pytest.raises(ValueError, match="labels must be integers"):
            fit(torch.zeros(5, 3, dtype=torch.long))
        with pytest.raises(ValueError, match="at least two classes"):
            pv.models.SemiSupervisedModel(1, pv.priors.StandardNormal(2), bernoulli(2, 1))
        with pytest.raises(ValueError, match="classification must be positive"):
            pv.objectives.SemiSupervisedELBO(-1.0)
        with pytest.raises(TypeError, match="a guide with classify"):
            pv.objectives.SemiSupervisedELBO(1.0).loss(*conditional(), x, x)
        narrow = pv.guides.SemiSupervisedGuide(model, MLP(16, [8], 2), Joined(MLP(19, [8])))
        with pytest.raises(ValueError, match="logits of shape"):
            narrow(x, torch.zeros(5, dtype=torch.long))


def conditional(conditional_prior=False):
    prior = gaussian(3, 2) if conditional_prior else pv.priors.StandardNormal(2)
    model = pv.models.ConditionalModel(prior, bernoulli(2, 3), conditional_prior)
    return model, pv.guides.AmortizedNormal(model, Joined(MLP(16 + 3, [8])))


@pytest.mark.parametrize("conditional_prior", [False, True])
def test_conditional_model_learns_from_the_covariates(conditional_prior, binary):
    """The evidence exceeds that of the same model with permuted covariates."""
    y = torch.eye(3)[(binary[:, :8].sum(1) > binary[:, 8:].sum(1)).long()]
    found = []
    for covariates in (y, y[torch.randperm(50)]):
        torch.manual_seed(0)
        model, guide = conditional(conditional_prior)
        data = (binary, covariates)
        pv.fit(model, guide, data, epochs=40, batch_size=25, learning_rate=0.02, progress=False)
        found.append(pv.evidence(model, guide, data, num_particles=200, seed=0).mean)
    assert found[0] > found[1] + 0.3
    with pytest.raises(ValueError, match="call it on x, y"):
        model(binary)


def hierarchical_pair():
    model = hierarchy()
    return model, pv.guides.HierarchicalGuide(model, MLP(16, [8]))


def test_captured_steps_of_a_hierarchy_equal_eager_steps(binary, without_compiler):
    check_same(hierarchical_pair, binary, double=True, objective=pv.objectives.IWAE(2),
               execution="captured, not compiled")  # fmt: skip


@pytest.mark.parametrize("make", [semi_supervised, conditional])
def test_captured_steps_with_covariates_equal_eager_steps(make, binary, without_compiler):
    y = torch.randint(-1, 3, (50,)) if make is semi_supervised else torch.rand(50, 3)
    losses = []
    for capture in (True, False):
        torch.manual_seed(0)
        model, guide = make()
        objective = pv.objectives.ELBO()
        if make is semi_supervised:
            objective = pv.objectives.SemiSupervisedELBO(2.0)
        fit = pv.fit(model, guide, (binary, y), objective=objective, epochs=4, batch_size=10,
                     capture=capture, seed=0, progress=False)  # fmt: skip
        losses.append(fit.history.loss.tolist())
        assert fit.execution.startswith("captured") is capture
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@needs_compiler
@pytest.mark.slow
def test_compiled_semi_supervised_fit(binary):
    """The compiler lays out tensors in another order than torch."""
    model, guide = semi_supervised()
    y = torch.randint(-1, 3, (50,))
    fit = pv.fit(model, guide, (binary, y), objective=pv.objectives.SemiSupervisedELBO(2.0),
                 epochs=3, batch_size=10, capture=True, progress=False)  # fmt: skip
    assert fit.execution == "captured"


def test_conditional_prior_depends_on_its_covariates():
    model, _ = conditional(conditional_prior=True)
    y = torch.eye(3)
    locs = model.prior(y).mean
    assert (locs[0] - locs[1]).abs().sum() > 1e-3
    trace = pyro.poutine.trace(model).get_trace(torch.zeros(3, 16), y)
    assert torch.equal(trace.nodes["z"]["fn"].mean, locs)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (1, 1), (2, 2)])
def test_generate_and_reconstruct_small_data(shape):
    size = torch.Size(shape[1:]).numel()
    net = nn.Sequential(MLP(2, [4], size), nn.Unflatten(-1, shape[1:]))
    likelihood = pv.likelihoods.Bernoulli(net, event_dim=len(shape) - 1)
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
    guide = pv.guides.AmortizedNormal(model, nn.Sequential(nn.Flatten(1), MLP(size, [4])))
    x = torch.rand(shape).round()
    assert pv.generate(model, x).shape == pv.reconstruct(model, guide, x).shape == shape


def test_mixture_model_requires_a_mixture_prior():
    with pytest.raises(TypeError, match=r"must be a priors.MixtureOfNormals"):
        pv.models.MixtureModel(pv.priors.StandardNormal(2), bernoulli(2))


def test_fair_coins_have_one_bit_per_dimension():
    """Fair coins have one bit each for any z."""
    likelihood = pv.likelihoods.Bernoulli(lambda z: torch.zeros(*z.shape[:-1], 16))
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood)
    guide = pv.guides.AmortizedNormal(model, MLP(16, [4]))
    found = pv.evidence(model, guide, torch.rand(7, 16).round(), num_particles=2000, seed=0)
    assert found.dimensions == 16
    assert found.bits_per_dimension == pytest.approx(1.0, rel=1e-2)


def torch_normal(*_):
    return torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), 1.0), 1)


X, LABELS = torch.zeros(5, 16), torch.zeros(5, 4)
STANDARD = pv.priors.StandardNormal(3)
WITH_A_WRONG_PRIOR = {
    "latent variable": (lambda prior: pv.LatentVariableModel(prior, bernoulli(3)), (X,)),
    "conditional": (
        lambda prior: pv.models.ConditionalModel(prior, bernoulli(3, 4)), (X, LABELS)),
    "hierarchical": (
        lambda prior: pv.models.HierarchicalModel(prior, [gaussian(3, 3)], bernoulli(3)), (X,)),
    "semi-supervised": (
        lambda prior: pv.models.SemiSupervisedModel(4, prior, bernoulli(3, 4)),
        (X, torch.zeros(5, dtype=torch.long))),
    "sequence": (
        lambda prior: pv.models.SequenceModel(prior, gaussian(3, 3), bernoulli(3)),
        (X.reshape(5, 1, 16),)),
    "flow": (lambda prior: pv.surjections.FlowModel(prior, [pv.surjections.Absolute()]), (X,)),
}  # fmt: skip
WITH_A_WRONG_LIKELIHOOD = {
    "latent variable": (lambda wrong: pv.LatentVariableModel(STANDARD, wrong), (X,)),
    "conditional": (lambda wrong: pv.models.ConditionalModel(STANDARD, wrong), (X, LABELS)),
    "hierarchical": (
        lambda wrong: pv.models.HierarchicalModel(STANDARD, [gaussian(3, 3)], wrong), (X,)),
    "mixture": (
        lambda wrong: pv.models.MixtureModel(pv.priors.MixtureOfNormals(3, 2), wrong), (X,)),
}  # fmt: skip
WRONG = {"of torch": torch_normal, "a tensor": lambda *_: torch.zeros(3), "None": lambda *_: None}


@pytest.mark.parametrize("wrong", [*WRONG, "a distribution"])
@pytest.mark.parametrize("model", WITH_A_WRONG_PRIOR)
def test_priors_that_return_no_distribution_of_pyro_are_refused(model, wrong):
    make, arguments = WITH_A_WRONG_PRIOR[model]
    program = make(WRONG.get(wrong, dist.Normal(torch.zeros(3), 1.0)))
    with pytest.raises(TypeError, match=r"prior must be .* returns a distribution of pyro"):
        program(*arguments)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("model", WITH_A_WRONG_LIKELIHOOD)
def test_likelihoods_that_return_no_distribution_of_pyro_are_refused(model, wrong):
    make, arguments = WITH_A_WRONG_LIKELIHOOD[model]
    with pytest.raises(TypeError, match=r"likelihood must be .* returns a distribution of pyro"):
        make(WRONG[wrong])(*arguments)


def test_term_of_the_classifier_is_scaled_like_the_elbo():
    x, y = torch.randn(8), torch.randint(-1, 2, (8,)).float()

    class Guide:
        def __call__(self, x, y):
            with pyro.plate("data", 80, subsample=x):
                pyro.sample("z", dist.Normal(x / 2, 0.7))

        def classify(self, x):
            return dist.Bernoulli(logits=x)

    def model(x, y):
        with pyro.plate("data", 80, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    losses = []
    for objective in (pv.objectives.ELBO(), pv.objectives.SemiSupervisedELBO(5.0)):
        torch.manual_seed(0)
        losses.append(objective.loss(model, Guide(), x, y))
    known = y >= 0
    expected = -5.0 * dist.Bernoulli(logits=x[known]).log_prob(y[known]).sum() * 80 / 8
    assert losses[1] - losses[0] == pytest.approx(expected.item(), rel=1e-4)
