"""A captured step is the eager step: the same parameters, or an eager run and the reason why."""

import copy
import functools
import itertools
import random
import shutil
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from pyro.distributions import constraints
from torch import nn

import pyro_vae as pv
from pyro_vae.capture import Captured
from pyro_vae.modules import modules
from pyro_vae.training.adam import Adam

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="needs a C++ compiler to compile a captured step",
)
# Relative distance of all parameters after the steps, per dtype: rounding, grown by training.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Transformed(pyro.nn.PyroModule):
    """A guide with a normalizing flow: an inverse autoregressive transform of a Gaussian."""

    def __init__(self, latent, data):
        super().__init__()
        self.encoder = nn.Linear(data, 2 * latent)
        self.flow = dist.transforms.affine_autoregressive(latent, hidden_dims=[6])

    def forward(self, x):
        loc, raw = self.encoder(x).chunk(2, -1)
        base = dist.Normal(loc, nn.functional.softplus(raw)).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


class NormalisedDecoder(nn.Module):
    """Running averages, changed in place by each step."""

    def __init__(self, latent, data):
        super().__init__()
        # Without a bias: its gradient would be zero but for rounding, which Adam makes into steps.
        self.first, self.norm = nn.Linear(latent, 6, bias=False), nn.BatchNorm1d(6)
        self.last = nn.Linear(6, data)

    def forward(self, z):
        return self.last(torch.tanh(self.norm(self.first(z))))


class DroppingDecoder(nn.Sequential):
    """Noise of its own, in training."""

    def __init__(self, latent, data):
        super().__init__(nn.Linear(latent, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, data))


def with_decoder(decoder):
    def make():
        model = pv.LatentVariableModel(
            prior=pv.priors.StandardNormal(2), likelihood=pv.likelihoods.Bernoulli(decoder(2, 16))
        )
        return model, pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))

    return make


def flow_pair():
    model, _ = make_pair()
    return model, Transformed(2, 16)


def functions():
    """Plain functions with pyro.param, constrained ones too, and a subsampling plate."""

    def model(x):
        weight = pyro.param("weight", lambda: 0.3 * torch.randn(2, 16))
        scale = pyro.param("scale", lambda: torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", 500, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("encoder", lambda: 0.1 * torch.randn(16, 2))
        scale = pyro.param("guide_scale", lambda: torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", 500, subsample=x):
            pyro.sample("z", dist.Normal(x @ loc, scale).to_event(1))

    return model, guide


def discrete():
    """A latent without a reparameterised sample: the score function estimator."""

    def model(x):
        weight = pyro.param("weight", lambda: torch.randn(3, 16))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Bernoulli(logits=weight[k]).to_event(1), obs=x)

    def guide(x):
        logits = pyro.param("logits", lambda: 0.1 * torch.randn(16, 3))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=x @ logits))

    return model, guide


def positive_latent():
    """A latent whose gradient is implicit, on another support."""

    def model(x):
        rate = pyro.param("rate", lambda: torch.rand(16) + 0.5, constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * rate, 1.0).to_event(1), obs=x)

    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
    return model, guide


def fitted(make, x, *, double=False, **options):
    """Fit a pair of fixed initial values and give it back with all its tensors, flat."""
    torch.manual_seed(7)
    model, guide = make()
    if double:
        for module in modules(model, guide):
            module.double()
    settings = {"epochs": 4, "batch_size": 10, "seed": 3, "progress": False}
    fit = pv.fit(model, guide, x.double() if double else x, **{**settings, **options})
    with pv.parameter_store(model, guide) as store:
        bare = [p.detach().flatten() for _, p in sorted(store["params"].items())]
    held = [t for m in modules(model, guide) for t in (*m.parameters(), *m.buffers())]
    return fit, torch.cat([*bare, *(t.detach().flatten() for t in held)]).double()


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def check_same(make, x, *, double=False, execution="captured", **options):
    eager, expected = fitted(make, x, double=double, capture=False, **options)
    captured, tensors = fitted(make, x, double=double, capture=True, **options)
    assert captured.execution == execution
    assert eager.execution == "eager: capture=False"
    assert distance(tensors, expected) < TOLERANCE[torch.float64 if double else torch.float32]
    assert captured.history.loss.values == pytest.approx(eager.history.loss.values, rel=1e-5)
    return captured


@pytest.fixture
def without_compiler(monkeypatch):
    """Captures run operation by operation: what is tested here does not need the compiler."""
    monkeypatch.setattr(Captured, "compiles", False)


OBJECTIVES = [
    pv.objectives.ELBO(),
    pv.objectives.ELBO(3),
    pv.objectives.ELBO(2, vectorize_particles=False),
    pv.objectives.MeanFieldELBO(),
    pv.objectives.IWAE(4),
]
PAIRS = {
    "normal": make_pair,
    "flow": flow_pair,
    "batch-norm": with_decoder(NormalisedDecoder),
    "dropout": with_decoder(DroppingDecoder),
    "functions": functions,
    "gamma": positive_latent,
    "discrete": discrete,
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("pair", [n for n in PAIRS if n != "discrete"])
def test_captured_steps_are_eager_steps(pair, objective, double, binary, without_compiler):
    if pair == "batch-norm" and objective.num_particles > 1 and objective.vectorize_particles:
        pytest.skip("BatchNorm1d takes the particles' dimension for channels (docs/contract.md)")
    if double and pair in ("functions", "flow"):
        pytest.skip("this program makes float32 values of its own")
    check_same(PAIRS[pair], binary, double=double, objective=objective,
               execution="captured, not compiled")  # fmt: skip


def test_captured_score_function_steps_are_eager_steps(binary, without_compiler):
    check_same(discrete, binary, execution="captured, not compiled")


@needs_compiler
@pytest.mark.parametrize(
    ("pair", "objective", "double"),
    [
        ("normal", pv.objectives.MeanFieldELBO(), False),
        ("normal", pv.objectives.IWAE(4), True),
        ("flow", pv.objectives.ELBO(), False),
        ("batch-norm", pv.objectives.ELBO(), False),
        ("functions", pv.objectives.ELBO(2), False),
    ],
)
def test_compiled_steps_are_eager_steps(pair, objective, double, binary):
    check_same(PAIRS[pair], binary, double=double, objective=objective)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("pair", list(PAIRS))
def test_every_compiled_step_is_the_eager_step(pair, objective, double, binary):
    if pair == "batch-norm" and objective.num_particles > 1 and objective.vectorize_particles:
        pytest.skip("BatchNorm1d takes the particles' dimension for channels (docs/contract.md)")
    if double and pair in ("functions", "flow", "discrete"):
        pytest.skip("this program makes float32 values of its own")
    if pair == "discrete" and type(objective) is not pv.objectives.ELBO:
        pytest.skip("this objective has no estimator for discrete latents")
    check_same(PAIRS[pair], binary, double=double, objective=objective)


OPTIONS = {
    "clipping": {"clip_norm": 0.5},
    "schedule": {"scheduler": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)},
    "SGD": {"optimizer": functools.partial(torch.optim.SGD, lr=0.01)},
    "L-BFGS": {"optimizer": functools.partial(torch.optim.LBFGS, lr=0.01, max_iter=3), "epochs": 2},
    "binarisation": {"transform": lambda x: (torch.rand_like(x) < 0.9 * x).to(x.dtype)},
    "bernoulli": {"transform": lambda x: torch.bernoulli(0.9 * x)},
    "short last batch": {"batch_size": 12},
    "one batch": {"batch_size": 50, "epochs": 8},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_settings_of_the_fit_hold_under_capture(options, binary, without_compiler):
    check_same(make_pair, binary, execution="captured, not compiled", **options)


def test_streams_are_captured(binary, without_compiler):
    for loader in (
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(binary), batch_size=10),
        torch.utils.data.DataLoader(binary, batch_size=10),
    ):
        torch.manual_seed(7)
        fits = [
            pv.fit(*make_pair(), loader, epochs=3, seed=1, capture=c, progress=False)
            for c in (True, False)
        ]
        assert fits[0].execution == "captured, not compiled"


def test_early_stopping_stops_at_the_same_epoch(binary, without_compiler):
    options = {"validation": binary[:20], "patience": 1, "epochs": 40, "learning_rate": 0.3}
    fit = check_same(make_pair, binary, execution="captured, not compiled", **options)
    assert len(fit.history) < 40
    assert fit.best_epoch < len(fit.history)


class Warming(pv.objectives.Objective):
    """An objective that warms up: its weight is a tensor, which it changes in place."""

    def __init__(self):
        super().__init__()
        self.weight = torch.tensor(0.0)

    def bound(self, terms):
        self.weight.add_(0.05).clamp_(max=1.0)
        return (terms.log_likelihood - self.weight * (terms.log_guide - terms.log_prior)).mean(0)


def test_a_weight_that_is_a_tensor_warms_up_under_capture(binary, without_compiler):
    weights = []
    for capture in (False, True):
        objective = Warming()
        fit, tensors = fitted(make_pair, binary, objective=objective, capture=capture, epochs=2)
        weights.append((objective.weight.item(), tensors))
    assert fit.execution == "captured, not compiled"
    assert weights[0][0] == pytest.approx(weights[1][0]) == pytest.approx(0.05 * 11)  # one look
    assert distance(weights[1][1], weights[0][1]) < 1e-5


# Programs that cannot be captured: each runs eagerly, with the eager result, and says why.


class Program(nn.Module):
    """A pair's model that does something in Python at each run."""

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
    keep_a_tensor: "model.last changed",
    hidden_counter: "does not do the same twice",
}


def test_what_a_failed_capture_has_changed_is_put_back(binary, without_compiler):
    """The guide's running averages were updated before the model turned out uncapturable."""

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
def test_what_cannot_be_captured_runs_eagerly_and_says_why(what, binary, without_compiler):
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


def test_the_line_that_depends_on_values_is_named(binary, without_compiler):
    model, _ = make_pair()
    model = Program(model.likelihood, branch_on_data)
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
    with pytest.warns(UserWarning, match=r"test_capture.py, line \d+\)"):
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
            """A scheduler that does more than it should: it changes a number elsewhere."""

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


TEMPERATURE = 1.0


def test_a_change_that_no_name_leads_to_is_found_at_the_next_epoch(binary, without_compiler):
    """A global that only a method reads: each epoch's first captured step is checked again."""

    class Tempered(pv.objectives.Objective):
        def bound(self, terms):
            return TEMPERATURE * terms.log_weight.mean(0)

    class Schedule(torch.optim.lr_scheduler.LambdaLR):
        def step(self, *args):
            global TEMPERATURE
            TEMPERATURE *= 0.9
            super().step(*args)

    def run(capture):
        global TEMPERATURE
        TEMPERATURE = 1.0
        scheduler = functools.partial(Schedule, lr_lambda=lambda epoch: 1.0)
        return fitted(make_pair, binary, capture=capture, objective=Tempered(), epochs=5,
                      scheduler=scheduler)  # fmt: skip

    _, expected = run(False)
    with pytest.warns(UserWarning, match="its graph differs from it by"):
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
    with pytest.warns(UserWarning, match="weight changed|bias changed"):
        _, tensors = run(True)
    assert distance(tensors, expected) < 1e-5


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_random_numbers_from_elsewhere_are_refused(draw, binary, without_compiler):
    def transform(x):
        return x * (0.5 if draw() < 0.01 else 1.0)

    def run(capture):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - what a user's program may draw from
        return fitted(make_pair, binary, capture=capture, transform=transform, epochs=30)

    _, expected = run(False)
    with pytest.warns(UserWarning, match="draws random numbers from Python or numpy|same twice"):
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
    with pytest.warns(UserWarning, match="it uses a Generator of its own"):
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


def test_a_compiler_that_loses_writes_is_found(binary, monkeypatch):
    def careless(graph, inputs, options):
        return lambda *args: graph(*(tensor.clone() for tensor in args))

    monkeypatch.setattr(torch._inductor, "compile", careless)
    make = with_decoder(NormalisedDecoder)
    _, expected = fitted(make, binary, capture=False)
    with pytest.warns(UserWarning, match="its graph differs from it"):
        _, tensors = fitted(make, binary, capture=True)
    assert torch.equal(tensors, expected)


def test_evidence_with_weights_of_zero_is_captured(without_compiler):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(-1.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 0.45))  # at times outside the prior's support

    torch.manual_seed(1)
    x = 0.1 * torch.randn(40)
    options = {"num_particles": 50, "batch_size": 5, "pairs_per_pass": 50, "seed": 2}
    eager = pv.evidence(model, guide, x, capture=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = pv.evidence(model, guide, x, capture=True, **options)
    torch.testing.assert_close(captured.values, eager.values)


def test_a_second_fit_never_replays_the_graph_of_the_first(binary, without_compiler):
    wide = functools.partial(make_pair, hidden=13)
    for make, batch_size in ((make_pair, 10), (make_pair, 25), (wide, 10), (make_pair, 10)):
        check_same(make, binary, batch_size=batch_size, execution="captured, not compiled")


def test_a_pair_fitted_twice_goes_on(binary, without_compiler):
    results = []
    for capture in (False, True):
        torch.manual_seed(7)
        pair = make_pair()
        for batch_size in (10, 25):
            pv.fit(*pair, binary, batch_size=batch_size, epochs=4, seed=2, capture=capture,
                   progress=False)  # fmt: skip
        results.append(torch.cat([p.detach().flatten() for m in pair for p in m.parameters()]))
    assert distance(results[1], results[0]) < 1e-5


def test_a_graph_that_computes_something_else_is_refused(binary, monkeypatch):
    """The check against the eager step is what a wrong compiler would meet."""
    compiled = torch._inductor.compile

    def wrong(graph, inputs, options):
        right = compiled(graph, inputs, options)
        return lambda *args: [o if o is None else o * 1.01 for o in right(*args)]

    monkeypatch.setattr(torch._inductor, "compile", wrong)
    _, expected = fitted(make_pair, binary, capture=False)
    with pytest.warns(UserWarning, match="differs from it by"):
        fit, tensors = fitted(make_pair, binary, capture=True)
    assert fit.execution.startswith("eager: its graph differs from it by")
    assert torch.equal(tensors, expected)


def test_without_a_compiler_the_graph_runs_as_it_is(binary, monkeypatch):
    def fail(*args):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    with pytest.warns(UserWarning, match="not compiled: RuntimeError: no compiler"):
        check_same(make_pair, binary, execution="captured, not compiled")


def test_errors_of_the_program_are_the_programs_own(binary, without_compiler):
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


@pytest.mark.parametrize("capture", ["yes", None, 1, 0])
def test_other_values_of_capture_are_refused(capture, binary):
    with pytest.raises(ValueError, match="capture must be True, False or"):
        pv.fit(*make_pair(), binary, capture=capture, progress=False)
    with pytest.raises(ValueError, match="capture must be True, False or"):
        pv.evidence(*make_pair(), binary, capture=capture)


def test_short_runs_are_not_captured_by_themselves(binary):
    fit = pv.fit(*make_pair(), binary, epochs=3, batch_size=10, progress=False)
    assert "would not repay a capture" in fit.execution
    fit = pv.fit(*make_pair(), binary, epochs=1, batch_size=50, progress=False)
    assert "no call was left" in fit.execution


def test_long_runs_are_captured_by_themselves(binary, monkeypatch):
    monkeypatch.setattr("pyro_vae.capture.captured.SECONDS_THAT_REPAY_TRACING", 1e-6)
    fit = pv.fit(*make_pair(), binary, epochs=5, batch_size=10, progress=False)
    assert fit.execution == "captured, not compiled"


@pytest.mark.parametrize("num_particles", [1, 7, 300])
def test_captured_evidence_is_eager_evidence(num_particles, binary, without_compiler):
    pair = make_pair()
    pair[1](binary)
    options = {"num_particles": num_particles, "batch_size": 15, "pairs_per_pass": 600, "seed": 5}
    eager, captured = (pv.evidence(*pair, binary, capture=c, **options) for c in (False, True))
    torch.testing.assert_close(captured.values, eager.values, rtol=1e-6, atol=0)
    torch.testing.assert_close(captured.khat, eager.khat, rtol=1e-3, atol=1e-3, equal_nan=True)


@needs_compiler
def test_compiled_evidence_is_eager_evidence(binary):
    pair = make_pair()
    pair[1](binary)
    options = {"num_particles": 300, "batch_size": 10, "pairs_per_pass": 500, "seed": 5}
    eager, captured = (pv.evidence(*pair, binary, capture=c, **options) for c in (False, True))
    torch.testing.assert_close(captured.values, eager.values, rtol=1e-6, atol=0)


def test_evidence_validates_every_value_though_captured(binary, without_compiler):
    pair = make_pair()
    pair[1](binary)
    stream = [binary[:10], binary[10:20], binary[20:30] + 0.5]
    loader = torch.utils.data.DataLoader(torch.cat(stream), batch_size=10)
    with pytest.raises(ValueError, match="support"):
        pv.evidence(*pair, loader, num_particles=50, capture=True)


@pytest.mark.parametrize("shape", [(5, 16), (5, 3, 19), (4, 1)])
def test_bernoulli_scores_by_products_as_by_sums(shape):
    logits = (6 * torch.randn(3, *shape, dtype=torch.double)).requires_grad_()
    x = torch.rand(shape, dtype=torch.double).round()
    for event_dim in (1, len(shape) - 1) if len(shape) > 2 else (1,):
        likelihood = pv.likelihoods.Bernoulli(nn.Identity(), event_dim)(logits)
        plain = dist.Bernoulli(logits=logits).to_event(event_dim)
        assert likelihood.event_shape == plain.event_shape
        torch.testing.assert_close(likelihood.log_prob(x), plain.log_prob(x))
        ours, theirs = (
            torch.autograd.grad(d.log_prob(x).square().sum(), logits) for d in (likelihood, plain)
        )
        torch.testing.assert_close(ours, theirs)
    extreme = pv.likelihoods.Bernoulli(nn.Identity())(torch.tensor([[200.0, -200.0, 90.0, 0.0]]))
    assert extreme.log_prob(torch.tensor([[1.0, 0.0, 1.0, 1.0]])).item() == pytest.approx(-0.693147)


def test_bernoulli_broadcasts_and_scores_half_precision_as_pyro_does():
    x = torch.rand(4, 16).round()
    for logits in (torch.randn(4, 1), torch.randn(16), torch.zeros(4, 16, dtype=torch.half)):
        ours = pv.likelihoods.Bernoulli(nn.Identity())(logits).log_prob(x.to(logits.dtype))
        plain = dist.Bernoulli(logits=logits).to_event(1)
        torch.testing.assert_close(
            ours, plain.base_dist.log_prob(x.to(logits.dtype)).sum(-1), check_dtype=False
        )
    logits = torch.randn(4, 16)
    by_datum = torch.func.vmap(
        torch.func.grad(lambda row: pv.likelihoods.Bernoulli(nn.Identity())(row).log_prob(x[0]))
    )(logits)
    torch.testing.assert_close(by_datum, x[0] - logits.sigmoid())


def closure_of(parameters, gradients):
    def closure():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return torch.tensor(0.0)

    return closure


def test_adam_is_torchs_adam():
    ours = [torch.randn(5, 3), torch.randn(4), torch.randn(2, dtype=torch.double)]
    theirs = [p.clone().requires_grad_() for p in ours]
    ours = [p.requires_grad_() for p in ours]
    mine, reference = Adam(ours, lr=0.01), torch.optim.Adam(theirs, lr=0.01)
    calls = []
    mine.register_step_post_hook(lambda *args: calls.append(1))
    for step in range(60):
        gradients = [torch.randn_like(p) for p in ours]
        if step % 5 == 3:
            gradients[1] = None
        if step == 20:
            mine.load_state_dict(copy.deepcopy(reference.state_dict()))
        if step == 30:
            for optimizer in (mine, reference):
                optimizer.state.clear()
        if step == 40:
            for optimizer in (mine, reference):
                optimizer.param_groups[0].update(lr=0.003, maximize=True, weight_decay=0.1)
        mine.step(closure_of(ours, gradients))
        reference.step(closure_of(theirs, gradients))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 60
