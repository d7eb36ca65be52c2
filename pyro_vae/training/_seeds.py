"""Fit one method with several seeds, in parallel processes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import os
import pickle
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from rich.progress import Progress

from pyro_vae._programs.pair_trace import Program
from pyro_vae._utils.checks import check_call, is_whole_number, positive_integer, require_callable
from pyro_vae._utils.distributed import num_processes
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.precision import check_precision, shared_precision
from pyro_vae._utils.progress import task
from pyro_vae._utils.random import seeded
from pyro_vae._utils.threads import torch_threads
from pyro_vae._utils.user_warnings import warns_once
from pyro_vae.datasets._minibatches import Data
from pyro_vae.datasets._unused_columns import UnusedColumnsWarning
from pyro_vae.training._callbacks import Callback, check_after_epoch
from pyro_vae.training._checkpoints import Checkpoint
from pyro_vae.training._fit import Fit, fit
from pyro_vae.training._nonfinite import NonFiniteError

_OWN_OPTIONS = ("seed", "checkpoint", "progress", "description")
_SECONDS_BETWEEN_LOOKS = 0.2


@warns_once
def fit_seeds(
    make_pair: Callable[[], tuple[Program, Program]],
    data: Data,
    *,
    seeds: int | Sequence[int] = 5,
    num_workers: int | None = None,
    checkpoint: str | Path | None = None,
    callbacks: Callable[[int], Sequence[Callback]] | None = None,
    progress: bool | Progress = True,
    description: str = "fit",
    **fit_options: Any,
) -> list[Fit]:
    r"""Make and fit a new pair for each of several seeds, in parallel processes.

    Two fits of one method differ by their random initial weights, order of the data and noise. So
    one fit per method does not show which of two methods is better (Bouthillier et al. 2021).
    :func:`pyro_vae.compare` uses lists of fits::

        pv.compare({"elbo": pv.fit_seeds(...), "iwae": pv.fit_seeds(...)}, test)

    Each process fits one pair at a time, with one thread. The results do not depend on the number
    of processes. They are those of ``pv.fit(*make_pair(), data, seed=seed, ...)`` on one thread,
    where ``make_pair`` is called after ``torch.manual_seed(seed)``.

    Each process compiles the steps of equal pairs once. So ``capture=True`` saves time with many
    short fits of a small pair; see docs/performance.md.

    Args:
        make_pair: function that returns a new model and a new guide. It is called with torch seeded
            by each seed, so the initial weights depend on the seed alone. Methods whose pairs have
            the same networks then start from the same weights.
        data: training data, as in :func:`pyro_vae.fit`.
        seeds: the seeds, or their number S for the seeds 0 to S - 1.
        num_workers: number of processes. The default is the number of CPU cores, and at most the
            number of seeds. With 1, all fits run in this process.
        checkpoint: folder for the checkpoints, one folder for each seed. The same call resumes from
            them.
        callbacks: function from a seed to the callbacks of its fit. It is called in the process of
            the fit.
        progress: show a progress bar, or add one to a rich Progress.
        description: text before the bar.
        **fit_options: other arguments of :func:`pyro_vae.fit`.

    Returns:
        One :class:`Fit` for each seed, in the order of the seeds.

    Raises:
        ValueError: Two seeds are equal, or the list is empty. ``make_pair`` repeats a program.
            An argument of ``fit`` is invalid. The call is inside a group of processes.
        TypeError: ``make_pair`` does not return two programs. An option is not an argument of
            ``fit``, or is set for each seed. An argument cannot be sent to another process.
        NonFiniteError: See :func:`pyro_vae.fit`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> data = pv.datasets.load("digits")
        >>> def make_pair():
        ...     model = pv.LatentVariableModel(
        ...         prior=pv.priors.StandardNormal(2),
        ...         likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [16], 64)),
        ...     )
        ...     return model, pv.guides.AmortizedNormal(model, pv.nets.MLP(64, [16]))
        >>> fits = pv.fit_seeds(
        ...     make_pair, data.train, seeds=2, num_workers=1, epochs=2, progress=False
        ... )
        >>> [fit.seed for fit in fits]
        [0, 1]
    """
    check_call(fit_seeds, locals())
    require_callable("make_pair", make_pair)
    seeds = _checked_seeds(seeds)
    _check_options(fit_options)
    check_after_epoch(fit_options.get("after_epoch"))
    check_precision(fit_options.get("precision"))
    # Other processes do not have the setting of this one.
    fit_options["precision"] = shared_precision(fit_options.get("precision"))
    if callbacks is not None and not callable(callbacks):
        raise TypeError(
            "callbacks must be a function from a seed to a list of callbacks, such as "
            f"lambda seed: [Logger(f'run-{{seed}}')], got {callbacks!r}"
        )
    if num_processes() > 1:
        raise ValueError(
            "fit_seeds starts processes of its own, but this is a group of processes "
            "(torch.distributed). Call fit for each seed instead."
        )
    cores = os.cpu_count() or 1
    num_workers = cores if num_workers is None else positive_integer("num_workers", num_workers)
    num_workers = min(num_workers, len(seeds))
    pairs = _make_pairs(make_pair, seeds)  # to raise its errors now
    with contextlib.ExitStack() as stack:
        if checkpoint is None:
            checkpoint = stack.enter_context(_temporary_folder())
        folder = Path(checkpoint).resolve()  # workers may have another working directory
        load = functools.partial(_fit_one, make_pair, data, fit_options, folder)
        run = functools.partial(load, callbacks=callbacks)
        advance = stack.enter_context(
            task(progress, description, len(seeds) * fit_options.get("epochs", 50))
        )
        stack.enter_context(_epochs_shown(folder, seeds, advance))
        if num_workers == 1:
            # One thread, so that rounding does not depend on the number of cores.
            with torch_threads(1):
                return [run(seed, pair) for seed, pair in zip(seeds, pairs, strict=True)]
        _run_in_processes(run, seeds, num_workers)
        # Each fit is finished, so that resuming it only loads its last checkpoint.
        return [
            _seconds_of_epochs(load(seed, pair)) for seed, pair in zip(seeds, pairs, strict=True)
        ]


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """Make a folder for checkpoints, and remove it. Errors of a fit do not name it."""
    with tempfile.TemporaryDirectory(prefix="pyro-vae-") as folder:
        try:
            yield folder
        except NonFiniteError as error:
            raise error.without_folder() from error


def _checked_seeds(seeds: int | Sequence[int]) -> list[int]:
    if is_whole_number(seeds):
        return list(range(positive_integer("seeds", seeds)))
    if not isinstance(seeds, list | tuple | range):
        raise TypeError(f"seeds must be a number of seeds or a list of integers, got {seeds!r}")
    for seed in seeds:
        if not is_whole_number(seed):
            raise TypeError(f"each seed in seeds must be an integer, got {seed!r}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"each seed in seeds must be from 0 to 2**63 - 1, got {seed}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more integers, all different, got {seeds!r}")
    return [int(seed) for seed in seeds]


def _check_options(options: dict[str, Any]) -> None:
    known = inspect.signature(fit).parameters
    for name in options:
        if name in _OWN_OPTIONS or name in ("model", "guide", "data"):
            raise TypeError(f"fit_seeds sets {name!r} of each fit. Leave it out of fit_options")
        if name not in known:
            raise TypeError(f"{name!r} is not an argument of fit. See help(pyro_vae.fit)")


def _make_pairs(make_pair: Callable[[], Any], seeds: Sequence[int]) -> list[tuple]:
    pairs: list[tuple] = []
    seen: set[int] = set()
    for seed in seeds:
        with seeded(seed):
            pair = make_pair()
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(callable, pair)):
            raise TypeError(f"make_pair must return (model, guide), got {pair!r}")
        if seen & set(map(id, pair)):
            raise ValueError(
                "make_pair returned a program that it returned before. Each fit trains its pair in "
                "place, so make a new model and a new guide in every call."
            )
        seen |= set(map(id, pair))
        pairs.append(tuple(pair))
    return pairs


def _fit_one(
    make_pair: Callable[[], tuple[Program, Program]],
    data: Data,
    options: dict[str, Any],
    folder: Path,
    seed: int,
    pair: tuple[Program, Program] | None = None,
    callbacks: Callable[[int], Sequence[Callback]] | None = None,
) -> Fit:
    """Fit the pair of one seed, or resume its fit.

    Parameters in Pyro's global store are ignored, because other processes do not have them.
    """
    with pyro.get_param_store().scope():
        if pair is None:
            with seeded(seed):
                pair = make_pair()
        options = {**options, "objective": copy.deepcopy(options.get("objective"))}
        users = [] if callbacks is None else callbacks(seed)
        return fit(
            *pair,
            data,
            seed=seed,
            checkpoint=Checkpoint(folder / f"seed-{seed}", resume=True),
            callbacks=[_ShowEpoch(_epochs_file(folder, seed)), *users],
            progress=False,
            **options,
        )


def _run_in_processes(run: Callable[..., Fit], seeds: Sequence[int], num_workers: int) -> None:
    """Fit the pairs of all seeds in worker processes, which leave checkpoints of finished fits."""
    import cloudpickle
    import joblib

    try:
        content = cloudpickle.dumps(run)
    except Exception as error:  # objects raise errors of many types
        raise TypeError(
            f"make_pair, data or an option cannot be sent to another process: {first_line(error)}. "
            "Pass objects that can be pickled, or num_workers=1."
        ) from error
    with tempfile.TemporaryDirectory(prefix="pyro-vae-") as folder:
        path = Path(folder) / "run.pickle"
        path.write_bytes(content)
        dtype = torch.get_default_dtype()  # other processes have their own
        jobs = [joblib.delayed(_work)(path, seed, dtype) for seed in seeds]
        joblib.Parallel(n_jobs=num_workers, backend="loky", batch_size=1)(jobs)


def _work(path: Path, seed: int, dtype: torch.dtype) -> None:
    """Fit the pair of one seed in a worker process, whose default dtype is set to that of the call.

    Raises:
        RuntimeError: The fit raised an error that cannot be pickled. The message has its text.
    """
    run = pickle.loads(path.read_bytes())  # noqa: S301 - written by the parent process
    try:
        with torch_threads(1), _default_dtype(dtype), warnings.catch_warnings():
            # The parent process issues this warning at the line of the user's code.
            warnings.simplefilter("ignore", UnusedColumnsWarning)
            run(seed)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301
        except Exception:  # exceptions of user code may need several arguments
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the dtype of new tensors inside the block. Joblib reuses its processes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _ShowEpoch(Callback):
    """Write the number of finished epochs to a file.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self._path = path

    def after_epoch(self, epoch: int, row: Mapping[str, float]) -> None:
        self._path.write_text(str(epoch))


def _epochs_file(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.epochs"


@contextlib.contextmanager
def _epochs_shown(
    folder: Path, seeds: Sequence[int], advance: Callable[..., None]
) -> Iterator[None]:
    """Advance a progress bar by the finished epochs of all fits, from files of the workers."""
    folder.mkdir(parents=True, exist_ok=True)
    shown, ended = 0, threading.Event()

    def look() -> None:
        nonlocal shown
        epochs = 0
        for seed in seeds:
            with contextlib.suppress(OSError, ValueError):  # not there yet, or half written
                epochs += int(_epochs_file(folder, seed).read_text())
        advance(max(0, epochs - shown))
        shown = max(shown, epochs)

    def watch() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


def _seconds_of_epochs(result: Fit) -> Fit:
    """Return a fit with the time of its epochs, instead of the time of loading it."""
    return dataclasses.replace(result, seconds=float(result.history["seconds"].sum()))
