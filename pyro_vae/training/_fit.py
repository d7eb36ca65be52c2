"""Fit a model and a guide by stochastic variational inference, with one optimizer for both."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyro
import torch
from pyro.params.param_store import ParamStoreDict
from rich.progress import Progress
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae._capture import Capture, check_capture
from pyro_vae._programs import fits
from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.evaluation import evaluation_mode, warn_of_evaluation_mode
from pyro_vae._programs.pair_state import digests as digests_of_pair
from pyro_vae._programs.pair_trace import PairTrace, Program
from pyro_vae._programs.parameters import (
    bind,
    parameter_store,
    parameters_of,
    require_programs,
    require_trainable_tensors,
    warn_of_untrained,
)
from pyro_vae._programs.validation import check_pair
from pyro_vae._utils.checks import check_call
from pyro_vae._utils.compiled_modules import compiled_modules_run_eagerly
from pyro_vae._utils.devices import torch_device
from pyro_vae._utils.distributed import broadcast_from_first, num_processes, rank
from pyro_vae._utils.interrupts import Interrupted, defer_keyboard_interrupt
from pyro_vae._utils.messages import program_name
from pyro_vae._utils.modules import modules
from pyro_vae._utils.precision import (
    Precision,
    check_precision,
    current_precision,
    matmul_precision,
)
from pyro_vae._utils.progress import task
from pyro_vae._utils.random import restored_generators, seeded
from pyro_vae._utils.user_warnings import ignores_frozen_parameters, warn_user, warns_once
from pyro_vae.datasets._minibatches import Data, Minibatches
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.serialization._pair_state import Description
from pyro_vae.training._arguments import (
    alternation_of,
    check_arguments,
    checkpoints_of,
    learning_rate_of,
    skip_limit_of,
)
from pyro_vae.training._callbacks import AfterEpoch, Callback, Callbacks
from pyro_vae.training._checkpoints import Checkpoint
from pyro_vae.training._loop import COLUMNS, SCHEDULED, TrainingLoop
from pyro_vae.training._losses import check_enumeration, check_objective, loss_value
from pyro_vae.training._minibatch_sizes import try_sizes
from pyro_vae.training._missing import check_gradient_of_missing
from pyro_vae.training._nonfinite import Skip
from pyro_vae.training._resume import require_settings, resuming_from, settings_of_run
from pyro_vae.training._step import TrainStep
from pyro_vae.training._train_state import TrainState
from pyro_vae.training._validation import Validation

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Fit:
    """A fitted pair.

    Args:
        model: program of p(x, z) with fitted parameters.
        guide: program of q(z|x) with fitted parameters.
        history: a DataFrame with a row for each epoch and the columns

            - ``loss``: minus the bound, in nats per data point, averaged over the steps of the
              epoch;
            - ``validation_loss``: the loss on the validation data, NaN without validation. Each
              schedule of the objective has its last value, or its largest if it repeats. So the
              bound is the same in all epochs;
            - ``validation_elbo``: the ELBO of the validation data in nats per data point, whatever
              the objective. So fits with different objectives can be compared. It is computed from
              the samples of ``validation_loss``, with closed forms of the KL where they are known,
              and without losses in the guide. It is NaN without validation, and if the guide gives
              a latent one point (a Delta);
            - ``validation_loss_scheduled``: the loss on the validation data, with the schedules at
              their values at the end of the epoch. The column exists only if there are schedules;
            - ``learning_rate``: of the optimizer's first group, NaN if it has no ``"lr"``;
            - ``skipped``: the number of skipped steps;
            - ``seconds``: the time of the epoch;

            and the columns that ``after_epoch`` and ``callbacks`` returned.
        best_epoch: the epoch, from 1, whose parameters the pair has.
        seconds: the time of the whole fit.
        execution: how the steps ran at the end: ``"captured"`` (as compiled code), ``"captured,
            not compiled"``, or ``"eager: "`` and the reason.
        digests: checksums of the pair's tensors at the end of the fit. :func:`pyro_vae.compare`
            uses them to detect a later change.
        seed: the seed of the fit. :func:`pyro_vae.compare` pairs runs of two methods by it.
        stop_reason: the reason if ``patience`` or a callback ended the fit early, else None.
        schedules_ended: whether the schedules of the objective have come within 1% of their last
            values, or repeat (:meth:`pyro_vae.objectives.Objective.has_settled`). If not, the
            objective still had other weights at the end of the fit. True for an objective of Pyro.
    """

    model: Program
    guide: Program
    history: pd.DataFrame
    best_epoch: int
    seconds: float
    execution: str
    digests: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    seed: int | None = None
    stop_reason: str | None = None
    schedules_ended: bool = True

    def __repr__(self) -> str:
        count = len(self.history)
        skipped = int(self.history["skipped"].sum()) if count else 0
        pair = f"{program_name(self.model)} and {program_name(self.guide)}"
        epochs = f"{count}{f', {skipped} steps skipped' if skipped else ''}"
        stopped = "" if self.stop_reason is None else f"; stopped early: {self.stop_reason}"
        chosen = "the best" if self.best_epoch < count else "the last"
        lines = [
            f"Fit of {pair}, seed {self.seed}",
            f"  epochs      {epochs}{stopped}",
            f"  parameters  of epoch {self.best_epoch}, {chosen}",
            f"  loss        {self._losses()}",
            f"  time        {self.seconds:.1f} s, {self.execution}",
        ]
        if not self.schedules_ended:
            lines.append("  schedules   not at their last values; train for more epochs")
        return "\n".join(lines)

    def _losses(self) -> str:
        """Return the losses of the epoch whose parameters the pair has."""
        if not len(self.history):
            return "unknown, before the first epoch"
        row = self.history.loc[self.best_epoch]
        held_out = [
            f"{name} {row[column]:.2f}"
            for name, column in (("validation", "validation_loss"), ("ELBO", "validation_elbo"))
            if not math.isnan(row[column])
        ]
        return ", ".join([f"{row['loss']:.2f}", *held_out]) + " nats per data point"


@warns_once
@ignores_frozen_parameters()
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
    batch_size: int | None = None,
    learning_rate: float | Mapping[str, float] | None = None,
    guide_steps: int | None = None,
    model_steps: int | None = None,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    patience: int | None = None,
    after_epoch: AfterEpoch | None = None,
    callbacks: Sequence[Callback] | None = None,
    on_nonfinite: Literal["raise", "skip"] | Skip = "raise",
    checkpoint: str | Path | Checkpoint | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    plate: str | None = None,
    capture: Capture = "auto",
    precision: Precision | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool | Progress = True,
    description: str = "fit",
) -> Fit:
    r"""Maximize an objective over the parameters of a model and a guide.

    Each step descends the loss per data point, :math:`-\frac1B \sum_b \mathcal{L}(x_b)`, on a
    minibatch (Kingma & Welling 2014, algorithm 1). The pair is trained in place, with its own
    parameter store (see :func:`pyro_vae.parameter_store`). So two fits never change each other's
    parameters, and a second fit of the same pair continues the first.

    A fit computes gradients even if it is called under ``torch.no_grad`` or
    ``torch.inference_mode``.

    In a ``torch.distributed`` group (``torchrun``), each process calls ``fit`` with all data and
    processes its share of the rows of every minibatch. Gradients are averaged. All processes start
    with the parameters of the first one; see docs/scaling.md.

    Args:
        model: program of p(x, z), called with a minibatch.
        guide: program of q(z|x), called with the same minibatch.
        data: training data: x ``(N, *event)``, or a tuple ``(x, *covariates)``. docs/contract.md
            lists all kinds of data under "Data". Columns that the programs do not take, such as
            labels, are left out with a warning.
        objective: the bound to maximize. The default is ``objectives.ELBO()``.
        validation: validation data. The loss on them is computed after each epoch, with the same
            noise each time. Each schedule of the objective then has its last value.
        epochs: passes over the data.
        batch_size: rows of a minibatch. The default is 100, or a tenth of the rows for 101 to 999
            rows. With fewer rows of data, one minibatch has all of them. A last minibatch of one
            row is joined to the one before it. A DataLoader has its own batch size.
        learning_rate: learning rate of the default optimizer, Adam (fused). The default is 1e-3. A
            dictionary ``{"model": ..., "guide": ...}`` sets two rates. Parameters that both
            programs use, or create later, have the rate of the model. Do not pass ``learning_rate``
            together with ``optimizer``.
        guide_steps: number of steps of the guide alone (E-steps of variational EM; Neal & Hinton
            1998). They alternate with ``model_steps`` steps of the model alone (M-steps).
            Parameters that both programs use, or create later, are updated in all steps. By
            default, each step trains both programs. If only ``model_steps`` is passed,
            ``guide_steps`` is 1.
        model_steps: number of steps of the model alone. If only ``guide_steps`` is passed, it is 1.
        optimizer: function from the parameters to a torch optimizer, to replace Adam.
        scheduler: function from the optimizer to a learning rate scheduler, which steps once per
            epoch.
        clip_norm: largest norm of the gradient of all parameters. A larger gradient is scaled down.
        patience: stop after this many epochs without a lower validation loss, and restore the
            parameters and buffers of the best epoch. If the objective has schedules, counting
            starts when all of them have their last values.
        after_epoch: function ``after_epoch(epoch, row)`` that is called after each epoch, with its
            number, from 1, and its row of the history, a mapping. It may return a dictionary of
            numbers, which become columns of the history. Its random numbers are the same in each
            epoch. If it raises :class:`~pyro_vae.training.StopTraining`, the fit ends.
        callbacks: objects of subclasses of :class:`~pyro_vae.training.Callback`, which are called
            in order after each epoch, after each checkpoint and after the fit.
        on_nonfinite: the reaction to a step whose loss or gradient is NaN or infinite. ``"raise"``
            raises an error. A :class:`~pyro_vae.training.Skip` skips the update, counts it in the
            history, and raises an error beyond a limit. ``"skip"`` is ``Skip()``.
        checkpoint: a folder for checkpoints, or a :class:`~pyro_vae.training.Checkpoint` with
            further settings. A folder is ``Checkpoint(folder)``. To resume a run, pass
            ``Checkpoint(folder, resume=True)``, a new pair and the same arguments. ``epochs`` may
            be larger than before, and ``seed`` may be left out. On the same device, the parameters
            of a resumed run equal those of an uninterrupted run bit for bit. The number of threads
            must be the same. With ``capture="auto"``, the number of epochs must be the same too,
            because it decides whether steps are compiled.
        transform: function that is applied to each minibatch x on the device. Use
            ``torch.bernoulli`` for dynamic binarization. It returns a tensor with as many rows.
            Validation data are not transformed.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        capture: run the programs through Python a few times, then replay the operations of a step
            as compiled code; see docs/performance.md. ``"auto"`` captures and compiles if the run
            is long enough. It decides by the operations of a step and the number of steps, so equal
            runs decide equally. On CUDA, ``"auto"`` never captures, because captured steps were
            not compared with eager ones there. Steps of a pair that cannot be captured run eagerly,
            with a warning that names the cause. The results are equal up to rounding.
        precision: of float32 matrix products, as in ``torch.set_float32_matmul_precision``. It is
            restored afterwards. The default is not to change it; see docs/performance.md.
        device: ``"auto"`` is CUDA if available, else the CPU. The pair stays on the device.
        seed: seed of the order of the data, of the noise, and of the initial values that the guide
            creates at its first call. The random state of the process is restored afterwards.
        progress: show a progress bar, or add one to a rich Progress.
        description: text before the bar.

    Returns:
        The :class:`Fit`.

    Raises:
        ValueError: Data or an argument are invalid, or the pair breaks a rule (docs/contract.md).
            The pair or the objective cannot process a minibatch of some size. A density or a
            gradient is not finite because of NaN or infinite values in the data. There are no
            parameters to train, or some were made under ``torch.inference_mode``. ``learning_rate``
            is passed together with an optimizer. All of these are raised before the first step,
            except for minibatch sizes and values of a stream.
        TypeError: The objective is not a ``pyro.infer.ELBO``. ``optimizer`` or ``scheduler`` does
            not return one of torch's. ``transform`` does not return a tensor. ``after_epoch`` or a
            callback does not take its arguments.
        NonFiniteError: A loss or a gradient is NaN or infinite. It is a FloatingPointError that
            names the site or parameter, the epoch and the rows. The pair has its state before that
            step.
        FloatingPointError: The validation loss is NaN or infinite.
        Interrupted: Ctrl-C was pressed. It is a KeyboardInterrupt, and ``.partial`` is the fit at
            the end of the step.
        UnreadableFile: No checkpoint in the folder can be read. It is a ValueError.
        OSError: A checkpoint cannot be written. Earlier checkpoints are intact.

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
    name_data_plate(plate, model, guide)
    objective = ELBO() if objective is None else objective
    check_objective(objective)
    check_arguments(
        epochs=epochs,
        clip_norm=clip_norm,
        patience=patience,
        validation=validation,
    )
    called = Callbacks(after_epoch, callbacks, reserved=[*COLUMNS, SCHEDULED])
    skip_limit = skip_limit_of(on_nonfinite)
    learning_rate = learning_rate_of(learning_rate, optimizer)
    alternation = alternation_of(guide_steps, model_steps)
    check_capture(capture)
    check_precision(precision)
    require_programs(model, guide)
    require_trainable_tensors(model, guide)
    warn_of_evaluation_mode(model, guide)
    device = torch_device(device)
    started = time.perf_counter()
    checkpoints = checkpoints_of(checkpoint)
    saved = None if checkpoints is None else checkpoints.begin()
    if saved is not None and seed is None:
        with resuming_from(checkpoints.folder):
            seed = saved["settings"].get("seed")  # not in older checkpoints
    with (
        matmul_precision(precision),
        seeded(seed),
        parameter_store(model, guide, fresh=True) as store,
    ):
        order_seed, noise_seed = broadcast_from_first(torch.randint(2**62, (2,))).tolist()
        batches, held_out = _minibatches(
            data,
            validation,
            batch_size,
            device=device,
            seed=order_seed,
            transform=transform,
            programs=(model, guide),
        )
        _move(model, guide, objective, device, num_data=batches.num_data)
        settings = settings_of_run(batches, held_out, objective) | {
            "guide_steps": guide_steps,
            "model_steps": model_steps,
            "clip_norm": clip_norm,
            "an optimizer of its own": optimizer is not None,
            "learning_rate": learning_rate,
            "transform": transform is not None,
            "precision": current_precision(),
            "seed": seed,
        }
        if saved is not None:
            with resuming_from(checkpoints.folder):
                require_settings(saved["settings"], settings, checkpoints.folder)
                if "seed" not in saved["settings"]:  # an older checkpoint
                    del settings["seed"]
                batches.load_state_dict(saved)
        order = batches.state_dict()  # before the check of the pair, which begins the first pass
        described = Description(model, guide)
        with compiled_modules_run_eagerly(modules(model, guide)):
            parameters = _check_pair(
                model, guide, objective, batches, held_out, store, skips=skip_limit > 0
            )
        train_state = TrainState(
            model,
            guide,
            objective,
            transform,
            parameters,
            learning_rate=learning_rate,
            optimizer=optimizer,
            scheduler=scheduler,
        )
        train_step = TrainStep(
            train_state, batches, clip_norm=clip_norm, alternation=alternation, capture=capture
        )
        check_gradient_of_missing(train_step, model, guide, objective, batches)
        with (
            task(progress, description, epochs) as advance,
            defer_keyboard_interrupt() as interrupted,
            seeded(noise_seed + rank() if num_processes() > 1 else None),
        ):
            loop = TrainingLoop(
                train_step,
                batches,
                None if held_out is None else Validation(train_step, objective, held_out),
                epochs=epochs,
                patience=patience,
                checkpoints=checkpoints,
                settings=settings,
                skip_limit=skip_limit,
                callbacks=called,
                advance=advance,
                interrupted=interrupted,
                order=order,
                description=described,
            )
            if saved is not None:
                with resuming_from(checkpoints.folder):
                    loop.load_state_dict(saved)
                called.load_state_dict(saved.get("callbacks", {}))  # not in older checkpoints
            is_finished = loop.train()
        digests = digests_of_pair(model, guide)
        fits.find(model, guide).digests.update(digests)
    history = loop.history.set_index("epoch")
    seconds = time.perf_counter() - started
    execution = train_step.execution
    train_step.release()
    result = Fit(
        model,
        guide,
        history,
        loop.best_epoch,
        seconds,
        execution,
        digests,
        seed,
        loop.stop_reason if is_finished else None,
        _schedules_ended(objective),
    )
    called.after_fit(result)
    if not is_finished:
        raise Interrupted(f"the fit was stopped after {len(history)} epochs", result)
    return result


def _schedules_ended(objective: pyro.infer.ELBO) -> bool:
    if not isinstance(objective, Objective):
        return True
    try:
        return objective.has_settled()
    except Exception:  # a schedule that has no end, or that fails at later steps
        return True


def _minibatches(
    data: Data,
    validation: Data | None,
    batch_size: int | None,
    *,
    device: torch.device,
    seed: int,
    transform: Callable[[Tensor], Tensor] | None,
    programs: tuple[Program, Program],
) -> tuple[Minibatches, Minibatches | None]:
    """Make the minibatches of the training data, shuffled, and of the validation data."""
    options = {"device": device, "programs": programs, "joins_last": True}
    batches = Minibatches(
        data,
        batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        transform=transform,
        **options,
    )
    if validation is None:
        return batches, None
    generator = torch.Generator()  # seeded before each validation
    return batches, Minibatches(
        validation, batches.batch_size, generator=generator, name="validation", **options
    )


def _move(
    model: Program,
    guide: Program,
    objective: pyro.infer.ELBO,
    device: torch.device,
    *,
    num_data: int | None,
) -> None:
    """Move pair and objective to the device. Check the number of data points."""
    for module in modules(model, guide):
        module.to(device)
    if isinstance(objective, Objective):
        objective.to(device)
        if num_data is not None:
            objective.check_num_data(num_data)


def _check_pair(
    model: Program,
    guide: Program,
    objective: pyro.infer.ELBO,
    batches: Minibatches,
    held_out: Minibatches | None,
    store: ParamStoreDict,
    *,
    skips: bool,
) -> dict[str, list[Tensor]]:
    """Check the pair on a minibatch of each size. Return the parameters of model and guide.

    Args:
        model: The program of p(x, z).
        guide: The program of q(z|x).
        objective: The objective of the fit.
        batches: The training data.
        held_out: The validation data, None without any.
        store: The parameter store of the pair.
        skips: Whether the fit may skip steps whose loss is NaN or infinite.
    """
    first, first_held_out = batches.first(), None
    with evaluation_mode(model, guide):  # so that running averages do not change
        trace = check_pair(model, guide, first, batches)
        if held_out is not None:
            first_held_out = held_out.first()
            with restored_generators():  # so that validation does not change the noise of training
                check_pair(model, guide, first_held_out, held_out)
        check_enumeration(objective, trace)
        _warn_of_supports(trace)
        loss_value(objective, model, guide, *first)  # to raise its errors now
        _check_scale_of_global_latents(trace, batches.num_data)
        bind(model, guide, store, trace)
        parameters = parameters_of(model, guide, trace)
        warn_of_untrained(model, guide, trace, itertools.chain(*parameters.values()))
    for each, rows, training in ((batches, first, True), (held_out, first_held_out, False)):
        if each is not None:
            with nullcontext() if training else restored_generators():
                try_sizes(
                    model, guide, objective, each, rows, training=training, nonfinite_too=not skips
                )
    return parameters


def _warn_of_supports(trace: PairTrace) -> None:
    for name, support in trace.outside_support().items():
        warn_user(
            f"the guide samples latent {name!r} from all real numbers, but its support under the "
            f"model is {support}. Samples outside have a density of zero. Then the ELBO is minus "
            "infinity, and reparameterized gradients of other bounds, such as the IWAE, are "
            "biased. Use a guide on that support, such as pv.guides.AmortizedNormal."
        )


def _check_scale_of_global_latents(trace: PairTrace, num_data: int | None) -> None:
    shared = [f.name for f in trace.guide.values() if not f.local and not f.observed]
    if shared and trace.scale == 1.0 and num_data is not None and num_data > trace.batch_size:
        raise ValueError(
            f"latent site {shared[0]!r} is shared by all {num_data} data points, but a minibatch "
            f"of {trace.batch_size} includes its whole KL. Scale the minibatch to all data with "
            f'`pyro.plate("data", {num_data}, subsample=x)`, or set batch_size={num_data}.'
        )
