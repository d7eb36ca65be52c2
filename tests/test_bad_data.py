"""Bad arguments of every public function and class are refused by name; valid ones are accepted.

The list of callables comes from their signatures. public_calls.py has valid arguments, and
bad_values.py has the values that replace them. ``pytest -m slow tests/test_bad_data.py`` tries
more of them.
"""

from __future__ import annotations

import inspect
import numbers as numbers_abc
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from bad_values import CASES, INF, ODD, accepts, equals_of, is_out_of_range, make_array
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from public_calls import PUBLIC, WITHOUT_A_CALL, X, arguments, call, make_pair, numbers
from torch import Tensor

import pyro_vae as pv
from pyro_vae._utils.checks import annotations_of


def hint_of(name: str, argument: str) -> Any:
    function = PUBLIC[name]
    hints = annotations_of(function.__init__ if inspect.isclass(function) else function)
    return hints.get(argument, Any)


def arguments_of(name: str) -> list[str]:
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


NAMES = sorted(PUBLIC.keys() - WITHOUT_A_CALL.keys())
# Arguments that are valid with other types than their annotation, and why.
ALSO_VALID = {
    ("rate_distortion", "betas"): "any numbers that can be iterated",
    ("distributions.MixtureOfDiagNormals", "validate_args"): "torch's own argument",
    ("distributions.NanMasked", "validate_args"): "torch's own argument",
    ("evaluation.khat", "log_weights"): "takes nested lists, as numpy does",
    ("guides.SemiSupervisedGuide", "model"): "any object with the methods of the model",
}
# Other numbers must not be negative, and other integers must not be zero.
MAY_BE_NEGATIVE = {
    "seed",
    "checkpoint_seconds",
    "mutual_information",
    "dimension_wise",
    "beta",
    "capacity",
    "start",
    "end",
    "alpha",
    "log_density",
    "value",
    "bounds",
}
MAY_BE_ZERO = {"context", "history", "plate_nesting", "row", "num_draws", "event_dims"}
MAY_BE_ZERO |= MAY_BE_NEGATIVE
MAY_BE_ZERO_IN = {("decode", "num_samples"), ("encode", "num_samples")}
NOT_CALLED = {"objectives.SemiSupervisedELBO", "flows.Composition", "objectives.CUBO"}
OF_ITS_USE = "x|z|value|inputs|parameters|size|plates"  # of what an accepted argument did not fit
DATA = {"data", "like", "validation", "train", "test", "x", "exemplars", "pseudo_inputs"}
DATA |= {"z"}
MORE_DATA = {("terms", "args"), ("interpolate", "start"), ("plots.interpolations", "start")}
DATA_CALLS = [(n, a) for n in NAMES for a in arguments_of(n) if a in DATA or (n, a) in MORE_DATA]
SLOW = {
    "fit",
    "prior_holes",
    "collapse_report",
    "sandwich",
    "inference_gaps",
    "rate_distortion",
    "compare",
    "diagnose",
    "load",
    "load_checkpoint",
    "serialization.export_decoder",
    "serialization.export_encoder",
    "impute",
    "interpolate",
    "evidence",
    "elbo_surgery",
    "evaluation.refit_prior",
    "fit_seeds",
    "plots.aggregated_posterior",
    "plots.interpolations",
    "plots.traversals",
}
AT_THE_FIRST_CALL = {  # guides make their family and networks at the first call
    ("guides.AmortizedFlow", "length"),
    ("guides.AmortizedLowRankNormal", "rank"),
    ("guides.AmortizedMixture", "components"),
    ("guides.HierarchicalGuide", "hidden"),
    ("guides.SequenceGuide", "hidden"),
}
WHAT_CAME = (
    "got |gave |takes |observed|shape|vs |collide|invalid|without|needs|NaN|infinite|empty|masked|"
    "bits|too large|layout|device|outside|differ"
)
ANY_NUMBERS = {
    ("generate", "x"): "x gives the number of rows and their shape alone",
    ("decode", "x"): "x gives the shape of a row alone",
    ("plots.samples", "x"): "as generate",
    ("plots.manifold", "x"): "as decode",
    ("plots.traversals", "x"): "one row is encoded",
    ("decode", "z"): "latents have another shape than x",
}
PROGRAMS_TAKE_TENSORS = {("terms", "args"), ("guides.LocalGuide", "x")}
# Names in a message that replace the name of the argument, and why.
OTHER_NAMES: dict[tuple[str, str], str] = {
    ("terms", "args"): "x",  # the programs' own first argument
    ("terms", "plate_nesting"): "plate_nesting|plates",  # Pyro says which plates collide
    ("priors.AggregatedPosterior", "data"): "data|x",  # the x of the guide's encoder
    ("interpolate", "start"): "start|x",
    ("plots.interpolations", "start"): "start|x",  # the programs' own first argument
    ("compare", "train"): "train|data",  # it is the data of the surgery
    **{("diagnose", name): f"{name}|data" for name in ("train", "test")},
    ("gradient_noise", "x"): "x|parameter|value",  # torch names the parameter that is NaN
}


def describes(value: Any, message: str) -> bool:
    """Return whether a message shows the value, its type, or its fault."""
    shape = None if getattr(value, "is_nested", False) else getattr(value, "shape", None)
    dtype = getattr(value, "dtype", None)
    shown = [repr(value), str(value), type(value).__name__, dtype, shape and tuple(shape)]
    return any(str(each) in message for each in shown) or bool(re.search(WHAT_CAME, message))


def finite(found: Any) -> bool:
    """Return whether all numbers are real and not NaN; a log-density may be -inf."""
    if isinstance(found, Tensor):
        return not found.is_complex() and not torch.isnan(found).any()
    return all(map(finite, found)) if isinstance(found, list | tuple) else found == found


def close(found: Any, wanted: Any) -> bool:
    if isinstance(found, list | tuple):
        return len(found) == len(wanted) and all(map(close, found, wanted))
    found, wanted = (
        torch.as_tensor(np.asarray(each.detach() if isinstance(each, Tensor) else each)).double()
        for each in (found, wanted)
    )
    return found.shape == wanted.shape and torch.allclose(found, wanted, 1e-3, 1e-4)


def check_call(run: Callable[[Any], Any], value: Any, argument: str, valid: bool | None) -> Any:
    """Run a call with a value; return its numbers, or None if the value is refused.

    A refusal must name the argument and show the value.

    Args:
        valid: whether the call must accept the value; None if it may.
    """
    pyro.clear_param_store()
    found = message = None
    try:
        found = run(value)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{argument}={value!r} gave {error!r}") from error
    if message is None:
        assert valid is not False, f"{argument}={value!r} was accepted, and gave {found!r}"
        return found
    shown = f"{argument}={value!r}: {message}"
    assert valid is not True, f"valid, but refused: {shown}"
    assert re.search(rf"\b({argument})\b", message, re.IGNORECASE), f"not named: {shown}"
    assert describes(value, message), f"it is not said what came: {shown}"
    return None


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for folders that are made by mistake
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", NAMES)
def test_every_public_callable_has_a_valid_call(name):
    """A new public name needs a row in public_calls.py, unless COMMON has its arguments."""
    required = [
        p.name
        for p in inspect.signature(PUBLIC[name]).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    assert not set(required) - arguments(name).keys(), f"{name} needs a row in public_calls.py"
    assert finite(numbers(call(name)))


def try_argument(name: str, argument: str, value: Any, quick: bool) -> None:
    """Check that a call refuses a value of a wrong type or range, and accepts other numbers."""
    hint = hint_of(name, argument)
    if hint is Any or (name, argument) in ALSO_VALID:
        return
    several = inspect.signature(PUBLIC[name]).parameters[argument].kind.name == "VAR_POSITIONAL"
    low = -INF if argument in MAY_BE_NEGATIVE else 0
    may_be_zero = argument in MAY_BE_ZERO or (name, argument) in MAY_BE_ZERO_IN
    is_count = accepts(hint, 1) and not accepts(hint, 0.5) and not may_be_zero
    if is_count and not isinstance(value, Sequence):
        low = 1  # numbers in a sequence may be zero; True and False are not numbers
    bad = not accepts(hint, value) or is_out_of_range(value, low)
    of_number = isinstance(value, numbers_abc.Real | list | tuple) and not isinstance(value, bool)
    if not bad and (not of_number or (quick and name in SLOW)):
        return

    def run(value: Any) -> Any:
        made = call(name, **{argument: (value,) if several else value})
        return made if bad else numbers(made)

    late = accepts(hint, value) and (name, argument) in AT_THE_FIRST_CALL
    word = OTHER_NAMES.get((name, argument), argument) + ("" if bad else f"|{OF_ITS_USE}")
    check_call(run, value, word, False if bad and not late else None)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_refused_by_name(name):
    for number, argument in enumerate(arguments_of(name)):
        for value in ODD[number % 4 :: 4]:
            try_argument(name, argument, value, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_wrong_argument_is_refused_by_name(name):
    for argument in arguments_of(name):
        for value in ODD:
            try_argument(name, argument, value, quick=False)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NAMES]
)
def test_equal_values_of_other_types_are_accepted(name):
    defaults = {
        p.name: p.default
        for p in inspect.signature(PUBLIC[name]).parameters.values()
        if p.default is not p.empty
    }
    for argument, good in (defaults | arguments(name)).items():
        for value in equals_of(good) if argument != "args" else ():
            if isinstance(value, np.bool_) and hint_of(name, argument) is not bool:
                continue  # "auto" or a progress bar is also valid: only True and False are flags
            check_call(lambda v, a=argument: numbers(call(name, **{a: v})), value, argument, True)


def try_data(name: str, argument: str, array: Any) -> None:
    """Check that data in any layout give the result of the same contiguous tensor."""
    if array.value is None and hint_of(name, argument) not in (Any, Tensor):
        return

    def run(value: Any) -> Any:
        return numbers(call(name, **{argument: (value,) if argument == "args" else value}))

    # If a site cannot score a value, the message names the site.
    word = OTHER_NAMES.get((name, argument), argument) + "|site"
    free = (name, argument) in ANY_NUMBERS and isinstance(array.value, Tensor | np.ndarray)
    free |= (name, argument) in PROGRAMS_TAKE_TENSORS and not isinstance(array.value, Tensor)
    found = check_call(run, array.value, word, None if free else array.good)
    if found is not None:
        assert finite(found), f"{array!r} gave {found}"
        if array.plain is not None:
            wanted = run(array.plain)
            assert close(found, wanted), f"{array!r} gave {found}, not {wanted}"


def cases_of(number: int, count: int) -> list[str]:
    """Return a third of the invalid cases and ``count`` others, which differ by ``number``."""
    others = [name for name, case in CASES.items() if case[1] is not False]
    bad = [name for name, case in CASES.items() if case[1] is False]
    return bad[number % 3 :: 3] + [
        others[(number * 37 + i * 13) % len(others)] for i in range(count)
    ]


@pytest.mark.parametrize(("name", "argument"), DATA_CALLS)
def test_data_are_refused_by_name_or_match_a_plain_tensor(name, argument):
    number = DATA_CALLS.index((name, argument))
    for case in cases_of(number, 1 if name in SLOW else 5):
        try_data(name, argument, make_array(case, number % 4))


def _with_decoder(likelihood: Any, z: Any) -> Tensor:
    count = 4 * {"Categorical": 2, "DiscretizedLogistic": 2}.get(type(likelihood).__name__, 1)
    count = 24 if type(likelihood).__name__ == "DiscretizedLogisticMixture" else count
    torch.default_generator.manual_seed(0)
    likelihood.decoder = pv.nets.MLP(4, [3], count)
    return likelihood(z).log_prob(X)


def _score(likelihood: Any, value: Any) -> Tensor:
    count = {"Categorical": 8, "DiscretizedLogistic": 8, "DiscretizedLogisticMixture": 24}
    return likelihood(torch.zeros(5, count.get(type(likelihood).__name__, 4))).log_prob(value)


def _moved(flow: Any, x: Any) -> list[Tensor]:
    transform = flow(torch.linspace(-1, 1, flow.num_parameters))
    return [transform(x), transform.log_abs_det_jacobian(x, transform(x))]


def _sampled(program: Any, x: Any) -> Any:
    torch.default_generator.manual_seed(0)
    found = program(x)
    return [*found.values()] if isinstance(found, dict) else found


# Tensor arguments of the objects of a class.
CALLED_WITH: dict[type, dict[str, Callable[[Any, Any], Any]]] = {
    pv.likelihoods.Likelihood: {"value": _score, "x|z": _with_decoder},
    pv.flows.Flow: {"x|y": _moved, "parameters": lambda flow, p: flow(p)(torch.ones(5, 4))},
    pv.objectives.Objective: {"x": lambda loss, x: torch.tensor(loss.loss(*make_pair(), x))},
    pv.guides.AmortizedGuide: {"x": _sampled},
    pv.LatentVariableModel: {"x": _sampled},
    pv.nets.MLP: {"x": lambda net, x: net(x)},
    pv.nets.GatedMLP: {"x": lambda net, x: net(x)},
    pv.nets.Joined: {"x|inputs": lambda net, x: net(x)},
    pv.nets.ConvEncoder: {"x": lambda net, x: net(x)},
    pv.nets.ConvDecoder: {"z": lambda net, z: net(z)},
    pv.nets.ResidualBlock: {"x": lambda net, x: net(x)},
    pv.nets.ResidualEncoder: {"x": lambda net, x: net(x)},
    pv.nets.ResidualDecoder: {"z": lambda net, z: net(z)},
    pv.priors.StandardNormal: {"value": lambda prior, z: prior().log_prob(z)},
    pv.priors.MixtureOfNormals: {"value": lambda prior, z: prior().log_prob(z)},
    pv.priors.FlowPrior: {"value|x|y": lambda prior, z: prior().log_prob(z)},
}


def _saved(x: Any) -> Any:
    call("save", folder=Path("pair"), notes={"x": x}, overwrite=True)
    return [np.asarray(note) for note in pv.load("pair").notes.values()]


def _optimal() -> Any:
    return pv.likelihoods.Normal(torch.nn.Identity(), pv.likelihoods.OptimalScale())


# Calls with arguments that are not in the table.
MORE_CALLS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("khat", "log_weights"): lambda x: torch.nan_to_num(pv.evaluation.khat(x)),
    ("evidence by AIS", "data|site"): lambda x: numbers(
        call("evidence", data=x, method=call("evaluation.AIS"))
    ),
    ("terms of particles", "x"): lambda x: call("terms", args=(x,), num_particles=3).log_weight,
    ("save", "notes|note"): _saved,
    ("optimal scale", "value"): lambda x: _score(_optimal(), x),
    ("optimal scale", "x|z"): lambda z: _with_decoder(_optimal(), z),
}
VALUES = [
    (name, word)
    for name in NAMES
    for kind, calls in CALLED_WITH.items()
    for word in calls
    if inspect.isclass(PUBLIC[name]) and issubclass(PUBLIC[name], kind) and name not in NOT_CALLED
] + [*MORE_CALLS]


def try_value(name: str, word: str, array: Any) -> None:
    """Check that an object, called with a tensor in any layout, matches a plain tensor.

    Programs accept NaN, any shape that fits, sparse matrices, and torch's device "meta".
    """
    if re.search("sparse|meta|nested tensor", array.how) or array.value is None:
        return
    if name.startswith("guides") and re.search("nan|infinite", array.how):
        return  # torch names the matrix that it cannot factorize
    if word == "parameters" and "shape" in array.how:
        return  # their batch is that of x
    run = MORE_CALLS.get((name, word))
    if run is None:
        known = (calls for kind, calls in CALLED_WITH.items() if issubclass(PUBLIC[name], kind))
        of_object = next(calls[word] for calls in known if word in calls)
        run = lambda value: of_object(call(name), value)  # noqa: E731
    any_values = isinstance(array.value, Tensor) and not array.value.is_complex()
    free = name in ("khat", "save")  # khat accepts lists, and save any value that a file can hold
    valid = None if any_values or array.good or free else False
    if isinstance(array.value, Tensor):
        word += "|invalid values|Value is not broadcastable"  # torch's words
    found = check_call(run, array.value, word, valid)
    if found is not None and array.plain is not None:
        wanted = run(array.plain)
        assert close(found, wanted), f"{array!r} gave {found}, not {wanted}"


@pytest.mark.parametrize(("name", "word"), VALUES)
def test_values_are_refused_by_name_or_match_a_plain_tensor(name, word):
    number = VALUES.index((name, word))
    for case in cases_of(number, 5):
        try_value(name, word, make_array(case, number % 4))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "word"), DATA_CALLS + VALUES)
def test_every_bad_array_is_refused_by_name(name, word):
    @settings(
        max_examples=10 if name in SLOW else 60,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from([*CASES]), st.integers(0, 3))
    def trial(case: str, seed: int) -> None:
        (try_data if (name, word) in DATA_CALLS else try_value)(name, word, make_array(case, seed))

    trial()


ARRAY = X.numpy()
FOUND = {
    "reversed rows": (ARRAY[::-1], torch.tensor(ARRAY[::-1].copy())),
    "foreign bytes": (ARRAY.astype(">f4"), X),
    "a mask without masked values": (np.ma.masked_array(ARRAY, np.zeros_like(ARRAY)), X),
    "a parameter": (torch.nn.Parameter(X.clone()), X),
}


@pytest.mark.parametrize("name", FOUND)
def test_evidence_does_not_depend_on_the_layout_of_data(name):
    value, plain = FOUND[name]
    found, wanted = (
        pv.evidence(*make_pair(), x, num_particles=3, seed=0).values for x in (value, plain)
    )
    torch.testing.assert_close(found, wanted)


def test_fit_adds_no_gradient_to_the_data():
    x = X.clone().requires_grad_()
    pv.fit(*make_pair(), x, batch_size=5, epochs=1, progress=False)
    assert x.grad is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X.to(torch.complex64), "data must hold real numbers, got dtype torch.complex64"),
        (ARRAY.astype("complex64"), "data must hold numbers, got dtype complex64"),
        (ARRAY.astype("datetime64[s]"), "data must hold numbers, got dtype datetime64"),
        (ARRAY.astype(np.longdouble), "data must hold numbers"),
        (np.ma.masked_array(ARRAY, ARRAY > 0), "data has masked values"),
        (
            torch.nested.nested_tensor([X[0], X[1, :2]]),
            "data must have rows of one shape, got a nested tensor",
        ),
        (X.to("meta"), "data must hold real numbers, .* device meta"),
        (np.full((5, 4), 2**63, dtype=np.uint64), r"data must hold numbers below 2\*\*63"),
    ],
)
def test_evidence_refuses_data_without_real_numbers(value, message):
    with pytest.raises(ValueError, match=message):
        pv.evidence(*make_pair(), value, num_particles=3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_likelihoods_score_every_real_dtype(dtype):
    z = torch.randn(5, 4)
    for name in ("Bernoulli", "ContinuousBernoulli", "Normal", "Laplace", "StudentT", "Poisson"):
        p = getattr(pv.likelihoods, name)(torch.nn.Identity())(z)
        torch.testing.assert_close(p.log_prob(X.to(dtype)), p.log_prob(X), check_dtype=False)
        with pytest.raises(TypeError, match="the value to be scored must be a dense"):
            p.log_prob(X.to(torch.complex64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pv.nets.MLP(4.0, [3]), "in_features must be a whole number, got 4.0"),
        (lambda: pv.nets.MLP(4, "34"), r"hidden must be a sequence, such as \[8\], got '34'"),
        (lambda: pv.nets.MLP(10**15, [10**15]), "cannot run with in_features="),
        (lambda: pv.nets.MLP(4, [3])(torch.ones(5, 3)), r"of shape \(..., 4\), got \(5, 3\)"),
        (lambda: pv.nets.MLP(4, [3])(torch.ones(5, 4).double()), "float32 .* got torch.float64"),
        (lambda: pv.likelihoods.Normal(torch.nn.Identity(), 1e-300), "scale must be positive"),
        (lambda: pv.likelihoods.Normal(torch.nn.Identity(), 10**400), "scale must be positive"),
        (lambda: pv.likelihoods.Levels(2.5), "levels must be a whole number"),
        (lambda: pv.objectives.BetaELBO("1"), "beta must be a number, got '1'"),
        (lambda: pv.objectives.CUBO(float("nan")), "n must be finite, got nan"),
        (lambda: pv.flows.Planar(3)(torch.ones(6)), r"parameters .* \(..., 7\), got \(6,\)"),
        (
            lambda: pv.flows.Planar(3)(torch.ones(7))(torch.ones(5, 1)),
            r"x must be of shape \(..., 3\), got \(5, 1\)",
        ),
        (lambda: pv.flows.AffineCoupling(3, context=-1), "context must not be negative"),
        (lambda: pv.flows.NeuralSpline(3, bound=float("nan")), "bound must be finite, got nan"),
        (lambda: make_pair()[0]([[1.0]]), "x must be a tensor, got list"),
        (lambda: make_pair()[1](torch.ones(0, 4)), "x must be of shape .* and not empty"),
        (
            lambda: pv.terms(*make_pair(), torch.full((5, 4), torch.nan)),
            "x has NaN or infinite values",
        ),
        (lambda: pv.datasets.load("digits", seed="0"), "seed must be a whole number, got '0'"),
    ],
)
def test_messages_name_the_argument_and_its_value(call, message):
    """Each call once returned a number, or raised an error of torch or Python."""
    with pytest.raises((ValueError, TypeError), match=message):
        call()
