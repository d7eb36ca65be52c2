"""Two processes that split every minibatch train like one process."""

import functools
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed
from capturing import needs_compiler
from new_processes import join_two, start_two
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import pyro_vae as pv
from pyro_vae._capture import Captured
from pyro_vae._programs.pair_state import state
from pyro_vae.training import _checkpoints as checkpoints
from pyro_vae.training._step import TrainStep

EXAMPLE = Path(__file__).parents[2] / "examples" / "data_parallel.py"
ROWS = 51  # the last minibatch of 10 has one row, so one process has none


class Pair(nn.Module):
    """A Gaussian pair whose noise is part of the data."""

    def __init__(self, batch_norm=False):
        super().__init__()
        torch.manual_seed(2)
        layers = [nn.Linear(6, 5), nn.BatchNorm1d(5)] if batch_norm else [nn.Linear(6, 5)]
        self.encoder = nn.Sequential(*layers, nn.Tanh(), nn.Linear(5, 4))
        self.decoder = nn.Linear(2, 6)
        self.spread = nn.Parameter(torch.zeros(()))
        self.double()

    def model(self, x, noise):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(noise), 1.0).to_event(1))
            scale = self.spread.exp()
            pyro.sample("x", dist.Normal(self.decoder(z), scale).to_event(1), obs=x)

    def guide(self, x, noise):
        loc, scale = self.encoder(x).chunk(2, -1)
        q = dist.Normal(loc, scale.exp()).to_event(1)
        z = loc + scale.exp() * noise
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(z, log_density=q.log_prob(z), event_dim=1))


def data(rows=ROWS):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, 2, generator=generator, dtype=torch.float64)


def data_with_zeros(x, noise, bad=(27,)):
    """Return positive rows with zeros at the bad rows, where x log x is NaN."""
    x = x.abs() + 0.1
    x[list(bad), 2] = 0.0
    return x, noise


class Logarithm(Pair):
    def guide(self, x, noise):
        super().guide(x * x.log(), noise)


class Sometimes(Pair):
    """A pair with a parameter used only for large rows, which some shares and minibatches lack."""

    def __init__(self):
        super().__init__()
        self.raised = nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def model(self, x, noise):
        large = x[:, :1] > 1.5
        super().model(x - large * self.raised if large.any() else x, noise)


class Labeled(Pair):
    """A pair that observes 1 for large rows, 0 for others and an invalid 2 for very large rows."""

    def model(self, x, noise):
        super().model(x, noise)
        label = (x[:, 0] > 1.0).double() + (x[:, 0] > 50.0)
        with pyro.plate("labels", len(x)):
            pyro.sample("label", dist.Bernoulli(0.5 * torch.ones_like(label)), obs=label)


class Rows(Dataset):
    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, i):
        return tuple(column[i] for column in self.columns)


def trained(kind=Pair, columns=None, killed_after=None, own_noise=False, frozen=None, **options):
    pair = kind()

    def freeze(epoch, row):
        pair.get_parameter(frozen).requires_grad_(False)

    if frozen is not None:
        options["after_epoch"] = freeze
    columns = data() if columns is None else columns
    defaults = {"batch_size": 10, "epochs": 3, "seed": 0, "progress": False, "capture": False}
    programs = (pair.model, pair.guide)
    if own_noise:
        model = pv.LatentVariableModel(
            pv.priors.StandardNormal(2), pv.likelihoods.Normal(pv.nets.MLP(2, [5], 6))
        ).double()
        programs = (model, pv.guides.AmortizedNormal(model, pv.nets.MLP(6, [5]).double()))
        columns = columns[0]
        programs[1](columns)
        programs[1].double()
    take_a_step, steps = TrainStep.step, 0

    def step(train_step, *args, **more):
        nonlocal steps
        steps += 1
        if steps == killed_after:
            raise KeyboardInterrupt
        return take_a_step(train_step, *args, **more)

    TrainStep.step = step
    try:
        result = pv.fit(*programs, columns, **(defaults | options))
    except KeyboardInterrupt:
        return {}
    finally:
        TrainStep.step = take_a_step
    found = {name: tensor.detach().clone() for name, tensor in state(*programs).items()}
    found["history"] = torch.tensor(result.history[["loss", "validation_loss"]].to_numpy())
    found["skipped"] = torch.tensor(result.history["skipped"].to_numpy())
    return found


def runs(folder):
    """Return the training runs by name, each a function without arguments."""
    columns = data()
    loader = functools.partial(DataLoader, TensorDataset(*columns), batch_size=10)
    written = functools.partial(pv.training.Checkpoint, folder, seconds=0.0)
    small = functools.partial(pv.training.Checkpoint, f"{folder}-small", seconds=0.0)
    return {
        "plain": lambda: trained(epochs=9),  # 54 steps
        "straight": lambda: trained(),
        "captured": lambda: trained(capture=True),
        "bounded": lambda: trained(clip_norm=0.1),
        "turns": lambda: trained(guide_steps=1, clip_norm=0.1),
        "validation": lambda: trained(validation=columns, patience=2),
        "a Dataset": lambda: trained(columns=Rows(columns)),
        "a loader": lambda: trained(columns=loader(shuffle=True)),
        "skipped": lambda: trained(Logarithm, data_with_zeros(*columns), on_nonfinite="skip"),
        "needed by some": lambda: trained(Sometimes),
        "frozen": lambda: trained(frozen="decoder.weight"),
        # In the first epoch, which validates values, errors occur in both processes, in the second
        # alone, and in the first alone, where the second has no row.
        "errors": lambda: trained(
            Logarithm,
            DataLoader(
                TensorDataset(*data_with_zeros(*columns, bad=(22, 27, 47, 50))), batch_size=10
            ),
            on_nonfinite="skip",
            clip_norm=1.0,
        ),
        "killed": lambda: trained(killed_after=11, checkpoint=written()),
        "resumed": lambda: trained(checkpoint=written(resume=True)),
        "killed before a single row": lambda: trained(
            columns=data(101), killed_after=11, checkpoint=small()
        ),
        "a single row": lambda: trained(columns=data(101), checkpoint=small(resume=True)),
        "single rows": lambda: trained(batch_size=1, epochs=1),
    }


def stop(epoch, row):
    if epoch == 2:
        raise pv.training.StopTraining


def fail(epoch, row):
    raise OSError("the disk is full")


def run_process(rank, folder):
    """Run everything in one process and save the tensors of each run."""
    join_two(rank, folder)
    checkpoints._SHARE_OF_TIME = float("inf")
    Captured.compiles = False
    found = {name: run() for name, run in runs(f"{folder}/run").items()}
    drawn = []

    def draw(x):
        drawn.append(torch.randn(3))
        return x

    found["own noise"] = trained(own_noise=True, transform=draw)
    found["drawn"] = drawn
    sampler = DistributedSampler(TensorDataset(*data()), seed=1)
    loader = DataLoader(TensorDataset(*data()), batch_size=5, sampler=sampler)
    found["own rows"] = trained(columns=loader)
    with pytest.raises(pv.training.NonFiniteError) as raised:
        trained(Logarithm, data_with_zeros(*data()))
    found["told"] = [str(raised.value), raised.value.rows[raised.value.bad]]
    x, noise = data()
    x[27, 0] = 100.0  # in the second process's half of its minibatch
    with pytest.raises(ValueError, match=r"support|process 1") as raised:
        trained(Labeled, DataLoader(TensorDataset(x, noise), batch_size=10), on_nonfinite="skip")
    found["refused"] = str(raised.value)
    with pytest.raises(ValueError, match=r"support|another process failed on its validation"):
        trained(Labeled, validation=DataLoader(TensorDataset(x, noise), batch_size=10))
    found["stopped"] = trained(after_epoch=stop if rank == 1 else None)
    with pytest.raises((OSError, RuntimeError)) as failed:
        trained(after_epoch=fail if rank == 1 else None)
    found["failed callback"] = f"{failed.typename}: {failed.value}"
    found["noise and averages"] = trained(functools.partial(Pair, batch_norm=True), batch_size=13)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def run_compiled_process(rank, folder):
    """Run the captured case in one process, compiled."""
    join_two(rank, folder)
    torch._inductor.config.compile_threads = 1
    torch.save({"captured": trained(capture=True)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def run_two(work, folder):
    start_two(work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_two(run_process, tmp_path_factory.mktemp("two"))


EQUAL = [
    "single rows",
    "plain",
    "bounded",
    "turns",
    "validation",
    "a Dataset",
    "captured",
    "skipped",
    "needed by some",
    "frozen",
    "errors",
]


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_equal_one(name, found, tmp_path, without_compiler):
    require_equal(name, found, tmp_path)


@needs_compiler
@pytest.mark.slow
def test_two_compiling_processes_equal_one(tmp_path):
    require_equal("captured", run_two(run_compiled_process, tmp_path), tmp_path)


def require_equal(name, found, folder):
    expected = runs(folder)[name]()
    for share in found:
        assert share[name].keys() == expected.keys()
        for key, tensor in share[name].items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    "name",
    [
        *EQUAL,
        "stopped",
        "a single row",
        "a loader",
        "own rows",
        "own noise",
        "noise and averages",
        "resumed",
    ],
)
def test_all_processes_end_with_equal_tensors(name, found):
    first, second = (share[name] for share in found)
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]) or key == "history", key


def test_all_processes_stop_after_the_epoch_in_which_one_stops(found):
    for share in found:
        losses, all_losses = (share[name]["history"][:, 0] for name in ("stopped", "plain"))
        assert torch.equal(losses, all_losses[:2])


def test_all_processes_end_if_a_callback_fails_in_one(found):
    told = [share["failed callback"] for share in found]
    assert told[0] == "RuntimeError: a callback of process 1 failed in epoch 1: the disk is full"
    assert told[1] == "OSError: the disk is full"


def test_processes_draw_different_noise(found):
    first, second = (share["drawn"] for share in found)
    assert not torch.equal(first[-1], second[-1])


@pytest.mark.parametrize("name", ["a loader", "own rows"])
def test_all_rows_are_used_for_any_loader(name, found):
    """Loaders use another order of rows than a tensor, so losses differ slightly."""
    history, expected = (found[0][n]["history"][:, 0] for n in (name, "straight"))
    assert not torch.equal(history, expected)
    torch.testing.assert_close(history, expected, rtol=0.05, atol=0.0)


def test_both_processes_name_the_nan_row(found):
    for share in found:
        message, bad = share["told"]
        assert bad.tolist() == [27]
        assert "site 'z'" in message


def test_data_refused_by_one_process_stop_both(found):
    """The value is finite, so it is not skipped."""
    first, second = (share["refused"] for share in found)
    assert "values outside the support of site 'label'" in second
    assert first == "process 1 failed on its rows of the minibatch. See its error"


def test_resumed_processes_are_bitwise_equal(found):
    for share in found:
        assert share["killed"] == {}
        for key, tensor in share["resumed"].items():
            assert torch.equal(tensor, share["straight"][key]) or key == "history", key


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process(tmp_path):
    def printed(folder, *arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        command += ["--standalone", "--max-restarts=2", str(EXAMPLE), "--checkpoint", folder]
        result = subprocess.run(  # noqa: S603
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return [line for line in result.stdout.splitlines() if not line.startswith("fit")]

    *expected, last = printed("straight")
    *found, last_of_killed = printed("killed", "--die-at", "3")
    assert found == expected
    assert last.endswith("0 restarts")
    assert last_of_killed == last.replace("0 restarts", "1 restarts")
