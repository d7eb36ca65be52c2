"""Fit a pair of programs: stochastic variational inference with one optimizer over both."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from rich.progress import Progress
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae._capture import Capture, check_capture
from pyro_vae._programs import fits
from pyro_vae._programs import parameters as programs
from pyro_vae._programs.pair_state import digests as digests_of_pair
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.validation import check_pair
from pyro_vae._utils.checks import check_call, positive_integer, positive_number, real_number
from pyro_vae._utils.distributed import broadcast_from_first, num_processes, rank
from pyro_vae._utils.interrupts import defer_keyboard_interrupt
from pyro_vae._utils.modules import modules
from pyro_vae._utils.progress import task
from pyro_vae._utils.random import seeded
from pyro_vae._utils.referenced_objects import referenced_objects
from pyro_vae.datasets._minibatches import Data, Minibatches
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.serialization._contents import Description
from pyro_vae.serialization._files import UnreadableFile
from pyro_vae.training._checkpoints import Checkpoints
from pyro_vae.training._loop import AfterEpoch, OnNonFinite, StoppedRun, TrainingLoop
from pyro_vae.training._losses import check_enumeration, check_objective, loss_value
from pyro_vae.training._minibatch_sizes import try_sizes
from pyro_vae.training._missing import check_gradient_of_missing
from pyro_vae.training._step import BOTH, TrainStep
from pyro_vae.training._train_state import TrainState
from pyro_vae.training._validation import Validation

_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Fit:
    """A fitted pair.

    Args:
        model: program of p(x, z), its parameters fitted.
        guide: program of q(z|x), its parameters fitted.
        history: a row for each epoch, whose columns are

            - ``loss``: minus the bound, in nats per data point, averaged over the steps of the
              epoch;
            - ``validation_loss``: the same of the validation data, NaN without any. It is of one
              bound over the whole run: the objective with each schedule at its last value (of one
              that repeats, its largest);
            - ``validation_loss_scheduled``: the same at the values that the schedules have at the
              end of the epoch; only where the objective has schedules;
            - ``learning_rate``: of the optimizer's first group, NaN where that has no ``"lr"``;
            - ``skipped``: the steps that were;
            - ``seconds``;

            and what ``after_epoch`` returned.
        best_epoch: the epoch, from 1, whose parameters the pair holds.
        seconds: the time it all took.
        execution: how the steps ran in the end: ``"captured"`` (as compiled code), ``"captured,
            not compiled"``, or ``"eager: "`` and why.
        digests: of the pair's tensors when the fit ended, by which :func:`pyro_vae.compare` sees
            that another fit has changed them.
    """

    model: Program
    guide: Program
    history: pd.DataFrame
    best_epoch: int
    seconds: float
    execution: str
    digests: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)


class StoppedFit(KeyboardInterrupt):
    """A fit that was interrupted, at the end of a step; with a checkpoint, it can be resumed.

    Args:
        fit: the pair as it stands, and the history of the epochs that were done.
    """

    def __init__(self, fit: Fit):
        super().__init__(f"the fit was stopped after {len(fit.history)} epochs")
        self.fit = fit


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    model: Program,
    guide: Program,
    data: Data,
    *,
    objective: pyro.infer.ELBO | None = None,
    validation: Data | None = None,
    epochs: int = 50,
    batch_size: int = 100,
    learning_rate: float | Mapping[str, float] | None = None,
    guide_steps: int | None = None,
    model_steps: int | None = None,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    patience: int | None = None,
    after_epoch: AfterEpoch | None = None,
    on_nonfinite: OnNonFinite = "raise",
    skip_limit: int = 100,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    checkpoints_kept: int = 3,
    resume: bool = False,
    transform: Callable[[Tensor], Tensor] | None = None,
    capture: Capture = "auto",
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool | Progress = True,
    description: str = "fit",
) -> Fit:
    r"""Maximise the objective's bound over the parameters of model and guide together.

    Each step descends the loss per datum, :math:`-\frac1B \sum_b \mathcal{L}(x_b)` on a minibatch
    (Kingma & Welling 2014, algorithm 1). The pair is trained in place, in a parameter store of its
    own (see :func:`pyro_vae.parameter_store`): two fits never touch each other's parameters, and a
    second fit of the same pair goes on from the first.

    Gradients are enabled inside, whether it is called under ``torch.no_grad``,
    ``torch.inference_mode`` or neither.

    In a ``torch.distributed`` group (``torchrun``), each process is called with the whole data and
    takes its rows of every minibatch; gradients are averaged, and all hold the parameters of the
    first one to begin with; see docs/scaling.md.

    Args:
        model: program of p(x, z), called with a minibatch.
        guide: program of q(z|x), called likewise.
        data: training data: a tensor or numpy array x ``(N, *event)``, a tuple
            ``(x, *covariates)``, a torch Dataset or a DataLoader.
        objective: what to maximise; ``objectives.ELBO()`` if not given.
        validation: held-out data, on which the loss is taken after each epoch at the same noise,
            and with the objective's schedules at their last values: so epochs can be compared.
        epochs: passes over the data.
        batch_size: rows of a minibatch; all of them, where the data have fewer. A DataLoader
            brings its own.
        learning_rate: of the default optimizer, Adam (fused), 1e-3 if not given; or
            ``{"model": ..., "guide": ...}``, the model's being that of what both use, or make
            later. An optimizer of your own brings its own.
        guide_steps: alternate instead of moving all parameters in each step: so many steps of the
            guide alone (E-steps of variational EM; Neal & Hinton 1998), then ``model_steps`` of
            the model alone (M-steps). What both use moves in all of them, and so do parameters
            that the programs make later. 1 if only the other is given.
        model_steps: see ``guide_steps``.
        optimizer: makes another optimizer from the parameters.
        scheduler: makes a learning rate scheduler from the optimizer; it steps once an epoch.
        clip_norm: bound on the norm of the whole gradient.
        patience: stop after this many epochs without a lower validation loss, and restore the
            parameters and buffers of the best epoch. If the objective has schedules, the epochs
            count from where all have reached their last values.
        after_epoch: called with the number of each epoch, from 1, when it is over; what it
            returns, numbers by name, are columns of the history. It sees the pair as it is, with
            the same noise each time.
        on_nonfinite: what to do with a step whose loss or gradient is NaN or infinite:
            ``"raise"``, or ``"skip"`` its update and count it in the history.
        skip_limit: how many steps may be skipped before it raises all the same.
        checkpoint: a folder for checkpoints, from which the run can go on after whatever ended
            it. They hold all that the next step depends on, so that a run that was resumed ends
            with the same parameters, bit by bit, as one that was never stopped (the same device
            and number of threads given, and ``capture`` True or False: ``"auto"`` decides by the
            time that steps take).
        checkpoint_seconds: the time between two of them, at the least.
        checkpoints_kept: how many of the last stay.
        resume: go on from the last whole checkpoint in the folder; begin, if there is none. Pass
            the pair as it was made, and the same arguments; ``epochs`` may be more than before.
        transform: applied to each minibatch x on the device: ``torch.bernoulli`` binarises
            dynamically. Validation data are taken as they are.
        capture: run the programs through Python a few times, then replay the step's operations as
            compiled code; see docs/performance.md. ``"auto"`` captures, and compiles, where the
            run is long enough to repay it. Where the pair does not allow it, the steps run eagerly
            and a warning says why. The results are the same but for rounding.
        device: ``"auto"`` is CUDA where there is one, else the CPU. The pair stays there.
        seed: fixes order, noise and the initial values of what the first call of the guide makes;
            the process's own random numbers go on as if there had been no fit.
        progress: show a bar; or a rich Progress to add one to.
        description: text before the bar.

    Returns:
        The :class:`Fit`.

    Raises:
        ValueError: bad data, arguments out of range, or a pair that breaks the contract, all
            before the first step; a minibatch of a size that the pair or the objective cannot
            take, before the first step too, unless the data are a stream; NaN or infinite values
            of the data that reach a density or a gradient; no parameters to train, or some that
            were made under ``torch.inference_mode``; a learning rate beside an optimizer.
        TypeError: the objective is no ``pyro.infer.ELBO``; what ``optimizer`` or ``scheduler``
            makes is not torch's.
        NonFiniteError: a loss or a gradient is NaN or infinite: a FloatingPointError that names
            the site or parameter, the epoch and the rows; the pair is as it was before that step.
        FloatingPointError: a validation loss is.
        StoppedFit: a KeyboardInterrupt, with the fit as it stands at the end of the step.
        UnreadableFile: no checkpoint can be read: a ValueError.
        OSError: a checkpoint cannot be written; those before it are whole.

    Example:
        >>> import torch, pyro_vae as pv
        >>> data = pv.datasets.load("digits")
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [32], 64)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(64, [32]))
        >>> fit = pv.fit(model, guide, data.train, epochs=3, seed=0, progress=False)
        >>> bool(fit.history.loss[3] < fit.history.loss[1])  # by epoch
        True
    """
    check_call(fit, locals())
    objective = ELBO() if objective is None else objective
    check_objective(objective)
    _check_arguments(epochs, clip_norm, patience, validation, on_nonfinite, skip_limit, after_epoch)
    learning_rate = _learning_rate(learning_rate, optimizer)
    alternation = _alternation(guide_steps, model_steps)
    check_capture(capture)
    programs.require_programs(model, guide)
    programs.require_trainable_tensors(model, guide)
    device = _device(device)
    started = time.perf_counter()
    checkpoints = _checkpoints(checkpoint, checkpoint_seconds, checkpoints_kept, resume)
    going_on = None if checkpoints is None else checkpoints.begin(resume=resume)
    with seeded(seed), programs.parameter_store(model, guide, fresh=True) as store:
        order_seed, noise_seed = broadcast_from_first(torch.randint(2**62, (2,))).tolist()
        order = torch.Generator().manual_seed(order_seed)
        batches = Minibatches(
            data, batch_size, device=device, shuffle=True, generator=order, transform=transform
        )
        held_out = None
        if validation is not None:
            held_out = Minibatches(
                validation,
                batch_size,
                device=device,
                generator=torch.Generator(),
                name="validation",
            )
        for module in modules(model, guide):
            module.to(device)
        if isinstance(objective, Objective):
            objective.to(device)
            if batches.num_data is not None:
                objective.check_num_data(batches.num_data)
        settings = _settings(batches, held_out, objective) | {
            "guide_steps": guide_steps,
            "model_steps": model_steps,
            "clip_norm": clip_norm,
            "an optimizer of its own": optimizer is not None,
            "learning_rate": learning_rate,
            "transform": transform is not None,
        }
        if going_on is not None:
            with _readable(checkpoints.folder):
                _require_settings(going_on["settings"], settings, checkpoints.folder)
                batches.set_order(going_on["order"])
        order_of_pass = batches.order()
        first = batches.first()
        with programs.evaluation_mode(model, guide):  # a look must not move running averages
            trace = check_pair(model, guide, first, batches)
            if held_out is not None:
                first_held_out = held_out.first()
                check_pair(model, guide, first_held_out, held_out)
            check_enumeration(objective, trace)
            loss_value(objective, model, guide, *first)  # what it refuses, it refuses now
            _check_scale_of_global_latents(trace, batches.num_data)
            programs.bind(model, guide, store, trace)
            parameters = programs.parameters(model, guide, trace)
        how = {"nonfinite_too": on_nonfinite == "raise"}
        try_sizes(model, guide, objective, batches, first, training=True, **how)
        if held_out is not None:
            try_sizes(model, guide, objective, held_out, first_held_out, training=False, **how)
        trained = TrainState(
            model,
            guide,
            objective,
            transform,
            parameters,
            learning_rate=learning_rate,
            optimizer=optimizer,
            scheduler=scheduler,
        )
        trainer = TrainStep(
            model,
            guide,
            objective,
            batches,
            trained,
            parameters,
            clip_norm=clip_norm,
            alternation=alternation,
            capture=capture,
        )
        check_gradient_of_missing(trainer, model, guide, objective, batches)
        # Values that no look has seen yet are checked as they come, in the first pass over them.
        unseen, validator = not batches.values_checked, None
        if held_out is not None:
            validator = Validation(trainer, objective, held_out, unseen=not held_out.values_checked)
        stopped = False
        with (
            task(progress, description, epochs) as advance,
            defer_keyboard_interrupt() as interrupted,
            seeded(noise_seed + rank() if num_processes() > 1 else None),
        ):
            run = TrainingLoop(
                trainer,
                batches,
                validator,
                device=device,
                epochs=epochs,
                patience=patience,
                checkpoints=checkpoints,
                settings=settings,
                description=Description(model, guide),
                on_nonfinite=on_nonfinite,
                skip_limit=skip_limit,
                after_epoch=after_epoch,
                advance=advance,
                interrupted=interrupted,
                unseen=unseen,
                order=order_of_pass,
            )
            if going_on is not None:
                with _readable(checkpoints.folder):
                    run.go_on_from(going_on)
            try:
                run.train()
            except StoppedRun:
                stopped = True
        digests = digests_of_pair(model, guide)
        fits.find(model, guide).digests.update(digests)
    history = run.history.set_index("epoch")
    by_validation = patience is not None and len(history)
    best = len(history)
    if by_validation:  # an older checkpoint does not say which epoch was the best
        best = run.position.best_epoch or history["validation_loss"].idxmin()
    seconds = time.perf_counter() - started
    result = Fit(model, guide, history, int(best), seconds, trainer.execution, digests)
    if stopped:
        raise StoppedFit(result)
    return result


def _checkpoints(
    folder: str | Path | None, seconds: float, kept: int, resume: bool
) -> Checkpoints | None:
    real_number("checkpoint_seconds", seconds)
    kept = positive_integer("checkpoints_kept", kept)
    if folder is None:
        if resume:
            raise ValueError("resume=True goes on from a checkpoint: name its folder, checkpoint=")
        return None
    return Checkpoints(folder, seconds, kept)


def _settings(
    batches: Minibatches, held_out: Minibatches | None, objective: pyro.infer.ELBO
) -> dict[str, Any]:
    """What a run must have in common with the one that it goes on with."""
    of_objective = {
        name: repr(value)
        for name, value in referenced_objects(objective=objective)
        if isinstance(value, bool | int | float | str) and "._" not in name
    }
    return {
        "batch_size": batches.batch_size,
        "number of data": batches.num_data,
        "data": batches.digest(),
        "validation": None if held_out is None else [held_out.num_data, held_out.digest()],
        "objective": type(objective).__qualname__,
        "particles of the objective": getattr(objective, "num_particles", None),
        "numbers of the objective": of_objective,
    }


def _require_settings(saved: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    for name, value in here.items():
        if name not in saved or saved[name] != value:
            raise ValueError(
                f"{folder} has the checkpoints of a run with {name} {saved.get(name)}, here it is "
                f"{value}: pass the arguments of that run, or name another folder"
            )


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Refuse a checkpoint that is whole, but holds something else."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UnreadableFile(
            f"{folder} holds no checkpoint that this pyro_vae can go on from: {error!r}. Name "
            "another folder, or take the version that wrote it"
        ) from error


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        here = int(os.environ.get("LOCAL_RANK", "0"))  # of torchrun: one GPU for each process
        return torch.device("cuda", here) if num_processes() > 1 else torch.device("cuda")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch lacks this device
        raise ValueError(f"device {device!r} cannot be used here: {error}") from error
    return torch.device(device)


def _learning_rate(learning_rate, optimizer) -> float | Mapping[str, float] | None:
    """Return the learning rates of the default optimizer, None where there is another."""
    if optimizer is not None and not isinstance(learning_rate, Mapping | None):
        raise ValueError(
            f"learning_rate={learning_rate!r} is for the default optimizer, and would not reach "
            "the one that is passed as optimizer. Give it to that one, as in "
            "optimizer=functools.partial(torch.optim.SGD, lr=0.1), and leave learning_rate out"
        )
    if learning_rate is None:
        return _LEARNING_RATE if optimizer is None else None
    if not isinstance(learning_rate, Mapping):
        return positive_number("learning_rate", learning_rate)
    if set(learning_rate) != {"model", "guide"}:
        raise ValueError(
            "learning_rate must be a number, or have one for 'model' and one for 'guide', got "
            f"{dict(learning_rate)}"
        )
    if optimizer is not None:
        raise ValueError(
            "two learning rates are for the default optimizer: one of your own makes its groups "
            "from the parameters it is given"
        )
    for name, value in learning_rate.items():
        positive_number(f"learning_rate[{name!r}]", value)
    return learning_rate


def _alternation(guide_steps: int | None, model_steps: int | None) -> list[str]:
    """Return whose step each is, of one cycle."""
    if guide_steps is None and model_steps is None:
        return [BOTH]
    guide_steps = positive_integer("guide_steps", 1 if guide_steps is None else guide_steps)
    model_steps = positive_integer("model_steps", 1 if model_steps is None else model_steps)
    return ["guide"] * guide_steps + ["model"] * model_steps


def _check_arguments(
    epochs, clip_norm, patience, validation, on_nonfinite, skip_limit, after_epoch
) -> None:
    positive_integer("epochs", epochs)
    if clip_norm is not None:
        positive_number("clip_norm", clip_norm)
    if patience is not None:
        positive_integer("patience", patience)
        if validation is None:
            raise ValueError("patience needs validation data: pass validation=")
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(f'on_nonfinite must be "raise" or "skip", got {on_nonfinite!r}')
    positive_integer("skip_limit", skip_limit)
    if after_epoch is not None and not callable(after_epoch):
        raise TypeError(f"after_epoch must be a function of the epoch, got {after_epoch!r}")


def _check_scale_of_global_latents(trace: PairTrace, num_data: int | None) -> None:
    shared = [f.name for f in trace.guide.values() if not f.local and not f.observed]
    if shared and trace.scale == 1.0 and num_data is not None and num_data > trace.batch_size:
        raise ValueError(
            f"latent site {shared[0]!r} is shared by all {num_data} data, but a minibatch of "
            f"{trace.batch_size} would charge its whole KL. Let the minibatch stand for all data, "
            f'by `pyro.plate("data", {num_data}, subsample=x)`, or set batch_size={num_data}.'
        )
