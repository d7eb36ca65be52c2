"""Captured and eager steps give the same parameters, for every program."""

import functools
import itertools
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same, distance, fitted, needs_compiler, replace_compiler
from conftest import make_pair
from guide_table import DENSITIES
from pyro.distributions import constraints
from torch import nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.flop_counter import FlopCounterMode

import pyro_vae as pv
from pyro_vae._capture import Captured
from pyro_vae._capture.captured import Stage
from pyro_vae._capture.policy import WorkCounter
from pyro_vae.training._step import TrainStep


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


class NormalizedDecoder(nn.Module):
    """A decoder with running averages, which each step changes in place."""

    def __init__(self, latent, data):
        super().__init__()
        # No bias: its gradient would be zero up to rounding, which Adam turns into steps.
        self.first, self.norm = nn.Linear(latent, 6, bias=False), nn.BatchNorm1d(6)
        self.last = nn.Linear(6, data)

    def forward(self, z):
        return self.last(torch.tanh(self.norm(self.first(z))))


class DropoutDecoder(nn.Sequential):
    """A decoder with dropout."""

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
    """Functions with pyro.param, with and without constraints, and a subsampling plate."""

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
    """A discrete latent, trained by the score function estimator."""

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
    """A positive latent with a Gamma prior."""

    def model(x):
        rate = pyro.param("rate", lambda: torch.rand(16) + 0.5, constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * rate, 1.0).to_event(1), obs=x)

    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
    return model, guide


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
    "batch-norm": with_decoder(NormalizedDecoder),
    "dropout": with_decoder(DropoutDecoder),
    "functions": functions,
    "gamma": positive_latent,
    "discrete": discrete,
}


def fits(pair, objective):
    """Return whether an objective can train a pair."""
    if pair == "batch-norm":  # BatchNorm1d treats particles as channels (docs/contract.md)
        return objective.num_particles == 1 or not objective.vectorize_particles
    if pair == "discrete":  # other objectives have no estimator
        return type(objective) is pv.objectives.ELBO
    return True


# Objectives with other gradients than those of their values, or with changing weights.
MORE_OBJECTIVES = [
    pv.objectives.StickingTheLanding(2),
    pv.objectives.DReG(3),
    pv.objectives.MIWAE(2, 2),
    pv.objectives.PIWAE(2, 2),
    pv.objectives.CIWAE(0.5, 2),
    pv.objectives.Renyi(0.5, 2),
    pv.objectives.CUBO(2, 2),
    pv.objectives.TVO(2),
    pv.objectives.ScoreFunction(2, "others"),
    pv.objectives.ScoreFunction(1, "average"),
    pv.objectives.ReweightedWakeSleep(2, wake=1.0, sleep=1.0),
    pv.objectives.FreeBits(0.1, per="dimension"),
    pv.objectives.BetaTCVAE(num_data=50),
    pv.objectives.InfoVAE(0.5),
]
CASES = [(pair, objective) for pair in PAIRS for objective in OBJECTIVES if fits(pair, objective)]


SHORT = {"epochs": 2, "execution": "captured, not compiled"}


def every_case():
    """Yield all combinations. By default, run each objective, and each pair in one dtype or both.

    The operations of a pair do not depend on the objective, and few depend on the dtype.
    """
    for pair, objective in CASES:
        own = OBJECTIVES[2] if pair in ("batch-norm", "discrete") else OBJECTIVES[-1]
        for double in (False, True):
            if double:
                default = pair == "normal" or objective is own
            else:
                default = pair in ("normal", "batch-norm") and objective is OBJECTIVES[0]
            marks = () if default else pytest.mark.slow
            yield pytest.param(pair, objective, double, marks=marks)


@pytest.mark.parametrize(("pair", "objective", "double"), list(every_case()), ids=str)
def test_captured_steps_match_eager(pair, objective, double, binary, without_compiler):
    check_same(PAIRS[pair], binary, double=double, objective=objective, **SHORT)


def with_reset(make, objective):
    """Return ``make`` with a reset: the step and averages of the objective become zero."""

    def begin():
        for value in vars(objective).values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        return make()

    return begin


# Objectives with the operations of others.
REDUCTIONS = (pv.objectives.MIWAE, pv.objectives.CIWAE, pv.objectives.Renyi)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(o, marks=pytest.mark.slow if isinstance(o, REDUCTIONS) else ())
        for o in MORE_OBJECTIVES
    ],
    ids=str,
)
def test_captured_steps_match_eager_for_every_objective(objective, binary, without_compiler):
    check_same(with_reset(make_pair, objective), binary, double=True, objective=objective, **SHORT)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("objective", MORE_OBJECTIVES, ids=str)
def test_compiled_steps_match_eager_for_every_objective(objective, binary):
    check_same(with_reset(make_pair, objective), binary, double=True, objective=objective)


@needs_compiler
@pytest.mark.parametrize(
    ("pair", "objective", "double"),
    [
        ("batch-norm", pv.objectives.ELBO(), False),
        pytest.param("functions", pv.objectives.IWAE(4), True, marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_match_eager(pair, objective, double, binary):
    check_same(PAIRS[pair], binary, double=double, objective=objective)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("pair", "objective"), CASES, ids=str)
def test_compiled_steps_match_eager_in_all_cases(pair, objective, double, binary):
    check_same(PAIRS[pair], binary, double=double, objective=objective)


# Guides with the operations of others.
VARIANTS = ["planar, shared", "inverse autoregressive, shared", "sylvester, orthogonal",
            "sylvester, triangular", "low rank", "radial", "masked autoregressive",
            "affine coupling", "spline autoregressive", "sylvester, householder",
            "planar", "mixture"]  # fmt: skip
GUIDES = [
    pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ())
    for name in [*DENSITIES, "delta", "semi-amortized", "local"]
]


@pytest.mark.parametrize("name", GUIDES)
def test_captured_steps_match_eager_for_every_guide(name, binary, without_compiler):
    check_same(lambda: guided(name, binary), binary, double=True, **SHORT)


def guided(name, x):
    model, guide = make_pair()
    if name == "semi-amortized":
        return model, pv.guides.SemiAmortized(guide, steps=2)
    if name == "local":
        return model, pv.guides.LocalGuide(model, x.to(torch.get_default_dtype()))
    make = pv.guides.AmortizedDelta if name == "delta" else DENSITIES[name]
    return model, make(model, pv.nets.MLP(16, [8]))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", [*DENSITIES, "delta", "semi-amortized", "local"])
def test_compiled_steps_match_eager_for_every_guide(name, binary):
    check_same(lambda: guided(name, binary), binary, double=True)


OPTIONS = {
    "clipping": {"clip_norm": 0.5},
    "schedule": {"scheduler": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)},
    "SGD": {"optimizer": functools.partial(torch.optim.SGD, lr=0.01)},
    "L-BFGS": {"optimizer": functools.partial(torch.optim.LBFGS, lr=0.01, max_iter=3), "epochs": 2},
    "binarization": {"transform": lambda x: (torch.rand_like(x) < 0.9 * x).to(x.dtype)},
    "bernoulli": {"transform": lambda x: torch.bernoulli(0.9 * x)},
    "short last batch": {"batch_size": 12},
    "one batch": {"batch_size": 50, "epochs": 8},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fit_options_work_under_capture(options, binary, without_compiler):
    check_same(make_pair, binary, execution="captured, not compiled", **options)


def test_data_loaders_are_captured(binary, without_compiler):
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
    """An objective with warm-up: it changes its weight, a tensor, in place."""

    def __init__(self):
        super().__init__()
        self.weight = torch.tensor(0.0)

    def bound(self, terms):
        self.weight.add_(0.05).clamp_(max=1.0)
        return (terms.log_likelihood - self.weight * (terms.log_guide - terms.log_prior)).mean(0)


def test_objective_changes_its_tensor_under_capture(binary, without_compiler):
    weights = []
    for capture in (False, True):
        objective = Warming()
        fit, tensors = fitted(make_pair, binary, objective=objective, capture=capture, epochs=2)
        weights.append((objective.weight.item(), tensors))
    assert fit.execution == "captured, not compiled"
    assert weights[0][0] == pytest.approx(weights[1][0]) == pytest.approx(0.05 * 11)  # one trial
    assert distance(weights[1][1], weights[0][1]) < 1e-5


def test_second_fit_does_not_replay_the_first_graph(binary, without_compiler):
    wide = functools.partial(make_pair, hidden=13)
    for make, batch_size in ((make_pair, 10), (make_pair, 25), (wide, 10), (make_pair, 10)):
        check_same(make, binary, batch_size=batch_size, execution="captured, not compiled")


def test_gradients_with_other_strides_than_their_parameters(binary, without_compiler):
    """einsum's gradient is transposed, and sum's is expanded: a fused update would misread both."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.shift = (nn.Parameter(torch.randn(*s)) for s in ((16, 2), (8,)))

        def forward(self, z):
            return torch.einsum("...i,ji->...j", z, self.weight) + self.shift.sum()

    plain = functools.partial(torch.optim.Adam, lr=1e-3, foreach=False)
    make = with_decoder(lambda latent, data: Decoder())
    _, expected = fitted(make, binary, capture=False, optimizer=plain)
    for capture in (False, True):
        _, tensors = fitted(make, binary, capture=capture)
        assert distance(tensors, expected) < 1e-5


def test_a_parameter_may_be_frozen_during_a_fit(binary, without_compiler):
    def run(capture):
        class Freeze(torch.optim.lr_scheduler.LambdaLR):
            def step(self, *args):
                self.optimizer.param_groups[0]["params"][0].requires_grad_(False)
                super().step(*args)

        scheduler = functools.partial(Freeze, lr_lambda=lambda epoch: 1.0)
        return fitted(make_pair, binary, capture=capture, epochs=5, scheduler=scheduler)

    _, expected = run(False)
    fit, tensors = run(True)
    assert fit.execution == "captured, not compiled"
    assert distance(tensors, expected) < 1e-5


@pytest.mark.parametrize("program", ["model", "guide"])
def test_a_parameter_that_was_frozen_before_a_fit_may_be_thawed(program, binary, without_compiler):
    def run(capture):
        moved = []

        def make():
            nonlocal frozen, start
            pair = dict(zip(("model", "guide"), make_pair(), strict=True))
            pair["guide"](binary)
            frozen = next(pair[program].parameters()).requires_grad_(False)
            start = frozen.detach().clone()
            return pair["model"], pair["guide"]

        def thaw(epoch, row):
            moved.append(not torch.equal(frozen.detach(), start))
            frozen.requires_grad_(epoch > 1)

        frozen = start = None
        fit, tensors = fitted(make, binary, capture=capture, epochs=4, after_epoch=thaw)
        assert moved == [False, False, True, True]
        return fit, tensors

    _, expected = run(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*eagerly")
        fit, tensors = run(True)
    assert fit.execution == "captured, not compiled"
    assert distance(tensors, expected) < 1e-5


def test_first_repeated_batch_shape_is_captured(binary, without_compiler):
    batches = [binary[:5], *binary[5:].split(9)]

    class Stream(torch.utils.data.Dataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, number):
            return batches[number]

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    for capture in (False, True):
        torch.manual_seed(7)
        fit = pv.fit(*make_pair(), loader, epochs=3, seed=1, capture=capture, progress=False)
    assert fit.execution == "captured, not compiled"


def test_nan_in_a_buffer_is_captured(binary, without_compiler):
    class Decoder(nn.Linear):
        def __init__(self, latent, data):
            super().__init__(latent, data)
            self.register_buffer("missing", torch.tensor([torch.nan] + [1.0] * (data - 1)))

        def forward(self, z):
            return super().forward(z) * self.missing.nan_to_num(0.5)

    _, expected = fitted(with_decoder(Decoder), binary, capture=False)
    fit, tensors = fitted(with_decoder(Decoder), binary, capture=True)
    assert fit.execution == "captured, not compiled"
    torch.testing.assert_close(tensors, expected, equal_nan=True)


def test_second_captured_fit_matches_eager(binary, without_compiler):
    results = []
    for capture in (False, True):
        torch.manual_seed(7)
        pair = make_pair()
        for batch_size in (10, 25):
            pv.fit(*pair, binary, batch_size=batch_size, epochs=4, seed=2, capture=capture,
                   progress=False)  # fmt: skip
        results.append(torch.cat([p.detach().flatten() for m in pair for p in m.parameters()]))
    assert distance(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("capture", ["yes", None, 1, 0])
def test_invalid_values_of_capture_are_refused(capture, binary):
    with pytest.raises(ValueError, match="capture must be True, False or"):
        pv.fit(*make_pair(), binary, capture=capture, progress=False)
    with pytest.raises(ValueError, match="capture must be True, False or"):
        pv.evidence(*make_pair(), binary, capture=capture)


def test_short_runs_are_not_captured_by_default(binary):
    fit = pv.fit(*make_pair(), binary, epochs=3, batch_size=10, progress=False)
    assert "a capture saves no time" in fit.execution
    fit = pv.fit(*make_pair(), binary, epochs=1, batch_size=50, progress=False)
    assert "too few calls" in fit.execution


def test_long_runs_are_captured_by_default(binary, monkeypatch):
    monkeypatch.setattr("pyro_vae._capture.captured.SECONDS_THAT_REPAY_TRACING", 1e-6)
    fit = pv.fit(*make_pair(), binary, epochs=5, batch_size=10, progress=False)
    assert fit.execution == "captured, not compiled"


class Slow(nn.Module):
    """A decoder that sleeps in each call, as on a busy machine."""

    def __init__(self, seconds):
        super().__init__()
        self.net, self.seconds = pv.nets.MLP(2, [8], 16), seconds

    def forward(self, z):
        time.sleep(self.seconds)
        return self.net(z)


def test_slow_steps_do_not_change_the_numbers(binary, monkeypatch):
    """The default decides by the operations of a step, not by its time."""
    monkeypatch.setattr("pyro_vae._capture.captured.SECONDS_THAT_REPAY_TRACING", 0.7)
    fits, params = [], []
    for seconds in (0.0, 0.02):
        torch.manual_seed(7)
        model = pv.LatentVariableModel(
            pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(Slow(seconds))
        )
        guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(16, [8]))
        options = {"epochs": 12, "batch_size": 10, "seed": 3, "progress": False}
        fits.append(pv.fit(model, guide, binary, **options))
        params.append([p.detach() for m in (model, guide) for p in m.parameters()])
    assert fits[0].execution == fits[1].execution
    assert fits[0].history.loss.equals(fits[1].history.loss)
    for one, other in zip(*params, strict=True):
        assert torch.equal(one, other)


class Batched(nn.Module):
    """Products of batches of matrices."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 8, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        x = x.flatten(0, 1)
        return torch.baddbmm(self.bias, x, self.weight) @ (self.weight.mT @ x)


def step_of(network, x):
    def step():
        network(x).square().sum().backward()

    return step


@pytest.mark.parametrize(
    "network",
    [
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 7), nn.Tanh(), nn.Linear(7, 3)),
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.Conv2d(3, 4, 2)),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ConvTranspose2d(4, 2, 3, 2)),
        lambda: Batched(),
    ],
    ids=["linear", "convolution", "transposed", "batched"],
)
def test_products_are_those_of_torch(network):
    network = network()
    x = torch.randn(6, 2, 8, 8)
    run = step_of(network, x)
    with FlopCounterMode(display=False) as expected:
        run()
    with WorkCounter() as counter:
        run()
    assert counter.products == expected.get_total_flops() / 2
    assert counter.products > 0


def test_views_are_no_work():
    x = torch.randn(3, 4)
    with WorkCounter() as counter:
        x.T.reshape(2, 6).unsqueeze(0).expand(5, 2, 6)
    copies = 1  # a transposed tensor is copied for another shape
    assert (counter.operations, counter.values) == (copies, 12)
    with WorkCounter() as counter:
        x + 1
    assert (counter.operations, counter.values, counter.products) == (1, 12, 0)
    assert counter.seconds(torch.device("cpu")) > 0


MEASURED = [  # milliseconds of eager steps in docs/performance.md
    ([200, 200], 50, 20, pv.objectives.ELBO(), 2.65),
    ([200, 200], 50, 100, pv.objectives.ELBO(), 4.45),
    ([400], 20, 256, pv.objectives.ELBO(), 7.50),
    ([200, 200], 50, 20, pv.objectives.IWAE(num_particles=50), 14.2),
    ([200, 200], 50, 100, pv.objectives.IWAE(num_particles=50), 69.9),
    ([400], 20, 128, pv.objectives.IWAE(num_particles=50), 106.0),
]


@pytest.mark.parametrize(("hidden", "latent", "rows", "objective", "milliseconds"), MEASURED)
def test_estimates_of_time_agree_with_measured_steps(hidden, latent, rows, objective, milliseconds):
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(latent),
        pv.likelihoods.Bernoulli(pv.nets.MLP(latent, hidden, 784)),
    )
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(784, hidden))
    x = torch.bernoulli(torch.full((rows, 784), 0.3))
    objective.loss(model, guide, x)
    with WorkCounter() as counter:
        loss = objective.differentiable_loss(model, guide, x)
        torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])
    assert counter.seconds(x.device) == pytest.approx(milliseconds / 1e3, rel=0.2)


def test_an_error_of_the_function_is_raised_while_operations_are_counted():
    calls = iter(range(9))

    def function(x):
        if next(calls) > 0:
            raise ArithmeticError("it failed")
        return [x + torch.rand(3)]

    captured = Captured(function, watch={}, name="a function", capture="auto")
    captured(torch.ones(3))
    with pytest.raises(ArithmeticError, match="it failed"):
        captured(torch.ones(3))


@pytest.mark.parametrize("calls", [10, 10**9])
def test_functions_whose_operations_cannot_be_recorded_run_eagerly(calls):
    """Only a long run has a warning, because only its calls would have been captured."""
    state = torch.zeros(3)

    def function(x):
        state.add_(1)
        noise = torch.rand(3)
        if _len_torch_dispatch_stack():
            raise NotImplementedError("not with a mode")
        return [x + noise + state]

    captured = Captured(function, watch={"state": state}, name="a function", capture="auto")
    captured.calls_left = calls
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [captured(torch.ones(3))[0] for _ in range(4)]
    torch.manual_seed(3)
    for number, result in enumerate(found, 1):
        assert torch.equal(result, torch.ones(3) + torch.rand(3) + number)
    assert len(caught) == (calls == 10**9)
    reason = "it cannot be traced: NotImplementedError" if caught else "a capture saves no time"
    assert captured.execution.startswith(f"eager: {reason}")


needs_stance = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="needs torch.compiler.set_stance"
)


@needs_stance
@pytest.mark.parametrize("capture", ["auto", True])
def test_compiled_networks_stay_compiled(capture, binary):
    """If torch met them under a dispatch mode, it would run their Python code forever after."""
    torch._dynamo.reset()  # other tests may have reached its limit of compilations
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph(*args)

    net = torch.compile(pv.nets.MLP(2, [8], 16), backend=backend)

    def decoder(z):
        return net(z)

    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(decoder))
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(16, [8]))
    options = {"epochs": 3, "batch_size": 10, "capture": capture, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = pv.fit(model, guide, binary, **options)
    assert fit.execution.startswith("eager")
    runs.clear()
    with torch.no_grad():
        net(torch.randn(10, 2))
    assert runs


@needs_stance
@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_compiled_networks_run_compiled_in_each_step(binary):
    """The checks before the first step do not use up torch's limit of compilations."""
    torch._dynamo.reset()
    runs, counts = [], []

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph(*args)

    decoder, encoder = (
        torch.compile(pv.nets.MLP(*sizes), backend=backend) for sizes in ((2, [8], 16), (16, [8]))
    )
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(decoder))
    guide = pv.guides.AmortizedNormal(model, encoder)

    def count(epoch, row):
        counts.append(len(runs))
        runs.clear()

    options = {"epochs": 2, "batch_size": 10, "capture": False, "progress": False}
    pv.fit(model, guide, binary[:25], validation=binary[:15], after_epoch=count, seed=0, **options)
    assert counts == [2 * (3 + 2)] * 2  # steps and minibatches of the validation data


class Branches(nn.Module):
    """A decoder with an operation that runs one of two functions."""

    def __init__(self):
        super().__init__()
        self.net = pv.nets.MLP(2, [8], 16)

    def forward(self, z):
        logits = self.net(z)
        return torch.cond(logits.sum() > 0, lambda y: 2 * y, lambda y: y / 2, (logits,))


@needs_stance
@pytest.mark.parametrize("capture", ["auto", True])
def test_programs_with_branches_run_as_before(capture, binary):
    losses = []
    for how in (False, capture):
        torch.manual_seed(3)
        model = pv.LatentVariableModel(
            pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(Branches())
        )
        guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(16, [8]))
        options = {"epochs": 2, "batch_size": 10, "seed": 0, "progress": False, "capture": how}
        with warnings.catch_warnings():
            warnings.simplefilter("error" if how == "auto" else "ignore")
            losses.append(pv.fit(model, guide, binary, **options).history.loss.to_numpy())
    assert losses[1] == pytest.approx(losses[0])


def test_longer_runs_are_compiled_by_default(binary, monkeypatch):
    for name in ("TRACING", "COMPILING"):
        monkeypatch.setattr(f"pyro_vae._capture.captured.SECONDS_THAT_REPAY_{name}", 1e-6)
    compiled = []

    def compile_graph(graph, inputs, options):
        compiled.append(graph)
        return graph

    replace_compiler(monkeypatch, compile_graph)
    fit = pv.fit(*make_pair(), binary, epochs=5, batch_size=10, progress=False)
    assert fit.execution == "captured"
    assert len(compiled) == 1


@pytest.mark.parametrize("own_code", [None, "a callback", "a scheduler", "an optimizer"])
def test_steps_between_comparisons(own_code, binary, without_compiler, monkeypatch):
    """An epoch has 5 steps. A comparison takes as long as ten steps of a small network."""
    compared, take_a_step, steps = [], TrainStep.step, itertools.count(1)
    now = 0

    def step(*args):
        nonlocal now
        now = next(steps)
        return take_a_step(*args)

    def check(captured, inputs):
        compared.append(now)
        return Captured._check(captured, inputs)

    options = {
        None: {},
        "a callback": {"after_epoch": lambda epoch, row: None},
        "a scheduler": {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 10)},
        "an optimizer": {"optimizer": functools.partial(torch.optim.SGD, lr=1e-3)},
    }[own_code]
    monkeypatch.setattr(TrainStep, "step", step)
    monkeypatch.setattr(Captured, "_runs", Captured._runs | {Stage.CHECK: check})
    pv.fit(*make_pair(), binary, epochs=60, batch_size=10, progress=False, capture=True, **options)
    assert compared[0] == 4  # after a first call and two traces
    if own_code is None:
        assert compared[1:] == [101, 201]
    else:
        assert compared[1:] == [*range(6, 301, 5)]


def test_hook_of_a_callback_is_found_at_the_next_epoch(binary, without_compiler):
    """No name refers to the hook of a tensor. The steps before it are more than 500."""

    def run(capture):
        torch.manual_seed(3)
        model, guide = make_pair()
        weight = next(guide.parameters())

        def after_epoch(epoch, row):
            if epoch == 105:
                weight.register_hook(torch.zeros_like)

        return pv.fit(model, guide, binary, epochs=108, batch_size=10, progress=False, seed=0,
                      capture=capture, after_epoch=after_epoch), weight  # fmt: skip

    _, expected = run(False)
    with pytest.warns(UserWarning, match="its graph differs from the eager run"):
        fit, found = run(True)
    assert fit.execution.startswith("eager: its graph differs")
    assert distance(found, expected) < 1e-4
