"""The parts of a capture on CUDA that need no GPU.

A CUDA graph writes the results of all replays to the same memory. ``Recorded`` does so on the CPU.
"""

import functools
import math

import pytest
import torch
from capturing import distance, fitted
from conftest import Stream, make_pair

import pyro_vae as pv
from pyro_vae._capture import Captured, policy
from pyro_vae._capture.cuda import versions_elsewhere
from pyro_vae.training._step import TrainStep


class Recorded:
    """A function whose results always lie in the memory of the first ones."""

    def __init__(self, function, inputs):
        self._function = function
        self._outputs = function(*inputs)

    def __call__(self, *inputs):
        for kept, new in zip(self._outputs, self._function(*inputs), strict=True):
            if kept is not None:
                kept.copy_(new)
        return self._outputs


@pytest.fixture
def recorded(monkeypatch, without_compiler):
    """Capture on the CPU as on CUDA, with ``Recorded`` in the place of CUDA graphs."""
    monkeypatch.setattr("pyro_vae._capture.captured._DEVICES_WITH_GRAPHS", ("cpu",))
    monkeypatch.setattr("pyro_vae._capture.captured.CudaGraph", Recorded)


OPTIMIZERS = {
    "Adam": {},
    "L-BFGS": {
        "optimizer": functools.partial(torch.optim.LBFGS, lr=0.01, max_iter=3),
        "epochs": 2,
    },
}


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_losses_of_steps_that_share_their_memory(options, binary, recorded):
    eager, expected = fitted(make_pair, binary, capture=False, **options)
    captured, tensors = fitted(make_pair, binary, capture=True, **options)
    assert captured.execution == "captured, not compiled"
    assert captured.history.loss.values == pytest.approx(eager.history.loss.values, rel=1e-5)
    assert distance(tensors, expected) < 1e-5


def test_evaluations_of_calls_that_share_their_memory(pair, binary, recorded):
    model, guide = pair
    guide(binary)
    ais = pv.evaluation.AIS(num_chains=4, num_temperatures=6, pilot=4)
    ascent = pv.evaluation.Ascent(window=5, max_steps=20, patience=1, num_particles=2)

    def results(capture):
        options = {"pairs_per_pass": 100, "batch_size": 10, "capture": capture, "seed": 0}
        by_chains = pv.evidence(model, guide, binary, method=ais, **options)
        options["num_particles"] = 50
        gaps = pv.inference_gaps(model, guide, binary[:20], ascent=ascent, **options)
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
