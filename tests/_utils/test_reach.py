"""The modules of a program are found by name, or else when they run."""

import argparse
import collections
import contextvars
import copy
import dataclasses
import functools
import importlib
import itertools
import queue
import sys
import threading
import types
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae._utils.modules import modules, unnamed


class Net(nn.Module):
    """A network with batch norm and dropout that records its mode at each call."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
        self.modes = []

    def forward(self, z):
        self.modes.append(self.training)
        return self.body(z.reshape(-1, 1)).reshape(*z.shape[:-1], 2)


def run(net, x):
    """The body of each model; ``net`` is a module or is called like one."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :1] / 2, 0.7).to_event(1))


# Each returns a model that uses the module, which is found by name.


def closure(net):
    return lambda x: run(net, x)


def lambda_in_lambda(net):
    return lambda x: (lambda y: (lambda: run(net, y))())(x)


def global_name(net):
    global GLOBAL
    GLOBAL = net
    return uses_global


def uses_global(x):
    run(GLOBAL, x)


def default_argument(net):
    def model(x, dec=net):
        run(dec, x)

    return model


def default_of_an_inner_function(net):
    def model(x):
        def inner(y, dec=net):
            run(dec, y)

        inner(x)

    return model


def keyword_only_default(net):
    def model(x, *, dec=net):
        run(dec, x)

    return model


def partial_by_position(net):
    return functools.partial(run, net)


def partial_by_keyword(net):
    return functools.partial(lambda x, dec: run(dec, x), dec=net)


def timed(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)

    return inner


def wrapped(net):
    return timed(timed(lambda x: run(net, x)))


def held_by_a_wrapper(net):
    def decorate(function):
        @functools.wraps(function)
        def inner(x):
            return function(net, x)

        return inner

    return decorate(run)


def cached_function(net):
    get = functools.lru_cache(lambda: net)
    return lambda x: run(get(), x)


def dispatched(net):
    @functools.singledispatch
    def model(x):
        raise TypeError

    @model.register
    def _(x: torch.Tensor):
        run(net, x)

    return model


def callable_object(net):
    class Model:
        def __init__(self):
            self.net = net

        def __call__(self, x):
            run(self.net, x)

    return Model()


def slots(net):
    class Model:
        __slots__ = ("__weakref__", "net")

        def __call__(self, x):
            run(self.net, x)

    model = Model()
    model.net = net
    return model


def dataclass_with_slots(net):
    @dataclasses.dataclass(slots=True)
    class Config:
        net: nn.Module

    config = Config(net)
    return lambda x: run(config.net, x)


def property_(net):
    class Model:
        @property
        def net(self):
            return net

        def __call__(self, x):
            run(self.net, x)

    return Model()


def cached_property(net):
    class Model:
        @functools.cached_property
        def net(self):
            return net

        def __call__(self, x):
            run(self.net, x)

    return Model()


def class_attribute(net):
    class Model:
        dec = staticmethod(net)

        def __call__(self, x):
            run(self.dec, x)

    return Model()


def attribute_of_a_named_class(net):
    class Config:
        dec = functools.partial(net)

    return lambda x: run(Config.dec, x)


def class_method(net):
    class Model:
        dec = (net,)

        @classmethod
        def model(cls, x):
            run(cls.dec[0], x)

    return Model.model


def static_method(net):
    class Model:
        @staticmethod
        def model(x):
            run(net, x)

    return Model.model


def metaclass(net):
    class Meta(type):
        def dec(cls):
            return net

    class Config(metaclass=Meta):
        pass

    return lambda x: run(Config.dec(), x)


def own_python_module(net):
    """A function of another file that uses the globals of that file."""
    other = types.ModuleType("other_file")
    other.run, other.net = run, net
    exec("def model(x):\n    run(net, x)", vars(other))  # noqa: S102
    return other.model


def attribute_of_a_python_module(net):
    other = types.ModuleType("other_file")
    other.part = types.ModuleType("other_file.part")
    other.part.net = net
    space = {"other": other, "run": run, "__name__": "user"}
    exec("def model(x):\n    run(other.part.net, x)", space)  # noqa: S102
    return space["model"]


def import_inside(net):
    other = types.ModuleType("file_imported_inside")
    other.net = net
    sys.modules["file_imported_inside"] = other  # the test removes it

    def model(x):
        from file_imported_inside import net

        run(net, x)

    return model


def held_in(container, get):
    def make(net):
        held = container(net)
        return lambda x: run(get(held), x)

    return make


def default_dictionary(net):
    held = collections.defaultdict(list)
    held["decoders"].append(net)
    return held


Pair = collections.namedtuple("Pair", ["name", "net"])


class UserList(list):
    pass


def list_with_an_attribute(net):
    held = UserList()
    held.net = net
    return held


def thread_local(net):
    held = threading.local()
    held.net = net
    return held


def context_variable(net):
    variable = contextvars.ContextVar("net")
    variable.set(net)
    return variable


def queued(net):
    held = queue.Queue()
    held.put(net)
    return held


def array_of_objects(net):
    held = np.empty(1, dtype=object)
    held[0] = net
    return held


def plain_list_of_a_module(net):
    held = nn.Identity()
    held.helpers = [net]
    return held


def function_attribute(net):
    def get():
        return get.net

    get.net = net
    return get


class Proxy:
    def __init__(self, inner):
        object.__setattr__(self, "inner", inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, z):
        return self.inner(z)


CONTAINERS = {
    "dictionary": (lambda net: {"decoder": net}, lambda h: h["decoder"]),
    "list": (lambda net: [0, [net]], lambda h: h[1][0]),
    "tuple": (lambda net: (net,), lambda h: h[0]),
    "set": (lambda net: {net}, lambda h: next(iter(h))),
    "frozenset": (lambda net: frozenset([net]), lambda h: next(iter(h))),
    "deque": (lambda net: collections.deque([net]), lambda h: h[0]),
    "defaultdict": (default_dictionary, lambda h: h["decoders"][0]),
    "OrderedDict": (lambda net: collections.OrderedDict(net=net), lambda h: h["net"]),
    "ChainMap": (lambda net: collections.ChainMap({}, {"net": net}), lambda h: h["net"]),
    "mappingproxy": (lambda net: types.MappingProxyType({"net": net}), lambda h: h["net"]),
    "key of a dictionary": (lambda net: {net: 1.0}, lambda h: next(iter(h))),
    "namedtuple": (lambda net: Pair("decoder", net), lambda h: h.net),
    "list with an attribute": (list_with_an_attribute, lambda h: h.net),
    "weak reference": (weakref.ref, lambda h: h()),
    "weak proxy": (weakref.proxy, lambda h: h),
    "weak method": (lambda net: weakref.WeakMethod(net.forward), lambda h: h()),
    "weak dictionary": (lambda net: weakref.WeakValueDictionary(n=net), lambda h: h["n"]),
    "iterator of a list": (lambda net: iter([net] * 1000), next),
    "generator": (lambda net: (each for each in [net] * 1000), next),
    "function attribute": (function_attribute, lambda h: h()),
    "bound method of a dictionary": (lambda net: {"net": net}.get, lambda h: h("net")),
    "ContextVar": (context_variable, lambda h: h.get()),
    "threading.local": (thread_local, lambda h: h.net),
    "queue": (queued, lambda h: h.queue[0]),
    "array of objects": (array_of_objects, lambda h: h[0]),
    "SimpleNamespace": (lambda net: types.SimpleNamespace(net=net), lambda h: h.net),
    "argparse.Namespace": (lambda net: argparse.Namespace(net=net), lambda h: h.net),
    "list of a torch module": (plain_list_of_a_module, lambda h: h.helpers[0]),
    "proxy": (Proxy, lambda h: h),
}
FOUND = {
    f.__name__: f
    for f in (
        closure, lambda_in_lambda, global_name, default_argument, default_of_an_inner_function,
        keyword_only_default, partial_by_position, partial_by_keyword, wrapped, held_by_a_wrapper,
        cached_function, dispatched, callable_object, slots, dataclass_with_slots, property_,
        cached_property, class_attribute, attribute_of_a_named_class, class_method, static_method,
        metaclass, own_python_module, attribute_of_a_python_module, import_inside,
    )
} | {name: held_in(*how) for name, how in CONTAINERS.items()}  # fmt: skip


# Each returns a model that uses the module, which is not found by name.


def by_a_name_in_a_string(net):
    global GLOBAL
    GLOBAL = net
    return lambda x: run(globals()["GLO" + "BAL"], x)


def imported_by_a_string(net):
    other = types.ModuleType("file_imported_inside")
    other.net = net
    sys.modules["file_imported_inside"] = other
    return lambda x: run(importlib.import_module("file_imported_" + "inside").net, x)


def object_of_torch(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.net = net
    return lambda x: run(optimizer.net, x)


def iterator(net):
    held = itertools.cycle([net])
    return lambda x: run(next(held), x)


def by_an_identifier(net):
    held = id(net)
    KEPT[held] = net
    find = "KEPT"
    return lambda x: run(globals()[find][held], x)


KEPT = {}


NOT_FOUND = [
    by_a_name_in_a_string, imported_by_a_string, object_of_torch, iterator, by_an_identifier,
]  # fmt: skip


def made_at_each_run(net):
    """Create a module without parameters at each run, as is common for nn.Softplus()."""
    return lambda x: run(lambda z: nn.Dropout(0.5)(net(z)), x)


@pytest.fixture(autouse=True)
def _no_import():
    yield
    sys.modules.pop("file_imported_inside", None)


@pytest.mark.parametrize("way", FOUND)
def test_a_module_is_found_by_name(way):
    net = Net()
    model = FOUND[way](net)
    assert any(each is net for each in modules(model, guide))


WAYS = FOUND | {f.__name__: f for f in NOT_FOUND}


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_uses_eval_mode_and_keeps_running_averages(way):
    net = Net()
    model = WAYS[way](net)
    before = {name: value.clone() for name, value in net.named_buffers()}
    x = torch.randn(6, 2) + 3
    for call in (
        lambda: pv.evidence(model, guide, x, num_particles=2, seed=0),
        lambda: pv.elbo_surgery(model, guide, x, seed=0),
        lambda: pv.generate(model, x),
        lambda: pv.reconstruct(model, guide, x),
    ):
        call()
        assert set(net.modes) == {False}
        assert all(part.training for part in net.modules())
        net.modes.clear()
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


class Hidden:
    """Programs whose modules are looked up by a string."""

    def __init__(self, decoder, encoder=None):
        sys.modules["file_imported_inside"] = types.SimpleNamespace(dec=decoder, enc=encoder)

    @staticmethod
    def get(name):
        return getattr(importlib.import_module("file_imported_" + "inside"), name)

    def model(self, x):
        decoder = self.get("dec")
        pyro.module("decoder", decoder)
        run(decoder, x)

    def guide(self, x):
        loc = x[:, :1] / 2
        if (encoder := self.get("enc")) is not None:
            pyro.module("encoder", encoder)
            loc = encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))


def test_fit_validates_unnamed_modules_in_eval_mode():
    net = Net()
    pair = Hidden(net)
    x = torch.randn(20, 2) + 3
    pv.fit(pair.model, pair.guide, x, validation=x, epochs=2, batch_size=10, progress=False)
    assert net.body[1].num_batches_tracked == 4  # the trial minibatch does not count
    assert net.modes.count(True) == 4
    assert not any(net.modes[:2] + net.modes[-2:])
    assert unnamed(pair.model, pair.guide) == [net]


def test_dropout_made_at_each_run_is_in_eval_mode():
    x = torch.randn(6, 2)
    values = [
        pv.evidence(made(nn.Linear(1, 2)), guide, x, num_particles=500, seed=0).values
        for made in (made_at_each_run, closure)
        if torch.manual_seed(0)
    ]
    assert torch.equal(*values)


def test_patience_restores_running_averages_of_unnamed_modules():
    """Patience restores the whole pair."""
    net, found, x = Net(), [], torch.randn(40, 2)
    pair = Hidden(net)
    fit = pv.fit(
        pair.model, pair.guide, x, validation=10 * x, epochs=6, patience=2, batch_size=20,
        learning_rate=0.3, seed=0, progress=False,
        after_epoch=lambda epoch, row: found.append(copy.deepcopy(net.state_dict())),
    )  # fmt: skip
    assert fit.best_epoch < len(found)
    best = found[fit.best_epoch - 1]
    assert all(torch.equal(value, best[name]) for name, value in net.state_dict().items())


def test_gradient_noise_keeps_running_averages_of_unnamed_modules():
    net = Net()
    pair, before = Hidden(net), copy.deepcopy(net.state_dict())
    pv.gradient_noise(pair.model, pair.guide, torch.randn(6, 2), [pv.objectives.ELBO()], repeats=2)
    assert net.modes.count(True) >= 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_save_and_checkpoints_refuse_unnamed_modules(tmp_path):
    pair, x = Hidden(Net()), torch.randn(20, 2)
    with pytest.raises(ValueError, match="a Net with parameters or buffers runs in model or guide"):
        pv.fit(pair.model, pair.guide, x, epochs=1, batch_size=10, progress=False,
               checkpoint=tmp_path / "steps")  # fmt: skip
    with pytest.raises(ValueError, match="closure, a global, a default argument"):
        pv.save(tmp_path / "pair", pair.model, pair.guide)


def test_save_refuses_parameters_of_a_module_made_at_each_run(tmp_path):
    def model(x):
        net = nn.Linear(1, 2)
        pyro.module("net", net)
        run(net, x)

    pv.fit(model, guide, torch.randn(20, 2), epochs=1, batch_size=10, progress=False)
    with pytest.raises(ValueError, match=r"'net\$\$\$\w+' was fitted, but its module"):
        pv.save(tmp_path / "pair", model, guide)


def test_unnamed_module_of_one_pair_is_not_found_in_another(tmp_path):
    """A guide that was evaluated with the same model does not add its modules there."""
    net = Net()
    pair = Hidden(Net(), nn.Linear(2, 1))

    def model(x):
        run(net, x)

    x = torch.randn(6, 2)
    pv.evidence(model, pair.guide, x, num_particles=2)
    assert unnamed(model, pair.guide) == [pair.get("enc")]
    assert unnamed(model, guide) == []
    pv.save(tmp_path / "pair", model, guide)


def test_a_module_of_another_thread_keeps_its_mode():
    other, stop, modes = nn.Dropout(0.5), threading.Event(), set()

    def train():
        while not stop.is_set():
            other(torch.ones(1))
            modes.add(other.training)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        pv.evidence(closure(Net()), guide, torch.randn(50, 2), num_particles=200)
    finally:
        stop.set()
        thread.join()
    assert modes == {True}


@pytest.mark.parametrize("way", [closure, imported_by_a_string])
def test_compiled_module_has_no_graph_break(way):
    """The hooks that find modules are not in the graph, and eval mode disables dropout."""
    net = nn.Sequential(nn.Linear(1, 2), nn.Dropout(0.5))
    x = torch.randn(6, 2)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    values = [
        pv.evidence(way(n), guide, x, num_particles=9, seed=0).values for n in (compiled, net)
    ]
    assert torch.equal(*values)


def test_shared_module_keeps_its_mode():
    shared = nn.Dropout(0.5)
    first, second = nn.Sequential(nn.Linear(1, 2), shared), nn.Sequential(shared)
    pv.evidence(closure(lambda z: second(first(z))), guide, torch.randn(6, 2), num_particles=2)
    assert shared.training
    shared.eval()
    pv.evidence(closure(lambda z: second(first(z))), guide, torch.randn(6, 2), num_particles=2)
    assert not shared.training
    assert first.training


def test_hooks_are_removed_after_evaluation_or_error():
    hooks = nn.modules.module._global_forward_pre_hooks
    pv.evidence(closure(Net()), guide, torch.randn(5, 2), num_particles=2)
    with pytest.raises(ValueError, match="cannot run"):
        pv.evidence(closure(nn.Linear(7, 7)), guide, torch.randn(5, 2), num_particles=2)
    assert not hooks


def test_an_unnamed_module_on_another_device_is_refused_by_name():
    pair = Hidden(Net().to("meta"))
    with pytest.raises(
        ValueError, match="a Net that runs in model or guide is on meta, but the data"
    ):
        pv.fit(pair.model, pair.guide, torch.randn(20, 2), batch_size=10, progress=False)
