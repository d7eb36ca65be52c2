"""Programs that cannot be captured correctly run eagerly, with a warning that says why."""

import collections
import ctypes
import functools
import itertools
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same, distance, fitted, replace_compiler
from conftest import make_pair
from test_capture import NormalizedDecoder, with_decoder
from torch import nn

import pyro_vae as pv


class Program(nn.Module):
    """A model that calls a Python function at each run."""

    def __init__(self, likelihood, what):
        super().__init__()
        self.likelihood, self.what = likelihood, what
        self.runs, self.temperatures, self.last = 0, {"z": 1.0}, None

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            scale = self.what(self, x, z)
            with pyro.poutine.scale(scale=scale):
                pyro.sample("x", self.likelihood(z), obs=x)


def branch_on_data(program, x, z):
    return 1.0 if x.mean() > 0.5 else 0.5


def branch_on_a_parameter(program, x, z):
    return 1.0 if program.likelihood.decoder[0].weight.sum() > 0 else 0.5


def read_a_number(program, x, z):
    return 1.0 + z.detach().abs().max().item()


def through_numpy(program, x, z):
    return 1.0 + float(z.detach().numpy().max())


def through_a_list(program, x, z):
    return 1.0 + z.detach().flatten().tolist()[0] ** 2


def a_shape_of_values(program, x, z):
    return 1.0 + x[x > 0.5].mean()


def count_runs(program, x, z):
    program.runs += 1
    return min(1.0, program.runs / 30)


def change_a_dictionary(program, x, z):
    program.temperatures["z"] *= 0.9
    return 1.0 + program.temperatures["z"]


def grow_a_dictionary(program, x, z):
    program.temperatures[f"run {len(program.temperatures)}"] = 1.0
    return 1.0


def keep_a_tensor(program, x, z):
    scale = 1.0 if program.last is None else 1.0 + program.last.mean() ** 2
    program.last = x.detach()
    return scale


counter = itertools.count()


def hidden_counter(program, x, z):
    return 1.0 / (1 + next(counter) % 7)


UNCAPTURABLE = {
    branch_on_data: "control flow depends on values of tensors",
    branch_on_a_parameter: "control flow depends on values of tensors",
    read_a_number: "control flow depends on values of tensors",
    through_numpy: "takes values of tensors out of torch",
    through_a_list: "takes values of tensors out of torch",
    a_shape_of_values: "a shape depends on values of tensors",
    count_runs: "model.runs changed from",
    change_a_dictionary: "model.temperatures['z'] changed from 0.",
    grow_a_dictionary: "model.temperatures",
    keep_a_tensor: "model.last was replaced by ",
    hidden_counter: "its operations differ between two runs",
}


def test_failed_capture_restores_the_state(binary, without_compiler):
    """The guide updates its running averages before the model fails to be captured."""

    def make():
        model, _ = make_pair()
        model = Program(model.likelihood, read_a_number)
        encoder = nn.Sequential(nn.Linear(16, 6, bias=False), nn.BatchNorm1d(6))
        return model, pv.guides.AmortizedNormal(model, encoder=encoder)

    _, expected = fitted(make, binary, capture=False)
    with pytest.warns(UserWarning, match="runs eagerly"):
        _, tensors = fitted(make, binary, capture=True)
    assert torch.equal(tensors, expected)


@pytest.mark.parametrize("what", UNCAPTURABLE, ids=lambda f: f.__name__)
def test_uncapturable_programs_run_eagerly_and_say_why(what, binary, without_compiler):
    def make():
        global counter
        counter = itertools.count()
        model, guide = make_pair()
        model = Program(model.likelihood, what)
        return model, pv.guides.AmortizedNormal(model, encoder=guide.encoder)

    options = {"objective": pv.objectives.ELBO(), "epochs": 3}
    _, expected = fitted(make, binary, capture=False, **options)
    with pytest.warns(UserWarning, match="runs eagerly") as caught:
        fit, tensors = fitted(make, binary, capture=True, **options)
    messages = [str(w.message) for w in caught if "runs eagerly" in str(w.message)]
    assert len(messages) == 1
    assert UNCAPTURABLE[what] in messages[0]
    assert fit.execution.startswith("eager: ")
    assert UNCAPTURABLE[what] in fit.execution
    assert torch.equal(tensors, expected)


def test_warning_names_the_line_that_depends_on_values(binary, without_compiler):
    model, _ = make_pair()
    model = Program(model.likelihood, branch_on_data)
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
    with pytest.warns(UserWarning, match=r"test_capture_refused.py, line \d+\)"):
        pv.fit(model, guide, binary, epochs=1, batch_size=10, capture=True, progress=False)


def test_numbers_changed_between_epochs_end_the_capture(binary, without_compiler):
    class Tempered(pv.objectives.ELBO):
        temperature = 1.0

        def __init__(self):
            super().__init__()
            self.temperature = 0.1

        def bound(self, terms):
            return self.temperature * super().bound(terms)

    def run(capture):
        objective = Tempered()

        class Schedule(torch.optim.lr_scheduler.LambdaLR):
            """A scheduler that also changes a number of the objective."""

            def step(self, *args):
                objective.temperature = min(1.0, objective.temperature + 0.1)
                super().step(*args)

        scheduler = functools.partial(Schedule, lr_lambda=lambda epoch: 1.0)
        return fitted(make_pair, binary, capture=capture, objective=objective, epochs=5,
                      scheduler=scheduler)  # fmt: skip

    _, expected = run(False)
    with pytest.warns(UserWarning, match=r"objective.temperature changed from 0\.\d+ to 0\.\d+"):
        fit, tensors = run(True)
    assert fit.execution.startswith("eager: objective.temperature")
    assert distance(tensors, expected) < 1e-5


def test_empty_dictionary_that_a_callback_adds_is_found(binary, without_compiler):
    class Flagged(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (0.5 if hasattr(self, "flag") else 1.0)

    def run(capture):
        torch.manual_seed(3)
        model = pv.LatentVariableModel(
            pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(Flagged(2, 16))
        )
        guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))

        def after_epoch(epoch, row):
            if epoch == 2:
                model.likelihood.decoder.flag = collections.OrderedDict()

        fit = pv.fit(model, guide, binary, epochs=4, batch_size=10, progress=False, seed=0,
                     capture=capture, after_epoch=after_epoch)  # fmt: skip
        return fit, model.likelihood.decoder.weight

    _, expected = run(False)
    with pytest.warns(UserWarning, match=r"model\.likelihood\.decoder\.flag was added"):
        _, found = run(True)
    assert distance(found, expected) < 1e-5


OPAQUE = ctypes.c_double(1.0)  # capture does not inspect it


def test_hidden_change_is_found_at_the_next_epoch(binary, without_compiler):
    """Each epoch's first captured step is checked again."""

    class Tempered(pv.objectives.Objective):
        def bound(self, terms):
            return OPAQUE.value * terms.log_weight.mean(0)

    class Schedule(torch.optim.lr_scheduler.LambdaLR):
        def step(self, *args):
            OPAQUE.value *= 0.9
            super().step(*args)

    def run(capture):
        OPAQUE.value = 1.0
        scheduler = functools.partial(Schedule, lr_lambda=lambda epoch: 1.0)
        return fitted(make_pair, binary, capture=capture, objective=Tempered(), epochs=5,
                      scheduler=scheduler)  # fmt: skip

    _, expected = run(False)
    with pytest.warns(UserWarning, match="its graph differs from the eager run by"):
        _, tensors = run(True)
    assert distance(tensors, expected) < 1e-5


def test_parameters_with_new_storage_are_found(binary, without_compiler):
    def run(capture):
        class Shrink(torch.optim.lr_scheduler.LambdaLR):
            def step(self, *args):
                for group in self.optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.data = 0.9 * parameter.data
                super().step(*args)

        scheduler = functools.partial(Shrink, lr_lambda=lambda epoch: 1.0)
        return fitted(make_pair, binary, capture=capture, epochs=5, scheduler=scheduler)

    _, expected = run(False)
    with pytest.warns(UserWarning, match="(weight|bias) moved to other memory"):
        _, tensors = run(True)
    assert distance(tensors, expected) < 1e-5


class Counting(pv.objectives.ELBO):
    """An objective that counts its calls in places that only one of its methods uses."""

    of_class = 0

    def __init__(self, where):
        super().__init__()
        self.where, self.queue, self.array = where, collections.deque(), np.zeros(1)

    def count(self):
        COUNTS["n"] += self.where == "global"
        type(self).of_class += self.where == "class"
        self.queue.extend([1] * (self.where == "deque"))
        self.array += self.where == "array"
        SLOT.count += self.where == "slot"
        found = COUNTS["n"] + self.of_class + len(self.queue) + self.array.item() + SLOT.count
        return found + counted(self.where == "default")

    def bound(self, terms):
        return (1.0 if self.count() < 12 else 0.5) * super().bound(terms)


class Slot:
    __slots__ = ("count",)


COUNTS, SLOT = {"n": 0}, Slot()


def counted(more, total=[0]):  # noqa: B006
    total[0] += more
    return total[0]


@pytest.mark.parametrize("where", ["global", "class", "deque", "array", "slot", "default"])
def test_counters_are_found_in_every_place(where, binary, without_compiler):
    def run(capture):
        COUNTS["n"] = Counting.of_class = SLOT.count = counted.__defaults__[0][0] = 0
        return fitted(make_pair, binary, capture=capture, objective=Counting(where))

    _, expected = run(False)
    with pytest.warns(UserWarning, match="changes an object that it depends on"):
        _, tensors = run(True)
    assert torch.equal(tensors, expected)


def test_parameters_with_new_storage_from_a_hook_are_found(binary, without_compiler):
    def run(capture):
        def optimizer(parameters):
            made = torch.optim.SGD(parameters, lr=0.01)
            calls = itertools.count()

            def shrink(*args):
                if next(calls) % 10 == 9:
                    for parameter in made.param_groups[0]["params"]:
                        parameter.data = 0.9 * parameter.data

            made.register_step_post_hook(shrink)
            return made

        return fitted(make_pair, binary, capture=capture, optimizer=optimizer, epochs=2,
                      batch_size=2)  # fmt: skip

    _, expected = run(False)
    with pytest.warns(UserWarning, match="storage of a parameter was replaced"):
        _, tensors = run(True)
    assert distance(tensors, expected) < 1e-5


def test_evidence_is_checked_again_for_each_minibatch(binary, without_compiler):
    model, guide = make_pair()
    guide(binary)
    calls = itertools.count()

    def drifting(x):
        return model(x if next(calls) < 25 else 1 - x)

    with pytest.warns(UserWarning, match="its graph differs from the eager run"):
        pv.evidence(drifting, guide, binary, num_particles=100, batch_size=5, pairs_per_pass=50,
                    capture=True, seed=0)  # fmt: skip


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_random_numbers_of_python_and_numpy_are_refused(draw, binary, without_compiler):
    def transform(x):
        return x * (0.5 if draw() < 0.01 else 1.0)

    def run(capture):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - a user's program may use it
        return fitted(make_pair, binary, capture=capture, transform=transform, epochs=6)

    _, expected = run(False)
    with pytest.warns(
        UserWarning, match="draws random numbers from Python or numpy|differ between two runs"
    ):
        _, tensors = run(True)
    assert torch.equal(tensors, expected)


def test_a_transform_may_write_to_its_input(binary, without_compiler):
    def transform(x):
        return x.div_(255.0).round_()

    data = 255 * binary
    for source in (data, torch.utils.data.DataLoader(data, batch_size=10)):
        check_same(make_pair, source, transform=transform, execution="captured, not compiled")
    assert torch.equal(data, 255 * binary)


def test_generators_of_the_program_are_refused(binary, without_compiler):
    def run(capture):
        generator = torch.Generator().manual_seed(0)
        transform = functools.partial(torch.bernoulli, generator=generator)
        return fitted(make_pair, binary, capture=capture, transform=lambda x: transform(0.9 * x))

    _, expected = run(False)
    with pytest.warns(UserWarning, match="Generator"):
        _, tensors = run(True)
    assert torch.equal(tensors, expected)


def test_sparse_gradients_are_refused(binary, without_compiler):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(2, 3, sparse=True)

        def forward(self, x):
            return self.table(x.long()).flatten(1)

    def make():
        model, _ = make_pair()
        return model, pv.guides.AmortizedNormal(model, encoder=Encoder())

    options = {"optimizer": functools.partial(torch.optim.SGD, lr=0.01)}
    _, expected = fitted(make, binary, capture=False, **options)
    with pytest.warns(UserWarning, match="sparse gradients"):
        _, tensors = fitted(make, binary, capture=True, **options)
    assert torch.equal(tensors, expected)


def test_compiler_that_drops_writes_is_found(binary, monkeypatch):
    def careless(graph, inputs, options):
        return lambda *args: graph(*(tensor.clone() for tensor in args))

    replace_compiler(monkeypatch, careless)
    make = with_decoder(NormalizedDecoder)
    _, expected = fitted(make, binary, capture=False)
    with pytest.warns(UserWarning, match="its graph differs from the eager run"):
        _, tensors = fitted(make, binary, capture=True)
    assert torch.equal(tensors, expected)


def test_graph_with_wrong_results_is_refused(binary, monkeypatch):
    """The result of the compiled step is compared with the eager step."""

    def wrong(graph, inputs, options):
        return lambda *args: [o if o is None else o * 1.01 for o in graph(*args)]

    replace_compiler(monkeypatch, wrong)
    _, expected = fitted(make_pair, binary, capture=False)
    with pytest.warns(UserWarning, match="differs from the eager run by"):
        fit, tensors = fitted(make_pair, binary, capture=True)
    assert fit.execution.startswith("eager: its graph differs from the eager run by")
    assert torch.equal(tensors, expected)


def test_graph_runs_uncompiled_if_the_compiler_fails(binary, monkeypatch):
    def fail(*args):
        raise RuntimeError("no compiler\nat all")

    replace_compiler(monkeypatch, fail)
    with pytest.warns(UserWarning, match="not compiled: RuntimeError: no compiler"):
        check_same(make_pair, binary, execution="captured, not compiled")


def test_errors_of_the_program_are_raised_unchanged(binary, without_compiler):
    model, guide = make_pair()
    calls = itertools.count()

    def failing(x):
        if next(calls) > 5:  # in the second epoch, where the capture begins
            raise KeyError("the program's own error")
        return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KeyError, match="the program's own error"):
            pv.fit(model, guide, binary, transform=failing, epochs=9, batch_size=10, capture=True,
                   progress=False)  # fmt: skip
