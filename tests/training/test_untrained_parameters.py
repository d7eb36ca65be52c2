"""Parameters that a fit does not train: hidden, unregistered, or in evaluation mode."""

import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, pyro_method
from torch import nn

import pyro_vae as pv

X = torch.randn(30, 3)


def model_of(decoder):
    return pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Normal(decoder, scale=1.0)
    )


def guide_of(model, encoder=None):
    return pv.guides.AmortizedNormal(model, encoder or nn.Linear(3, 8))


def with_encoder(make):
    """Return a function from a network to a pair that calls it through another object."""
    return lambda net: (model := model_of(nn.Linear(2, 3)), guide_of(model, make(net)))


def called(function, net, x):
    return net(x)


def plain_model(registers):
    def pair(net):
        decoder = nn.Linear(2, 3)

        def model(x):
            if registers:
                pyro.module("decoder", decoder)
                pyro.module("net", net)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                loc = decoder(net(z)[..., :2])
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        decoder.requires_grad_(registers)
        return model, guide_of(model)

    return pair


def with_prior(net):
    prior = lambda: dist.Normal(net.bias[:2], 1.0).to_event(1)  # noqa: E731
    model = pv.LatentVariableModel(prior, pv.likelihoods.Normal(nn.Linear(2, 3), scale=1.0))
    return model, guide_of(model)


def registered_pair(encoder, name_of_decoder):
    decoder = nn.Linear(2, 3)

    def model(x):
        pyro.module(name_of_decoder, decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x)[..., :2], 1.0).to_event(1))

    return model, guide


UNREGISTERED = {
    "lambda": with_encoder(lambda net: lambda x: net(x)),
    "partial": with_encoder(lambda net: functools.partial(called, None, net)),
    "method": with_encoder(lambda net: net.forward),
    "prior": with_prior,
    "closure": plain_model(registers=False),
    "one name for two": functools.partial(registered_pair, name_of_decoder="encoder"),
}


def fitted(model, guide, epochs=1):
    """Fit a pair and return the messages of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pv.fit(model, guide, X, epochs=epochs, seed=0, progress=False, capture=False)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("name", UNREGISTERED)
def test_a_fit_names_parameters_that_no_program_registers(name):
    net = nn.Linear(3, 8)
    (message,) = fitted(*UNREGISTERED[name](net))
    assert "which the fit does not train" in message
    assert "pyro.module" in message


@pytest.mark.parametrize("pair", [plain_model(registers=True), with_encoder(lambda net: net)])
def test_a_fit_trains_registered_parameters_without_a_warning(pair):
    net = nn.Linear(3, 8)
    before = net.weight.clone()
    assert fitted(*pair(net)) == []
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("name", UNREGISTERED)
def test_frozen_parameters_need_no_warning(name):
    net = nn.Linear(3, 8).requires_grad_(False)
    if name != "one name for two":
        assert fitted(*UNREGISTERED[name](net)) == []


def is_own_parameter(site):
    return site["type"] == "param" and not site["name"].startswith("z") and site["fn"] is not None


HIDES = [{"hide_types": ["param"]}, {"hide_fn": is_own_parameter}]


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("hides", HIDES)
def test_parameters_behind_a_block_are_frozen(hides, epochs):
    model = model_of(nn.Linear(2, 3))
    guide = guide_of(model)
    guide(X)
    before = [p.clone() for p in guide.parameters()]
    decoder = next(model.parameters()).clone()
    assert fitted(model, poutine.block(guide, **hides), epochs) == []
    assert all(map(torch.equal, guide.parameters(), before))
    assert not torch.equal(next(model.parameters()), decoder)


def test_a_block_may_hide_some_parameters_by_name():
    model = model_of(nn.Linear(2, 3))
    guide = guide_of(model)
    guide(X)
    before = {name: p.clone() for name, p in guide.named_parameters()}
    hidden = poutine.block(guide, hide_fn=lambda site: site["name"].startswith("encoder"))
    assert fitted(model, hidden) == []
    for name, parameter in guide.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("encoder")


@pytest.mark.parametrize("hides", HIDES)
def test_parameters_that_a_block_hides_are_registered(hides):
    encoder = nn.Linear(3, 2)
    model, guide = registered_pair(encoder, "decoder")
    before = encoder.weight.clone()
    assert fitted(model, poutine.block(guide, **hides)) == []
    assert torch.equal(encoder.weight, before)


def test_the_loss_module_lacks_parameters_behind_a_block():
    model = model_of(nn.Linear(2, 3))
    guide = guide_of(model)
    guide(X)
    loss_fn = pv.objectives.ELBO()(poutine.block(model, hide_types=["param"]), guide)
    assert {id(p) for p in loss_fn.parameters()} == {id(p) for p in guide.parameters()}


def test_a_block_that_hides_sites_alone_freezes_nothing():
    model = model_of(nn.Linear(2, 3))
    before = next(model.parameters()).clone()
    hidden = poutine.block(model, hide_fn=lambda site: site["name"] == "another")
    assert fitted(hidden, guide_of(model)) == []
    assert not torch.equal(next(model.parameters()), before)


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.1), nn.BatchNorm1d(8), pv.likelihoods.OptimalScale()]
)
def test_a_fit_in_evaluation_mode_warns_if_a_layer_depends_on_the_mode(layer):
    scale = layer if isinstance(layer, pv.likelihoods.OptimalScale) else 1.0
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Normal(nn.Linear(2, 3), scale=scale)
    )
    layers = [] if scale is layer else [layer]
    guide = guide_of(model, nn.Sequential(nn.Linear(3, 8), *layers))
    assert fitted(model, guide) == []
    model.eval()
    guide.eval()
    (message,) = fitted(model, guide)
    assert "evaluation mode" in message
    layer.train()
    assert fitted(model, guide) == []


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.0), nn.InstanceNorm1d(1), nn.BatchNorm1d(8).requires_grad_(False)]
)
def test_layers_that_evaluation_mode_does_not_change_need_no_warning(layer):
    model = model_of(nn.Linear(2, 3))
    layers = [nn.Unflatten(1, (1, 8)), layer, nn.Flatten()]
    layers = layers if isinstance(layer, nn.InstanceNorm1d) else [layer]
    guide = guide_of(model, nn.Sequential(nn.Linear(3, 8), *layers))
    fitted(model, guide)
    assert fitted(model.eval(), guide.eval()) == []


def test_a_fit_of_layers_without_modes_needs_no_warning():
    model = model_of(nn.Linear(2, 3))
    assert fitted(model.eval(), guide_of(model).eval()) == []


class Pair(PyroModule):
    def __init__(self):
        super().__init__()
        self.decoder = PyroModule[nn.Linear](2, 3)
        self.encoder = PyroModule[nn.Linear](3, 2)

    @pyro_method
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


@pytest.mark.parametrize("wraps", [lambda program: program, poutine.scale(scale=0.5)])
def test_the_loss_module_has_the_parameters_of_methods(wraps):
    pair = Pair()
    loss_fn = pv.objectives.ELBO()(wraps(pair.model), wraps(pair.guide))
    assert {id(p) for p in loss_fn.parameters()} == {id(p) for p in pair.parameters()}
    names = {name.rpartition(".encoder.")[2] for name in loss_fn.state_dict()}
    assert {"weight", "bias"} <= names
    before = pair.decoder.weight.clone()
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(X).backward()
    optimizer.step()
    assert not torch.equal(pair.decoder.weight, before)


def test_the_loss_module_has_each_program_once():
    model = model_of(nn.Linear(2, 3))
    guide = guide_of(model)
    guide(X)
    names = [name for name, _ in pv.objectives.ELBO()(model, guide).named_children()]
    assert names == ["model", "guide"]


@pytest.mark.parametrize("name", ["lambda", "partial", "method", "prior"])
def test_the_loss_module_names_parameters_that_its_list_lacks(name):
    model, guide = UNREGISTERED[name](nn.Linear(3, 8))
    guide(X)
    loss_fn = pv.objectives.ELBO()(model, guide)
    list(loss_fn.parameters())
    with pytest.warns(UserWarning, match=r"which the last parameters\(\) did not yield"):
        loss_fn(X)


def test_a_lazy_layer_without_values_is_named():
    model = model_of(nn.LazyLinear(3))
    with pytest.raises(
        ValueError, match=r"'likelihood\.decoder\.weight' of the model has no values"
    ):
        fitted(model, guide_of(model))
    model.likelihood(torch.randn(4, 2))
    assert fitted(model, guide_of(model)) == []
