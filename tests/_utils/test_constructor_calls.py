"""Components print as their constructor calls, which can be evaluated if they are plain."""

import copy
import functools
import pickle

import pytest
import torch
from public_calls import PUBLIC, WITHOUT_A_CALL, call, numbers
from torch import nn
from torch.distributions import transforms

import pyro_vae as pv
from pyro_vae._utils.constructor_calls import constructor_call, shown_value

FOLDERS = [
    "nets",
    "flows",
    "priors",
    "likelihoods",
    "models",
    "objectives",
    "surjections",
    "guides",
]
# Their arguments include data or functions, which have no short expression.
NOT_PLAIN = {
    *("guides.LocalGuide", "priors.AggregatedPosterior", "priors.ExemplarPrior"),
    *("priors.VampPrior", "models.SequenceModel", "surjections.Maximum", "surjections.Stochastic"),
    "surjections.VariationalDequantization",
}
COMPONENTS = [
    name
    for name in sorted(PUBLIC)
    if name.partition(".")[0] in FOLDERS
    and isinstance(PUBLIC[name], type)
    and name not in WITHOUT_A_CALL
    and name != "likelihoods.Levels"  # a constraint, which prints as those of torch
]


def evaluated(text, folder):
    """Evaluate a constructor call, with the names of its folder before those of others."""
    names = {"partial": functools.partial, "tensor": torch.tensor, **vars(nn), **vars(transforms)}
    for each in [*FOLDERS, folder]:
        names |= vars(getattr(pv, each))
    if folder == "guides":
        names |= vars(pv.guides.families)
    return eval(text, {**names, "LatentVariableModel": pv.LatentVariableModel})  # noqa: S307


@pytest.mark.parametrize("name", COMPONENTS)
def test_component_prints_as_the_call_that_makes_it(name):
    made = call(name)
    text = repr(made)
    assert text.startswith(f"{PUBLIC[name].__name__}(")
    assert text == repr(copy.deepcopy(made))
    assert all(len(line) <= 100 for line in text.splitlines())
    if name in NOT_PLAIN:
        return
    again = evaluated(text, name.partition(".")[0])
    assert type(again) is type(made)
    assert repr(again) == text
    if isinstance(made, nn.Module):
        again.load_state_dict(made.state_dict())  # raises if a name or a shape differs
    torch.testing.assert_close(numbers(again), numbers(made), rtol=0, atol=0, equal_nan=True)


class Half(pv.objectives.Objective):
    """An objective of a user, which records no arguments."""

    def bound(self, terms):
        return terms.log_weight.mean(0) / 2


class Wide(pv.nets.MLP):
    """A network of a user."""

    def __init__(self):
        super().__init__(2, [30])


def test_subclasses_of_users_print_as_before():
    assert repr(Half(3)) == "Half(num_particles=3)"
    assert repr(Wide()).startswith("Wide(\n  (0): Linear(in_features=2, out_features=30")


def test_modules_print_inside_those_of_torch():
    net = nn.Sequential(pv.nets.MLP(2, [3]), nn.Tanh())
    assert repr(net) == "Sequential(\n  (0): MLP(2, hidden=[3])\n  (1): Tanh()\n)"
    tree = nn.Module.__repr__(
        pv.LatentVariableModel(pv.priors.StandardNormal(2), pv.likelihoods.Normal(net))
    )
    assert "(prior): StandardNormal(2)" in tree


def test_replaced_module_is_shown():
    likelihood = pv.likelihoods.Poisson(pv.nets.MLP(2, [3], 4))
    likelihood.decoder = nn.Linear(2, 4)
    assert repr(likelihood) == "Poisson(Linear(in_features=2, out_features=4, bias=True))"


def test_long_calls_have_a_line_for_each_argument():
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(10),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(10, [200, 200], 64), scale=0.5),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(64, [200, 200]))
    assert repr(guide).splitlines() == [
        "AmortizedNormal(",
        "  LatentVariableModel(",
        "    StandardNormal(10),",
        "    likelihood=Normal(MLP(10, hidden=[200, 200], out_features=64), scale=0.5),",
        "  ),",
        "  encoder=MLP(64, hidden=[200, 200]),",
        ")",
    ]


def program(x):
    """A program of a user."""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (program, "program"),
        (nn.ReLU, "ReLU"),
        (functools.partial(pv.flows.Sylvester, size=2), "partial(Sylvester, size=2)"),
        (torch.zeros(500, 3), "<tensor of shape (500, 3)>"),
        (torch.tensor([0.1, 2.0]), f"tensor({[torch.tensor(0.1).item(), 2.0]})"),
        (torch.tensor([1.5], dtype=torch.float64), "tensor([1.5], dtype=torch.float64)"),
        (torch.zeros(50).numpy(), "<array of shape (50,)>"),
        (torch.zeros(1).numpy()[0], "0.0"),
        ((3,), "(3,)"),
        ([(1, 2), {"a": None}], "[(1, 2), {'a': None}]"),
    ],
)
def test_arguments_are_short(value, text):
    assert shown_value(value) == text


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (transforms.ExpTransform(), "ExpTransform()"),
        (transforms.AffineTransform(1.0, 2.0), "AffineTransform(1.0, 2.0, 0)"),
        (transforms.SigmoidTransform().inv, "inverse(SigmoidTransform())"),
    ],
)
def test_transforms_are_shown(transform, text):
    assert repr(pv.surjections.Bijection(transform)) == f"Bijection({text})"


def test_functions_that_cannot_be_pickled_are_named():
    making = pickle.loads(pickle.dumps(vars(pv.surjections.Maximum(lambda: None))["_making"]))  # noqa: S301
    text = constructor_call(making.cls, {"noise": making.args[0]})
    assert text.replace("\n", "").startswith("Maximum(  <the function test_functions_that_")
