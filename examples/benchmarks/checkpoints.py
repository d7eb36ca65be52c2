"""Measure the cost of checkpoints and NaN checks, and kill and resume runs.

python examples/benchmarks/checkpoints.py cost                # the ratios; a few minutes
python examples/benchmarks/checkpoints.py kill                # thirty runs, eager
python examples/benchmarks/checkpoints.py kill --captured

The cost is measured for captured steps on random data of 784 dimensions. There are epochs of bare
steps, of steps with NaN checks, and of steps with NaN checks and checkpoints. Checkpoints are as
frequent as a fit allows. The three kinds alternate, and the results are medians over rounds.

Killed and resumed runs must have the same parameters as a run without interruption, bit by bit.
"""

import argparse
import hashlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch

import pyro_vae as pv
from pyro_vae._programs.pair_state import state
from pyro_vae.training import _checkpoints as checkpoints
from pyro_vae.training import _loop as run
from pyro_vae.training._checkpoints import Checkpoints

ROWS = 2000  # data of the runs that are killed


def make_pair(features, hidden, latents):
    torch.manual_seed(0)
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(latents),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(latents, hidden, features)),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(features, hidden))
    return model, guide


def cost(arguments):
    """Print the median times of a step, and their ratios to those of bare steps."""
    run_chunk, due = run.TrainingLoop._run_chunk, Checkpoints.due

    def bare(self, selections, validated):
        for selection in selections:
            self._count(selection, float("nan"))
            self.train_step.step(selection)
        return 0

    modes = {"bare": (bare, False), "checked": (run_chunk, False)}
    modes["checked, with checkpoints"] = (run_chunk, due)
    times = {name: [] for name in modes}
    busy = {name: [] for name in modes}
    turns = list(modes) * arguments.rounds
    x = torch.bernoulli(torch.rand(arguments.data, 784))
    steps = arguments.data // 100
    began = time.perf_counter(), time.process_time()

    def after_epoch(epoch, row):
        nonlocal began
        number = epoch - 3  # the first two capture the step
        if 0 <= number < len(turns):
            times[turns[number]].append((time.perf_counter() - began[0]) / steps)
            busy[turns[number]].append((time.process_time() - began[1]) / steps)
        if 0 <= number + 1 < len(turns):
            run.TrainingLoop._run_chunk, Checkpoints.due = modes[turns[number + 1]]
        began = time.perf_counter(), time.process_time()

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(run.TrainingLoop, _run_chunk=run_chunk),
    ):
        pv.fit(
            *make_pair(784, [200, 200], 50),
            x,
            epochs=2 + len(turns),
            capture=True,
            after_epoch=after_epoch,
            checkpoint=pv.training.Checkpoint(folder, seconds=0.0),
            seed=0,
        )
    print("| steps | ms | ratio | ratio of CPU time |\n|---|---|---|---|")
    for name in modes:
        wall, processor = (
            median(t / b for t, b in zip(found[name], found["bare"], strict=True))
            for found in (times, busy)
        )
        print(f"| {name} | {1e3 * median(times[name]):.3f} | {wall:.3f} | {processor:.3f} |")


def killed_and_resumed(arguments):
    """Kill runs at random times, every third while it writes. Count those with equal results."""
    torch.set_num_threads(1)  # because the runs are forked
    options = {"epochs": arguments.epochs, "capture": arguments.captured}
    with tempfile.TemporaryDirectory() as folder:
        expected = ended(Path(folder) / "straight", **options)
        same, generator = 0, np.random.default_rng(0)
        for number in range(arguments.runs):
            place = Path(folder) / str(number)
            process = forked(place, **options)
            step = generator.integers(ROWS // 100 * arguments.epochs)
            writing = number % 3 == 0
            while last_step(place) < step or (writing and not any(place.glob(".step-*"))):
                if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
            time.sleep(0 if writing else generator.uniform(0, 0.02))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            step = last_step(place)
            left = " inside a checkpoint" * any(place.glob(".step-*.writing"))
            found = ended(place, **options)
            same += found == expected
            print(
                f"run {number}: {'killed' if os.WIFSIGNALED(status) else 'was over'}{left}, "
                f"resumed at {step if step >= 0 else 'the beginning'}: "
                f"{'the same' if found == expected else 'ANOTHER'}",
                flush=True,
            )
    print(f"{same} of {arguments.runs} bit-identical")
    sys.exit(same != arguments.runs)


def forked(folder, **options):
    """Start or resume a fit in a new process, which writes a digest next to the checkpoint."""
    if process := os.fork():
        return process
    checkpoints._SHARE_OF_TIME = 0.5  # half of the time, not a fiftieth, is writing
    x = torch.bernoulli(torch.rand(ROWS, 20, generator=torch.Generator().manual_seed(1)) / 2)
    pair = make_pair(20, [30], 3)
    pv.fit(
        *pair,
        x,
        validation=x[:100],
        transform=torch.bernoulli,
        checkpoint=pv.training.Checkpoint(folder, seconds=0.02, resume=True),
        seed=0,
        progress=False,
        **options,
    )
    found = hashlib.sha256()
    for name, tensor in sorted(state(*pair).items()):
        found.update(name.encode() + tensor.detach().numpy().tobytes())
    folder.with_suffix(f".{os.getpid()}").write_text(found.hexdigest())
    os._exit(0)


def last_step(folder):
    """Return the step of the last checkpoint, or -1 without a checkpoint."""
    return max((int(path.name[5:]) for path in folder.glob("step-*")), default=-1)


def ended(folder, **options):
    """Return the digest of the parameters at the end of a fit."""
    process = forked(folder, **options)
    os.waitpid(process, 0)
    return folder.with_suffix(f".{process}").read_text()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("cost")
    command.add_argument("--data", type=int, default=40_000)
    command.add_argument("--rounds", type=int, default=7)
    command.set_defaults(run=cost)
    command = commands.add_parser("kill")
    command.add_argument("--runs", type=int, default=30)
    command.add_argument("--epochs", type=int, default=20)
    command.add_argument("--captured", action="store_true")
    command.set_defaults(run=killed_and_resumed)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
