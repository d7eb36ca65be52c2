"""Idioms of published Pyro programs, each in a small program with a known log p(x).

The guides are exact posteriors. Then every log-weight is log p(x), so that the loss and the
evidence are known for any noise and any number of particles.
"""

import math

import pyro
import pyro.distributions as dist
import pyro.infer.autoguide
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae._utils.numerics import MIN_SCALE
from pyro_vae.objectives import ELBO


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Line:
    """z ~ N(0, 1) and x ~ N(w z, s), with the posterior as its guide.

    Args:
        plate: returns the plate of the data points, given x.
    """

    def __init__(self, plate=lambda x: pyro.plate("data", len(x))):
        self.plate = plate
        self.w, self.s = torch.randn(()), 0.5 + torch.rand(())

    def model(self, x):
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(self.w * z, self.s), obs=x)

    def posterior(self, x):
        precision = 1 + (self.w / self.s) ** 2
        return dist.Normal(self.w * x / self.s**2 / precision, precision**-0.5)

    def guide(self, x):
        with self.plate(x):
            pyro.sample("z", self.posterior(x))

    def log_evidence(self, x):
        return dist.Normal(0.0, (self.w**2 + self.s**2).sqrt()).log_prob(x)


def check_evidence(model, guide, data, expected, **options):
    found = pv.evidence(model, guide, data, num_particles=7, seed=0, **options)
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-9)


def check_loss(model, guide, args, expected, objectives):
    for objective in objectives:
        loss = objective.loss(model, guide, *args)
        assert loss == pytest.approx(expected.item(), rel=1e-9), type(objective).__name__


@pytest.mark.parametrize("name", ["data", "images"])
@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
def test_plates_of_any_name_with_and_without_a_size(name, sized):
    line = Line(lambda x: pyro.plate(name, len(x)) if sized else pyro.plate(name))
    x = torch.randn(5)
    exact = line.log_evidence(x)
    check_loss(line.model, line.guide, [x], -exact.sum(), [ELBO(), ELBO(3), Trace_ELBO()])
    check_evidence(line.model, line.guide, x, exact)
    surgery = pv.elbo_surgery(line.model, line.guide, x, seed=0)
    rate = dist.kl.kl_divergence(line.posterior(x), dist.Normal(0.0, 1.0))
    assert surgery.rate == pytest.approx(rate.mean().item(), rel=1e-9)


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("name", ["data", "images"])
@pytest.mark.parametrize("kind", ["amortized", "local"])
def test_guides_of_the_library_open_the_plate_of_the_model(name, kind):
    """TraceEnum_ELBO compares the plates of model and guide by their names."""
    line = Line(lambda x: pyro.plate(name, len(x)))
    x = torch.randn(5, 1)

    def model(x):
        line.model(x[:, 0])

    posterior = line.posterior(x[:, 0])
    # A raw scale of zero means one.
    raw_scale = (posterior.stddev - MIN_SCALE).expm1().log() - math.log(math.expm1(1.0))
    parameters = torch.stack([posterior.mean, raw_scale], -1)
    if kind == "amortized":
        guide = pv.guides.AmortizedNormal(model, encoder=nn.Identity())
        guide(x)
        head = guide.built["head"]
        head.weight.data = torch.stack([posterior.mean[:1] / x[0], torch.zeros(1)])
        head.bias.data = torch.stack([torch.zeros(()), raw_scale[0]])
    else:
        guide = pv.guides.LocalGuide(model, x)
        guide.table.data = torch.arange(10.0).reshape(5, 2)  # to find the order of the rows
        guide.table.data[(guide.parameters_of(x)[:, 0] / 2).long()] = parameters
    expected = line.log_evidence(x[:, 0])
    particles = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    objectives = [TraceEnum_ELBO(max_plate_nesting=1), TraceEnum_ELBO(**particles), ELBO()]
    objectives += [Trace_ELBO(), Trace_ELBO(**particles), TraceGraph_ELBO()]
    check_loss(model, guide, [x], -expected.sum(), objectives)
    check_evidence(model, guide, x, expected)


def test_model_that_asserts_the_number_of_its_rows():
    """A model of all documents at once; the guide is built from a run on these rows alone."""
    line, x = Line(), torch.randn(6)

    def model(x):
        assert x.shape == (6,)
        line.model(x)

    guide = pv.guides.AmortizedNormal(model, encoder=nn.Unflatten(0, (6, 1)))
    fit = pv.fit(model, guide, x, epochs=1, progress=False)
    assert fit.history.loss.isna().sum() == 0
    check_evidence(model, line.guide, x, line.log_evidence(x))


def test_masks_over_a_time_series_of_several_lengths():
    """``.mask(m).to_event(1)`` in both programs, as in deep Markov models."""
    lengths, steps, a = torch.tensor([4, 2, 3, 1]), 4, torch.randn(())
    mask = torch.arange(steps) < lengths[:, None]
    x = torch.randn(4, steps).where(mask, 0.0)

    def model(x, mask):
        before = torch.zeros(len(x), 1)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(steps)):
                m = mask[:, t : t + 1]
                z = pyro.sample(f"z_{t}", dist.Normal(a * before, 1.0).mask(m).to_event(1))
                fn = dist.Normal(z, 1.0).mask(m).to_event(1)
                pyro.sample(f"x_{t}", fn, obs=x[:, t : t + 1])
                before = z

    def guide(x, mask):
        shift, precision = [], []  # of exp(shift z - precision z^2 / 2), the future given z_t
        h, j = torch.zeros(len(x), 1), torch.zeros(len(x), 1)
        for t in reversed(range(steps)):
            h, j = h + x[:, t : t + 1], j + mask[:, t : t + 1]
            shift.insert(0, h)
            precision.insert(0, j)
            h, j = a * h / (1 + j), a**2 * j / (1 + j)
        before = torch.zeros(len(x), 1)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(steps)):
                total = 1 + precision[t]
                q = dist.Normal((a * before + shift[t]) / total, total**-0.5)
                before = pyro.sample(f"z_{t}", q.mask(mask[:, t : t + 1]).to_event(1))

    powers = torch.arange(steps)[:, None] - torch.arange(steps)
    chain = torch.where(powers >= 0, a ** powers.clamp(min=0), 0.0)
    covariance = chain @ chain.T + torch.eye(steps)
    expected = torch.stack([
        dist.MultivariateNormal(torch.zeros(n), covariance[:n, :n]).log_prob(row[:n])
        for row, n in zip(x, lengths.tolist(), strict=True)
    ])  # fmt: skip
    objectives = [ELBO(), ELBO(3), Trace_ELBO()]
    check_loss(model, guide, [x, mask], -expected.sum(), objectives)
    check_evidence(model, guide, (x, mask), expected)
    with pytest.raises(ValueError, match="'z_1' has a mask that differs"):
        pv.elbo_surgery(model, guide, (x, mask))


def test_weight_of_the_kl_by_poutine_scale():
    line, x, weight = Line(), torch.randn(6), 0.3
    shift = torch.randn(())

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=weight):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(line.w * z, line.s), obs=x)

    def shifted(x):
        q = line.posterior(x)
        return dist.Normal(q.mean + shift, q.stddev)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=weight):
            pyro.sample("z", shifted(x))

    q = shifted(x)
    torch.manual_seed(0)
    z = q.sample()
    kl = q.log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    expected = weight * kl - dist.Normal(line.w * z, line.s).log_prob(x)
    for objective in (ELBO(), Trace_ELBO()):
        objective.loss(model, guide, x)  # the first run examines the programs
        torch.manual_seed(0)
        check_loss(model, guide, [x], expected.sum(), [objective])
    with pytest.raises(ValueError, match="unscaled"):
        pv.evidence(model, guide, x)
    shift = torch.zeros(())
    check_evidence(pv.unscaled(model), pv.unscaled(guide), x, line.log_evidence(x))


class Linear(nn.Module):
    """z ~ N(0, 1) of two dimensions, x ~ N(decoder(z), s), for a decoder that is affine.

    Args:
        decoder: the module; it need not take a dimension of particles.
    """

    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.s = decoder, 0.5 + torch.rand(())

    def p_x(self, z):
        return dist.Normal(self.decoder(z), self.s).to_event(1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", self.p_x(z), obs=x)

    @torch.no_grad()
    def affine(self):
        """Return A and b of the decoder A z + b, in evaluation mode."""
        training = self.training
        self.eval()
        rows = self.decoder(torch.cat([torch.zeros(1, 2), torch.eye(2)]))
        self.train(training)
        return (rows[1:] - rows[0]).T, rows[0]

    def posterior(self, x):
        a, b = self.affine()
        precision = torch.eye(2) + a.T @ a / self.s**2
        loc = torch.linalg.solve(precision, a.T @ (x - b).T / self.s**2).T
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))

    def log_evidence(self, x):
        a, b = self.affine()
        noise = self.s**2 * torch.eye(len(b))
        return dist.MultivariateNormal(b, a @ a.T + noise).log_prob(x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("ignore:model and guide cannot run with a leading dimension")
def test_batch_norm_in_the_decoder_is_evaluated_with_its_running_statistics(training):
    norm = nn.BatchNorm1d(3, affine=False)
    pair = Linear(nn.Sequential(nn.Linear(2, 3), norm)).requires_grad_(False)
    for _ in range(3):
        pair.decoder(torch.randn(20, 2))
    pair.train(training)
    before = norm.running_mean.clone()
    x = torch.randn(6, 3)
    expected = pair.log_evidence(x)
    check_evidence(pair.model, pair.guide, x, expected)
    assert pair.training is training
    assert torch.equal(norm.running_mean, before)
    pair.eval()
    check_loss(pair.model, pair.guide, [x], -expected.sum(), [ELBO(), ELBO(3), Trace_ELBO()])


@pytest.mark.filterwarnings("ignore:model and guide cannot run with a leading dimension")
def test_observed_numbers_are_selected_by_an_index():
    """A conditional model of the pixels that the input hides, ``loc[x == -1].view(B, -1)``."""
    pair = Linear(nn.Linear(2, 4)).requires_grad_(False)
    y = torch.randn(5, 4)
    x = torch.stack([row.where(torch.randperm(4) < 2, -1.0) for row in torch.rand(5, 4)])

    def model(x, y):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))
            loc = pair.decoder(z)[x == -1].view(len(x), -1)
            obs = y[x == -1].view(len(x), -1)
            pyro.sample("y", dist.Normal(loc, pair.s).to_event(1), obs=obs)

    hidden = [(x[i] == -1).nonzero().flatten() for i in range(5)]
    a, b = pair.affine()

    def guide(x, y):
        precision, shift = [], []
        for i in range(len(x)):
            hidden = x[i] == -1
            part = a[hidden]
            precision.append(torch.eye(2) + part.T @ part / pair.s**2)
            shift.append(x[i, :2] + part.T @ (y[i] - b)[hidden] / pair.s**2)
        precision, shift = torch.stack(precision), torch.stack(shift)
        loc = torch.linalg.solve(precision, shift.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data"):
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))

    expected = torch.stack([
        dist.MultivariateNormal(
            a[h] @ x[i, :2] + b[h], a[h] @ a[h].T + pair.s**2 * torch.eye(2)
        ).log_prob(y[i, h])
        for i, h in enumerate(hidden)
    ])  # fmt: skip
    check_loss(model, guide, [x, y], -expected.sum(), [ELBO(), ELBO(3), Trace_ELBO()])
    check_evidence(model, guide, (x, y), expected)


def test_words_are_enumerated_in_an_inner_plate():
    line, topics, centers = Line(), torch.randn(3), torch.randn(3)
    x, words = torch.randn(5), torch.randn(5, 4)

    def model(x, words):
        with pyro.plate("documents", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(line.w * z, line.s), obs=x)
            with pyro.plate("words", 4, dim=-2):
                probs = topics.softmax(0).expand(len(x), 3)
                infer = {"enumerate": "parallel"}
                topic = pyro.sample("topic", dist.Categorical(probs), infer=infer)
                pyro.sample("word", dist.Normal(centers[topic], 1.0), obs=words.T)

    def guide(x, words):
        with pyro.plate("documents", len(x), dim=-1):
            pyro.sample("z", line.posterior(x))

    table = topics.log_softmax(0) + dist.Normal(centers, 1.0).log_prob(words.unsqueeze(-1))
    expected = line.log_evidence(x) + table.logsumexp(-1).sum(-1)
    objectives = [ELBO(), ELBO(3), TraceEnum_ELBO(max_plate_nesting=2)]
    check_loss(model, guide, [x, words], -expected.sum(), objectives)
    check_evidence(model, guide, (x, words), expected)


@pytest.mark.parametrize("how", ["parallel", None])
def test_label_is_enumerated_in_the_guide(how):
    """A missing label y and a latent z, with q(y|x) q(z|x, y), as in the model M2."""
    line, centers = Line(), torch.randn(3)
    x = torch.randn(5)

    def model(x, y=None):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(len(x), 3) / 3), obs=y)
            pyro.sample("x", dist.Normal(line.w * z + y @ centers, line.s), obs=x)

    def guide(x, y=None):
        with pyro.plate("data"):
            if y is None:
                logits = line.log_evidence(x.unsqueeze(-1) - centers)
                y = pyro.sample("y", dist.OneHotCategorical(logits=logits))
            pyro.sample("z", line.posterior(x - y @ centers))

    by_label = line.log_evidence(x.unsqueeze(-1) - centers) - torch.tensor(3.0).log()
    expected = by_label.logsumexp(-1)
    enumerated = config_enumerate(guide, how, expand=True) if how else guide
    enum = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    check_loss(model, enumerated, [x], -expected.sum(), [ELBO(), ELBO(3), enum])
    check_evidence(model, enumerated, x, expected)
    y = torch.eye(3)[torch.randint(3, (5,))]
    check_loss(model, enumerated, [x, y], -(by_label * y).sum(), [ELBO(), enum])
    check_evidence(model, enumerated, (x, y), (by_label * y).sum(-1))


def test_baselines_of_tracegraph():
    """The loss of the baseline is a square, so its gradient is known."""
    logit, centers, x = torch.randn(()), torch.randn(2), torch.randn(6)
    baseline = nn.Linear(1, 1)

    def log_joint(x):
        prior = torch.stack([-logit, logit]).sigmoid().log()
        return prior + dist.Normal(centers, 1.0).log_prob(x.unsqueeze(-1))

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=logit.expand(len(x))))
            pyro.sample("x", dist.Normal(centers[c.long()], 1.0), obs=x)

    def guide(x):
        pyro.module("baseline", baseline)
        table = log_joint(x)
        infer = {"baseline": {"baseline_value": baseline(x.unsqueeze(-1)).squeeze(-1)}}
        with pyro.plate("data", len(x)):
            q = dist.Bernoulli(logits=table[:, 1] - table[:, 0])
            pyro.sample("c", q, infer=infer)

    expected = log_joint(x).logsumexp(-1)
    check_loss(model, guide, [x], -expected.sum(), [ELBO(), TraceGraph_ELBO()])
    check_evidence(model, guide, x, expected)
    values = baseline(x.unsqueeze(-1)).squeeze(-1)
    loss = (expected - values).square().sum()
    exact = torch.autograd.grad(loss, [*baseline.parameters()])
    for objective in (ELBO(), TraceGraph_ELBO()):
        baseline.zero_grad()
        objective.loss_and_grads(model, guide, x)
        for parameter, gradient in zip(baseline.parameters(), exact, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["data", "rows"])
def test_minibatch_of_a_plate_that_subsamples(name):
    line = Line(lambda x: pyro.plate(name, 50, subsample=x))
    x = torch.randn(5)
    exact = line.log_evidence(x)
    check_loss(line.model, line.guide, [x], -10 * exact.sum(), [ELBO(), ELBO(3), Trace_ELBO()])
    check_evidence(line.model, line.guide, x, exact)


def test_parameters_of_svi_are_evaluated():
    """The values are in Pyro's global store; SVI alone has trained them."""
    line, x = Line(), 3 * torch.randn(8)

    def with_parameters(program):
        def run(x):
            line.w = pyro.param("w", torch.tensor(0.1))
            line.s = pyro.param("s", torch.tensor(0.5), constraint=constraints.positive)
            program(x)

        return run

    model, guide = with_parameters(line.model), with_parameters(line.guide)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(x)
    w, s = pyro.param("w").detach(), pyro.param("s").detach()
    assert w != 0.1
    assert s != 0.5
    check_evidence(model, guide, x, dist.Normal(0.0, (w**2 + s**2).sqrt()).log_prob(x))
    fit = pv.fit(model, guide, x, epochs=1, learning_rate=0.05, progress=False)
    with pv.parameter_store(model, guide):
        fitted = pyro.param("w").detach()
        variance = fitted**2 + pyro.param("s").detach() ** 2
    assert fitted != w
    assert pyro.param("w") == w  # the fit has its own store
    check_evidence(fit.model, fit.guide, x, dist.Normal(0.0, variance.sqrt()).log_prob(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data", "has size 6 for a minibatch of 3 rows"),
        ("items", 'outside the plate "data"'),
    ],
)
def test_data_points_in_the_second_dimension_are_explained(name, message):
    """The programs take x of shape (observations, data points)."""
    x = torch.randn(3, 6)

    def model(x):
        with pyro.plate(name, x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1]), 1.0))
            with pyro.plate("observations", len(x), dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate(name, x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x.mean(0), 1.0))

    with pytest.raises(ValueError, match=message):
        pv.evidence(model, guide, x)
    posterior = dist.Normal(x.sum(0) / 4, 0.5)

    def exact(x):
        with pyro.plate(name, x.shape[1], dim=-1):
            pyro.sample("z", posterior)

    covariance = torch.eye(3) + torch.ones(3, 3)
    expected = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x.T)
    rows = x.T.contiguous()
    check_evidence(lambda x: model(x.T), lambda x: exact(x.T), rows, expected)


def test_enumerated_site_in_a_plate_that_draws_its_rows_is_explained():
    """The plate draws three of six documents at random inside the programs."""
    x = torch.randn(6)

    def model(x):
        with pyro.plate("documents", 6, subsample_size=3) as rows:
            infer = {"enumerate": "parallel"}
            c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2), infer=infer)
            pyro.sample("x", dist.Normal(c.double(), 1.0), obs=x[rows])

    def guide(x):
        pass

    with pytest.raises(ValueError, match="draws 3 of the 6 rows"):
        pv.fit(model, guide, x, progress=False)


def test_autoguide_is_loaded_after_one_call(tmp_path):
    line, x = Line(), torch.randn(6)
    guide = pyro.infer.autoguide.AutoNormal(line.model)
    pv.fit(line.model, guide, x, epochs=1, progress=False)
    pv.save(tmp_path / "pair", line.model, guide)
    again = pyro.infer.autoguide.AutoNormal(line.model)
    with pytest.raises(ValueError, match="AutoGuides do, call it once on a minibatch"):
        pv.load(tmp_path / "pair", line.model, again)
    again(x)
    saved = pv.load(tmp_path / "pair", line.model, again)
    loss = {}
    for name, pair in (("before", (line.model, guide)), ("after", (saved.model, saved.guide))):
        torch.manual_seed(0)
        loss[name] = ELBO().loss(*pair, x)
    assert loss["before"] == loss["after"]
