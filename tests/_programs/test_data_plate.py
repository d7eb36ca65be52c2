"""The plate of the data points is found under any name, with or without a size."""

import contextlib
import functools
import gc
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import pyro_vae as pv
from pyro_vae._programs import data_plate

WEIGHT = torch.tensor([[0.8, -0.4, 0.3], [0.1, 0.9, -0.7]])
FIT = {"epochs": 2, "batch_size": 10, "seed": 1, "progress": False}

PLATES = {
    "sized": lambda name, x: pyro.plate(name, len(x)),
    "unsized": lambda name, x: pyro.plate(name),
    "subsampled": lambda name, x: pyro.plate(name, 60, subsample=x),
    "third dimension": lambda name, x: pyro.plate(name, len(x), dim=-1),
}


@pytest.fixture
def x():
    return torch.randn(30, 3)


def pair_of(of_model, of_guide=None, plate=PLATES["sized"]):
    """Return a linear Gaussian model and its exact posterior, with plates of the given names."""

    def model(x):
        with plate(of_model, x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT, 1.0).to_event(1), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.zeros(2))
        precision = torch.eye(2) + WEIGHT @ WEIGHT.T
        with plate(of_guide or of_model, x):
            mean = torch.linalg.solve(precision, (x @ WEIGHT.T).mT).mT + shift
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))

    return model, guide


def log_evidence(x):
    covariance = torch.eye(3) + WEIGHT.T @ WEIGHT
    return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)


@pytest.mark.parametrize("plate", PLATES.values(), ids=PLATES)
@pytest.mark.parametrize("names", [("cells", "cells"), ("data", "cells"), ("documents", "batch")])
def test_numbers_do_not_depend_on_the_name_of_the_plate(names, plate, x):
    results = []
    for of_model, of_guide in [("data", "data"), names]:
        used = PLATES["sized"] if not results and plate is PLATES["unsized"] else plate
        model, guide = pair_of(of_model, of_guide, used)
        with pv.parameter_store(model, guide):
            loss = pv.objectives.ELBO(num_particles=3).loss(model, guide, x)
        fit = pv.fit(model, guide, x, **FIT)
        evidence = pv.evidence(model, guide, x, num_particles=4, seed=2, progress=False)
        surgery = pv.elbo_surgery(model, guide, x, seed=3, progress=False)
        results.append([loss, *fit.history.loss, evidence.mean, surgery.marginal_kl])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_the_evidence_of_an_exact_posterior_is_exact_under_any_name(x):
    for plate in PLATES.values():
        model, guide = pair_of("observations", plate=plate)
        terms = pv.terms(model, guide, x, num_particles=3)
        torch.testing.assert_close(terms.log_weight, log_evidence(x).expand(3, -1))


def test_gradients_equal_those_of_pyro(x):
    model, guide = pair_of("cells")
    found = []
    pv.terms(model, guide, x)  # finds the plate
    for objective in (pyro.infer.Trace_ELBO(), pv.objectives.ELBO()):
        pyro.clear_param_store()
        torch.manual_seed(3)
        value = objective.differentiable_loss(model, guide, x)
        value.backward()
        found.append((value.item(), pyro.param("shift").grad.tolist()))
    (value, gradient), (ours, of_ours) = found
    assert ours == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(of_ours, gradient, rtol=1e-4, atol=1e-4)


def test_a_captured_fit_finds_the_plate(x, without_compiler):
    losses = []
    for capture in (False, True):
        model, guide = pair_of("cells", "batch")
        fit = pv.fit(model, guide, x, **FIT, capture=capture)
        losses.append(fit.history.loss)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_program_is_examined_once_and_forgotten_with_its_owner(x):
    model, guide = pair_of("cells")
    calls = []
    counted = functools.partial(lambda run, x: calls.append(1) or run(x), model)
    pv.terms(counted, guide, x)
    first = len(calls)
    pv.terms(counted, guide, x)
    assert (first, len(calls)) == (3, 4)  # a run, and two on other numbers of rows
    before = len(data_plate._found)
    gone = weakref.ref(model)
    del model, counted
    gc.collect()
    assert gone() is None
    assert len(data_plate._found) < before


def test_methods_of_one_module_have_their_own_plates(x):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

        def model(self, x):
            with pyro.plate("cells", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ WEIGHT, 1.0).to_event(1), obs=x)

        def guide(self, x):
            pyro.module("pair", self)
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))

    pair = Pair()
    assert pv.fit(pair.model, pair.guide, x, **FIT).history.loss.notna().all()
    assert pv.terms(pair.model, pair.guide, x, num_particles=2).log_weight.shape == (2, 30)


def test_latents_and_observations_may_be_in_two_plates_of_the_data(x):
    def model(x):
        with pyro.plate("latents", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("observations", len(x)):
            pyro.sample("x", dist.Normal(z @ WEIGHT, 1.0).to_event(1), obs=x)

    _, guide = pair_of("latents")
    terms = pv.terms(model, guide, x, num_particles=2)
    torch.testing.assert_close(terms.log_weight, log_evidence(x).expand(2, -1))


def test_a_program_for_one_number_of_rows_is_accepted_with_one_plate(x):
    loc = torch.zeros(30, 2)

    def model(x):
        with pyro.plate("cells", 30):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT, 1.0).to_event(1), obs=x)

    _, guide = pair_of("cells")
    terms = pv.terms(model, guide, x)
    torch.testing.assert_close(terms.log_weight, log_evidence(x).expand(1, -1))


def test_an_inner_plate_as_large_as_the_minibatch_is_not_the_data():
    def model(x):
        with pyro.plate("features", 3, dim=-1), pyro.plate("cells", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("features", 3, dim=-1), pyro.plate("cells", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(3, 3)
    expected = dist.Normal(0.0, 2**0.5).log_prob(x).sum(1)
    torch.testing.assert_close(pv.terms(model, guide, x).log_weight[0], expected)
    assert pv.evidence(model, guide, x, num_particles=2, progress=False).mean == pytest.approx(
        expected.mean().item(), rel=1e-5
    )


def square_pair():
    """Return a pair whose two plates both have the size of the minibatch, and x for it."""

    def model(x):
        rows, columns = pyro.plate("rows", len(x), dim=-1), pyro.plate("columns", len(x), dim=-2)
        with rows, columns:
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x @ x.mT)

    def guide(x):
        rows, columns = pyro.plate("rows", len(x), dim=-1), pyro.plate("columns", len(x), dim=-2)
        with rows, columns:
            shift = pyro.param("shift", torch.tensor(0.0))
            pyro.sample("z", dist.Normal(x @ x.mT / 2 + shift, 0.5**0.5))

    return model, guide, torch.randn(5, 2)


CALLS = {
    "terms": lambda m, g, x, **o: pv.terms(m, g, x, **o),
    "fit": lambda m, g, x, **o: pv.fit(m, g, x, epochs=1, progress=False, **o),
    "evidence": lambda m, g, x, **o: pv.evidence(m, g, x, num_particles=2, **o),
    "elbo_surgery": lambda m, g, x, **o: pv.elbo_surgery(m, g, x, **o),
    "collapse_report": lambda m, g, x, **o: pv.collapse_report(m, g, x, **o),
    "compare": lambda m, g, x, **o: pv.compare({"a": (m, g)}, x, num_particles=2, **o),
    "gradient_noise": lambda m, g, x, **o: pv.gradient_noise(
        m, g, x, [pv.objectives.ELBO()], repeats=2, **o
    ),
    "to_arviz": lambda m, g, x, **o: pv.to_arviz(m, g, x, num_draws=2, **o),
    "reconstruct": lambda m, g, x, **o: pv.reconstruct(m, g, x, by_site=True, **o),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_two_nested_plates_that_follow_the_minibatch_need_a_name(call):
    model, guide, x = square_pair()
    with pytest.raises(ValueError, match=r"'(rows|columns)', '(rows|columns)'.*plate="):
        call(model, guide, x)
    call(model, guide, x, plate="columns")
    model, guide, x = square_pair()
    pv.terms(model, guide, x, plate="columns")
    expected = dist.Normal(0.0, 2**0.5).log_prob(x @ x.mT)
    terms = pv.terms(model, guide, x)  # the name is kept
    torch.testing.assert_close(terms.log_weight[0], expected.sum(1))


def test_a_wrong_name_of_the_plate_is_refused_with_the_plates():
    model, guide, x = square_pair()
    with pytest.raises(ValueError, match=r"plates are, by size, \{.*'rows': 5"):
        pv.terms(model, guide, x, plate="cells")
    with pytest.raises(TypeError, match="plate must be the name"):
        pv.terms(model, guide, x, plate=3)


def test_a_latent_without_rows_in_a_plate_without_a_size_is_refused_by_name():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * torch.ones(len(x)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x.mean(), 1.0))

    with pytest.raises(ValueError, match="has no size"):
        pv.terms(model, guide, torch.randn(5))


@pytest.mark.parametrize("call", [pv.terms, pv.evidence, pv.elbo_surgery, pv.fit])
def test_a_plate_that_draws_rows_of_x_is_explained(call, x):
    """Pyro's tutorials draw minibatches in the model; here the data are minibatches."""

    def model(x):
        with pyro.plate("cells", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    def guide(x):
        with pyro.plate("cells", len(x), subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 1.0).to_event(1))

    with pytest.raises(ValueError, match=rf"'cells' draws 2 of the {len(x)} rows of x"):
        call(model, guide, x)


@pytest.mark.parametrize("name", ["cells", "data"])
def test_guides_of_the_library_find_the_plate_of_their_model(name, x):
    model, _ = pair_of(name)
    losses = []
    for plate in ("data", name):
        torch.manual_seed(0)
        model, _ = pair_of(plate)
        guide = pv.guides.AmortizedFlow(model, pv.nets.MLP(3, [8]), flow=pv.flows.Planar, length=2)
        losses.append(pv.fit(model, guide, x, **FIT).history.loss.tolist())
    assert losses[0] == losses[1]
    within = pyro.plate(name, 7)
    with within:
        assert guide(x[:7])["z"].shape == (7, 2)


@st.composite
def structures(draw):
    """Draw a batch size, the sizes of inner plates, and whether each follows the batch size."""
    batch = draw(st.integers(2, 5))
    inner = draw(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=2))
    return batch, inner, draw(st.integers(0, len(inner))), draw(st.booleans())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(structure=structures())
def test_random_plates_give_the_right_weights_or_an_error(structure):
    batch, inner, place, fixed = structure
    dims = list(range(-1, -len(inner) - 2, -1))
    data_dim = dims.pop(place)
    follows = any(f for _, f in inner)
    assume(not (fixed and follows))

    def sizes(x):
        rows = {data_dim: batch if fixed else len(x)}
        inner_sizes = [len(x) if of_batch else size for size, of_batch in inner]
        return rows | dict(zip(dims, inner_sizes, strict=True))

    def shape_of(x):
        return [size for _, size in sorted(sizes(x).items())]

    def spread(x):
        shape = [1] * (len(inner) + 1)
        shape[data_dim] = len(x)
        return x.reshape(shape).expand(shape_of(x))

    def program(x, *, of_model):
        value = spread(x)
        with contextlib.ExitStack() as stack:
            for dim, size in sizes(x).items():
                stack.enter_context(pyro.plate(f"plate{dim}", size, dim=dim))
            if not of_model:
                pyro.sample("z", dist.Normal(value / 2, 0.5**0.5))
                return
            z = pyro.sample("z", dist.Normal(torch.zeros(shape_of(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=value)

    model = functools.partial(program, of_model=True)
    guide = functools.partial(program, of_model=False)
    x = torch.randn(batch)
    count = torch.Size(shape_of(x)).numel() / batch
    expected = count * dist.Normal(0.0, 2**0.5).log_prob(x)
    same_size = any(size == batch for size, _ in inner)
    if follows or (fixed and same_size):
        with pytest.raises(ValueError, match=r"plate=|plates are, by size"):
            pv.terms(model, guide, x)
    else:
        torch.testing.assert_close(pv.terms(model, guide, x).log_weight[0], expected)
