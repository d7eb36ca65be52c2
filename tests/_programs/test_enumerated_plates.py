"""Enumeration inside plates within a data point, such as the words of a document."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae._programs import predictions
from pyro_vae._programs.pair_trace import PairTrace

VOCABULARY, TOPICS, WORDS = 7, 3, 5
ENUMERATED = {"enumerate": "parallel"}


@pytest.fixture
def x():
    return torch.randint(VOCABULARY, (20, WORDS))


@pytest.fixture
def programs():
    """Return a topic model, the same model with its topics summed out by hand, and a guide."""
    pyro.clear_param_store()
    start = torch.softmax(torch.randn(TOPICS, VOCABULARY), -1)

    def topics():
        return pyro.param("topics", start, constraint=constraints.simplex)

    def model(x):
        words = topics()
        with pyro.plate("documents", len(x), dim=-1):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(TOPICS)))
            with pyro.plate("words", WORDS, dim=-2):
                c = pyro.sample("c", dist.Categorical(theta), infer=ENUMERATED)
                pyro.sample("x", dist.Categorical(words[c]), obs=x.T)

    def marginal(x):
        words = topics()
        with pyro.plate("documents", len(x), dim=-1):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(TOPICS)))
            with pyro.plate("words", WORDS, dim=-2):
                pyro.sample("x", dist.Categorical(theta @ words), obs=x.T)

    def guide(x):
        counts = torch.nn.functional.one_hot(x, VOCABULARY).sum(1).float()
        weight = pyro.param("weight", lambda: 0.3 * torch.randn(VOCABULARY, TOPICS))
        with pyro.plate("documents", len(x), dim=-1):
            pyro.sample("theta", dist.Dirichlet((1 + counts @ weight).exp().clamp(0.5, 9)))

    return model, marginal, guide


def at_equal_noise(seed, call, *args, **options):
    torch.manual_seed(seed)
    return call(*args, **options)


@pytest.mark.parametrize("num_particles", [1, 4])
def test_words_are_summed_out_one_by_one(programs, x, num_particles):
    model, marginal, guide = programs
    options = {"num_particles": num_particles, "plate_nesting": 2}
    pv.terms(model, guide, x)  # draws the initial weights
    found = at_equal_noise(1, pv.terms, model, guide, x, enumerates=True, **options)
    expected = at_equal_noise(1, pv.terms, marginal, guide, x, **options)
    torch.testing.assert_close(found.log_weight, expected.log_weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.log_prior, expected.log_prior)


def test_loss_and_gradient_equal_those_of_trace_enum_elbo(programs, x):
    model, _, guide = programs
    at_equal_noise(0, pv.terms, model, guide, x)
    names = ["topics", "weight"]
    results = []
    for ours in (False, True):
        torch.manual_seed(3)
        if ours:
            terms = pv.terms(model, guide, x, enumerates=True, plate_nesting=2)
            loss = -terms.log_weight.sum()
        else:
            elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=2)
            loss = elbo.differentiable_loss(model, guide, x)
        parameters = [pyro.param(name).unconstrained() for name in names]
        results.append((loss, *torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_estimators_agree_with_the_marginal_model(programs, x, without_compiler):
    model, marginal, guide = programs
    evidences = [
        pv.evidence(m, guide, x, num_particles=4000, seed=1, progress=False)
        for m in (model, marginal)
    ]
    error = sum(e.monte_carlo_errors.square().sum() for e in evidences).sqrt() / len(x)
    assert abs(evidences[0].mean - evidences[1].mean) < 4 * error + 1e-3  # 1 in 16,000
    fits = [
        pv.fit(m, guide, x, epochs=2, batch_size=10, seed=2, progress=False, capture=capture)
        for m, capture in ((model, False), (model, True))
    ]
    assert all(fit.history["loss"].notna().all() for fit in fits)
    surgery = pv.elbo_surgery(model, guide, x, seed=0, progress=False)
    assert surgery.rate == pytest.approx(surgery.mutual_information + surgery.marginal_kl)


def test_predictions_sample_the_words(programs):
    model, _, guide = programs
    x = torch.randint(VOCABULARY, (400, WORDS))
    terms = at_equal_noise(4, pv.terms, model, guide, x, num_particles=2)
    drawn = terms.predict()["x"]
    assert drawn.shape == (2, 400, WORDS)
    probs = terms.samples["theta"] @ pyro.param("topics").detach()
    expected = probs.mean((0, 1))
    found = torch.nn.functional.one_hot(drawn, VOCABULARY).float().mean((0, 1, 2))
    error = (expected * (1 - expected) / drawn.numel()).sqrt()
    assert ((found - expected).abs() < 5 * error).all()  # 1 in 200,000 for all seven


def test_a_class_of_the_document_and_topics_of_its_words_are_summed_in_order(programs, x):
    _, _, _ = programs
    words = torch.softmax(torch.randn(TOPICS, VOCABULARY), -1)
    mixing = torch.softmax(torch.randn(2, TOPICS), -1)

    def model(x):
        with pyro.plate("documents", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(torch.sigmoid(z)), infer=ENUMERATED)
            pyro.sample("y", dist.Normal(k, 1.0), obs=x[:, 0].float())
            with pyro.plate("words", WORDS, dim=-2):
                c = pyro.sample("c", dist.Categorical(mixing[k.long()]), infer=ENUMERATED)
                pyro.sample("x", dist.Categorical(words[c]), obs=x.T)

    def guide(x):
        with pyro.plate("documents", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.2, 0.9))

    terms = pv.terms(model, guide, x, num_particles=3)
    z = terms.samples["z"]
    log_words = (mixing @ words).log()
    of_class = [
        dist.Bernoulli(torch.sigmoid(z)).log_prob(torch.tensor(float(k)))
        + dist.Normal(float(k), 1.0).log_prob(x[:, 0].float())
        + log_words[k][x].sum(1)
        for k in (0, 1)
    ]
    expected = torch.stack(of_class).logsumexp(0)
    torch.testing.assert_close(terms.log_likelihood, expected, rtol=1e-4, atol=1e-4)


def test_masked_words_do_not_count(programs, x):
    """Documents of different lengths are padded, and the padding is masked."""
    _, _, guide = programs
    words = torch.softmax(torch.randn(TOPICS, VOCABULARY), -1)
    lengths = torch.randint(1, WORDS + 1, (len(x),))
    mask = torch.arange(WORDS) < lengths.unsqueeze(1)

    def model(x):
        with pyro.plate("documents", len(x), dim=-1):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(TOPICS)))
            with pyro.plate("words", WORDS, dim=-2), pyro.poutine.mask(mask=mask[: len(x)].T):
                c = pyro.sample("c", dist.Categorical(theta), infer=ENUMERATED)
                pyro.sample("x", dist.Categorical(words[c]), obs=x.T)

    terms = pv.terms(model, guide, x)
    each = (terms.samples["theta"] @ words).log()[0].gather(1, x)
    torch.testing.assert_close(terms.log_likelihood[0], (each * mask).sum(1), rtol=1e-4, atol=1e-4)


def test_a_site_outside_the_plate_of_the_values_it_depends_on_is_refused(programs, x):
    _, _, guide = programs

    def model(x):
        with pyro.plate("documents", len(x), dim=-1):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(TOPICS)))
            with pyro.plate("words", WORDS, dim=-2):
                c = pyro.sample("c", dist.Categorical(theta), infer=ENUMERATED)
            total = c.float().sum(-2, keepdim=True)
            pyro.sample("x", dist.Normal(total, 1.0), obs=x[:, 0].float())

    with pytest.raises(ValueError, match="'x' depends on site 'c', which is enumerated inside"):
        pv.terms(model, guide, x)


def test_a_guide_that_enumerates_in_an_inner_plate_is_refused(programs, x):
    model, _, guide = programs

    def enumerating(x):
        guide(x)
        with pyro.plate("documents", len(x), dim=-1), pyro.plate("words", WORDS, dim=-2):
            probs = torch.ones(WORDS, len(x), TOPICS)
            pyro.sample("c", dist.Categorical(probs), infer=ENUMERATED)

    with pytest.raises(ValueError, match="the guide enumerates site 'c' inside a plate"):
        pv.terms(model, enumerating, x)


def test_a_latent_that_depends_on_enumerated_words_is_refused(x):
    def model(x):
        with pyro.plate("documents", len(x), dim=-1), pyro.plate("words", WORDS, dim=-2):
            c = pyro.sample("c", dist.Categorical(torch.ones(TOPICS)), infer=ENUMERATED)
            z = pyro.sample("z", dist.Normal(c.float(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T.float())

    def guide(x):
        with pyro.plate("documents", len(x), dim=-1), pyro.plate("words", WORDS, dim=-2):
            pyro.sample("z", dist.Normal(x.T.float(), 1.0))

    with pytest.raises(ValueError, match="latent site 'z' depends on"):
        pv.terms(model, guide, x)


WORDS = 3
PARALLEL = {"enumerate": "parallel"}


class TopicModel:
    """A class of each document, a latent that depends on it, and two values of each word."""

    def __init__(self):
        self.of_class, self.of_word = torch.rand(()), torch.rand(2)
        self.next, self.far = torch.rand(2), 3 * torch.randn(4)

    def __call__(self, x):
        with pyro.plate("data", len(x), dim=-2):
            c = pyro.sample("c", dist.Bernoulli(self.of_class), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(2 * c, 1.0))
            with pyro.plate("words", WORDS, dim=-1):
                v = pyro.sample("v", dist.Bernoulli(self.of_word[c.long()]), infer=PARALLEL)
                w = pyro.sample("w", dist.Bernoulli(self.next[v.long()]), infer=PARALLEL)
                loc = self.mean_of(c, v, w, z)
                pyro.sample("x", dist.Normal(loc, 0.5), obs=x)

    def mean_of(self, c, v, w, z):
        return self.far[0] * c + self.far[1] * v * z + self.far[2] * w + self.far[3] * v * w

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0))

    def log_joint(self, x, z):
        """Sum log p(x, z) over all values by hand, (K, B), for z (K, B, 1) and x (B, W)."""
        bernoulli, found = torch.distributions.Bernoulli, []
        for c in torch.arange(2.0):
            words = []
            for v in torch.arange(2.0):
                for w in torch.arange(2.0):
                    prior = bernoulli(self.of_word[c.long()]).log_prob(v)
                    prior = prior + bernoulli(self.next[v.long()]).log_prob(w)
                    loc = self.mean_of(c, v, w, z)
                    words.append(prior + dist.Normal(loc, 0.5).log_prob(x))
            of_words = torch.stack(words).logsumexp(0).sum(-1)
            of_class = bernoulli(self.of_class).log_prob(c)
            of_class = of_class + dist.Normal(2 * c, 1.0).log_prob(z.squeeze(-1))
            found.append(of_class + of_words)
        return torch.stack(found).logsumexp(0)

    def mean_given(self, z):
        """Average x over all values by hand, for one number z."""
        bernoulli = torch.distributions.Bernoulli
        log_class = [
            bernoulli(self.of_class).log_prob(c) + dist.Normal(2 * c, 1.0).log_prob(z)
            for c in torch.arange(2.0)
        ]
        mean = 0.0
        for c, weight in zip(torch.arange(2.0), torch.stack(log_class).softmax(0), strict=True):
            for v in torch.arange(2.0):
                of_v = bernoulli(self.of_word[c.long()]).log_prob(v).exp()
                for w in torch.arange(2.0):
                    of_w = bernoulli(self.next[v.long()]).log_prob(w).exp()
                    mean = mean + weight * of_v * of_w * self.mean_of(c, v, w, z)
        return mean


@pytest.mark.parametrize("num_particles", [1, 4])
def test_values_outside_and_inside_of_a_plate_are_summed_out(num_particles):
    model, x = TopicModel(), torch.randn(5, WORDS)
    t = pv.terms(model, model.guide, x, num_particles=num_particles)
    z = t.samples["z"].reshape(num_particles, 5, 1)
    log_guide = dist.Normal(x.mean(-1), 1.0).log_prob(z.squeeze(-1))
    expected = model.log_joint(x, z) - log_guide
    torch.testing.assert_close(t.log_weight, expected, rtol=1e-5, atol=1e-5)


def test_decoded_means_are_averaged_over_values_inside_of_a_plate():
    model, z = TopicModel(), torch.randn(4)
    expected = torch.stack([model.mean_given(each) for each in z])
    for seed in range(2):
        found = pv.decode(model, z, x=torch.zeros(4, WORDS), seed=seed)
        torch.testing.assert_close(found, expected.unsqueeze(1).expand(4, WORDS))


def test_latent_that_depends_on_a_value_inside_of_a_plate_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("words", WORDS, dim=-1):
            w = pyro.sample("w", dist.Bernoulli(0.3), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("words", WORDS, dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match=r"'z' depends on \['w'\], which the model enumerates"):
        pv.terms(model, guide, torch.randn(5, WORDS))


class Chain:
    """A Markov chain of T states. Its last state decides z, and each state one number of x."""

    def __init__(self, length, states=3):
        self.length, self.first = length, torch.rand(states).log_softmax(0).exp()
        self.step, self.of_z = torch.randn(states, states).softmax(-1), torch.randn(states)
        self.far = 3 * torch.randn(states)

    def __call__(self, x):
        with pyro.plate("data", len(x)):
            probs, numbers = self.first, []
            for t in range(self.length):
                c = pyro.sample(f"c_{t}", dist.Categorical(probs), infer=PARALLEL)
                probs = self.step[c]
                numbers.append(c)
            z = pyro.sample("z", dist.Normal(self.of_z[numbers[-1]], 0.5))
            for t, c in enumerate(numbers):
                pyro.sample(f"x_{t}", dist.Normal(self.far[c] + z, 0.1), obs=x[:, t])

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    def states_given(self, z):
        """Return p(c_t|z) of numbers z (N,), (T, N, states), and p(c_0, c_1|z)."""
        forward = [self.first]
        for _ in range(self.length - 1):
            forward.append(forward[-1] @ self.step)
        backward = [dist.Normal(self.of_z, 0.5).log_prob(z.unsqueeze(-1)).exp()]
        for _ in range(self.length - 1):
            backward.append(backward[-1] @ self.step.T)
        product = torch.stack(forward).unsqueeze(1) * torch.stack(backward[::-1])
        first_two = self.first.unsqueeze(-1) * self.step * backward[-2].unsqueeze(-2)
        first_two = first_two / first_two.sum((-2, -1), keepdim=True)
        return product / product.sum(-1, keepdim=True), first_two


@pytest.mark.parametrize("length", [3, 30])
def test_samples_given_the_latents_of_a_long_chain(length):
    model, x = Chain(length), torch.randn(4, length)
    t = pv.terms(model, model.guide, x, num_particles=1000)
    z, drawn = t.samples["z"].flatten(), t.predict()
    each, first_two = model.states_given(z)
    drawn = torch.stack([drawn[f"x_{n}"].flatten() for n in range(length)]) - z
    product = torch.einsum("nij,i,j->n", first_two, model.far, model.far)
    for found, expected in (
        *zip(drawn, each @ model.far, strict=True),
        (drawn[0] * drawn[1], product),
    ):
        error = (found - expected).std() / len(z) ** 0.5
        assert (found - expected).mean().abs() < 5 * error  # 2e-5 false alarms for 31 numbers


def test_means_given_the_latents_of_a_long_chain():
    model, x = Chain(30), torch.randn(4, 30)
    run = PairTrace(model, model.guide, (x,))
    z = run.guide["z"].site["value"]
    expected = model.states_given(z)[0] @ model.far + z
    found = {site["name"]: mean for site, mean in predictions.means(run)}
    for n, each in enumerate(expected):
        torch.testing.assert_close(found[f"x_{n}"], each, rtol=1e-4, atol=1e-4)


def test_values_inside_of_crossed_plates_are_refused():
    weights = torch.randn(2, 2)

    def model(x):
        first, second = pyro.plate("first", 2, dim=-2), pyro.plate("second", 2, dim=-1)
        with pyro.plate("data", len(x), dim=-3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with first:
                a = pyro.sample("a", dist.Bernoulli(0.3), infer=PARALLEL)
            with second:
                b = pyro.sample("b", dist.Bernoulli(0.6), infer=PARALLEL)
            with first, second:
                loc = weights[a.long(), b.long()] + 0 * z
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-3):
            pyro.sample("z", dist.Normal(x.sum((1, 2), keepdim=True), 1.0))

    with pytest.raises(ValueError, match="'a' and 'b' are enumerated inside inner plates that"):
        pv.terms(model, guide, torch.randn(3, 2, 2))


def test_latents_that_no_enumerated_value_can_have_given():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 1.0, -torch.inf]]).log_softmax(-1)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.4), infer=PARALLEL)
            k = pyro.sample("k", dist.Categorical(logits=logits[c.long()]))
            pyro.sample("x", dist.Normal(k.float() + c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=x.new_zeros(len(x), 3)))

    x = torch.randn(5)
    t = pv.terms(model, guide, x, num_particles=50)
    impossible = t.samples["k"] == 2
    assert 0 < impossible.sum() < impossible.numel()
    assert (t.log_weight[impossible] == -torch.inf).all()
    assert t.log_weight[~impossible].isfinite().all()
    assert t.predict()["x"].isfinite().all()
    found = pv.evidence(model, guide, x, num_particles=20_000, seed=0)
    c, k = torch.arange(2.0).reshape(2, 1, 1), torch.arange(3.0).reshape(3, 1)
    prior = torch.tensor([0.6, 0.4]).log().reshape(2, 1, 1) + logits.unsqueeze(-1)
    exact = (prior + dist.Normal(k + c, 1.0).log_prob(x)).logsumexp((0, 1))
    error = (found.values - exact).abs() / found.monte_carlo_errors
    assert (error < 5).all()  # 3e-6 false alarms for 5 numbers
