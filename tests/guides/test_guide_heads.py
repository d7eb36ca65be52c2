"""A guide makes its head at its first call, which must not change the result."""

import copy

import pyro.distributions as dist
import pytest
import torch
from guide_table import DENSITIES, Model

import pyro_vae as pv
from pyro_vae import guides, objectives

MAKERS = {
    **{n: DENSITIES[n] for n in ("normal", "mixture", "planar", "hierarchical")},
    "semi-amortized": lambda model, encoder: guides.SemiAmortized(
        guides.AmortizedNormal(model, encoder), steps=2
    ),
}


def pair(name, x):
    model = Model()
    return model, MAKERS[name](model, pv.nets.MLP(x.shape[-1], [7]))


def loaded(guide, model):
    """Return a copy as after load_state_dict: its head is made at the next call."""
    state = guide.state_dict()
    name = "guide." if isinstance(guide, guides.SemiAmortized) else ""
    fresh = copy.deepcopy(guide)
    inner = fresh.guide if name else fresh
    inner.built = type(inner.built)()
    if isinstance(inner, guides.HierarchicalGuide):
        inner._sites = ()
    fresh.load_state_dict(state)
    return fresh


FUNCTIONS = {
    "evidence": lambda m, g, x: pv.evidence(m, g, x, num_particles=10, seed=0).values,
    "naive evidence": lambda m, g, x: (
        pv.evidence(m, g, x, num_particles=10, method="naive", seed=0).values
    ),
    "surgery": lambda m, g, x: torch.tensor(pv.elbo_surgery(m, g, x, seed=0).elbo),
    "collapse": lambda m, g, x: torch.as_tensor(
        pv.collapse_report(m, g, x, seed=0).units.kl.to_numpy()
    ),
    "reconstruct": lambda m, g, x: pv.reconstruct(m, g, x, seed=0),
}


CASES = [
    pytest.param(n, f, marks=() if n == "normal" or f == "evidence" else pytest.mark.slow)
    for n in MAKERS
    for f in FUNCTIONS
    if (n, f) != ("semi-amortized", "surgery")
]


@pytest.mark.filterwarnings("ignore::pyro_vae.evaluation.UnreliableEvidence")
@pytest.mark.parametrize(("name", "function"), CASES)
def test_first_call_returns_the_same_as_the_second(name, function):
    x = torch.randn(20, 5)
    model, guide = pair(name, x)
    guide(x)
    fresh = loaded(guide, model)
    expected = FUNCTIONS[function](model, guide, x)
    for _ in range(2):
        found = FUNCTIONS[function](model, fresh, x)
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("name", MAKERS)
def test_losses_and_terms_of_the_first_call_are_the_same(name, num_particles):
    x = torch.randn(20, 5)
    model, guide = pair(name, x)
    guide(x)
    fresh, found = loaded(guide, model), []
    for program in (guide, fresh, fresh):
        objective = objectives.ELBO(num_particles)
        torch.manual_seed(3)
        loss = objective.loss(model, program, x)
        t = pv.terms(model, program, x, num_particles=num_particles)
        found.append(torch.cat([torch.tensor([loss]), t.log_weight.detach().flatten()]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[1], found[2])


@pytest.mark.parametrize("name", MAKERS)
def test_head_depends_on_the_seed(name):
    x, heads = torch.randn(20, 5), []
    model = Model()
    encoder = pv.nets.MLP(5, [7])
    for seed in (0, 0, 1):
        guide = MAKERS[name](model, copy.deepcopy(encoder))
        torch.manual_seed(seed)
        guide(x)
        heads.append(torch.cat([p.detach().flatten() for p in guide.parameters()]))
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("name", MAKERS)
def test_guide_first_called_under_inference_mode_can_be_trained(name):
    x = torch.randn(40, 5)
    model, guide = pair(name, x)
    with torch.inference_mode():
        pv.evidence(model, guide, x, num_particles=5)
    fit = pv.fit(model, guide, x, epochs=2, batch_size=20, progress=False)
    assert fit.history.loss.notna().all()
    before = [p.detach().clone() for p in guide.parameters()]
    pv.fit(model, guide, x, epochs=1, batch_size=20, progress=False)
    assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


def test_sequence_guide_first_called_under_inference_mode_can_be_trained():
    model = pv.models.SequenceModel(
        prior=pv.priors.StandardNormal(2),
        transition=lambda z: dist.Normal(0.9 * z, 0.4).to_event(1),
        likelihood=lambda z: dist.Normal(z, 0.1).to_event(1),
    )
    guide = guides.SequenceGuide(model, recurrent=4, hidden=[5])
    x = torch.randn(6, 3, 2)
    with torch.inference_mode():
        guide(x)
    pv.fit(model, guide, x, epochs=1, batch_size=3, progress=False)
