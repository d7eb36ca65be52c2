"""Compare the exemplar prior with its definition, and its codes with those of the guide."""

import copy

import pyro
import pytest
import torch
from capturing import check_same
from conftest import make_pair

import pyro_vae as pv
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._utils.numerics import inverse_softplus_scale, softplus_scale
from pyro_vae.priors import _exemplar

D, LATENT = 16, 2


class Model(pyro.nn.PyroModule):
    def __init__(self, prior):
        super().__init__()
        self.prior = prior
        self.likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(LATENT, [8], D))

    def forward(self, x, index=None):
        p_z = self.prior(index)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", p_z)
            return pyro.sample("x", self.likelihood(z), obs=x)


class Encoder(pv.nets.MLP):
    def forward(self, x, index=None):
        return super().forward(x)


def make(exemplars, **options):
    """Return a pair in training mode, with random parameters."""
    prior = pv.priors.ExemplarPrior(LATENT, exemplars=exemplars, **options)
    model = Model(prior)
    guide = pv.guides.AmortizedNormal(model, Encoder(D, [8]))
    prior.bind_guide(guide)
    guide(exemplars, torch.arange(len(exemplars)))
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, guide


def codes(guide, x):
    with torch.no_grad():
        trace = pyro.poutine.trace(guide).get_trace(x)
    return trace.nodes["z"]["fn"].base_dist.loc


def log_mixture(z, means, prior):
    """Return the log-density of an even mixture by its definition, for one z (..., D)."""
    scale = softplus_scale(prior.raw_scale).double()
    normal = torch.distributions.Normal(means.double(), scale)
    joint = normal.log_prob(z.double().unsqueeze(-2)).sum(-1)
    return (joint.logsumexp(-1) - torch.log(torch.tensor(float(len(means))))).float()


@pytest.mark.parametrize("options", [{}, {"num_nearest": 11}, {"num_drawn": 12}])
def test_a_data_point_has_a_mixture_of_all_other_exemplars(options):
    x = torch.rand(12, D)
    model, guide = make(x, **options)
    index = torch.tensor([3, 0, 7, 3])
    p = model.prior(index)
    assert p.batch_shape == (4,)
    assert p.event_shape == (LATENT,)
    z = torch.randn(5, 4, LATENT)
    means = codes(guide, x)
    for row, own in enumerate(index):
        others = torch.arange(12) != own
        expected = log_mixture(z[:, row], means[others], model.prior)
        torch.testing.assert_close(p.log_prob(z)[:, row], expected, rtol=1e-5, atol=1e-5)
    assert p.expand((5, 4)).sample().shape == (5, 4, LATENT)


def test_a_sample_of_exemplars_has_none_twice_and_not_ones_own():
    x = torch.rand(30, D)
    model, guide = make(x, num_drawn=9)
    means, index, seen = codes(guide, x), torch.arange(30), set()
    for _ in range(200):
        p = model.prior(index)
        assert len(p.loc) == 9
        drawn = torch.cdist(p.loc, means).argmin(1)
        torch.testing.assert_close(p.loc, means[drawn])
        assert len(drawn.unique()) == 9
        assert torch.equal(p.logits == -torch.inf, drawn == index.unsqueeze(1))
        seen |= {*drawn.tolist()}
    assert seen == {*range(30)}
    assert len(model.prior().loc) == 9
    assert len(model.eval().prior(index).loc) == 30


@pytest.mark.parametrize(("k", "offset"), [(1, 0.0), (4, 0.0), (20, 0.0), (4, 1e4)])
def test_the_mixture_has_the_nearest_exemplars_of_the_minibatch(k, offset):
    """Far from zero, expanded squares of distances would cancel."""
    x = torch.rand(40, D)
    model, guide = make(x, num_nearest=k)
    with torch.no_grad():
        guide.built.head.bias[:LATENT] += offset
    for part in torch.arange(40).split(4):  # fills the stored codes
        model.prior(part)
    means = codes(guide, x)
    torch.testing.assert_close(model.prior.stored_codes, means)
    index = torch.randperm(40)[:6]
    distance = torch.cdist(means[index].double(), means.double())
    distance[torch.arange(6), index] = torch.inf
    nearest = distance.topk(k, largest=False).indices.unique()
    z = means[index] + torch.randn(3, 6, LATENT)
    found = model.prior(index).log_prob(z)
    for row, own in enumerate(index):
        used = means[nearest[nearest != own]]
        expected = log_mixture(z[:, row], used, model.prior)
        torch.testing.assert_close(found[:, row], expected, rtol=1e-5, atol=1e-5)


def test_stored_codes_are_those_of_the_current_guide_and_part_of_the_state():
    x = torch.rand(20, D)
    model, guide = make(x, num_drawn=8, num_nearest=2)
    model.prior.stored_codes.zero_()
    index = torch.tensor([1, 4])
    model.prior(index)
    stored = model.prior.stored_codes
    torch.testing.assert_close(stored[index], codes(guide, x[index]))
    known = stored.ne(0).any(1)
    assert 3 <= known.sum() <= 6
    torch.testing.assert_close(stored[known], codes(guide, x)[known])
    again = type(model.prior)(**model.prior.as_arguments())
    again.bind_guide(guide)
    again.load_state_dict(model.prior.state_dict())
    assert torch.equal(again.stored_codes, stored)


def test_gradients_are_those_of_the_definition():
    """The gradient also reaches the guide through the codes of the exemplars."""
    x = torch.rand(15, D)
    model, guide = make(x, num_nearest=14)
    z, index = torch.randn(3, LATENT), torch.tensor([2, 5, 9])
    parameters = [p for p in model.prior.parameters() if p.requires_grad]
    found = torch.autograd.grad(model.prior(index).log_prob(z).sum(), parameters, allow_unused=True)
    means = pyro.poutine.trace(guide).get_trace(x).nodes["z"]["fn"].base_dist.loc
    expected = sum(
        log_mixture(z[row], means[torch.arange(15) != own], model.prior)
        for row, own in enumerate(index)
    )
    expected = torch.autograd.grad(expected, parameters, allow_unused=True)
    reached = 0
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            reached += a.abs().sum() > 0
    assert reached >= 4  # the scale and the encoder


@pytest.mark.parametrize(
    "options", [{}, {"num_drawn": 20}, {"num_drawn": 20, "num_nearest": 3}], ids=str
)
def test_captured_steps_equal_eager_steps(options, binary, without_compiler):
    data = (binary, torch.arange(len(binary)))
    check_same(lambda: make(binary.to(torch.get_default_dtype()), **options), data, double=True,
               objective=pv.objectives.IWAE(2), execution="captured, not compiled")  # fmt: skip


def test_a_fit_resumes_with_its_stored_codes(binary, tmp_path):
    data = (binary, torch.arange(len(binary)))

    def run(epochs, checkpoint=None):
        torch.manual_seed(1)
        pair = make(binary, num_drawn=20, num_nearest=3)
        return pv.fit(*pair, data, epochs=epochs, batch_size=10, seed=0, validation=data,
                      checkpoint=checkpoint, progress=False)  # fmt: skip

    whole = run(6)
    run(3, pv.training.Checkpoint(tmp_path / "run", resume=True))
    resumed = run(6, pv.training.Checkpoint(tmp_path / "run", resume=True))
    assert resumed.history.loss.values == pytest.approx(whole.history.loss.values, rel=1e-6)
    assert torch.equal(resumed.model.prior.stored_codes, whole.model.prior.stored_codes)
    assert torch.equal(resumed.model.prior.raw_scale, whole.model.prior.raw_scale)


def test_only_ones_own_exemplar_favors_a_narrow_gaussian():
    """At a code, the density of its own Gaussian rises without limit as sigma falls to zero."""
    x, index = torch.rand(40, D).round(), torch.arange(40)
    model, guide = make(x)
    z, found = codes(guide, x), []
    for scale in (0.001, 0.01, 0.1, 1.0):
        with torch.no_grad():
            model.prior.raw_scale.copy_(inverse_softplus_scale(scale))
            found.append([model.prior(i).log_prob(z).mean().item() for i in (None, index)])
    (narrow, narrow_without), *_, (wide, wide_without) = found
    assert narrow > wide
    assert narrow_without < wide_without


def test_an_evaluation_encodes_all_exemplars_once():
    """Between evaluations, the guide may change in any way."""
    x = torch.rand(12, D)
    model, guide = make(x)
    guide.register_buffer("shift", torch.zeros(8))
    calls = []

    def shift(encoder, inputs, output):
        calls.append(len(inputs[0]))
        return output + guide.shift

    guide.encoder.register_forward_hook(shift)
    z = torch.randn(6, LATENT)

    def check(count):
        means = codes(guide, model.prior.exemplars)
        calls.clear()
        p = model.prior()
        torch.testing.assert_close(p.log_prob(z), log_mixture(z, means, model.prior).to(z))
        assert sum(calls) == count

    def change():
        guide.shift.add_(0.5)
        guide.encoder[0].weight.data.mul_(1.1)
        model.prior.exemplars[0].add_(0.5)

    for _ in range(2):
        with evaluation_mode(model, guide):
            check(12)
            check(0)
        change()
        with evaluation_mode(model):
            check(12)
            with evaluation_mode(guide):
                check(12)
            check(0)
        model.eval()
        with torch.no_grad():
            check(12)
            change()
            check(12)
        model.train()


def test_a_validation_encodes_all_exemplars_once(binary):
    data = (binary, torch.arange(len(binary)))

    def encodings(epochs):
        model, guide = make(binary, num_drawn=20, num_nearest=3)
        sizes = []
        guide.encoder.register_forward_hook(lambda m, inputs, _: sizes.append(len(inputs[0])))
        pv.fit(model, guide, data, validation=data, epochs=epochs, batch_size=10, progress=False)
        return sizes.count(len(binary))

    assert encodings(4) - encodings(1) == 3


def test_codes_for_evaluation_have_gradients_where_they_are_asked_for():
    x = torch.rand(12, D)
    model, guide = make(x)
    model.eval()
    weight = guide.encoder[0].weight
    model.prior().log_prob(torch.randn(LATENT)).backward()
    assert weight.grad.abs().sum() > 0
    with evaluation_mode(model, guide):
        model.prior()
        weight.grad = None
        with torch.enable_grad():
            model.prior().log_prob(torch.randn(LATENT)).backward()
    assert weight.grad.abs().sum() > 0
    assert copy.deepcopy(model).prior().loc.shape == (12, LATENT)


ESTIMATORS = {
    "evidence": lambda *pair, x, c: pv.evidence(
        *pair, x, num_particles=20, batch_size=10, pairs_per_pass=100, seed=0, capture=c
    ).mean,
    "AIS": lambda *pair, x, c: pv.evidence(
        *pair, x[:9], method=pv.evaluation.AIS(2, 5, leapfrog_steps=2, step_size=0.3), seed=0,
        capture=c
    ).mean,
    "gaps": lambda *pair, x, c: pv.inference_gaps(
        *pair, x[:10], num_particles=20, ascent=pv.evaluation.Ascent(window=5, patience=1),
        seed=0, capture=c
    ).approximation_gap.mean,
    "surgery": lambda *pair, x, c: pv.elbo_surgery(*pair, x, seed=0).mutual_information,
}  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_encode_all_exemplars_once(name, binary, without_compiler, monkeypatch):
    """Also those that are captured, and those with gradients in z. The results are the same."""
    exemplars = torch.rand(33, D).round()
    model, guide = make(exemplars, num_drawn=20, num_nearest=3)
    found, counts = [], []
    for capture in (False, True):
        for once in (True, False):
            encoded = []

            def count(prior, method=pv.priors.ExemplarPrior._all_codes, encoded=encoded):
                encoded.append(1)
                return method(prior)

            with monkeypatch.context() as patch:
                patch.setattr(pv.priors.ExemplarPrior, "_all_codes", count)
                if not once:
                    patch.setattr(
                        _exemplar, "once_per_evaluation", lambda owner, compute: compute()
                    )
                found.append(ESTIMATORS[name](model, guide, x=binary, c=capture))
            counts.append(len(encoded))
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)
    once, every, once_captured, _ = counts
    assert once <= 5  # the checks before an estimate are evaluations too
    assert once_captured <= 5
    assert every >= 2 * once


def test_a_fit_tells_that_positions_are_wrong(binary, without_compiler):
    count = len(binary)
    for wrong in (-1, count):
        index = torch.arange(count)
        index[7] = wrong
        model, guide = make(binary, num_drawn=20)
        with pytest.raises(ValueError, match=f"between 0 and {count - 1}"):
            pv.fit(model, guide, (binary, index), batch_size=4, epochs=4, progress=False)
    index[7] = count
    model, guide = make(binary, num_drawn=20)
    data = (binary, torch.arange(count))

    def replace():
        data[1].copy_(index)

    with pytest.raises((IndexError, ValueError), match=r"positions|out of bounds"):
        pv.fit(model, guide, data, batch_size=4, epochs=4, capture=True, progress=False,
               after_epoch=lambda epoch, row: replace())  # fmt: skip


def test_bad_arguments_are_refused():
    x = torch.rand(5, D)
    create = pv.priors.ExemplarPrior
    with pytest.raises(ValueError, match="between 1 and the 5 exemplars"):
        create(LATENT, exemplars=x, num_drawn=6)
    for options, most in (({}, 4), ({"num_drawn": 3}, 2), ({"num_drawn": 1}, 0)):
        for number in (0, most + 1):
            with pytest.raises(ValueError, match=f"num_nearest must be between 1 and {most}"):
                create(LATENT, exemplars=x, num_nearest=number, **options)
    model, _ = make(x, num_nearest=2)
    with pytest.raises(ValueError, match="needs the minibatch's positions"):
        model.prior()
    for index in (torch.tensor([0.0]), torch.tensor(3), torch.tensor([True]), x):
        with pytest.raises(ValueError, match="as integers"):
            model.prior(index)
    with pytest.raises(TypeError, match="index must be a tensor, got list"):
        model.prior([0, 1])
    for index in (torch.tensor([5, 0]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="between 0 and 4"):
            model.prior(index)
    prior = create(LATENT, exemplars=x, num_drawn=1)
    model, guide = make_pair(LATENT, D)
    prior.bind_guide(guide)
    assert len(prior().loc) == 1
    with pytest.raises(ValueError, match="at least two"):
        prior(torch.tensor([0]))
    prior = create(LATENT, exemplars=x)
    with pytest.raises(ValueError, match=r"call prior\.bind_guide"):
        prior()
    other, _ = make_pair()
    flow = pv.guides.AmortizedFlow(other, pv.nets.MLP(D, [8]), flow=pv.flows.NeuralSpline)
    prior.bind_guide(flow)
    for mode in (True, False):
        with pytest.raises(ValueError, match="needs a guide that is a diagonal Gaussian"):
            prior.train(mode)()
