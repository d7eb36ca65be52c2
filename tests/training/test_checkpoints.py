"""A run that was interrupted at any time and resumed equals the uninterrupted run."""

import errno
import functools
import os
import random
import re
import signal
import threading
import types
import warnings
from unittest import mock

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import needs_compiler
from conftest import make_pair
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae import objectives
from pyro_vae._programs.pair_state import state
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.serialization import _folder as files
from pyro_vae.serialization import _folder as writing
from pyro_vae.serialization._folder import read, write
from pyro_vae.training import Checkpoint, _step
from pyro_vae.training import _checkpoints as checkpoints
from pyro_vae.training import _loading as loading
from pyro_vae.training._loop import TrainingLoop
from pyro_vae.training._step import TrainStep

SHARE_OF_TIME = checkpoints._SHARE_OF_TIME  # before the fixture changes it


class Killed(BaseException):
    """Simulates the end of the process."""


@pytest.fixture(autouse=True)
def write_at_every_step(monkeypatch):
    """Write checkpoints at the requested times regardless of their cost."""
    monkeypatch.setattr(checkpoints, "_SHARE_OF_TIME", float("inf"))


class Noisy(nn.Module):
    """An encoder with batch norm and dropout."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(size, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.2)
        )

    def forward(self, x):
        return self.features(x)


def noisy_pair():
    torch.manual_seed(3)
    model, _ = make_pair()
    return model, pv.guides.AmortizedNormal(model, encoder=Noisy(16, 7))


def bare_pair():
    """Return functions with pyro.param parameters, one of them created later."""
    calls = []

    def model(x):
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(2)).to_event(1))
            if x.requires_grad or len(calls) > 0:
                z = z + pyro.param("shift", lambda: torch.randn(2))
            calls.append(1)
            loc = z.sum(-1, keepdim=True).expand(x.shape)
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.full((16, 2), 0.01))
        spread = pyro.param(
            "spread", torch.tensor([0.3, 0.2]), constraint=dist.constraints.interval(0.01, 2.0)
        )
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, spread).to_event(1))

    return model, guide


class Rows(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i].roll(random.randrange(3) + np.random.randint(3))  # noqa: NPY002, S311


class Shuffled(IterableDataset):
    """A shuffled stream whose order depends on all earlier random numbers."""

    def __init__(self, x):
        self.x = x

    def __iter__(self):
        buffer = []
        for row in self.x:
            buffer.append(row)
            if len(buffer) > 7:
                yield buffer.pop(int(torch.randint(len(buffer), ())))
        yield from buffer


def on_disk(x, folder):
    rows = np.memmap(folder / "rows.bin", dtype="float32", mode="w+", shape=tuple(x.shape))
    rows[:] = x.numpy()
    rows.flush()
    return np.memmap(folder / "rows.bin", dtype="float32", mode="r", shape=tuple(x.shape))


def own_generator(x):
    return DataLoader(
        TensorDataset(x), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5)
    )


CASES = {
    "modules": {},
    "noise of their own": {"pair": noisy_pair},
    "bare parameters": {"pair": bare_pair},
    "binarized": {"transform": torch.bernoulli},
    "a Dataset": {"wrap": Rows},
    "a stream": {"wrap": Shuffled},
    "a loader": {"wrap": own_generator},
    "patience": {"patience": 1, "learning_rate": 0.3, "epochs": 5},
    "momentum": {"optimizer": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)},
    "closures": {"optimizer": functools.partial(torch.optim.LBFGS, lr=0.01, max_iter=3)},
    "a schedule of rates": {
        "scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=5)
    },
    "a plateau": {"scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0)},
    "turns": {"guide_steps": 2, "model_steps": 1},
    "turns, bounded": {"guide_steps": 2, "clip_norm": 1.0},
    "a schedule of weights": {
        "objective": lambda: objectives.BetaELBO(objectives.Linear(steps=20)),
    },
    "many particles": {"objective": lambda: objectives.DReG(num_particles=3)},
}

LONG = {"momentum", "a plateau", "a schedule of rates", "turns, bounded", "many particles"}

CAPTURED = {
    "modules": {},
    "noise of their own": {"pair": noisy_pair},
    "bare parameters": {"pair": bare_pair},
    "a loader": {"wrap": own_generator},
    "turns": {"guide_steps": 2, "model_steps": 1},
}


def run(x, folder=None, killed_after=None, **case):
    """Fit a new pair, killed after a step if asked, and return its tensors and history."""
    torch.manual_seed(11)
    random.seed(12)
    np.random.seed(13)  # noqa: NPY002
    case = {"pair": make_pair, "wrap": lambda x: x, "epochs": 2, "capture": False} | case
    model, guide = case.pop("pair")()
    data, transform = case.pop("wrap")(x), case.pop("transform", None)
    if "objective" in case:
        case["objective"] = case["objective"]()
    steps, take_a_step = 0, TrainStep.step

    def step(train_step, *args, **options):
        nonlocal steps
        steps += 1
        loss = take_a_step(train_step, *args, **options)
        if steps == killed_after:
            raise Killed
        return loss

    defaults = {"batch_size": 8, "seed": 0, "progress": False, "validation": x[:9]}
    if folder is not None:
        defaults["checkpoint"] = Checkpoint(folder, seconds=0.0, resume=True)
    with mock.patch.object(TrainStep, "step", step):
        result = pv.fit(model, guide, data, transform=transform, **(defaults | case))
    with pv.parameter_store(model, guide):
        found = {name: tensor.detach().clone() for name, tensor in state(model, guide).items()}
    return found, result.history.drop(columns="seconds"), steps


def assert_same(found, expected):
    tensors, history, _ = found
    assert tensors.keys() == expected[0].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[0][name]), name
    pd.testing.assert_frame_equal(history, expected[1], check_exact=True)


def some_of(last, name):
    """Return two steps, chosen by the name alone."""
    generator = np.random.default_rng(list(name.encode()))
    return 1 + generator.choice(last, 2, replace=False)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in CASES]
)
def test_resumed_run_equals_the_uninterrupted_run(name, binary, tmp_path):
    expected = run(binary, **CASES[name])
    last = expected[2]
    steps = some_of(last, name)
    for number, step in enumerate(steps):
        folder = tmp_path / str(number)
        with pytest.raises(Killed):
            run(binary, folder, step, **CASES[name])
        assert_same(run(binary, folder, **CASES[name]), expected)


def test_captured_run_resumes_at_its_capture_stage(binary, tmp_path, without_compiler):
    case = {
        "capture": True,
        "epochs": 3,
        "batch_size": 20,
    }  # two full minibatches and a smaller one
    expected = run(binary, **case)
    for step in (1, 4, 5, 7):
        with pytest.raises(Killed):
            run(binary, tmp_path / str(step), step, **case)
        assert_same(run(binary, tmp_path / str(step), **case), expected)


@pytest.mark.parametrize("repaid", [1e-6, 1e6], ids=["captured", "eager"])
def test_resumed_run_decides_on_its_capture_as_the_uninterrupted_run(
    binary, tmp_path, monkeypatch, repaid
):
    monkeypatch.setattr("pyro_vae._capture.captured.SECONDS_THAT_REPAY_TRACING", repaid)
    case = {"capture": "auto", "epochs": 3, "batch_size": 20}
    expected = run(binary, **case)
    for step in (2, 4, 6):
        with pytest.raises(Killed):
            run(binary, tmp_path / str(step), step, **case)
        assert_same(run(binary, tmp_path / str(step), **case), expected)


def test_default_decides_again_when_a_resumed_run_has_more_epochs(binary, tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vae._capture.captured.SECONDS_THAT_REPAY_TRACING", 0.1)
    options = {"capture": "auto", "seconds": 60.0}
    short, _ = fit(binary, tmp_path, epochs=2, **options)
    assert "a capture saves no time" in short.execution
    again, _ = fit(binary, tmp_path, epochs=2, resume=True, **options)
    assert again.execution == short.execution
    long, _ = fit(binary, tmp_path, epochs=40, resume=True, **options)
    assert long.execution == "captured, not compiled"


@needs_compiler
def test_resumed_run_compares_its_capture_at_the_same_steps(binary, tmp_path, monkeypatch):
    """A comparison returns the eager step, which differs from the compiled one by rounding."""
    monkeypatch.setattr(_step, "STEPS_BETWEEN_COMPARISONS", 20)
    case = {"capture": True, "epochs": 8}  # of 7 steps
    expected = run(binary, **case)
    for step in (25, 37):
        with pytest.raises(Killed):
            run(binary, tmp_path / str(step), step, **case)
        assert_same(run(binary, tmp_path / str(step), **case), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CAPTURED)
def test_compiled_run_resumes_bitwise(name, binary, tmp_path):
    case = {"capture": True, "epochs": 3} | CAPTURED[name]
    expected = run(binary, **case)
    for number, step in enumerate(some_of(expected[2], name)):
        folder = tmp_path / str(number)
        with pytest.raises(Killed):
            run(binary, folder, step, **case)
        assert_same(run(binary, folder, **case), expected)


def fit(x, folder=None, pair=make_pair, *, seconds=0.0, keep=3, resume=False, **changes):
    torch.manual_seed(11)
    programs = pair()
    defaults = {"epochs": 3, "batch_size": 10, "seed": 0, "progress": False, "capture": False}
    if folder is not None:
        defaults["checkpoint"] = Checkpoint(folder, seconds=seconds, keep=keep, resume=resume)
    result = pv.fit(*programs, x, **(defaults | changes))
    return result, tensors(*programs)


def tensors(model, guide):
    with pv.parameter_store(model, guide):
        return {name: tensor.detach().clone() for name, tensor in state(model, guide).items()}


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(others[n], t) for n, t in some.items())


class At:
    """A transform that runs an action at one of its calls."""

    def __init__(self, call, action):
        self.call, self.action, self.calls = call, action, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.call:
            self.action()
        return torch.bernoulli(x)


def test_run_on_memory_mapped_rows_resumes(binary, tmp_path):
    rows = on_disk(binary, tmp_path)
    expected, straight = fit(rows)
    with mock.patch.object(TrainStep, "end_epoch", side_effect=Killed), pytest.raises(Killed):
        fit(rows, tmp_path / "run")
    result, resumed = fit(rows, tmp_path / "run", resume=True)
    assert equal(straight, resumed)
    assert result.history.loss.tolist() == expected.history.loss.tolist()


def test_finished_run_resumes_for_more_epochs(binary, tmp_path):
    expected, straight = fit(binary, epochs=4)
    fit(binary, tmp_path, epochs=2)
    result, resumed = fit(binary, tmp_path, epochs=4, resume=True)
    assert equal(straight, resumed)
    assert result.history.loss.tolist() == expected.history.loss.tolist()
    again, same = fit(binary, tmp_path, epochs=4, resume=True)
    assert equal(straight, same)
    assert again.history.loss.tolist() == expected.history.loss.tolist()


class Averages(nn.Module):
    """An encoder with tensors that are not buffers; a training step replaces some of them."""

    def __init__(self, kinds):
        super().__init__()
        self.net, self.kinds = nn.Linear(16, 4), kinds
        self.constant, self.mean = torch.arange(4.0), torch.zeros(4)
        self.means, self.by_name = [torch.zeros(4)], {"mean": torch.zeros(4)}

    def forward(self, x):
        found = self.net(x)
        if self.training:
            mean = found.detach().mean(0)
            if "attribute" in self.kinds:
                self.mean = self.mean + mean
            if "in place" in self.kinds:
                self.mean += mean
            if "list" in self.kinds:
                self.means[0] = self.means[0] + mean
            if "dictionary" in self.kinds:
                self.by_name["mean"] = self.by_name["mean"] + mean
        return found - self.mean - self.means[0] - self.by_name["mean"] - self.constant


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("attribute", r"encoder\.mean\."),
        ("in place", r"encoder\.mean\."),
        ("list", r"encoder\.means\[0\]\."),
        ("dictionary", r"encoder\.by_name\['mean'\]\."),
        ("none", None),
    ],
)
def test_resume_warns_of_tensors_that_are_not_in_the_checkpoint(kind, name, binary, tmp_path):
    def pair():
        model, _ = make_pair()
        return model, pv.guides.AmortizedNormal(model, Averages([kind]))

    fit(binary, tmp_path, pair, epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(binary, tmp_path, pair, epochs=2, resume=True)
    found = [str(warning.message) for warning in caught]
    assert len(found) == (name is not None)
    for message in found:
        assert re.search(f"buffers only: guide.{name} Their current values are used", message)


class Keeping(nn.Module):
    """An encoder that keeps activations, on which the next run does not depend."""

    def __init__(self):
        super().__init__()
        self.net, self.hidden = nn.Linear(16, 4), None

    def forward(self, x):
        self.rows, self.hidden = x, self.net(x).tanh()
        return self.hidden


def test_resume_is_silent_about_activations_that_a_network_keeps(binary, tmp_path):
    def pair():
        model, _ = make_pair()
        return model, pv.guides.AmortizedNormal(model, Keeping())

    options = {"validation": binary[:20]}
    fit(binary, tmp_path, pair, epochs=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(binary, tmp_path, pair, epochs=2, resume=True, **options)


def test_ctrl_c_stops_after_the_step_and_the_run_resumes(binary, tmp_path):
    _, straight = fit(binary, transform=torch.bernoulli)
    press = At(9, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(pv.training.Interrupted) as stopped:
        fit(binary, tmp_path, transform=press)
    assert press.calls == 9  # one for the fit's first check, the last for the interrupted step
    assert len(stopped.value.partial.history) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _, resumed = fit(binary, tmp_path, transform=torch.bernoulli, resume=True)
    assert equal(straight, resumed)


def test_second_ctrl_c_stops_at_once_and_the_run_resumes(binary, tmp_path):
    _, straight = fit(binary, transform=torch.bernoulli)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(pv.training.Interrupted):
        fit(binary, tmp_path, transform=At(9, twice))
    _, resumed = fit(binary, tmp_path, transform=torch.bernoulli, resume=True)
    assert equal(straight, resumed)


def test_fit_interrupted_during_validation_resumes_bitwise(binary, tmp_path):
    _, straight = fit(binary, validation=binary)
    evaluate = TrainStep.evaluate

    def pressed(*args):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*args)

    with mock.patch.object(TrainStep, "evaluate", pressed), pytest.raises(pv.training.Interrupted):
        fit(binary, tmp_path, validation=binary)
    # No finished step is lost.
    assert read(max(tmp_path.iterdir()), kind=checkpoints.KIND)["trainer"]["steps"] == 5
    _, resumed = fit(binary, tmp_path, validation=binary, resume=True)
    assert equal(straight, resumed)


def test_fit_in_a_thread_keeps_signal_handlers(binary):
    thread = threading.Thread(target=fit, args=(binary,))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_full_disk_keeps_earlier_checkpoints(binary, tmp_path):
    _, straight = fit(binary)
    written = 0

    def full(descriptor, sync=os.fsync):
        nonlocal written
        written += 1
        if written > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with mock.patch("os.fsync", full), pytest.raises(OSError, match=r"step-\d+: No space left"):
        fit(binary, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    _, resumed = fit(binary, tmp_path, resume=True)
    assert equal(straight, resumed)


def test_unwritable_folder_raises_before_the_first_step(binary, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit(binary, tmp_path / "file" / "run")


def test_damaged_checkpoint_is_skipped(binary, tmp_path):
    _, straight = fit(binary, transform=torch.bernoulli)
    with pytest.raises(pv.training.Interrupted):
        fit(binary, tmp_path, transform=At(9, lambda: signal.raise_signal(signal.SIGINT)))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    record = tmp_path / names[-1] / "record.json"
    record.write_bytes(record.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="earlier checkpoint"):
        _, resumed = fit(binary, tmp_path, resume=True, transform=torch.bernoulli)
    assert equal(straight, resumed)
    assert (tmp_path / f"unreadable-{names[-1]}").exists()
    for path in tmp_path.glob("step-*"):
        (path / "tensors.safetensors").write_bytes(b"nothing")
    with pytest.raises(pv.serialization.UnreadableFile):
        fit(binary, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "batch_size 10, but here it is 5"),
        ({"objective": objectives.IWAE(num_particles=2)}, "objective ELBO"),
        ({"clip_norm": 1.0}, "clip_norm None"),
        ({"pair": lambda: make_pair(hidden=9)}, "tensors of the pair"),
        ({"pair": noisy_pair}, "tensors of the pair"),
        ({"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}, "optimizer of its own False"),
        ({"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1)}, "scheduler"),
        ({"learning_rate": {"model": 0.1, "guide": 0.2}}, "learning_rate 0.001"),
        ({"objective": objectives.FreeBits(0.5)}, "objective ELBO"),
        ({"validation": torch.ones(3, 16)}, "validation None"),
        ({"transform": torch.bernoulli}, "transform False"),
        ({"seed": 1}, "seed 0, but here it is 1"),
    ],
)
def test_resume_refuses_a_checkpoint_of_another_run(changes, message, binary, tmp_path):
    fit(binary, tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(binary, tmp_path, resume=True, **changes)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (
            {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)},
            {"optimizer": functools.partial(torch.optim.RMSprop, lr=0.1)},
            "optimizer and scheduler",
        ),
        (
            {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1)},
            {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)},
            "optimizer and scheduler",
        ),
        (
            {"objective": objectives.FreeBits(0.5)},
            {"objective": objectives.FreeBits(0.6)},
            r"a run with objective\.\S+ 0\.5, but here it is 0\.6\.",
        ),
        (
            {"objective": objectives.BetaELBO(objectives.Linear(10))},
            {"objective": objectives.BetaELBO(objectives.Linear(20))},
            r"a run with objective\.\S+ 10, but here it is 20\.",
        ),
    ],
)
def test_resume_refuses_another_optimizer_scheduler_or_objective(
    first, then, message, binary, tmp_path
):
    fit(binary, tmp_path, **first)
    with pytest.raises(ValueError, match=message):
        fit(binary, tmp_path, resume=True, **then)


def test_a_resumed_run_has_the_seed_of_its_first_part(binary, tmp_path):
    fit(binary, tmp_path, epochs=1, seed=5)
    straight, expected = fit(binary, epochs=3, seed=5)
    resumed, found = fit(binary, tmp_path, resume=True, epochs=3, seed=None)
    assert resumed.seed == straight.seed == 5
    assert equal(found, expected)
    with pytest.raises(ValueError, match="seed 5, but here it is 6"):
        fit(binary, tmp_path, resume=True, epochs=4, seed=6)


def test_a_run_without_a_seed_resumes_without_one(binary, tmp_path):
    fit(binary, tmp_path, epochs=1, seed=None)
    with pytest.raises(ValueError, match="seed None, but here it is 0"):
        fit(binary, tmp_path, resume=True, epochs=2, seed=0)
    resumed, _ = fit(binary, tmp_path, resume=True, epochs=2, seed=None)
    assert resumed.seed is None


def test_an_empty_name_is_no_folder_for_checkpoints():
    with pytest.raises(ValueError, match="must name a folder"):
        Checkpoint("")


def test_repeated_resume_of_a_finished_run_keeps_its_random_numbers(binary, tmp_path):
    options = {"pair": noisy_pair, "transform": torch.bernoulli}
    _, straight = fit(binary, epochs=4, **options)
    for epochs in (2, 2, 4):
        _, resumed = fit(binary, tmp_path, epochs=epochs, resume=True, **options)
    assert equal(straight, resumed)


class RandomRows(Dataset):
    """A data set that samples a new row at each access."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return torch.bernoulli(0.8 * self.x[i] + 0.1)


def shuffled_loader(x):
    return DataLoader(RandomRows(x), 10, shuffle=True, generator=torch.Generator())


@pytest.mark.parametrize("wrap", [RandomRows, shuffled_loader])
def test_random_validation_data_are_the_same_each_epoch(wrap, binary, tmp_path):
    result, _ = fit(binary, validation=wrap(binary), learning_rate=1e-12)
    assert result.history["validation_loss"].nunique() == 1
    _, straight = fit(binary, epochs=3, **plateau(wrap(binary)))
    fit(binary, tmp_path, epochs=1, **plateau(wrap(binary)))
    _, resumed = fit(binary, tmp_path, epochs=3, resume=True, **plateau(wrap(binary)))
    assert equal(straight, resumed)


def plateau(validation):
    return {
        "validation": validation,
        "scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    }


def test_run_interrupted_while_writing_a_checkpoint_resumes(binary, tmp_path):
    _, straight = fit(binary, transform=torch.bernoulli)
    write, times = TrainingLoop._write_checkpoint, 0

    def interrupted(self, **options):
        nonlocal times
        if self.position.epoch == 2 and self.position.step == 0 and times == 0:
            times += 1
            raise KeyboardInterrupt
        write(self, **options)

    with (
        mock.patch.object(TrainingLoop, "_write_checkpoint", interrupted),
        pytest.raises(pv.training.Interrupted),
    ):
        fit(binary, tmp_path, transform=torch.bernoulli)
    _, resumed = fit(binary, tmp_path, transform=torch.bernoulli, resume=True)
    assert equal(straight, resumed)


def test_nested_schedulers_resume(binary, tmp_path):
    def scheduler(optimizer):
        rates = torch.optim.lr_scheduler
        first = rates.LinearLR(optimizer, total_iters=2)
        then = rates.MultiStepLR(optimizer, [1, 2], gamma=0.5)
        return rates.SequentialLR(optimizer, [first, then], [2])

    _, straight = fit(binary, epochs=5, scheduler=scheduler)
    fit(binary, tmp_path, epochs=2, scheduler=scheduler)
    _, resumed = fit(binary, tmp_path, epochs=5, scheduler=scheduler, resume=True)
    assert equal(straight, resumed)


class Exact(torch.optim.Optimizer):
    """An optimizer that sums gradients in float64."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                total = self.state[p].setdefault("total", torch.zeros_like(p, dtype=torch.float64))
                total.add_(p.grad)
                p.sub_((total / 3).to(p.dtype), alpha=group["lr"])
        return loss


def test_dtypes_of_the_optimizer_state_are_kept(binary, tmp_path):
    _, straight = fit(binary, optimizer=Exact)
    fit(binary, tmp_path, epochs=1, optimizer=Exact)
    _, resumed = fit(binary, tmp_path, optimizer=Exact, resume=True)
    assert equal(straight, resumed)


def test_ctrl_c_in_the_last_callback_raises_interrupted(binary):
    def press(epoch, row):
        if epoch == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(pv.training.Interrupted) as stopped:
        fit(binary, after_epoch=press)
    assert len(stopped.value.partial.history) == 3


def test_temporary_folder_of_a_killed_writer_is_removed(binary, tmp_path):
    left = files.hidden(tmp_path / "step-000000000003", files.WRITING)
    left = left.with_name(left.name.replace(f".{os.getpid()}.", ".99999999."))
    left.mkdir(parents=True)
    (tmp_path / "step-notes.txt").write_text("mine")
    fit(binary, tmp_path)
    assert not left.exists()
    assert (tmp_path / "step-notes.txt").read_text() == "mine"


def test_checkpoint_with_other_content_is_refused(binary, tmp_path):
    fit(binary, tmp_path)
    last = sorted(tmp_path.iterdir())[-1]
    content = read(last, kind=checkpoints.KIND)
    for broken in ({}, content | {"position": {"epoch": 1}}, content | {"trainer": "none"}):
        write(last, broken, kind=checkpoints.KIND, overwrite=True)
        with pytest.raises(pv.serialization.UnreadableFile, match="no checkpoint that"):
            fit(binary, tmp_path, epochs=5, resume=True)


@pytest.mark.parametrize("found", [3, {"loss": 1.0}, {"kl": "much"}])
def test_after_epoch_refuses_invalid_return_values(found, binary):
    with pytest.raises((TypeError, ValueError), match="after_epoch must"):
        fit(binary, after_epoch=lambda epoch, row: found)


def test_after_epoch_may_return_numpy_numbers(binary, tmp_path):
    numbers = {"a": np.float32(1.5), "b": np.int64(2)}
    result, _ = fit(binary, tmp_path, after_epoch=lambda epoch, row: numbers)
    assert result.history["a"].tolist() == [1.5] * 3


def test_resume_refuses_other_data(binary, tmp_path):
    fit(binary, tmp_path)
    with pytest.raises(ValueError, match="with data "):
        fit(1 - binary, tmp_path, resume=True)


def test_folder_with_checkpoints_needs_resume(binary, tmp_path):
    fit(binary, tmp_path)
    with pytest.raises(ValueError, match="resume=True"):
        fit(binary, tmp_path)
    with pytest.raises(ValueError, match="resume=True"):
        pv.fit(*make_pair(), binary, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"folder": "run", "keep": 0}, ValueError, "keep"),
        ({"folder": "run", "keep": 2.5}, TypeError, "keep"),
        ({"folder": "run", "seconds": float("nan")}, ValueError, "seconds"),
        ({"folder": "run", "seconds": "60"}, TypeError, "seconds"),
        ({"folder": "run", "resume": 1}, TypeError, "resume"),
        ({"folder": 3}, TypeError, "checkpoint must be a folder"),
        ({"resume": True}, TypeError, "folder"),
    ],
)
def test_checkpoint_refuses_bad_arguments(arguments, error, name):
    with pytest.raises(error, match=name):
        Checkpoint(**arguments)


def test_folder_is_a_checkpoint_with_default_settings(binary, tmp_path):
    pv.fit(*make_pair(), binary, epochs=1, checkpoint=tmp_path / "run", progress=False)
    assert len(pv.load_checkpoint(tmp_path / "run").history) == 1
    assert Checkpoint(tmp_path) == Checkpoint(tmp_path, seconds=60.0, keep=3, resume=False)
    with pytest.raises(TypeError, match="checkpoint must be a folder"):
        pv.fit(*make_pair(), binary, checkpoint=3)


def test_state_that_cannot_be_saved_raises_before_the_first_step(binary, tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return super().state_dict() | {"callback": print}

    with pytest.raises(TypeError, match="callback"):
        fit(binary, tmp_path, optimizer=functools.partial(Odd, lr=0.1), epochs=10**6)


def test_only_the_last_checkpoints_are_kept(binary, tmp_path):
    fit(binary, tmp_path, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-000000000014",
        "step-000000000015",
    ]


def test_after_epoch_results_are_history_columns(binary):
    seen = []

    def kl_of_units(epoch, row):
        seen.append(epoch)
        report = pv.collapse_report(*programs, binary, num_particles=5)
        return {f"kl of unit {unit}": kl for unit, kl in enumerate(report.units["kl"])}

    torch.manual_seed(11)
    programs = make_pair()
    options = {"epochs": 3, "batch_size": 10, "seed": 0, "progress": False, "capture": False}
    result = pv.fit(*programs, binary, after_epoch=kl_of_units, **options)
    assert seen == [1, 2, 3]
    assert result.history[["kl of unit 0", "kl of unit 1"]].notna().all(axis=None)
    assert equal(
        tensors(*programs), fit(binary)[1]
    )  # after_epoch does not change the noise of the run


@pytest.mark.parametrize(
    ("name", "given"), [("modules", tuple), ("noise of their own", noisy_pair)]
)
def test_load_checkpoint_of_a_killed_run(name, given, binary, tmp_path):
    with pytest.raises(Killed):
        run(binary, tmp_path, 9, **CASES[name])
    saved = pv.load_checkpoint(tmp_path, *given())
    assert len(saved.history) == 1
    content = read(max(tmp_path.iterdir()), kind=checkpoints.KIND)
    assert equal(tensors(saved.model, saved.guide), content["trainer"]["tensors"])
    assert len(pv.evidence(saved.model, saved.guide, binary, num_particles=2).values) == len(binary)
    assert len(pv.load_checkpoint(min(tmp_path.iterdir()), *given()).history) <= 1
    for folder in (tmp_path, max(tmp_path.iterdir())):
        with pytest.raises(pv.serialization.UnreadableFile, match="load_checkpoint"):
            pv.load(folder)


def test_load_checkpoint_of_functions_needs_the_programs(binary, tmp_path):
    _, fitted = fit(binary, tmp_path, pair=bare_pair)
    with pytest.raises(ValueError, match="pass model and guide"):
        pv.load_checkpoint(tmp_path)
    saved = pv.load_checkpoint(tmp_path, *bare_pair())
    assert equal(tensors(saved.model, saved.guide), fitted)
    assert {"param.scale", "param.shift", "param.weight"} <= fitted.keys()


def test_load_checkpoint_returns_the_best_epoch(binary, tmp_path):
    options = {"patience": 5, "validation": binary[:9], "learning_rate": 0.3, "epochs": 6}
    result, fitted = fit(binary, tmp_path, **options)
    assert result.best_epoch < 6
    saved = pv.load_checkpoint(tmp_path)
    assert equal(tensors(saved.model, saved.guide), fitted)
    pd.testing.assert_frame_equal(saved.history, result.history)


def test_load_checkpoint_without_a_readable_checkpoint(binary, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            pv.load_checkpoint(folder)
    fit(binary, tmp_path, epochs=1)
    names = sorted(tmp_path.iterdir())
    (names[-1] / "tensors.safetensors").write_bytes(b"nothing")
    pv.load_checkpoint(tmp_path)  # loads the previous checkpoint
    assert sorted(tmp_path.iterdir()) == names  # reading changes nothing
    write(names[-1], {"trainer": {}}, kind=checkpoints.KIND, overwrite=True)
    with pytest.raises(pv.serialization.UnreadableFile, match="no checkpoint with a pair"):
        pv.load_checkpoint(tmp_path)


def test_long_history_is_resumed(binary, tmp_path, monkeypatch):
    fit(binary, tmp_path, epochs=1, after_epoch=lambda epoch, row: {"kl": 0.5})
    path = max(tmp_path.iterdir())
    content = read(path, kind=checkpoints.KIND)
    columns = [(name, np.resize(values, 5_000)) for name, values in content["history"]["columns"]]
    content["history"] |= {"columns": columns, "rows": 5_000}
    content["position"]["epoch"] = 5_001
    write(path, content, kind=checkpoints.KIND, overwrite=True)
    monkeypatch.setattr(writing, "MAX_RECORD", 100_000)  # 20 bytes per row
    result, _ = fit(binary, tmp_path, epochs=5_001, resume=True)
    assert len(result.history) == 5_001
    assert result.history["kl"].notna().sum() == 5_000


def test_best_epoch_before_the_resume_is_restored(binary, tmp_path):
    """The rate is 1000 times larger from the second epoch on, so the first epoch is best."""
    options = {
        "validation": binary,
        "patience": 5,
        "scheduler": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1000.0 if n else 1.0),
    }
    _, best = fit(binary, epochs=1, **options)
    fit(binary, tmp_path, epochs=2, **options)
    result, resumed = fit(binary, tmp_path, epochs=4, resume=True, **options)
    assert result.best_epoch == 1
    assert len(result.history) == 4
    assert equal(best, resumed)


def test_checkpoints_after_the_interrupted_state_are_removed(binary, tmp_path):
    """Press Ctrl-C twice between writing a checkpoint and removing the previous one."""
    _, straight = fit(binary)
    remove, names = checkpoints.shutil.rmtree, []

    def pressed(path, **options):
        if path.name.startswith("step-"):
            names.append(path.name)
            if len(names) == 7:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
        remove(path, **options)

    with mock.patch("shutil.rmtree", pressed), pytest.raises(pv.training.Interrupted):
        fit(binary, tmp_path, keep=1)
    assert names[-2:] == ["step-000000000006", "step-000000000007"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000006"]
    _, resumed = fit(binary, tmp_path, keep=1, resume=True)
    assert equal(straight, resumed)


@pytest.mark.parametrize(("took", "wait"), [(0.1, 10.0), (3.0, 150.0)])
def test_writing_takes_at_most_a_fiftieth_of_the_time(took, wait, tmp_path, monkeypatch):
    """The wait is ten seconds, or fifty times as long as the last write if that is more."""
    now = 1000.0

    def content():
        nonlocal now
        now += took
        return {}

    monkeypatch.setattr(checkpoints, "_SHARE_OF_TIME", SHARE_OF_TIME)
    monkeypatch.setattr(checkpoints, "time", types.SimpleNamespace(monotonic=lambda: now))
    folder = checkpoints.Checkpoints(Checkpoint(tmp_path, seconds=10.0, keep=1))
    assert folder.due
    folder.write(content, 0)
    end = now
    now = end + 0.999 * wait
    assert not folder.due
    now = end + 1.001 * wait
    assert folder.due


def fixed_scale_pair():
    """Return a pair whose attributes a callback may change."""
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(2, [7], 16), scale=1.0),
    )
    return model, pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [7]))


def test_resume_detects_changed_attributes(binary, tmp_path):
    torch.manual_seed(11)
    programs = fixed_scale_pair()
    options = {"batch_size": 10, "seed": 0, "progress": False, "capture": False}
    begun = options | {"checkpoint": Checkpoint(tmp_path, seconds=0.0)}
    resumed = options | {"checkpoint": Checkpoint(tmp_path, seconds=0.0, resume=True)}

    def sharpen(epoch, row):
        programs[0].likelihood.scale.value = 1 / (1 + epoch)

    pv.fit(*programs, binary, epochs=2, after_epoch=sharpen, **begun)
    with pytest.raises(ValueError, match="pass model and guide"):  # not made as it is now
        pv.load_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match=r"scale.value was 0.333\d*, now 1.0"):
        pv.fit(*fixed_scale_pair(), binary, epochs=3, **resumed)
    other, _ = fixed_scale_pair()
    other.likelihood.decoder[1] = nn.ReLU()
    guide = pv.guides.AmortizedNormal(other, encoder=pv.nets.MLP(16, [7]))
    with pytest.raises(ValueError, match="was Tanh, now ReLU"):
        pv.fit(other, guide, binary, epochs=4, **resumed)


@pytest.mark.parametrize(("capture", "interrupted"), [(False, 2), (True, 1), (True, 2)])
def test_parameters_frozen_during_the_run_stay_frozen(
    capture, interrupted, binary, tmp_path, without_compiler
):
    def run(folder, pressed):
        torch.manual_seed(11)
        model, guide = make_pair()

        def freeze(epoch, row):
            if epoch == 1:
                model.likelihood.requires_grad_(False)
                model.likelihood.eval()
            if epoch == pressed:
                raise KeyboardInterrupt

        options = {"batch_size": 10, "epochs": 4, "seed": 0, "progress": False, "capture": capture}
        if folder is not None:
            options["checkpoint"] = Checkpoint(folder, resume=True)
        fit = pv.fit(model, guide, binary, after_epoch=freeze, **options)
        assert fit.execution.startswith("captured" if capture else "eager: capture=False")
        return model, tensors(model, guide)

    _, straight = run(None, None)
    with pytest.raises(pv.training.Interrupted):
        run(tmp_path, interrupted)
    model, resumed = run(tmp_path, None)
    assert equal(straight, resumed)
    assert not model.likelihood.training


def late_pair(noisy):
    """Return a pair that creates a parameter in the seventh training call of the model."""
    calls = torch.zeros(())
    register = nn.Module()
    register.register_buffer("calls", calls)

    def model(x):
        register.calls.add_(register.training)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(2)).to_event(1))
            loc = z.sum(-1, keepdim=True).expand(x.shape)
            if register.calls > 6:
                loc = loc + pyro.param("late", lambda: torch.randn(16) if noisy else torch.ones(16))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.full((16, 2), 0.01))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, 0.5).to_event(1))

    return model, guide


@pytest.mark.parametrize("stops", ["at the end of the epoch", "in a later step"])
def test_run_resumes_after_a_parameter_was_created(stops, binary, tmp_path):
    pair = functools.partial(late_pair, noisy=True)
    straight = fit(binary, pair=pair, epochs=4)[1]
    assert "param.late" in straight

    def press(epoch, row):
        if epoch == 2:
            raise KeyboardInterrupt

    step, taken = TrainStep.step, 0

    def stopped(*args, **options):
        nonlocal taken
        taken += 1
        if taken == 9:
            raise KeyboardInterrupt
        return step(*args, **options)

    at_end = stops == "at the end of the epoch"
    options = {"after_epoch": press} if at_end else {}
    with (
        mock.patch.object(TrainStep, "step", step if at_end else stopped),
        pytest.raises(pv.training.Interrupted),
    ):
        fit(binary, tmp_path, pair=pair, epochs=4, seconds=60.0, **options)
    resumed = fit(binary, tmp_path, pair=pair, epochs=4, resume=True, seconds=60.0)[1]
    assert equal(straight, resumed)


def test_run_restored_to_before_its_capture_captures_again(binary, tmp_path, without_compiler):
    step, taken = TrainStep.step, 0

    def stopped(*args, **options):
        nonlocal taken
        taken += 1
        if taken == 5:
            assert args[0].execution == "captured, not compiled"
            raise KeyboardInterrupt
        return step(*args, **options)

    options = {"capture": True, "seconds": 60.0}
    with mock.patch.object(TrainStep, "step", stopped), pytest.raises(pv.training.Interrupted):
        fit(binary, tmp_path, **options)
    content = read(max(tmp_path.iterdir()), kind=checkpoints.KIND)
    assert content["trainer"]["steps"] == 0
    assert content["trainer"]["capture"]["stage"] == "trace"
    _, resumed = fit(binary, tmp_path, resume=True, **options)
    assert equal(fit(binary, capture=True)[1], resumed)


def test_resume_refuses_another_rate_of_a_custom_optimizer(binary, tmp_path):
    fit(binary, tmp_path, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"'lr': 0.1.*'lr': 0.5"):
        fit(binary, tmp_path, optimizer=functools.partial(torch.optim.SGD, lr=0.5), resume=True)


def test_load_checkpoint_retries_if_a_checkpoint_was_removed(binary, tmp_path):
    fit(binary, tmp_path, epochs=1)
    read, times = loading.last_whole, 0

    def gone(folder):
        nonlocal times
        times += 1
        if times < 3:
            raise pv.serialization.UnreadableFile("it is gone")
        return read(folder)

    with mock.patch.object(loading, "last_whole", gone):
        assert len(pv.load_checkpoint(tmp_path).history) == 1


def test_undone_best_epoch_is_not_the_best(binary, tmp_path):
    """An interrupt between two epochs undoes the last steps of the first."""
    options = {"patience": 5, "validation": binary[:9], "epochs": 4}
    _, straight = fit(binary, **options)
    order, calls = Minibatches.state_dict, 0

    def interrupted(batches):
        nonlocal calls
        calls += 1
        if calls == 3:  # one call comes before the first epoch
            raise KeyboardInterrupt
        return order(batches)

    with (
        mock.patch.object(Minibatches, "state_dict", interrupted),
        pytest.raises(pv.training.Interrupted),
    ):
        fit(binary, tmp_path, **options)
    content = read(max(tmp_path.iterdir()), kind=checkpoints.KIND)
    assert content["position"]["epoch"] == 2
    first = read(min(tmp_path.iterdir()), kind=checkpoints.KIND)["best"]
    assert first is None or equal(first, content["best"])
    _, resumed = fit(binary, tmp_path, resume=True, **options)
    assert equal(straight, resumed)
