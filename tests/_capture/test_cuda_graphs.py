"""The parts of a capture on CUDA that need no GPU.

``Recorded`` does on the CPU what a CUDA graph does: its operations have fixed numbers and read and
write fixed tensors, and the results of all replays lie in the same memory.
"""

import copy
import functools
import gc
import math
import weakref

import pytest
import torch
from capturing import distance, fitted
from conftest import Stream, make_pair
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae as pv
from pyro_vae._capture import Captured, policy
from pyro_vae._capture.cuda import versions_elsewhere
from pyro_vae.training._adam import Adam
from pyro_vae.training._step import TrainStep


class Recorded:
    """Stands in for a CUDA graph of one call of a function."""

    def __init__(self, function, inputs):
        self._outputs = function(*inputs)
        self._function = make_fx(function)(*inputs)

    def __call__(self, *inputs):
        for kept, new in zip(self._outputs, self._function(*inputs), strict=True):
            if kept is not None:
                kept.copy_(new)
        return self._outputs


@pytest.fixture
def recorded(monkeypatch, without_compiler):
    """Capture on the CPU as on CUDA, with ``Recorded`` in the place of CUDA graphs."""
    monkeypatch.setattr("pyro_vae._capture.cuda._DEVICES_WITH_GRAPHS", ("cpu",))
    monkeypatch.setattr("pyro_vae._capture.captured.CudaGraph", Recorded)
    monkeypatch.setattr("pyro_vae.training._whole_step.CudaGraph", Recorded)


schedulers = torch.optim.lr_scheduler
IN_TWO_PARTS = {
    "L-BFGS": {
        "optimizer": functools.partial(torch.optim.LBFGS, lr=0.01, max_iter=3),
        "epochs": 2,
    },
    "alternation": {"guide_steps": 2, "model_steps": 1},
}
IN_ONE_GRAPH = {
    "clipping, two learning rates": {
        "clip_norm": 0.5,
        "learning_rate": {"model": 0.01, "guide": 0.001},
    },
    "another learning rate in each epoch": {
        "scheduler": functools.partial(schedulers.ExponentialLR, gamma=0.3)
    },
    "other betas in each epoch": {
        "scheduler": functools.partial(schedulers.OneCycleLR, max_lr=0.1, total_steps=5)
    },
    "a warm-up": {"objective": pv.objectives.BetaELBO(pv.objectives.Linear(10))},
}


@pytest.mark.parametrize("options", IN_TWO_PARTS.values(), ids=IN_TWO_PARTS)
def test_losses_of_steps_that_share_their_memory(options, binary, recorded):
    check_recorded(binary, "captured, not compiled", **options)


@pytest.mark.parametrize("options", IN_ONE_GRAPH.values(), ids=IN_ONE_GRAPH)
def test_whole_steps(options, binary, recorded):
    check_recorded(binary, "captured, not compiled, with the optimizer", **options)


@pytest.mark.parametrize("parts", [1, 2])
def test_recordings_are_released_with_the_fit(parts, binary, recorded, monkeypatch):
    made, begin = [], Recorded.__init__

    def noted(self, *args):
        made.append(weakref.ref(self))
        begin(self, *args)

    monkeypatch.setattr(Recorded, "__init__", noted)
    options = {} if parts == 1 else IN_TWO_PARTS["alternation"]
    gc.disable()  # memory on a GPU does not start a garbage collection
    try:
        fitted(make_pair, binary, capture=True, **options)
        assert made
        assert not any(each() for each in made)
    finally:
        gc.enable()


def check_recorded(binary, execution, **options):
    eager, expected = fitted(make_pair, binary, **copy.deepcopy(options), capture=False)
    captured, tensors = fitted(make_pair, binary, **copy.deepcopy(options), capture=True)
    assert captured.execution == execution
    assert captured.history.loss.values == pytest.approx(eager.history.loss.values, rel=1e-5)
    assert distance(tensors, expected) < 1e-5


def normalizing_pair():
    model, _ = make_pair()
    network = torch.nn.Sequential(torch.nn.BatchNorm1d(16), pv.nets.MLP(16, [8]))
    next(model.parameters()).requires_grad_(False)
    return model, pv.guides.AmortizedNormal(model, encoder=network)


def test_whole_steps_with_running_averages_frozen_parameters_and_a_last_minibatch(binary, recorded):
    rows = torch.cat([binary, binary[:3]])  # 53 rows in minibatches of 10
    eager, expected = fitted(normalizing_pair, rows, capture=False)
    captured, tensors = fitted(normalizing_pair, rows, capture=True)
    assert captured.execution.endswith("with the optimizer")
    assert captured.history.loss.values == pytest.approx(eager.history.loss.values, rel=1e-5)
    assert distance(tensors, expected) < 1e-5


@pytest.mark.parametrize("spoiled", ["the update", "the loss"])
def test_a_whole_step_that_differs_is_not_used(spoiled, binary, recorded, monkeypatch):
    class Wrong(Recorded):
        def __call__(self, *inputs):
            loss, *gradients = super().__call__(*inputs)
            if spoiled == "the loss":
                return [loss + 0.01, *gradients]
            parameter.add_(1e-4)
            return [loss, *gradients]

    monkeypatch.setattr("pyro_vae.training._whole_step.CudaGraph", Wrong)

    def make():
        nonlocal parameter
        pair = make_pair()
        parameter = next(pair[0].parameters()).detach()
        return pair

    parameter = None
    _, expected = fitted(make, binary, capture=False)
    with pytest.warns(UserWarning, match="not part of the CUDA graph .*graph differs"):
        captured, tensors = fitted(make, binary, capture=True)
    assert captured.execution == "captured, not compiled"
    assert distance(tensors, expected) < 1e-5


def test_whole_steps_after_a_skipped_step(binary, recorded):
    class Spoiled(pv.objectives.ELBO):
        def bound(self, terms):
            bound = super().bound(terms)
            return torch.where(torch.rand(()) < 0.1, math.nan, bound)

    options = {"objective": Spoiled(), "on_nonfinite": "skip"}
    eager, expected = fitted(make_pair, binary, **copy.deepcopy(options), capture=False)
    captured, tensors = fitted(make_pair, binary, **copy.deepcopy(options), capture=True)
    assert captured.execution.endswith("with the optimizer")
    skipped = captured.history.skipped.tolist()
    assert skipped == eager.history.skipped.tolist()
    assert sum(skipped[:3]) > 0 == skipped[3]  # so the last epoch has whole steps
    assert distance(tensors, expected) < 1e-5


def test_resumed_whole_steps_equal_those_of_one_run_bit_for_bit(binary, recorded, tmp_path):
    _, expected = fitted(make_pair, binary, capture=True)
    checkpoint = functools.partial(pv.training.Checkpoint, tmp_path, seconds=0)
    fitted(make_pair, binary, capture=True, epochs=2, checkpoint=checkpoint())
    resumed, tensors = fitted(make_pair, binary, capture=True, checkpoint=checkpoint(resume=True))
    assert resumed.execution.endswith("with the optimizer")
    assert tensors.equal(expected)


def test_adam_keeps_its_tensors_on_devices_with_graphs(monkeypatch):
    monkeypatch.setattr("pyro_vae._capture.cuda._DEVICES_WITH_GRAPHS", ("cpu",))
    parameter = torch.randn(3, requires_grad=True)
    optimizer = Adam([parameter], lr=0.1)

    def closure():
        parameter.grad = torch.ones(3)
        return torch.zeros(())

    optimizer.step(closure)
    state, kept = copy.deepcopy(optimizer.state_dict()), optimizer.tensors()
    optimizer.step(closure)
    after = parameter.detach().clone()
    optimizer.load_state_dict(state)
    assert all(a is b for a, b in zip(optimizer.tensors(), kept, strict=True))
    assert optimizer.state[parameter]["step"] == 1
    rates = [tensor for _, tensor in optimizer._rates.values()]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.write_learning_rates()
    assert rates == [0.0]
    optimizer.step(closure)
    assert torch.equal(parameter.detach(), after)


def test_evaluations_of_calls_that_share_their_memory(pair, binary, recorded):
    model, guide = pair
    binary = binary[:20]
    guide(binary)
    ais = pv.evaluation.AIS(num_chains=4, num_temperatures=6, pilot=4, leapfrog_steps=2)
    ascent = pv.evaluation.Ascent(window=5, max_steps=20, patience=1, num_particles=2)

    def results(capture):
        options = {"pairs_per_pass": 100, "batch_size": 10, "capture": capture, "seed": 0}
        by_chains = pv.evidence(model, guide, binary, method=ais, **options)
        options["num_particles"] = 50
        gaps = pv.inference_gaps(model, guide, binary, ascent=ascent, **options)
        return [
            pv.evidence(model, guide, binary, **options).values,
            by_chains.values,
            gaps.approximation_gap.values,
            gaps.amortization_gap.values,
        ]

    for captured, eager in zip(results(True), results(False), strict=True):
        assert torch.allclose(captured, eager, atol=1e-4)


def test_cuda_runs_eagerly_by_default():
    assert "never compared on CUDA" in policy.reason_for_eager(torch.device("cuda", 0))
    assert policy.reason_for_eager(torch.device("cpu")) is None


def test_the_default_on_a_device_that_runs_eagerly(binary, monkeypatch):
    """The CPU plays the part of CUDA, where a long fit would be captured."""
    monkeypatch.setattr("pyro_vae._capture.captured.SECONDS_THAT_REPAY_TRACING", 1e-6)
    monkeypatch.setitem(policy._EAGER_DEVICES, "cpu", "no comparison yet")
    fit = pv.fit(*make_pair(), binary, epochs=5, batch_size=10, progress=False)
    assert fit.execution == "eager: no comparison yet"
    fit = pv.fit(*make_pair(), binary, epochs=5, batch_size=10, progress=False, capture=True)
    assert fit.execution.startswith("captured")


def test_a_resumed_run_stays_eager(binary, monkeypatch):
    monkeypatch.setitem(policy._EAGER_DEVICES, "cpu", "no comparison yet")

    def run(captured, times):
        return [captured(binary)[0].sum().item() for _ in range(times)]

    first, second = (
        Captured(lambda x: [2 * x], watch={}, name="a function", capture="auto") for _ in range(2)
    )
    run(first, 3)
    second.load_state_dict(first.state_dict())
    assert run(second, 3) == 3 * [2 * binary.sum().item()]
    assert second.execution == "eager: no comparison yet"


def test_changes_of_tensors_on_other_devices_are_found():
    here, elsewhere = torch.zeros(2, device="meta"), torch.zeros(2)
    ((tensor, version),) = versions_elsewhere([here, elsewhere], here.device)
    assert tensor is elsewhere
    assert tensor._version == version
    elsewhere.detach().add_(1.0)
    assert tensor._version != version


def test_the_loss_of_a_failed_step_is_on_the_device(binary, monkeypatch):
    """The losses of a chunk are stacked, which fails for tensors on two devices."""
    made = []
    tensor = torch.tensor

    def spy(value, **options):
        if isinstance(value, float) and math.isnan(value):
            made.append(options.get("device"))
        return tensor(value, **options)

    step = TrainStep.step

    def failing(self, *args, **options):
        if self.steps == 2 and not made:
            raise ValueError("a value is NaN")
        return step(self, *args, **options)

    monkeypatch.setattr(TrainStep, "step", failing)
    monkeypatch.setattr("pyro_vae.training._loop.torch.tensor", spy)
    pv.fit(*make_pair(), torch.utils.data.DataLoader(Stream(binary), batch_size=10), epochs=1,
           progress=False, capture=False, device="cpu")  # fmt: skip
    assert made == [torch.device("cpu")]
