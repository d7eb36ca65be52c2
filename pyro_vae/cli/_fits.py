"""Fit all methods of a comparison in parallel processes, the baseline first."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
from rich.progress import Progress

import pyro_vae as pv
from pyro_vae._utils.distributed import num_processes
from pyro_vae._utils.progress import task
from pyro_vae._utils.random import seeded
from pyro_vae.cli._arms import Arm
from pyro_vae.cli._data import Splits
from pyro_vae.cli._results import safe_names


@dataclass(frozen=True)
class Plan:
    """The fits of a comparison.

    Args:
        arms: the methods.
        data: training and validation data.
        seeds: training seeds of each method.
        options: arguments of :func:`pyro_vae.fit` for all methods.
        checkpoint: folder for checkpoints; None makes a temporary one.
    """

    arms: Sequence[Arm]
    data: Splits
    seeds: Sequence[int]
    options: Mapping[str, Any]
    checkpoint: Path | None

    def folder(self, arm: Arm) -> Path | None:
        """Return the folder for the checkpoints of a method."""
        names = [each.name for each in self.arms]
        if self.checkpoint is None:
            return None
        return self.checkpoint / safe_names(names)[names.index(arm.name)]

    def options_of(self, arm: Arm) -> dict[str, Any]:
        """Return the arguments of :func:`pyro_vae.fit` for a method, but for the seed."""
        own = {"validation": self.data.validation, "transform": self.data.transform}
        return {**self.options, **own, **arm.options}

    def fit_seeds(self, arm: Arm, seeds: Sequence[int]) -> list[pv.training.Fit]:
        """Fit a method with some seeds in this process, or load its finished fits."""
        return pv.fit_seeds(
            arm.make_pair,
            self.data.train,
            seeds=list(seeds),
            num_workers=1,
            checkpoint=self.folder(arm),
            progress=False,
            **self.options_of(arm),
        )


@contextlib.contextmanager
def fits_of(plan: Plan, bar: Progress) -> Iterator[Callable[[Arm], list[pv.training.Fit]]]:
    """Fit all methods, and yield a function that returns the fits of one when they are finished.

    Each worker process fits one pair at a time, with one thread. The fits of the first method
    begin first. In a group of processes (torchrun), the processes share each fit.

    Raises:
        ValueError: A fit failed.
    """
    if num_processes() > 1:
        yield lambda arm: [_fit_in_group(plan, arm, seed, bar) for seed in plan.seeds]
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyro-vae-")))
        is_temporary = plan.checkpoint is None
        if is_temporary:
            plan = Plan(plan.arms, plan.data, plan.seeds, plan.options, folder / "checkpoints")
        path = folder / "plan.pickle"
        try:
            path.write_bytes(cloudpickle.dumps(plan))
        except Exception as error:  # objects raise errors of many types
            raise ValueError(f"a pair or an option cannot be sent to a worker: {error}") from error
        jobs = [(arm.name, seed) for arm in plan.arms for seed in plan.seeds]
        workers = joblib.Parallel(
            n_jobs=min(os.cpu_count() or 1, len(jobs)),
            return_as="generator_unordered",
            batch_size=1,
        )
        done = workers(joblib.delayed(_fit_job)(path, *job, is_temporary) for job in jobs)
        stack.callback(_stop, done)
        advance = stack.enter_context(task(bar, "fit", len(jobs)))
        finished: set[tuple[str, int]] = set()

        def wait(arm: Arm) -> list[pv.training.Fit]:
            while any((arm.name, seed) not in finished for seed in plan.seeds):
                name, seed, error = next(done)
                if error:
                    raise ValueError(f"cannot fit {name!r} with seed {seed}: {error}")
                finished.add((name, seed))
                advance(1)
            return plan.fit_seeds(arm, plan.seeds)

        yield wait


def _stop(results: Generator) -> None:
    """Stop the workers, also before the end of their jobs."""
    with warnings.catch_warnings():  # joblib's warning of unfinished jobs
        warnings.simplefilter("ignore")
        results.close()


def _fit_job(path: Path, name: str, seed: int, is_temporary: bool) -> tuple[str, int, str]:
    """Fit one pair, which leaves a checkpoint. Return its name and seed, and the text of an error.

    Exceptions of a user's code may be of any type, which cannot always be pickled.
    """
    try:
        plan = pickle.loads(path.read_bytes())  # noqa: S301 - written by the parent process
        (arm,) = (arm for arm in plan.arms if arm.name == name)
        plan.fit_seeds(arm, [seed])
    except Exception as error:
        if is_temporary and isinstance(error, pv.training.NonFiniteError):
            error = error.without_folder()
        return name, seed, str(error) or type(error).__name__
    return name, seed, ""


def _fit_in_group(plan: Plan, arm: Arm, seed: int, bar: Progress) -> pv.training.Fit:
    with seeded(seed):
        model, guide = arm.make_pair()
    folder = plan.folder(arm)
    return pv.fit(
        model,
        guide,
        plan.data.train,
        seed=seed,
        checkpoint=None
        if folder is None
        else pv.training.Checkpoint(folder / f"seed-{seed}", resume=True),
        progress=bar,
        description=f"{arm.name}, seed {seed}",
        **plan.options_of(arm),
    )
