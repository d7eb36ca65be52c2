"""Pairs keep separate parameters, even with equal names."""

import dataclasses
import functools
import gc
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from torch import nn

import pyro_vae as pv
from pyro_vae._programs import fits
from pyro_vae._utils.modules import modules


def plain_pair(start=0.0):
    """Return a pair that uses pyro.param and pyro.module, under the same names each time."""
    decoder = nn.Linear(1, 1)

    def model(x):
        pyro.module("decoder", decoder)
        loc = pyro.param("loc", torch.tensor(start))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(decoder(z[..., None])[..., 0], 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.1))
        width = pyro.param("width", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, width))

    return model, guide, decoder


class MethodsPair(nn.Module):
    """As in Pyro's VAE example: model and guide are methods of one module."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2, 3), nn.Linear(3, 4)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, raw = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def options(**changes):
    return {"epochs": 5, "batch_size": 25, "learning_rate": 0.05, "seed": 0, "progress": False} | (
        changes
    )


def test_pairs_with_equal_parameter_names_train_separately():
    x = torch.randn(100) + 2
    alone_model, alone_guide, _ = plain_pair()
    torch.manual_seed(1)
    first_model, first_guide, first_decoder = plain_pair()
    torch.manual_seed(1)
    second_model, second_guide, second_decoder = plain_pair()
    pv.fit(alone_model, alone_guide, x - 9, **options())
    pv.fit(first_model, first_guide, x, **options())
    pv.fit(second_model, second_guide, x, **options())
    assert torch.equal(first_decoder.weight, second_decoder.weight)
    evidences = [
        pv.evidence(m, g, x, num_particles=50, seed=0).values
        for m, g in ((first_model, first_guide), (second_model, second_guide))
    ]
    assert torch.equal(*evidences)
    assert len(pyro.get_param_store()) == 0
    with pv.parameter_store(first_model, first_guide):
        loc = pyro.param("loc").item()
        assert set(pyro.get_param_store().keys()) >= {"loc", "slope", "width", "decoder$$$weight"}
    with pv.parameter_store(alone_model, alone_guide):
        assert pyro.param("loc").item() != loc


def test_pyro_modules_of_one_class_train_separately(binary):
    torch.manual_seed(3)
    first = make_pair()
    torch.manual_seed(3)
    second = make_pair()
    untouched = [p.clone() for p in second[0].parameters()]
    pv.fit(*first, binary, **options())
    for before, after in zip(untouched, second[0].parameters(), strict=True):
        assert torch.equal(before, after)
    pv.fit(*second, binary, **options())
    for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_untrained_pair_does_not_use_parameters_of_another(binary):
    """PyroParams use Pyro's store by name: another module's entry must not replace them."""

    class Model(pyro.nn.PyroModule):
        def __init__(self, loc):
            super().__init__()
            self.loc = pyro.nn.PyroParam(torch.tensor(loc))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.loc + z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.zeros(4)
    first, second = Model(0.0), Model(30.0)
    first(x)  # leaves its parameter in Pyro's global store, under the name "loc"
    assert pv.evidence(second, guide, x, num_particles=100, seed=0).mean < -50
    assert second.loc.item() == 30.0


def test_pairs_trained_by_svi_are_evaluated_with_their_parameters():
    x = torch.randn(200) + 4
    model, guide, _ = plain_pair()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pv.objectives.ELBO())
    untrained = pv.evidence(model, guide, x, num_particles=200, seed=0).mean
    assert len(pyro.get_param_store()) == 0  # evaluation stores nothing
    for _ in range(100):
        svi.step(x)
    assert pv.evidence(model, guide, x, num_particles=200, seed=0).mean > untrained + 1


def test_second_fit_starts_from_the_first():
    x = torch.randn(100) + 2
    model, guide, _ = plain_pair()
    first = pv.fit(model, guide, x, **options(epochs=20))
    second = pv.fit(model, guide, x, **options(epochs=1))
    assert second.history.loss.iloc[0] < first.history.loss.iloc[0]


def prior_as_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_fitted_model_keeps_its_parameters_with_another_guide():
    """Naive Monte Carlo: the guide is the prior."""
    x = torch.randn(100) + 3
    model, guide, _ = plain_pair()
    pv.fit(model, guide, x, **options(epochs=50))
    best = pv.evidence(model, guide, x, num_particles=2000, seed=0)
    naive = pv.evidence(model, prior_as_guide, x, num_particles=20_000, seed=0)
    error = (naive.monte_carlo_errors**2 + best.monte_carlo_errors**2).sqrt()
    assert ((naive.values - best.values).abs() < 4.5 * error + 0.02).all()


def test_fitted_guide_keeps_its_parameters_with_another_model():
    x = torch.randn(100) + 3
    model, guide, decoder = plain_pair()
    pv.fit(model, guide, x, **options(epochs=50))
    with pv.parameter_store(model, guide):
        loc, slope = pyro.param("loc").item(), pyro.param("slope").item()

    def other_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(decoder(z[..., None])[..., 0], 1.0), obs=x)

    with pv.parameter_store(other_model, guide):
        assert pyro.param("slope").item() == slope
    both = [pv.evidence(m, guide, x, num_particles=50, seed=0).mean for m in (model, other_model)]
    assert both[0] == pytest.approx(both[1], rel=1e-5)


def test_parameters_of_several_fits_are_ambiguous():
    x = torch.randn(100)
    model, guide, _ = plain_pair()

    def other(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("other", torch.tensor(0.0)), 1.0))

    pv.fit(model, guide, x, **options())
    pv.fit(model, other, x, **options())
    with pytest.raises(
        ValueError, match=r"fitted with 2 guides, and pyro.param values such as 'loc'"
    ):
        pv.evidence(model, prior_as_guide, x, num_particles=5)


def test_pair_of_methods_trains_only_its_own_module():
    x = torch.randn(60, 3)
    first, second = MethodsPair(), MethodsPair()
    before = pv.evidence(first.model, first.guide, x, num_particles=20, seed=0).mean
    pv.fit(first.model, first.guide, x, **options(epochs=20))
    assert pv.evidence(first.model, first.guide, x, num_particles=20, seed=0).mean > before
    pv.fit(second.model, second.guide, x, **options())
    assert not torch.equal(first.decoder.weight, second.decoder.weight)


def test_parameters_are_freed_with_their_pair():
    gc.collect()
    before = len(fits._fits)
    model, guide, _ = plain_pair()
    pv.fit(model, guide, torch.randn(50), **options(epochs=1))
    assert len(fits._fits) == before + 1
    del model, guide
    gc.collect()
    assert len(fits._fits) == before


def test_parameters_are_freed_with_their_pair_under_a_handler():
    gc.collect()
    before = len(fits._fits)
    model, guide, _ = plain_pair()
    wrapped = pyro.poutine.scale(model, scale=0.5), pyro.poutine.scale(guide, scale=0.5)
    pv.fit(*wrapped, torch.randn(50), **options(epochs=1))
    assert len(fits._fits) == before + 1
    del model, guide, wrapped
    gc.collect()
    assert len(fits._fits) == before


def test_evaluation_uses_an_open_parameter_store():
    x = torch.randn(50)
    model, guide, _ = plain_pair()
    pv.fit(model, guide, x, **options(epochs=1))
    with pv.parameter_store(model, guide):
        with torch.no_grad():
            pyro.param("loc").unconstrained().fill_(100.0)
        far = pv.evidence(model, guide, x, num_particles=10, seed=0).mean
    assert pv.evidence(model, guide, x, num_particles=10, seed=0).mean == far


def test_modules_finds_modules_in_closures_partials_and_objects():
    decoder, shared = nn.Linear(1, 1), nn.Linear(1, 2)

    def closure(x):
        return decoder(x)

    def wants(module, x):
        return module(x)

    class Callable:
        def __init__(self):
            self.net = shared

        def __call__(self, x):
            return self.net(x)

    assert modules(closure) == [decoder]
    assert modules(functools.partial(wants, shared)) == [shared]
    assert modules(Callable()) == [shared]

    def indirect(x):
        return closure(x) + indirect(x)

    assert modules(indirect) == [decoder]
    pair = MethodsPair()
    assert modules(pair.model, pair.guide) == [pair]


def test_modules_finds_modules_in_containers_and_inner_functions():
    nets = {"decoder": nn.Linear(1, 1), "list": [nn.Linear(1, 2)]}
    space = types.SimpleNamespace(net=nn.Linear(1, 3))

    def by_key(x):
        return nets["decoder"](x)

    def outer(x):
        def inner(y):
            return space.net(y)

        return inner(x)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain_list = [nn.Linear(1, 4)]

        def model(self, x):
            return self.plain_list[0](x)

    assert set(modules(by_key)) == {nets["decoder"], nets["list"][0]}
    assert modules(outer) == [space.net]
    holder = Holder()
    assert set(modules(holder.model)) == {holder, holder.plain_list[0]}
    assert modules(global_caller) == [GLOBAL_NET]


GLOBAL_NET = nn.Linear(1, 5)


def global_caller(x):
    def inner(y):
        return GLOBAL_NET(y)

    return inner(x)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Two objects of this class are equal but distinct."""

    k: int

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))


@dataclasses.dataclass
class Unhashable:
    k: int
    model = Frozen.model
    guide = Frozen.guide


@pytest.mark.parametrize("kind", [Frozen, Unhashable])
def test_equal_objects_keep_separate_parameters(kind):
    a, b = kind(1), kind(1)
    pv.fit(a.model, a.guide, torch.full((50,), 5.0), **options())
    with pv.parameter_store(a.model, a.guide):
        before = pyro.param("loc").item()
    pv.fit(b.model, b.guide, torch.full((50,), -5.0), **options())
    with pv.parameter_store(a.model, a.guide):
        assert pyro.param("loc").item() == before


def test_partials_with_equal_arguments_are_one_program():
    def model(x, k):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(k * pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.full((50,), 5.0)
    pv.fit(functools.partial(model, k=1), guide, x, **options(epochs=30))
    with pv.parameter_store(functools.partial(model, k=1), guide):
        assert pyro.param("loc").item() > 0.5


def test_fit_starts_from_svi_and_keeps_its_parameters():
    x = torch.randn(200) + 4
    model, guide, _ = plain_pair()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pv.objectives.ELBO())
    for _ in range(50):
        svi.step(x)
    reached = pyro.param("loc").item()
    pv.fit(model, guide, x, **options(epochs=1, learning_rate=1e-6))
    with pv.parameter_store(model, guide):
        assert pyro.param("loc").item() == pytest.approx(reached, abs=1e-3)
    pv.fit(model, guide, x - 9, **options())
    assert pyro.param("loc").item() == reached


@pytest.mark.parametrize("arguments", [(None, lambda x: x), (lambda x: x, 3)])
def test_programs_must_be_callable(arguments):
    for call in (pv.fit, pv.evidence, pv.elbo_surgery, pv.to_arviz):
        with pytest.raises(TypeError, match="must be a Pyro program"):
            call(*arguments, torch.randn(5))


def test_programs_and_their_wrappers_share_parameters():
    x = torch.randn(200) + 4

    def model(x, beta=1.0):
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, beta=1.0):
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=beta):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    half = functools.partial(model, beta=0.5), functools.partial(guide, beta=0.5)
    pv.fit(*half, x, **options(epochs=100))
    with pv.parameter_store(*half):
        loc = pyro.param("loc").item()
    assert loc > 1
    handled = (pyro.poutine.scale(model, scale=0.1), pyro.poutine.scale(guide, scale=0.1))
    for pair in ((model, guide), handled, (functools.partial(model, beta=0.2), guide)):
        with pv.parameter_store(*pair):
            assert pyro.param("loc").item() == loc
            assert pyro.param("slope").item() != pytest.approx(0.1, abs=1e-3)


def test_evaluation_at_initial_values_warns():
    model, guide, _ = plain_pair()
    with pytest.warns(UserWarning, match="found no value of pyro.param 'loc'"):
        pv.evidence(model, guide, torch.randn(5), num_particles=2)


@pytest.mark.filterwarnings("error:.*found no value of pyro.param")
def test_evaluation_after_an_epoch_uses_the_values_of_the_fit():
    model, guide, _ = plain_pair()
    x, seen = torch.randn(5), []

    def after_epoch(epoch, row):
        seen.append(pv.evidence(model, guide, x, num_particles=20, seed=0).mean)

    pv.fit(model, guide, x, epochs=2, after_epoch=after_epoch, seed=0, progress=False)
    assert seen[-1] == pv.evidence(model, guide, x, num_particles=20, seed=0).mean


def test_fit_keeps_a_frozen_module_in_eval_mode():
    frozen = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().requires_grad_(False)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 5)

        def forward(self, x):
            return self.net(frozen(x))

    pair = MethodsPair()
    guide = pv.guides.AmortizedNormal(pair.model, Encoder())
    before = frozen[1].running_mean.clone()
    pv.fit(pair.model, guide, torch.randn(50, 3) + 9, **options())
    assert not frozen.training
    assert torch.equal(frozen[1].running_mean, before)
    assert frozen in modules(guide)


def test_evaluation_calls_an_overridden_train_method():
    class Noise(torch.nn.Module):
        scale = 5.0

        def train(self, mode=True):
            self.scale = 5.0 if mode else 0.0
            return super().train(mode)

        def forward(self, z):
            return z + self.scale

    class Dropout(torch.nn.Module):
        """Monte Carlo dropout, which stays on."""

        def train(self, mode=True):
            return super().train(True)

        def forward(self, z):
            return z + float(self.training)

    x = torch.randn(50)
    for net, shift in ((Noise(), 0.0), (Dropout(), 1.0)):

        def model(x, net=net):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(net(z), 1.0), obs=x)

        def guide(x, shift=shift):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x - shift) / 2, 0.5**0.5))

        exact = dist.Normal(shift, 2**0.5).log_prob(x).mean().item()
        found = pv.evidence(model, guide, x, num_particles=50, seed=0)
        assert found.mean == pytest.approx(exact, abs=1e-4)
        assert net.training
        assert getattr(net, "scale", 5.0) == 5.0
