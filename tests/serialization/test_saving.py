"""Saved and loaded pairs compute bitwise equal numbers, and recipes rebuild them."""

import copy
import functools
import inspect
import json
import math
import pickle
import resource
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_table import DENSITIES
from new_processes import run_python
from torch import nn

import pyro_vae as pv
from pyro_vae import flows, guides, likelihoods, nets, priors
from pyro_vae._programs.pair_state import state
from pyro_vae._utils.init_args import init_args_of
from pyro_vae.guides import _families as families
from pyro_vae.serialization import _pair_state as filling
from pyro_vae.serialization import _registry as registry
from pyro_vae.serialization._folder import read, write
from pyro_vae.serialization._recipe import rebuild, recipe

ROWS = 8


def binary(rows=ROWS, size=6):
    return torch.bernoulli(torch.full((rows, size), 0.5))


def decoder(inputs=2, outputs=6):
    return nets.MLP(inputs, [4], outputs)


def encoder(inputs=6):
    return nets.MLP(inputs, [5])


def plain_model(prior=None):
    return pv.LatentVariableModel(
        prior or priors.StandardNormal(2), likelihoods.Bernoulli(decoder())
    )


def latent_variable():
    model = plain_model()
    return model, guides.AmortizedNormal(model, encoder()), (binary(),)


def conditional():
    model = pv.models.ConditionalModel(
        likelihoods.Normal(decoder(3, 4), scale=likelihoods.ScaleFromDecoder()),
        likelihoods.Bernoulli(nets.Joined(decoder(5))),
        conditional_prior=True,
    )
    guide = guides.AmortizedMultivariateNormal(model, nets.Joined(encoder(9)))
    return model, guide, (binary(), torch.randn(ROWS, 3))


def hierarchical():
    normal = likelihoods.Normal(decoder(2, 3), scale=0.5)
    model = pv.models.HierarchicalModel(
        priors.MixtureOfNormals(2, 3), [normal], likelihoods.Bernoulli(decoder(3))
    )
    return model, guides.HierarchicalGuide(model, encoder(), history=1, hidden=[4]), (binary(),)


def mixture():
    model = pv.models.MixtureModel(priors.MixtureOfNormals(2, 3), likelihoods.Bernoulli(decoder()))
    return model, guides.AmortizedMixture(model, encoder(), components=2), (binary(),)


def semi_supervised():
    likelihood = likelihoods.Bernoulli(nets.Joined(decoder(2 + 3)))
    model = pv.models.SemiSupervisedModel(3, priors.StandardNormal(2), likelihood)
    guide = guides.SemiSupervisedGuide(
        model, classifier=nets.MLP(6, [4], 3), encoder=nets.Joined(encoder(6 + 3))
    )
    guide = functools.partial(guide, enumerates=False)
    return model, guide, (binary(), torch.arange(ROWS) % 4 - 1)


def sequence():
    model = pv.models.SequenceModel(
        priors.StandardNormal(2),
        likelihoods.Normal(decoder(2, 2)),
        likelihoods.Bernoulli(decoder()),
    )
    guide = guides.SequenceGuide(model, encoder=encoder(), recurrent=4, hidden=[3])
    return model, guide, (binary(4 * ROWS).reshape(ROWS, 4, 6), torch.arange(ROWS) % 4 + 1)


def flow():
    transform = torch.distributions.AffineTransform(0.5, 2.0)
    model = pv.surjections.FlowModel(
        priors.StandardNormal(3), [transform, flows.Composition(3, length=2)]
    )
    return model, pv.surjections.FlowGuide(model), (torch.randn(ROWS, 3),)


def surjections():
    below = pv.surjections.Stochastic(
        encoder=likelihoods.Normal(nets.MLP(6, [4], 3)), decoder=likelihoods.Bernoulli(decoder(3))
    )
    above = pv.surjections.Slice(2, likelihoods.Normal(nets.MLP(2, [], 1)), conditional=True)
    model = pv.surjections.FlowModel(priors.StandardNormal(2), [below, above])
    return model, pv.surjections.FlowGuide(model), (binary(),)


def vamp():
    prior = priors.VampPrior(2, pseudo_inputs=torch.rand(4, 6))
    model = plain_model(prior)
    guide = guides.AmortizedNormal(model, encoder())
    prior.bind_guide(guide)
    return model, guide, (binary(),)


def exemplars():
    prior = priors.ExemplarPrior(2, exemplars=binary(5), num_drawn=3)
    model = plain_model(prior)
    guide = guides.AmortizedNormal(model, encoder())
    prior.bind_guide(guide)
    return model, guide, (binary(),)


def flow_prior():
    prior = priors.FlowPrior(2, flows.Composition(2, flows.Planar, length=2))
    model = plain_model(prior)
    return model, guides.AmortizedNormal(model, encoder()), (binary(),)


def aggregated():
    model, guide, (x,) = latent_variable()
    better = pv.LatentVariableModel(priors.AggregatedPosterior(guide, x), model.likelihood)
    return better, guide, (x,)


def aggregated_of_flows():
    model = plain_model()
    guide, x = guides.AmortizedFlow(model, encoder(), length=1), binary()
    guide(x)
    better = pv.LatentVariableModel(priors.AggregatedPosterior(guide, x), model.likelihood)
    return better, guide, (x,)


def local():
    model, x = plain_model(), binary()
    flow = functools.partial(families.Transformed, flow=flows.Planar, length=2)
    return model, guides.LocalGuide(model, x, family=flow), (x,)


def semi_amortized():
    model = plain_model()
    return (
        model,
        guides.SemiAmortized(guides.AmortizedNormal(model, encoder()), steps=2),
        (binary(),),
    )


def images():
    net = nn.Sequential(
        nn.Unflatten(-1, (1, 2, 3)),
        nn.Conv2d(1, 2, 2),
        nn.ELU(0.5),
        nn.Flatten(-3),
        nn.Linear(4, 3, bias=False),
        nn.BatchNorm1d(3),
        nn.Softplus(beta=2),
    )
    model = pv.LatentVariableModel(
        priors.StandardNormal(2),
        likelihoods.Bernoulli(
            nn.Sequential(nets.ConvDecoder(2, (1, 2, 3), [2], activation=nn.SiLU), nn.Flatten(-3))
        ),
    )
    return model, guides.AmortizedNormal(model, net), (binary(),)


PAIRS = [latent_variable, conditional, hierarchical, mixture, semi_supervised, sequence, flow,
         surjections, vamp, exemplars, flow_prior, aggregated, aggregated_of_flows, local,
         semi_amortized, images]  # fmt: skip


def trained(make):
    """Return a pair with lazy parts built and parameters moved, as after a fit."""
    model, guide, data = make()
    with torch.no_grad():
        guide(*data)
        for tensor in state(model, guide).values():
            if isinstance(tensor, nn.Parameter):
                tensor.add_(0.01 * torch.randn_like(tensor))
    return model, guide, data


def numbers(model, guide, data):
    return pv.evidence(model, guide, data, num_particles=3, seed=0).values


def same_state(ours, theirs):
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.requires_grad) == (other.dtype, other.requires_grad), name
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("make", PAIRS, ids=lambda make: make.__name__)
def test_library_pairs_load_without_programs(tmp_path, make):
    model, guide, data = trained(make)
    expected = numbers(model, guide, data)
    pv.save(tmp_path / "pair", model, guide)
    random_state = torch.get_rng_state()
    saved = pv.load(tmp_path / "pair")
    assert torch.equal(random_state, torch.get_rng_state())
    same_state(state(model, guide), state(saved.model, saved.guide))
    assert torch.equal(numbers(saved.model, saved.guide, data), expected)
    assert repr(saved.model) == repr(model)
    assert not {id(t) for t in state(model, guide).values()} & {
        id(t) for t in state(saved.model, saved.guide).values()
    }
    # A loaded pair can be saved again.
    pv.save(tmp_path / "again", saved.model, saved.guide)
    again = pv.load(tmp_path / "again")
    assert torch.equal(numbers(again.model, again.guide, data), expected)


@pytest.mark.parametrize("make", PAIRS, ids=lambda make: make.__name__)
def test_library_pairs_load_in_float64(tmp_path, make):
    model, guide, _ = trained(make)
    for program in (model, guide):
        getattr(program, "func", program).double()  # one guide is a partial function
    pv.save(tmp_path / "pair", model, guide)
    saved = pv.load(tmp_path / "pair")
    same_state(state(model, guide), state(saved.model, saved.guide))


@pytest.mark.parametrize("name", DENSITIES)
def test_guides_of_every_family_load(tmp_path, name):
    def make():
        model = plain_model()
        return model, DENSITIES[name](model, encoder()), (binary(),)

    model, guide, data = trained(make)
    pv.save(tmp_path / "pair", model, guide)
    saved = pv.load(tmp_path / "pair")
    same_state(state(model, guide), state(saved.model, saved.guide))
    assert torch.equal(numbers(saved.model, saved.guide, data), numbers(model, guide, data))


def test_loaded_pair_works_like_the_original(tmp_path):
    model, guide, (x,) = trained(latent_variable)
    pv.save(tmp_path / "pair", model, guide)
    saved = pv.load(tmp_path / "pair")
    surgeries = [pv.elbo_surgery(m, g, x, seed=0)
                 for m, g in ((model, guide), (saved.model, saved.guide))]  # fmt: skip
    assert surgeries[0].mutual_information == surgeries[1].mutual_information
    assert torch.equal(pv.generate(model, x, seed=0), pv.generate(saved.model, x, seed=0))
    options = {"epochs": 2, "batch_size": 4, "seed": 0, "progress": False, "capture": False}
    fits = [pv.fit(m, g, x, **options) for m, g in ((model, guide), (saved.model, saved.guide))]
    assert fits[0].history.loss.tolist() == fits[1].history.loss.tolist()
    same_state(state(model, guide), state(saved.model, saved.guide))


IN_A_NEW_PROCESS = """
import sys, torch, pyro_vae as pv
torch.set_num_threads(1)
saved = pv.load(sys.argv[1])
x = torch.load(sys.argv[2])
values = pv.evidence(saved.model, saved.guide, x, num_particles=3, seed=0).values
torch.save(values, sys.argv[3])
"""


def test_new_process_computes_the_same_numbers(tmp_path):
    model, guide, data = trained(vamp)
    pv.save(tmp_path / "pair", model, guide)
    torch.save(data[0], tmp_path / "x")
    program = tmp_path / "program.py"
    program.write_text(IN_A_NEW_PROCESS)
    result = run_python(program, ["pair", "x", "values"], tmp_path)
    assert not result.returncode, result.stderr
    assert torch.equal(torch.load(tmp_path / "values"), numbers(model, guide, data))


NUMBERS = {
    "float32": np.float32(0.5), "float16": np.float16(0.5), "float64": np.float64(1 / 3),
    "nan": np.float32("nan"), "int64": np.int64(-7), "uint8": np.uint8(255),
    "large": np.uint64(2**64 - 1), "true": np.bool_(True), "false": np.bool_(False),
}  # fmt: skip


class Centered(nn.Module):
    """An encoder whose means are not buffers."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = nn.Linear(6, 5), torch.tensor(2.0)
        self.mean, self.means = torch.zeros(6), {"x": torch.zeros(6)}

    def forward(self, x):
        return self.net((x - self.mean - self.means["x"]) / self.scale)


@pytest.mark.parametrize("changed", [None, "mean", "means['x']"])
def test_load_warns_of_tensors_that_are_not_saved(changed, tmp_path):
    def pair():
        model = plain_model()
        guide = guides.AmortizedNormal(model, Centered())
        guide(binary())
        return model, guide

    model, guide = pair()
    if changed == "mean":
        guide.encoder.mean = torch.full((6,), 0.3)
    elif changed:
        guide.encoder.means["x"] += 0.3
    pv.save(tmp_path / "pair", model, guide)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pv.load(tmp_path / "pair", *pair())
    found = [str(warning.message) for warning in caught]
    assert len(found) == (changed is not None)
    assert all(f"buffers only: guide.encoder.{changed}. Their" in message for message in found)


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    notes = {**NUMBERS, "list": [np.float32(2.0)], "by size": {np.int64(3): 0.5}}
    model, guide, _ = latent_variable()
    pv.save(tmp_path / "pair", model, guide, notes=notes)
    saved = pv.load(tmp_path / "pair").notes
    assert math.isnan(saved.pop("nan"))
    assert saved == {name: value for name, value in notes.items() if name != "nan"}
    kinds = {type(saved[name]) for name in NUMBERS if name != "nan"}
    assert kinds == {float, int, bool}
    with pytest.raises(TypeError, match=r"^notes\['c'\] is a"):
        pv.save(tmp_path / "other", model, guide, notes={"c": np.complex64(1j)})


def test_history_notes_and_versions_round_trip(tmp_path):
    model, guide, (x,) = latent_variable()
    fit = pv.fit(model, guide, x, epochs=3, batch_size=4, progress=False)
    index = pd.Index(["a", "b", "c"], name="run")
    frame = fit.history.assign(word=["x", None, "z"], flag=True).set_index(index)
    notes = {"codes": torch.ones(2), "shape": (2, 3), "rows": np.arange(3), "pi": 3.14}
    for history in (fit.history, frame):
        pv.save(tmp_path / "pair", model, guide, history=history, notes=notes, overwrite=True)
        saved = pv.load(tmp_path / "pair")
        pd.testing.assert_frame_equal(saved.history, history, check_exact=True)
    assert saved.notes["shape"] == (2, 3)
    assert torch.equal(saved.notes["codes"], torch.ones(2))
    assert saved.versions["torch"] == torch.__version__
    assert saved.versions.keys() == {"pyro_vae", "torch", "pyro-ppl", "python", "date"}
    with pytest.raises(TypeError, match=r"^notes\['f'\] is a function"):
        pv.save(tmp_path / "pair", model, guide, notes={"f": lambda: 0}, overwrite=True)
    with pytest.raises(FileExistsError):
        pv.save(tmp_path / "pair", model, guide)


def test_types_frozen_parameters_and_modes_are_kept(tmp_path):
    model, guide, (x,) = trained(images)
    guide.double()
    model.likelihood.half()
    guide.encoder[1].weight.requires_grad_(False)
    guide.encoder[5].eval()
    pv.save(tmp_path / "pair", model, guide)
    saved = pv.load(tmp_path / "pair")
    same_state(state(model, guide), state(saved.model, saved.guide))
    assert [m.training for m in saved.guide.modules()] == [m.training for m in guide.modules()]
    assert not saved.guide.encoder[5].training
    z = saved.guide(x.double())["z"]
    assert z.dtype == torch.float64


@pytest.mark.parametrize("capture", [True, False])
def test_tensor_names_do_not_depend_on_capture(tmp_path, capture, without_compiler):
    model, guide, (x,) = latent_variable()
    pv.fit(model, guide, x, epochs=1, batch_size=4, progress=False, capture=capture)
    pv.save(tmp_path / "pair", model, guide)
    record = json.loads((tmp_path / "pair/record.json").read_text())
    assert sorted(record["content"]["tensors"]) == sorted([
        "model.prior.loc", "model.prior.scale",
        *(f"model.likelihood.decoder.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")),
        *(f"guide.{n}.{kind}" for n in ("encoder.0", "built.head") for kind in ("weight", "bias")),
    ])  # fmt: skip
    saved = pv.load(tmp_path / "pair")
    assert torch.equal(numbers(saved.model, saved.guide, (x,)), numbers(model, guide, (x,)))


@pytest.mark.slow
def test_compiled_pair_loads_and_trains_on(tmp_path):
    model, guide, (x,) = latent_variable()
    options = {"epochs": 2, "batch_size": 4, "seed": 0, "progress": False, "capture": True}
    assert pv.fit(model, guide, x, **options).execution == "captured"
    pv.save(tmp_path / "pair", model, guide)
    saved = pv.load(tmp_path / "pair")
    fits = [pv.fit(m, g, x, **options) for m, g in ((model, guide), (saved.model, saved.guide))]
    assert fits[0].history.loss.tolist() == fits[1].history.loss.tolist()


# Custom programs


def custom_pair(width=4):
    net, body = nn.Linear(2, 6), nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width))

    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        rate = pyro.param("rate", torch.tensor([0.5]), constraint=dist.constraints.interval(0, 2))
        pyro.module("decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0, rate.expand(2)).to_event(1))
            pyro.sample("x", dist.Normal(net(z), scale).to_event(1), obs=x)

    def guide(x):
        loc, scale = body(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, guide


def fitted_custom_pair(x):
    model, guide = custom_pair()
    pv.fit(model, guide, x, epochs=3, batch_size=4, learning_rate=0.1, progress=False)
    return model, guide


def test_custom_programs_are_filled(tmp_path):
    x = torch.randn(ROWS, 6)
    model, guide = fitted_custom_pair(x)
    expected = numbers(model, guide, (x,))
    pv.save(tmp_path / "pair", model, guide)
    with pytest.raises(ValueError, match=r"pass model and guide to load: model is the function"):
        pv.load(tmp_path / "pair")
    with pytest.raises(ValueError, match=r"pass guide to load: guide is the function"):
        pv.load(tmp_path / "pair", custom_pair()[0])
    saved = pv.load(tmp_path / "pair", *custom_pair())
    assert torch.equal(numbers(saved.model, saved.guide, (x,)), expected)
    assert len(pyro.get_param_store()) == 0
    with pv.parameter_store(model, guide), torch.no_grad():
        before = {name: pyro.param(name).item() for name in ("scale", "rate")}
    with pv.parameter_store(saved.model, saved.guide):
        assert {name: pyro.param(name).item() for name in before} == before
        assert pyro.param("rate").unconstrained().requires_grad
    fits = [pv.fit(m, g, x, epochs=2, batch_size=4, seed=1, progress=False, capture=False)
            for m, g in ((model, guide), (saved.model, saved.guide))]  # fmt: skip
    assert fits[0].history.loss.tolist() == fits[1].history.loss.tolist()


def test_pair_loads_into_the_same_programs(tmp_path):
    x = torch.randn(ROWS, 6)
    model, guide = fitted_custom_pair(x)
    expected = numbers(model, guide, (x,))
    pv.save(tmp_path / "pair", model, guide)
    pv.fit(model, guide, x, epochs=1, batch_size=4, progress=False)
    assert not torch.equal(numbers(model, guide, (x,)), expected)
    pv.load(tmp_path / "pair", model, guide)
    assert torch.equal(numbers(model, guide, (x,)), expected)


def test_pair_trained_by_pyro_is_saved(tmp_path):
    x = torch.randn(ROWS, 6)
    model, guide = custom_pair()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    expected = numbers(model, guide, (x,))
    pv.save(tmp_path / "pair", model, guide)
    pyro.clear_param_store()
    saved = pv.load(tmp_path / "pair", *custom_pair())
    assert torch.equal(numbers(saved.model, saved.guide, (x,)), expected)


def test_load_refuses_programs_that_do_not_match(tmp_path):
    x = torch.randn(ROWS, 6)
    pv.save(tmp_path / "pair", *fitted_custom_pair(x))
    with pytest.raises(ValueError, match=r"of another shape: guide.body.0.weight \(saved \(4, 6\)"):
        pv.load(tmp_path / "pair", *custom_pair(width=8))
    model, _ = custom_pair()
    with pytest.raises(
        ValueError, match=r"missing here: guide.body.0.weight.* not saved: guide.enc"
    ):
        pv.load(tmp_path / "pair", model, guides.AmortizedNormal(model, encoder()))
    with pytest.raises(TypeError, match="guide must be a Pyro program"):
        pv.load(tmp_path / "pair", model, 3)


def test_library_guide_is_rebuilt_for_a_custom_model(tmp_path):
    x = torch.randn(ROWS, 6)

    def pair():
        model, _ = custom_pair()
        return model, guides.AmortizedFlow(
            model, encoder(), functools.partial(flows.Sylvester, size=1)
        )

    model, guide = pair()
    pv.fit(model, guide, x, epochs=2, batch_size=4, progress=False)
    pv.save(tmp_path / "pair", model, guide)
    for programs in ((pair()[0],), pair()):
        saved = pv.load(tmp_path / "pair", *programs)
        assert saved.guide._model.program is saved.model
        assert torch.equal(numbers(saved.model, saved.guide, (x,)), numbers(model, guide, (x,)))


class OwnEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x).relu()


def test_new_guide_with_a_custom_encoder_gets_its_head(tmp_path):
    model, guide, data = trained(
        lambda: (model := plain_model(), guides.AmortizedNormal(model, OwnEncoder()), (binary(),))
    )
    pv.save(tmp_path / "pair", model, guide)
    with pytest.raises(
        ValueError, match=r"pass guide and model to load: guide.encoder is a OwnEnc"
    ):
        pv.load(tmp_path / "pair")
    fresh = plain_model()
    guide_of_fresh = guides.AmortizedNormal(fresh, OwnEncoder())
    saved = pv.load(tmp_path / "pair", fresh, guide_of_fresh)
    assert saved.guide is guide_of_fresh
    assert torch.equal(numbers(saved.model, saved.guide, data), numbers(model, guide, data))


class Odd(dist.constraints.interval):
    """A support that is not one of torch's."""


class OddTransform(torch.distributions.transforms.SigmoidTransform):
    """A transform that is not one of torch's."""


def test_unregistered_support_needs_a_guide_that_was_called(tmp_path):
    torch.distributions.biject_to.register(Odd, lambda _: OddTransform())

    class Half(dist.Uniform):
        support = Odd(0.0, 1.0)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Half(torch.zeros(6), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(z).to_event(1), obs=x)

    x = binary()
    guide, called, fresh = (guides.AmortizedNormal(model, encoder()) for _ in range(3))
    guide(x), called(x)
    pv.save(tmp_path / "pair", model, guide)
    with pytest.raises(ValueError, match=r"missing here: guide.built.head.weight"):
        pv.load(tmp_path / "pair", model, fresh)
    saved = pv.load(tmp_path / "pair", model, called)
    assert torch.equal(numbers(model, saved.guide, (x,)), numbers(model, guide, (x,)))


@pytest.mark.parametrize("change", ["activation", "size", "more", "tied", "value", "hook"])
def test_programs_changed_after_construction_must_be_passed(tmp_path, change):
    model, guide, _ = trained(latent_variable)
    if change == "activation":
        guide.encoder[1] = nn.ReLU()
    elif change == "size":
        model.likelihood.decoder = decoder(2, 6).append(nn.Linear(6, 6))
    elif change == "more":
        guide.unused = nn.Linear(2, 2)
    elif change == "tied":
        model.likelihood.decoder[0].bias = model.likelihood.decoder[2].bias
    elif change == "value":
        model.likelihood.event_dim = 2
    elif change == "hook":
        guide.encoder.register_forward_hook(lambda *_: None)
        model.likelihood.register_forward_pre_hook(lambda *_: None)
    pv.save(tmp_path / "pair", model, guide)
    with pytest.raises(
        ValueError, match=r"pass model and guide to load: (it has changed since|.* hooks)"
    ):
        pv.load(tmp_path / "pair")
    pv.load(tmp_path / "pair", *copy.deepcopy((model, guide)))


def test_save_refuses_values_that_a_guide_uses_at_its_first_call(tmp_path):
    model, guide, (x,) = trained(latent_variable)
    fresh = guides.AmortizedNormal(model, encoder())
    fresh.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="uses only at its first call"):
        pv.save(tmp_path / "pair", model, fresh)
    fresh(x)
    pv.save(tmp_path / "pair", model, fresh)


def test_pair_is_saved_before_its_first_call(tmp_path):
    model, guide, data = latent_variable()
    pv.save(tmp_path / "pair", model, guide)
    saved = pv.load(tmp_path / "pair")
    assert not saved.guide.built
    assert numbers(saved.model, saved.guide, data).shape == (ROWS,)


# Recipes


def public_classes():
    abstract = {
        flows.Flow, guides.Family, pv.surjections.GenerativeSurjection,
        pv.surjections.InferenceSurjection, pv.surjections.SurVAELayer, pv.surjections.Surjection,
        likelihoods.Likelihood, likelihoods.Scale, priors.GuideMixturePrior, families.Family,
    }  # fmt: skip
    names = {name: cls for name, cls in registry.classes().items() if cls not in abstract}
    return {name: cls for name, cls in names.items() if not name.startswith("torch.")}


def build(cls):
    """Return an object of a class, built from simple arguments."""
    model = plain_model()
    known = {
        "model": model, "encoder": encoder(), "decoder": decoder(), "network": encoder(), "dim": 4,
        "in_features": 3, "out_features": 2, "hidden": [4], "image_shape": (1, 4, 4),
        "channels": [2], "depth": 1, "blocks": 1, "prior": priors.StandardNormal(2), "levels": 4,
        "likelihood": likelihoods.Bernoulli(decoder()), "layers": [likelihoods.Normal(decoder())],
        "transition": likelihoods.Normal(decoder()), "classes": 3, "classifier": decoder(6, 3),
        "x": binary(), "event_shape": (2,), "shape": (3,), "value": 1.5, "size": 2,
        "noise": likelihoods.Normal(decoder()), "flow": flows.Planar, "length": 2, "rank": 1,
        "pseudo_inputs": torch.rand(3, 6), "exemplars": binary(3), "data": binary(), "context": 3,
        "guide": guides.AmortizedNormal(model, encoder()), "transform": flows.Composition(4),
        "family": families.LowRankNormal, "steps": 2, "components": 3, "bins": 4, "scale": 0.5,
        "activation": nn.ELU, "signs": decoder(6), "momentum": 0.5, "initial": 2.0,
    }  # fmt: skip
    if cls is pv.surjections.FlowModel:
        known["layers"] = [
            pv.surjections.Absolute(decoder(6)),
            pv.surjections.Bijection(flows.Composition(6)),
        ]
    if cls is pv.models.MixtureModel:
        known["prior"] = priors.MixtureOfNormals(2, 3)
    if cls is pv.surjections.FlowGuide:
        known["model"] = build(pv.surjections.FlowModel)
    if cls is nets.ResidualBlock:
        known["channels"] = 2
    if cls is flows.Sylvester:
        known["size"] = 1
    if issubclass(cls, likelihoods.StudentT):
        known["scale"] = likelihoods.ScalePerOutput(3, 1, initial=0.5)
    args, kwargs = [], {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += known.get(name, ())
        elif parameter.kind is parameter.VAR_KEYWORD:
            continue
        elif name in known:
            kwargs[name] = known[name]
        elif parameter.default is parameter.empty:
            raise KeyError(f"{cls.__name__} has a new argument {name}: add one to this table")
    if args:
        kwargs = {name: v for name, v in kwargs.items() if name not in ("model", "x")}
        args = [model, binary()] if cls is guides.LocalGuide else args
    return cls(*args, **kwargs)


@pytest.mark.parametrize("name", public_classes())
def test_every_public_class_is_rebuilt_from_its_recipe(name):
    cls = public_classes()[name]
    thing = build(cls)
    structure = recipe(thing=thing)
    assert not structure["given"]
    made = rebuild(structure, memory=2**24)["thing"]
    assert type(made) is cls
    assert repr(made) == repr(thing)
    shapes = [[(n, t.shape) for n, t in each.state_dict().items()] for each in (thing, made)]
    assert shapes[0] == shapes[1]
    assert inspect.signature(cls).parameters.keys() >= inspect.signature(
        cls.__init__
    ).parameters.keys() - {"self"}
    # Copies and pickles keep the recipe and do not refer to the original's parts.
    for twin in (copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))):  # noqa: S301
        twin_recipe = recipe(thing=twin)
        assert repr(twin_recipe["things"]) == repr(structure["things"])
        if cls.__name__ not in vars(guides):
            inner = {id(m) for m in thing.modules()}
            held = [v for v in (init_args_of(twin) or {}).values() if isinstance(v, nn.Module)]
            assert not any(id(module) in inner for module in held)


def test_all_public_classes_are_registered():
    missing = []
    for package in (nets, priors, likelihoods, pv.models, guides, flows, pv.surjections):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing) and issubclass(thing, nn.Module):
                missing += [name] * (thing not in registry.names())
    assert not missing


def test_shared_parts_stay_shared():
    shared = encoder()
    model = plain_model()
    guide = guides.AmortizedNormal(model, nn.Sequential(shared, nets.MLP(5, [6]), shared))
    made = rebuild(recipe(model=model, guide=guide), memory=2**24)
    assert made["guide"]._model.program is made["model"]
    assert made["guide"].encoder[0] is made["guide"].encoder[2]


def test_recipe_of_a_copied_pair_shares_the_model():
    model, guide = copy.deepcopy(latent_variable()[:2])
    made = rebuild(recipe(model=model, guide=guide), memory=2**24)
    assert made["guide"]._model.program is made["model"]
    alone = copy.deepcopy(guide)
    assert alone._model.program is model
    assert recipe(model=model, guide=alone)["roots"]["guide"]["thing"] > 0


def test_decorated_classes_keep_signature_state_and_pickling():
    signature = inspect.signature(nets.MLP)
    assert [*signature.parameters] == ["in_features", "hidden", "out_features", "activation"]
    net = nets.MLP(2, [3])
    assert "_making" not in net.state_dict()
    assert isinstance(net, nn.Sequential)
    with pytest.raises(TypeError, match="hidden must be a sequence"):
        nets.MLP(2, 3)
    assert pickle.loads(pickle.dumps(nets.MLP(2, [3], activation=lambda: nn.ReLU())))  # noqa: S301

    class Wider(nets.MLP):
        pass

    reason = recipe(net=Wider(2, [3]))["given"]["net"]
    assert "Wider" in reason


# Tampered records


def tampered(folder, change):
    content = read(folder, kind="pair")
    change(content)
    write(folder, content, kind="pair", overwrite=True)


def huge(content, **arguments):
    content["recipe"]["things"] = [
        {**t, "arguments": {**t["arguments"], **arguments}} if t["class"] == "nets.MLP" else t
        for t in content["recipe"]["things"]
    ]


def thing(content, structure):
    content["recipe"]["things"][0] = structure


HOSTILE = {
    "terabyte": lambda c: huge(c, hidden=[2**20, 2**20]),
    "terabyte of masks": lambda c: thing(c, {"class": "flows.InverseAutoregressive",
        "arguments": {"dim": 2**20, "hidden": [2**20]}}),
    "terabyte of zeros": lambda c: thing(c, {"class": "priors.StandardNormal",
        "arguments": {"event_shape": (2**40,)}}),
    "endless flow": lambda c: thing(c, {"class": "families.Transformed",
        "arguments": {"dim": 2, "flow": {"class": "flows.Planar"}, "length": 10**15}}),
    "long list": lambda c: huge(c, hidden=[1] * 200_000),
    "head": lambda c: c["heads"]["guide"].update(width=2**40),
    "site": lambda c: c["heads"]["guide"]["sites"][0].update(event_shape=(2**40,)),
    "site of another kind": lambda c: c["heads"]["guide"]["sites"][0].update(plates=3),
    "mapping": lambda c: c["heads"]["guide"]["sites"][0].update(bijection=["os.system", "true"]),
    "import": lambda c: thing(c, {"class": "os.system", "arguments": {"command": "true"}}),
    "dunder": lambda c: thing(c, {"class": "nets.MLP", "arguments": {"__class__": 1}}),
    "abstract": lambda c: thing(c, {"class": "likelihoods.Likelihood", "arguments": {}}),
    "itself": lambda c: thing(c, {"class": "nets.Joined", "arguments": {"network": {"thing": 0}}}),
    "negative": lambda c: c["recipe"]["roots"].update(model={"thing": -1}),
    "no program": lambda c: c["recipe"]["roots"].update(model="os.system"),
    "no recipe": lambda c: c.update(recipe=3),
    "nothing": lambda c: c.clear(),
    "argument": lambda c: huge(c, in_features="x"),
    "fewer tensors": lambda c: c["tensors"].pop("guide.built.head.bias"),
    "tensors of numbers": lambda c: c["tensors"].update({"guide.built.head.bias": 3}),
}  # fmt: skip


@pytest.mark.parametrize("through", [{"thing": 0}, 3])
def test_load_refuses_priors_that_refer_to_themselves(tmp_path, through):
    pv.save(tmp_path / "pair", *trained(vamp)[:2])
    tampered(tmp_path / "pair", lambda c: c["recipe"]["through"][0].update(guide=through))
    with pytest.raises(pv.serialization.UnreadableFile, match=r"has no pair"):
        pv.load(tmp_path / "pair")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_records_are_refused_before_allocation(tmp_path, name):
    model, guide, _ = trained(latent_variable)
    pv.save(tmp_path / "pair", model, guide)
    tampered(tmp_path / "pair", HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"is not loaded|has no pair"):
        pv.load(tmp_path / "pair")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # kilobytes


def test_load_moves_the_whole_pair_to_the_device(tmp_path):
    x = torch.randn(ROWS, 6)
    pv.save(tmp_path / "pair", *fitted_custom_pair(x))
    saved = pv.load(tmp_path / "pair", *custom_pair(), device="meta")
    with pv.parameter_store(saved.model, saved.guide):
        tensors = state(saved.model, saved.guide)
    assert len(tensors) == 11
    assert all(tensor.is_meta for tensor in tensors.values())


def test_failed_load_leaves_the_programs_unchanged(tmp_path):
    x = torch.randn(ROWS, 6)
    pv.save(tmp_path / "pair", *fitted_custom_pair(x))
    tampered(
        tmp_path / "pair", lambda c: c["constraints"].update({"param.scale": ["os.system", "true"]})
    )
    model, guide = custom_pair()
    before = {name: tensor.clone() for name, tensor in state(model, guide).items()}
    with pytest.raises(
        pv.serialization.UnreadableFile, match=r"no constraint or transform named 'os.sys"
    ):
        pv.load(tmp_path / "pair", model, guide)
    assert all(torch.equal(before[name], t) for name, t in state(model, guide).items())


def test_load_refuses_other_folders(tmp_path):
    write(tmp_path / "run", {}, kind="checkpoint of a fit")
    with pytest.raises(
        pv.serialization.UnreadableFile, match="of the kind 'checkpoint of a fit', not 'pair'"
    ):
        pv.load(tmp_path / "run")
    with pytest.raises(pv.serialization.UnreadableFile, match="does not exist"):
        pv.load(tmp_path / "nowhere")


def test_rebuild_refuses_more_memory_than_allowed(tmp_path):
    """The memory bound is far above the need of valid pairs."""
    model, guide, _ = trained(latent_variable)
    structure = recipe(model=model, guide=guide)
    made = rebuild(structure, memory=20_000)
    assert filling.module_tensors(**made)
    with pytest.raises(ValueError, match="it would take more than 100 bytes"):
        rebuild(structure, memory=100)


def test_save_refuses_a_history_with_duplicate_columns(tmp_path):
    history = pd.DataFrame([[1.0, 2.0]], columns=["loss", "loss"])
    with pytest.raises(ValueError, match=r"\['loss'\] twice"):
        pv.save(tmp_path / "pair", *custom_pair(), history=history)


LAYERS = {
    "RMSNorm": lambda: nn.RMSNorm(6, eps=1e-3, elementwise_affine=False),
    "Hardtanh": lambda: nn.Hardtanh(-2.0, 2.0),
    "PReLU": lambda: nn.PReLU(6, init=0.3),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(6, affine=True, momentum=0.3),
    "AdaptiveAvgPool1d": lambda: nn.AdaptiveAvgPool1d(3),
    "LPPool1d": lambda: nn.LPPool1d(2, 2, stride=1, ceil_mode=True),
    "RReLU": lambda: nn.RReLU(0.2, 0.4),
    "AlphaDropout": lambda: nn.AlphaDropout(0.3),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.3),
    "Threshold": lambda: nn.Threshold(0.1, -3.0),
    "Softshrink": lambda: nn.Softshrink(0.2),
    "ZeroPad1d": lambda: nn.ZeroPad1d((1, 2)),
    "ConstantPad1d": lambda: nn.ConstantPad1d(2, 0.5),
    "ReflectionPad1d": lambda: nn.ReflectionPad1d(2),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2, alpha=0.1, k=2.0),
    "ChannelShuffle": lambda: nn.ChannelShuffle(2),
    "Unfold": lambda: nn.Unfold((2, 1)),
    "GRU": lambda: nn.GRU(6, 5, num_layers=2, bias=False, batch_first=True),
    "LSTM": lambda: nn.LSTM(6, 5, proj_size=3, bidirectional=True),
    "RNN": lambda: nn.RNN(6, 5, nonlinearity="relu"),
    "GRUCell": lambda: nn.GRUCell(6, 5, bias=False),
    "Linear": lambda: nn.Linear(6, 5, bias=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torch_are_made_again(name):
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    structure = recipe(net=nn.Sequential(layer))
    assert not structure["given"]
    made = rebuild(structure, memory=2**20)["net"][0]
    assert type(made) is type(layer)
    assert repr(made) == repr(layer)
    made.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6) if "Cell" in name else torch.randn(2, 6, 6)
    x = x[:, :, :, None] if name in ("ChannelShuffle", "Unfold") else x
    for each in (made, layer):
        each.eval()
    torch.testing.assert_close(made(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    ],
    ids=["transformer", "weight_norm"],
)
def test_a_layer_of_torch_that_does_not_keep_its_arguments(make, tmp_path):
    def pair():
        model, _, (x,) = latent_variable()
        size = x.shape[-1]
        encoder = nn.Sequential(nn.Linear(size, 6), make(), nn.Linear(6, 3))
        guide = pv.guides.AmortizedNormal(model, encoder)
        guide(x)
        return model, guide, x

    model, guide, x = pair()
    with pytest.warns(UserWarning, match="load will need guide=guide, .* torch does not keep"):
        pv.save(tmp_path / "pair", model, guide)
    with pytest.raises(ValueError, match="whose arguments torch does not keep"):
        pv.load(tmp_path / "pair")
    other, again, _ = pair()
    saved = pv.load(tmp_path / "pair", other, again)
    before, after = (pv.evidence(*each, x, seed=0) for each in ((model, guide), (other, again)))
    assert torch.equal(before.values, after.values)
    assert saved.guide is again
