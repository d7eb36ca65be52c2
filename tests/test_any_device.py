"""Every part runs on any device: a step of each on torch's device ``meta``.

A tensor on ``meta`` has a shape and no values. So a step fails there if a part makes a tensor on
the CPU, moves one, or reads a value, which would wait for a GPU. Checks of values are off, as in a
captured step.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_table import DENSITIES
from public_calls import PUBLIC, call
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_vae as pv

MLP, Joined = pv.nets.MLP, pv.nets.Joined
B, D, Z = 5, 16, 2


class RefusesWaiting(TorchDispatchMode):
    """Raises an error for operations that wait for a GPU, although ``meta`` has them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in READ_VALUES or ("cpu" in devices((args, kwargs)) and "meta" in devices(made)):
            raise AssertionError(f"{func} waits for the device")
        return made


def devices(tree):
    """Return the kinds of devices of all tensors, except for single numbers."""
    return {t.device.type for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.dim()}


READ_VALUES = {  # whether all scales are positive
    torch.ops.aten.normal.Tensor_Tensor,
    torch.ops.aten.normal.float_Tensor,
}


def step_on_meta(model, guide, *batch, objective=None):
    """Take one step on the CPU, which makes all networks, and one on ``meta``."""
    loss = (objective or pv.objectives.ELBO())(model, guide)
    loss(*batch)
    loss.to("meta")  # with both programs
    pyro.enable_validation(False)
    batch = [column.to("meta") for column in batch]
    with RefusesWaiting():
        value = loss(*batch)
        assert value.device.type == "meta"
        value.backward()
    parameters = [p for p in loss.parameters() if p.grad is not None]
    assert parameters
    assert all(p.grad.device.type == "meta" for p in parameters)


def binary():
    return torch.bernoulli(torch.full((B, D), 0.5))


def bernoulli(*sizes):
    network = MLP(sum(sizes), [8], D)
    return pv.likelihoods.Bernoulli(Joined(network) if len(sizes) > 1 else network)


def gaussian(inputs, outputs):
    scale = pv.likelihoods.ScaleFromDecoder()
    return pv.likelihoods.Normal(MLP(inputs, [8], 2 * outputs), scale=scale)


def make_pair(guide=pv.guides.AmortizedNormal, prior=None, likelihood=None):
    prior = pv.priors.StandardNormal(Z) if prior is None else prior
    model = pv.LatentVariableModel(prior, bernoulli(Z) if likelihood is None else likelihood)
    made = guide(model, MLP(D, [8]))
    if isinstance(prior, pv.priors.GuideMixturePrior):
        prior.bind_guide(made)
    return model, made


@pytest.mark.parametrize("name", DENSITIES)
def test_guides(name):
    step_on_meta(*make_pair(DENSITIES[name]), binary())


OBJECTIVES = [
    name
    for name, value in PUBLIC.items()
    if isinstance(value, type) and issubclass(value, pv.objectives.Objective)
    if value is not pv.objectives.SemiSupervisedELBO  # has a test of its own
    if value is not pv.objectives.Objective
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
    step_on_meta(*make_pair(), binary(), objective=call(name))


PRIORS = {
    "standard normal": lambda: pv.priors.StandardNormal(Z),
    "mixture": lambda: pv.priors.MixtureOfNormals(Z, 3),
    "flow": lambda: pv.priors.FlowPrior(
        Z, pv.flows.Composition(Z, pv.flows.AffineCoupling, length=2)
    ),
    "VampPrior": lambda: pv.priors.VampPrior(Z, pseudo_inputs=binary()),
    "exemplars": lambda: pv.priors.ExemplarPrior(Z, exemplars=binary()),
}


@pytest.mark.parametrize("name", PRIORS)
def test_priors(name):
    step_on_meta(*make_pair(prior=PRIORS[name]()), binary())


NUMBERS_OF_A_PIXEL = {"Categorical": 2, "DiscretizedLogistic": 2, "DiscretizedLogisticMixture": 6}
LIKELIHOODS = [
    name.rpartition(".")[2]
    for name, value in PUBLIC.items()
    if isinstance(value, type) and issubclass(value, pv.likelihoods.Likelihood)
    if name.rpartition(".")[2] not in ("Likelihood", "NanMasked")
]


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods(name):
    likelihood = call(f"likelihoods.{name}")
    likelihood.decoder = MLP(Z, [8], D * NUMBERS_OF_A_PIXEL.get(name, 1))
    step_on_meta(*make_pair(likelihood=likelihood), binary())


SCALES = {
    "decoder": pv.likelihoods.ScaleFromDecoder,
    "optimal": pv.likelihoods.OptimalScale,
    "shared": pv.likelihoods.SharedScale,
    "per output": lambda: pv.likelihoods.ScalePerOutput(D),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales(name):
    decoder = MLP(Z, [8], D * (2 if name == "decoder" else 1))
    likelihood = pv.likelihoods.Normal(decoder, scale=SCALES[name]())
    step_on_meta(*make_pair(likelihood=likelihood), torch.randn(B, D))


def conditional():
    model = pv.models.ConditionalModel(pv.priors.StandardNormal(Z), bernoulli(Z, 3))
    return model, pv.guides.AmortizedNormal(model, Joined(MLP(D + 3, [8]))), torch.randn(B, 3)


def hierarchical():
    layers = [gaussian(Z, 3)]
    model = pv.models.HierarchicalModel(pv.priors.StandardNormal(Z), layers, bernoulli(3))
    return model, pv.guides.HierarchicalGuide(model, MLP(D, [8]))


def mixture():
    model = pv.models.MixtureModel(pv.priors.MixtureOfNormals(Z, 3), bernoulli(Z))
    return model, pv.guides.AmortizedNormal(model, MLP(D, [8]))


def flow():
    layers = [
        pv.surjections.UniformDequantization(2),
        pv.surjections.Bijection(pv.flows.Composition(D, pv.flows.AffineCoupling, length=2)),
    ]
    model = pv.surjections.FlowModel(pv.priors.StandardNormal(D), layers)
    return model, pv.surjections.FlowGuide(model)


def semi_supervised():
    model = pv.models.SemiSupervisedModel(3, pv.priors.StandardNormal(Z), bernoulli(Z, 3))
    guide = pv.guides.SemiSupervisedGuide(
        model, classifier=MLP(D, [8], 3), encoder=Joined(MLP(D + 3, [8]))
    )
    return model, guide, torch.tensor([0, 1, -1, 2, -1])


def semi_amortized():
    model, guide = make_pair()
    return model, pv.guides.SemiAmortized(guide, steps=2)


def points():
    return make_pair(pv.guides.AmortizedDelta)


def own_programs():
    net, encoder = MLP(Z, [8], D), MLP(D, [8], Z)

    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(Z), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))

    return Model(), Guide()


MODELS = [
    *(conditional, hierarchical, mixture, flow, semi_supervised, semi_amortized, points),
    own_programs,
]


@pytest.mark.parametrize("make", MODELS)
def test_models(make):
    model, guide, *covariates = make()
    objective = None
    if make is semi_supervised:
        objective = pv.objectives.SemiSupervisedELBO(3.0)
    step_on_meta(model, guide, binary(), *covariates, objective=objective)


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 1, 2, 4, 3])])
def test_sequences(lengths):
    model = pv.models.SequenceModel(
        pv.priors.StandardNormal(Z), gaussian(Z, Z), pv.likelihoods.Bernoulli(MLP(Z, [8], 3))
    )
    guide = pv.guides.SequenceGuide(model, recurrent=6, hidden=[5])
    x = torch.bernoulli(torch.full((B, 4, 3), 0.5))
    step_on_meta(model, guide, x, *([] if lengths is None else [lengths]))


class OnTheCpu(nn.Module):
    """A prior that makes its tensors on the CPU."""

    def forward(self):
        return dist.Normal(torch.zeros(Z), torch.ones(Z)).to_event(1)


class ReadsAValue(nn.Module):
    """A decoder that reads a value of its input."""

    def __init__(self):
        super().__init__()
        self.net = MLP(Z, [8], D)

    def forward(self, z):
        return self.net(z if z.sum() > -1e9 else -z)


@pytest.mark.parametrize(
    "pair",
    [
        lambda: make_pair(prior=OnTheCpu()),
        lambda: make_pair(likelihood=pv.likelihoods.Bernoulli(ReadsAValue())),
    ],
    ids=["a tensor on the CPU", "a value is read"],
)
def test_parts_that_belong_to_one_device_fail(pair):
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        step_on_meta(*pair(), binary())
