"""Wrappers use the parameters of fitted programs; partials differ by their arguments."""

import argparse
import copy
import dataclasses
import functools
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae._utils.identity import method_of, owner_of


def make_pair():
    """Return a pair whose evidence is far off at the initial values of either program."""

    def model(x, weight=1.0):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(weight * z[..., None], 0.1).to_event(1), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.ones(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] + shift, 0.1))

    return model, guide


X = 5 + torch.linspace(-1, 1, 40)[:, None]


def options(**changes):
    return {"epochs": 60, "batch_size": 40, "learning_rate": 0.1, "seed": 0, "progress": False} | (
        changes
    )


def evidence(model, guide):
    return pv.evidence(model, guide, X, num_particles=50, seed=0).mean


def timed(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)

    return inner


def unmarked(function):
    def inner(*args):
        return function(*args)

    return inner


class Holder:
    def __init__(self, program):
        self.program = program

    def __call__(self, x):
        return self.program(x)

    def method(self, x):
        return self.program(x)


class Slots:
    __slots__ = ("__weakref__", "program")

    def __init__(self, program):
        self.program = program

    def __call__(self, x):
        return self.program(x)


class Module(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, x):
        return self.program(x)


def default(program):
    def inner(x, program=program):
        return program(x)

    return inner


WRAPPERS = {
    "lambda": lambda p: lambda x: p(x),
    "lambda in lambda": lambda p: lambda x: (lambda: p(x))(),
    "wraps": timed,
    "wraps twice": lambda p: timed(timed(p)),
    "closure": unmarked,
    "default argument": default,
    "callable object": Holder,
    "object with slots": Slots,
    "method": lambda p: Holder(p).method,
    "module": Module,
    "partial": functools.partial,
    "partial of a caller": lambda p: functools.partial(lambda x, call: call(x), call=p),
    "lambda of a partial": lambda p: lambda x: functools.partial(p)(x),
    "handler": lambda p: pyro.poutine.scale(p, scale=1.0),
    "handler of a lambda": lambda p: pyro.poutine.scale(lambda x: p(x), scale=1.0),
    "lambda of a handler": lambda p: lambda x: pyro.poutine.scale(p, scale=1.0)(x),
    "dictionary": lambda p: lambda x, programs={"p": p}: programs["p"](x),
}


@pytest.fixture(scope="module")
def fitted():
    """Return a fit and its evidence. The fit keeps the pair alive."""
    fit = pv.fit(*make_pair(), X, **options())
    return fit, evidence(fit.model, fit.guide)


@pytest.mark.filterwarnings("error:.*found no value of pyro.param")
@pytest.mark.parametrize("which", ["model", "guide", "both"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapper_uses_fitted_parameters(wrapper, which, fitted):
    fit, value = fitted
    wrap = WRAPPERS[wrapper]
    model = fit.model if which == "guide" else wrap(fit.model)
    guide = fit.guide if which == "model" else wrap(fit.guide)
    assert evidence(model, guide) == pytest.approx(value, rel=1e-6)


@pytest.mark.filterwarnings("error:.*found no value of pyro.param")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_program_uses_parameters_fitted_through_its_wrapper(wrapper):
    model, guide = make_pair()
    wrap = WRAPPERS[wrapper]
    fit = pv.fit(wrap(model), wrap(guide), X, **options(epochs=5))
    assert evidence(model, guide) == pytest.approx(evidence(fit.model, fit.guide), rel=1e-6)


def test_all_functions_use_fitted_parameters_through_a_wrapper(fitted, tmp_path):
    fit, value = fitted
    model, guide = timed(fit.model), lambda x: fit.guide(x)
    pairs = (fit.model, fit.guide), (model, guide)
    surgeries = [pv.elbo_surgery(*pair, X, seed=0) for pair in pairs]
    assert surgeries[0].elbo == pytest.approx(surgeries[1].elbo, rel=1e-6)
    drawn = [pv.generate(m, X, guide=g, seed=0) for m, g in ((fit.model, fit.guide), (model, None))]
    assert torch.equal(*drawn)
    comparison = pv.compare({"fit": fit, "wrapped": (model, guide)}, X, num_particles=50)
    assert comparison.difference("wrapped").mean == pytest.approx(0.0, abs=1e-5)
    exported = pv.to_arviz(model, guide, X, num_draws=4, seed=0)
    assert abs(exported.posterior["z"].mean().item() - 5) < 0.2
    values = []
    for pair in pairs:
        with pv.parameter_store(*pair):
            values.append(pyro.param("loc").item())
    assert values[0] == values[1] > 3
    pv.save(tmp_path / "pair", model, guide)
    other = make_pair()
    pv.load(tmp_path / "pair", *other)
    assert evidence(*other) == pytest.approx(value, rel=1e-6)


def test_lambda_uses_parameters_of_fitted_methods():
    class Pair:
        model, guide = (staticmethod(p) for p in make_pair())

        def p(self, x):
            self.model(x)

        def q(self, x):
            self.guide(x)

    pair = Pair()
    fit = pv.fit(pair.p, pair.q, X, **options())
    value = evidence(fit.model, fit.guide)
    assert evidence(lambda x: pair.p(x), lambda x: pair.q(x)) == pytest.approx(value, rel=1e-6)


def two_fits():
    first, second = make_pair(), make_pair()
    fits = [pv.fit(*first, X, **options()), pv.fit(*second, X - 9, **options())]
    return fits, first, second


def test_two_fitted_programs_in_a_wrapper_are_ambiguous():
    fits, (a, guide), (b, _) = two_fits()

    def free(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], 0.1))

    with pytest.raises(ValueError, match=r"fitted with 2 guides, and pyro.param values such as 'l"):
        evidence(lambda x: a(x) if len(x) else b(x), free)
    # The guide of one fit selects this fit.
    both = lambda x: a(x) if len(x) else b(x)  # noqa: E731
    assert evidence(both, guide) == pytest.approx(evidence(fits[0].model, guide), rel=1e-6)


def test_guide_selects_the_fit_of_a_model():
    model, guide = make_pair()
    other = make_pair()[1]
    fits = [pv.fit(model, guide, X, **options()), pv.fit(model, other, X - 9, **options())]
    for fit in fits:
        value = pv.evidence(fit.model, fit.guide, X, num_particles=20, seed=0).mean
        through = pv.evidence(timed(model), fit.guide, X, num_particles=20, seed=0).mean
        assert through == pytest.approx(value, rel=1e-6)
    assert fits[0].digests != fits[1].digests


def test_model_and_guide_of_different_fits_are_ambiguous():
    """One name in both programs has two values."""

    def make():
        def model(x):
            pyro.param("both", torch.zeros(()))
            make_pair()[0](x)

        def guide(x):
            pyro.param("both", torch.zeros(()))
            make_pair()[1](x)

        return model, guide

    fits = [pv.fit(*make(), X, **options(epochs=1)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"fitted with other partners, .* such as 'both'"):
        evidence(fits[0].model, fits[1].guide)


def test_pair_that_was_not_fitted_warns(fitted):
    """It is not an error: a user may evaluate a pair before a fit."""
    model, guide = make_pair()
    with pytest.warns(UserWarning, match="found no value of pyro.param 'loc'"):
        initial = evidence(lambda x: model(x), guide)
    assert initial < fitted[1] - 10


def scaled(x, sizes):
    weight = sizes["weights"][0] if isinstance(sizes, dict) else 1.0
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
        pyro.sample("x", dist.Normal(weight * z[..., None], 0.1).to_event(1), obs=x)


@dataclasses.dataclass
class Config:
    k: int
    layers: list


ARGUMENTS = {
    "list": lambda: [2],
    "dictionary": lambda: {"weights": [1.0]},
    "set": lambda: {1, 2},
    "nested": lambda: ({"a": [1, {2}]}, [[3]]),
    "array": lambda: np.arange(3.0),
    "array of objects": lambda: np.array([None, "a"], dtype=object),
    "namespace": lambda: types.SimpleNamespace(k=[2]),
    "argparse": lambda: argparse.Namespace(k=[2]),
    "dataclass": lambda: Config(2, [3]),
    "slice": lambda: slice(0, 2),
    "number": lambda: 2,
    "text": lambda: "two",
}
OTHERS = {
    "list": [3], "dictionary": {"weights": [2.0]}, "set": {1}, "nested": ({"a": [1, {2}]}, [[4]]),
    "array": np.arange(4.0), "array of objects": np.array([None, "b"], dtype=object),
    "namespace": types.SimpleNamespace(k=[3]), "argparse": argparse.Namespace(k=[3]),
    "dataclass": Config(2, [4]), "slice": slice(0, 3), "number": 2.0, "text": "three",
}  # fmt: skip


@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("by_keyword", [False, True])
def test_partials_with_equal_arguments_of_any_type_are_one_program(kind, by_keyword):
    def turned(sizes, x):
        scaled(x, sizes)

    def wrap(value):
        if by_keyword:
            return functools.partial(scaled, sizes=value)
        return functools.partial(turned, value)

    guide = make_pair()[1]
    pv.fit(wrap(ARGUMENTS[kind]()), guide, X, **options(epochs=2))
    first = wrap(ARGUMENTS[kind]())
    assert method_of(first) == method_of(wrap(ARGUMENTS[kind]()))
    assert hash(method_of(first)) == hash(method_of(wrap(ARGUMENTS[kind]())))
    assert method_of(first) != method_of(wrap(OTHERS[kind]))
    with pv.parameter_store(first, guide):
        loc = pyro.param("loc").item()
        assert loc != 0
    pv.fit(wrap(OTHERS[kind]), guide, X, **options(epochs=1))
    with pv.parameter_store(first, guide):  # another program has another store
        assert pyro.param("loc").item() == loc


@pytest.mark.parametrize("value", [torch.zeros(2), nn.Linear(1, 1), nn.Parameter(torch.zeros(2))])
def test_partials_of_two_tensors_or_modules_are_two_programs(value):
    first = functools.partial(scaled, sizes=value)
    assert method_of(first) == method_of(functools.partial(scaled, sizes=value))
    assert method_of(first) != method_of(functools.partial(scaled, sizes=copy.deepcopy(value)))
    assert owner_of(first) is scaled


def test_partial_with_a_recursive_argument_is_fitted():
    own = []
    own.append(own)
    model, guide = functools.partial(scaled, sizes=own), make_pair()[1]
    pv.fit(model, guide, X, **options(epochs=1))
    assert method_of(model) == method_of(model)
    assert evidence(model, guide) < 0
