"""A program is examined again when it opens other plates, and without an effect on its state."""

import contextlib
import copy
import functools
import math
import pickle
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae._programs import data_plate

ROWS = 6


def pair_of(plates_of_model, plates_of_guide=None):
    """Return a model of x given z = x, and its exact posterior, inside the plates of functions.

    Each function maps x to a list of (name, size, dimension). Sites have the shape of x.
    """

    def opened(plates_of, x):
        stack = contextlib.ExitStack()
        for name, size, dim in plates_of(x):
            stack.enter_context(pyro.plate(name, size, dim=dim))
        return stack

    def model(x):
        with opened(plates_of_model, x):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with opened(plates_of_guide or plates_of_model, x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    return model, guide


def log_evidence(x):
    """Return log p(x) of each data point; inner dimensions are summed."""
    log_prob = dist.Normal(0.0, 2**0.5).log_prob(x)
    return log_prob.reshape(len(x), -1).sum(1)


def right(model, guide, x):
    """Assert that the log-weights are exact."""
    torch.testing.assert_close(pv.terms(model, guide, x).log_weight[0], log_evidence(x))


def test_another_branch_may_call_the_plate_differently():
    def plates(x):
        name, other = ("cells", "genes") if x.shape[1] == 3 else ("genes", "cells")
        return [(name, len(x), -2), (other, x.shape[1], -1)]

    pair = pair_of(plates)
    for columns in (3, 4, 3, ROWS, 4):
        right(*pair, torch.randn(ROWS, columns))


def test_a_flag_may_exchange_the_names():
    names = ["cells", "genes"]
    pair = pair_of(lambda x: [(names[0], len(x), -2), (names[1], x.shape[1], -1)])
    for columns in (3, ROWS, 3, ROWS):
        right(*pair, torch.randn(ROWS, columns))
        names.reverse()


@pytest.mark.parametrize("columns", [(ROWS, ROWS), (ROWS, 3, ROWS), (3, ROWS, ROWS)])
def test_a_flag_may_exchange_the_names_of_plates_of_one_size(columns):
    class Names(nn.Module):
        exchanged = False

        def forward(self, x):
            names = ("genes", "cells") if self.exchanged else ("cells", "genes")
            return [(names[0], len(x), -2), (names[1], x.shape[1], -1)]

    names = Names()
    pair = pair_of(names)
    for count in columns * 2:
        right(*pair, torch.randn(ROWS, count))
        names.exchanged = not names.exchanged


@st.composite
def runs(draw):
    """Draw runs of one program: names and sizes of plates, and the place and kind of the data's."""
    names = draw(st.permutations(["data", "a", "b", "c"]))
    inner = draw(st.integers(0, 2))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = [draw(st.integers(1, 4)) for _ in range(inner + 1)]
        place = draw(st.integers(0, inner))
        kind = draw(st.sampled_from(["sized", "unsized", "subsample"]))
        found.append((draw(st.permutations(names)), sizes, place, kind))
    return found


@settings(max_examples=150, deadline=None)
@given(runs())
def test_random_sequences_of_plates_have_exact_weights(runs):
    now = {}

    def program(x, *, of_model):
        dims = [d - len(now["sizes"]) for d in range(len(now["sizes"]))]
        shape = [len(x) if d == now["place"] else size for d, size in enumerate(now["sizes"])]
        along = [len(x) if d == now["place"] else 1 for d in range(len(shape))]
        value = x.reshape(along).expand(shape)
        with contextlib.ExitStack() as stack:
            for d, (name, size) in enumerate(zip(now["names"], shape, strict=False)):
                size, options = (size if d != now["place"] else len(x)), {}
                if d == now["place"] and now["kind"] == "unsized":
                    size = None
                elif d == now["place"] and now["kind"] == "subsample":
                    size, options = 50, {"subsample": x}
                stack.enter_context(pyro.plate(name, size, dim=dims[d], **options))
            if of_model:
                z = pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=value)
            else:
                pyro.sample("z", dist.Normal(value / 2, 0.5**0.5))

    model = functools.partial(program, of_model=True)
    guide = functools.partial(program, of_model=False)
    for names, sizes, place, kind in runs:
        now.update(names=list(names), sizes=sizes, place=place, kind=kind)
        x = torch.randn(sizes[place])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            terms = pv.terms(model, guide, x, num_particles=2)
        count = math.prod(sizes) // len(x)
        expected = count * dist.Normal(0.0, 2**0.5).log_prob(x)
        torch.testing.assert_close(terms.log_weight, expected.expand(2, -1))
        assert terms.scale == pytest.approx(50 / len(x) if kind == "subsample" else 1.0)


def test_a_plate_data_of_another_branch_is_preferred():
    def plates(x):
        name = "data" if x.shape[1] > 3 else "cells"
        return [(name, len(x), -2), ("genes", x.shape[1], -1)]

    pair = pair_of(plates)
    for columns in (3, 4, ROWS):
        right(*pair, torch.randn(ROWS, columns))


def test_an_own_plate_data_of_the_rows_is_preferred_over_a_nested_one():
    # Both follow the rows. The name "data" decides.
    pair = pair_of(lambda x: [("data", len(x), -2), ("others", len(x), -1)])
    x = torch.randn(ROWS, ROWS)
    right(*pair, x)
    with pytest.raises(ValueError, match="plate="):
        right(*pair_of(lambda x: [("a", len(x), -2), ("b", len(x), -1)]), x)


def test_an_inner_plate_called_data_is_not_the_data_plate():
    pair = pair_of(lambda x: [("cells", len(x), -2), ("data", x.shape[1], -1)])
    for columns in (ROWS, 3, ROWS):  # first with as many columns as rows
        right(*pair, torch.randn(ROWS, columns))
    for rows in (1, 2, 3):
        right(*pair, torch.randn(rows, 3))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("name", ["data", "cells"])
@pytest.mark.parametrize("data_dim", [-1, -2])
def test_minibatches_of_few_rows(rows, name, data_dim):
    def plates(x):
        return [
            (name, x.shape[data_dim], data_dim),
            ("inner", x.shape[-3 - data_dim], -3 - data_dim),
        ]

    def flipped(program, x):
        return program(x if data_dim == -2 else x.mT)

    model, guide = (functools.partial(flipped, each) for each in pair_of(plates))
    for columns in (1, 2, 3):
        right(model, guide, torch.randn(rows, columns))


def test_training_and_evaluation_may_open_other_plates():
    class Switch(nn.Module):
        def forward(self, x):
            names = ("cells", "genes") if self.training else ("genes", "cells")
            return [(names[0], len(x), -2), (names[1], x.shape[1], -1)]

    switch = Switch()
    model, guide = pair_of(switch)
    x = torch.randn(12, 3)
    pv.terms(model, guide, x)
    evidence = pv.evidence(model, guide, x, num_particles=2, progress=False)
    torch.testing.assert_close(evidence.values.float(), log_evidence(x))
    right(model, guide, x)


def test_two_names_for_the_same_rows_are_both_the_data():
    for names in (("data", "cells"), ("cells", "data"), ("cells", "rows")):

        def model(x, names=names):
            with pyro.plate(names[0], len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            with pyro.plate(names[1], len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        _, guide = pair_of(lambda x: [("data", len(x), -1)])
        right(model, guide, torch.randn(ROWS))


def test_a_global_plate_as_large_as_the_minibatch_stays_global():
    for name in ("data", "cells"):

        def model(x, name=name):
            with pyro.plate("topics", ROWS):
                w = pyro.sample("w", dist.Normal(torch.zeros(ROWS), 1.0))
            with pyro.plate(name, len(x)):
                pyro.sample("x", dist.Normal(w.mean(-1, keepdim=True), 1.0), obs=x)

        def guide(x):
            with pyro.plate("topics", ROWS):
                pyro.sample("w", dist.Normal(torch.zeros(ROWS), 1.0))

        terms = pv.terms(model, guide, torch.randn(ROWS))
        torch.testing.assert_close(terms.log_weight_global, torch.zeros(1))
        assert terms.samples == {}


def test_a_covariate_with_as_many_rows_as_x_by_chance_is_refused_or_right():
    def model(x, w, name):
        with pyro.plate("features", len(w)):
            v = pyro.sample("v", dist.Normal(torch.zeros(len(w)), 1.0))
        with pyro.plate(name, len(x)):
            pyro.sample("x", dist.Normal(v.mean(-1, keepdim=True), 1.0), obs=x)

    def guide(x, w, name):
        with pyro.plate("features", len(w)):
            pyro.sample("v", dist.Normal(torch.zeros(len(w)), 1.0))

    x, w = torch.randn(ROWS), torch.randn(ROWS)
    for name in ("data", "cells"):
        model_, guide_ = (functools.partial(p, name=name) for p in (model, guide))
        with pytest.raises(ValueError, match="plate="):
            pv.terms(model_, guide_, x, w)


def test_rows_in_a_covariate_a_named_tuple_and_an_array():
    from typing import NamedTuple

    class Extra(NamedTuple):
        rows: torch.Tensor
        array: np.ndarray

    def model(x, extra):
        with pyro.plate("cells", 50, subsample=extra.rows):
            loc = torch.as_tensor(extra.array)
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, extra):
        with pyro.plate("cells", 50, subsample=extra.rows):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(ROWS)
    terms = pv.terms(model, guide, x, extra=Extra(torch.arange(ROWS), np.zeros(ROWS, np.float32)))
    torch.testing.assert_close(terms.log_weight[0], log_evidence(x))
    assert terms.scale == pytest.approx(50 / ROWS)


def test_a_plate_data_of_another_size_is_refused():
    model, guide = pair_of(lambda x: [("data", x.shape[1], -1)])
    with pytest.raises(ValueError, match='"data" has size 3 for a minibatch of 6 rows'):
        pv.terms(model, guide, torch.randn(ROWS, 3))


def test_a_sequential_plate_is_refused():
    def model(x):
        for i in pyro.plate("cells", len(x)):
            pyro.sample(f"x{i}", dist.Normal(0.0, 1.0), obs=x[i])

    with pytest.raises(ValueError, match="no site is inside a vectorized plate"):
        pv.terms(model, lambda x: None, torch.randn(ROWS))


def test_plate_stacks_and_decorators():
    def model(x):
        with pyro.plate_stack("stack", x.shape):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        @pyro.plate("cells", len(x), dim=-2)
        @pyro.plate("inner", x.shape[1], dim=-1)
        def sample():
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

        sample()

    for columns in (3, ROWS):
        right(model, guide, torch.randn(ROWS, columns))


HANDLERS = {
    "scale": lambda p: poutine.scale(p, 1.0),
    "mask": lambda p: poutine.mask(p, mask=torch.tensor(True)),
    "condition": lambda p: poutine.condition(p, {}),
    "do": lambda p: poutine.do(p, {}),
    "block": lambda p: poutine.block(p, hide=["nothing"]),
    "partial": lambda p: functools.partial(p),
    "lambda": lambda p: lambda x: p(x),
    "unscaled": pv.unscaled,
}


@pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)
def test_programs_under_handlers(handler):
    model, guide = pair_of(lambda x: [("cells", len(x), -2), ("genes", x.shape[1], -1)])
    for columns in (3, ROWS):
        right(handler(model), handler(guide), torch.randn(ROWS, columns))


def test_partials_of_one_function_have_their_own_plates():
    def program(x, names, *, of_model):
        with pyro.plate(names[0], len(x), dim=-2), pyro.plate(names[1], x.shape[1], dim=-1):
            if of_model:
                z = pyro.sample("z", dist.Normal(torch.zeros(x.shape), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            else:
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    for names in (("a", "b"), ("b", "a"), ("data", "b"), ("b", "data")):
        model, guide = (
            functools.partial(program, names=names, of_model=of_model) for of_model in (True, False)
        )
        right(model, guide, torch.randn(ROWS, 4))


class Model(nn.Module):
    def forward(self, x):
        with pyro.plate("cells", len(x), dim=-2), pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(x.shape), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("cells", len(x), dim=-2), pyro.plate("data", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def test_copies_and_new_programs_are_examined():
    model = Model()
    x = torch.randn(ROWS, ROWS)
    right(model, model.guide, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        right(other, other.guide, x)
    for count in range(20):  # an id may be used again after garbage collection
        names = ("a", "b") if count % 2 else ("b", "a")
        right(*pair_of(lambda x, n=names: [(n[0], len(x), -2), (n[1], x.shape[1], -1)]), x[:, :4])


def test_a_program_with_a_sized_plate_data_is_never_run_again(monkeypatch):
    monkeypatch.setattr(data_plate, "_examined", lambda *_: pytest.fail("it ran again"))
    for plate in (
        lambda x: pyro.plate("data", len(x)),
        lambda x: pyro.plate("data", 60, subsample=x),
        lambda x: pyro.plate("data"),
    ):

        def model(x, plate=plate):
            with plate(x):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        guide = pv.guides.AmortizedNormal(model, nn.Linear(2, 3))
        for rows in (1, 2, ROWS):
            pv.terms(model, guide, torch.randn(rows, 2), num_particles=2)


# Runs of the model alone.


def test_a_model_alone_may_call_its_plate_anything():
    x = torch.randn(ROWS, 3)
    for names in (("cells", "inner"), ("cells", "data")):
        model, guide = pair_of(lambda x, n=names: [(n[0], len(x), -2), (n[1], x.shape[1], -1)])
        assert pv.generate(model, x[:3], seed=0, by_site=True)["x"].shape == (3, 3)
        assert pv.reconstruct(model, guide, x[:3], by_site=True)["x"].shape == (3, 3)
        container = pv.to_arviz(model, guide, x[:3], num_draws=2)
        assert container["posterior"]["z"].shape == (1, 2, 3, 3)
        assert container["prior"]["z"].shape[-2:] == (3, 3) if "prior" in container else True


# A name that the caller gives.


def test_a_given_name_must_exist_and_have_the_rows():
    model, guide = pair_of(lambda x: [("cells", len(x), -2), ("genes", 3, -1)])
    x = torch.randn(ROWS, 3)
    with pytest.raises(ValueError, match=r"no vectorized plate 'rows'.*'cells': 6"):
        pv.terms(model, guide, x, plate="rows")
    with pytest.raises(ValueError, match=r"'genes'.*size 3 and x has 6 rows"):
        pv.terms(model, guide, x, plate="genes")
    pv.terms(model, guide, x, plate="cells")
    right(model, guide, x)
    with pytest.raises(ValueError, match="no vectorized plate 'rows'"):
        pv.generate(model, x, plate="rows", by_site=True)


def test_a_given_name_is_that_of_the_model_and_the_guide_may_have_another():
    def square(name, other):
        return lambda x: [(name, len(x), -2), (other, len(x), -1)]

    x = torch.randn(ROWS, ROWS)
    model, guide = pair_of(square("a", "b"), lambda x: [("rows", len(x), -2), ("b", 6, -1)])
    terms = pv.terms(model, guide, x, plate="a")
    torch.testing.assert_close(terms.log_weight[0], log_evidence(x))
    model, _ = pair_of(square("a", "b"))
    with pytest.raises(ValueError, match="plate="):
        pv.terms(model, pv.guides.AmortizedNormal(model, nn.Linear(ROWS, 4)), x)
    guide = pv.guides.AmortizedNormal(model, nn.Linear(ROWS, 4))
    assert pv.terms(model, guide, x, plate="a").log_weight.shape == (1, ROWS)


@pytest.mark.parametrize("name", ["b", None])
def test_a_loaded_pair_keeps_the_given_name(name, tmp_path):
    def square():
        return pair_of(lambda x: [("a", len(x), -2), ("b", len(x), -1)])

    x = torch.randn(ROWS, ROWS)
    model, guide = square()
    if name is not None:
        pv.terms(model, guide, x, plate=name)
    pv.save(tmp_path / "pair", model, guide)
    saved = pv.load(tmp_path / "pair", *square())
    if name is None:
        with pytest.raises(ValueError, match="plate="):
            pv.terms(saved.model, saved.guide, x)
        return
    found = pv.terms(saved.model, saved.guide, x).log_weight[0]
    torch.testing.assert_close(found, log_evidence(x.mT))


# Examining runs change nothing.


class Counting(nn.Module):
    """A layer with running averages, a count, and noise of three generators."""

    def __init__(self):
        super().__init__()
        self.norm, self.count = nn.BatchNorm1d(2), 0
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        self.count += 1
        self.mean = 0.9 * self.mean + x.mean(0).detach()
        random.random()  # noqa: S311
        np.random.rand()  # noqa: NPY002
        torch.rand(1)
        return self.norm(x)


def states():
    of_numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), of_numpy[1].tolist(), of_numpy[2]


def test_examining_runs_change_no_state():
    results = []
    for name in ("data", "cells"):
        pyro.clear_param_store()
        layer = Counting()

        def model(x, name=name, layer=layer):
            with pyro.plate(name, len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(layer(z), 1.0).to_event(1), obs=x)

        def guide(x, name=name):
            pyro.param(f"of {len(x)} rows", torch.tensor(0.0))
            with pyro.plate(name, len(x)):
                pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        x = torch.linspace(-1, 1, 2 * ROWS).reshape(ROWS, 2)
        terms = pv.terms(model, guide, x)
        results.append(
            (
                terms.log_weight.tolist(),
                {n: b.tolist() for n, b in layer.named_buffers()},
                (layer.count, layer.training, layer.norm.training),
                sorted(pyro.get_param_store().keys()),
                states(),
            )
        )
    assert results[0] == results[1]
    assert results[0][2] == (1, True, True)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_fit_begins_from_the_same_state_under_any_name(num_particles):
    results = []
    for name in ("data", "cells"):
        torch.manual_seed(0)
        net, norm = nn.Linear(2, 2), nn.BatchNorm1d(2)

        def model(x, name=name, net=net):
            pyro.module("net", net)
            with pyro.plate(name, len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

        def guide(x, name=name, norm=norm):
            pyro.module("norm", norm)
            with pyro.plate(name, len(x)):
                pyro.sample("z", dist.Normal(norm(x), 1.0).to_event(1))

        x = torch.linspace(-1, 1, 22).reshape(11, 2)
        objective = pv.objectives.IWAE(num_particles)
        fit = pv.fit(
            model, guide, x, objective=objective, epochs=2, batch_size=4, seed=0, progress=False
        )
        buffers = {key: value.tolist() for key, value in norm.state_dict().items()}
        results.append((fit.history["loss"].tolist(), buffers))
        assert buffers["num_batches_tracked"] == 6
    assert results[0] == results[1]
