"""Fit a pair of programs: stochastic variational inference with one optimizer over both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyro
import torch
from rich.progress import Progress
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from pyro_vae import programs
from pyro_vae.arguments import positive_integer, positive_number
from pyro_vae.capture import Capture, check_capture
from pyro_vae.contract import check_pair, observes_columns_alone
from pyro_vae.minibatches import Data, Minibatches
from pyro_vae.modules import modules
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.progress import task
from pyro_vae.seeding import seeded
from pyro_vae.traces import PairTrace, Program
from pyro_vae.training.trainer import BOTH, Trainer


@dataclass(frozen=True)
class Fit:
    """A fitted pair.

    Args:
        model: program of p(x, z), its parameters fitted.
        guide: program of q(z|x), its parameters fitted.
        history: a row for each epoch: ``loss`` and ``validation_loss`` (nats per datum, minus the
            bound; the latter NaN without validation data), ``learning_rate``, ``seconds``.
        best_epoch: the epoch, from 1, whose parameters the pair holds.
        seconds: the time it all took.
        execution: how the steps ran in the end: ``"captured"`` (as compiled code), ``"captured,
            not compiled"``, or ``"eager: "`` and why.
    """

    model: Program
    guide: Program
    history: pd.DataFrame
    best_epoch: int
    seconds: float
    execution: str


def fit(
    model: Program,
    guide: Program,
    data: Data,
    *,
    objective: pyro.infer.ELBO | None = None,
    validation: Data | None = None,
    epochs: int = 50,
    batch_size: int = 100,
    learning_rate: float | Mapping[str, float] = 1e-3,
    guide_steps: int | None = None,
    model_steps: int | None = None,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    patience: int | None = None,
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

    Args:
        model: program of p(x, z), called with a minibatch.
        guide: program of q(z|x), called likewise.
        data: training data: a tensor or numpy array x ``(N, *event)``, a tuple
            ``(x, *covariates)``, a torch Dataset or a DataLoader.
        objective: what to maximise; ``objectives.ELBO()`` if not given.
        validation: held-out data, on which the loss is taken after each epoch at the same noise.
        epochs: passes over the data.
        batch_size: rows of a minibatch; a DataLoader brings its own.
        learning_rate: of the default optimizer, Adam (fused); or ``{"model": ..., "guide": ...}``,
            the model's being that of what both use, or make later.
        guide_steps: alternate instead of moving all parameters in each step: so many steps of the
            guide alone (E-steps of variational EM; Neal & Hinton 1998), then ``model_steps`` of
            the model alone (M-steps). What both use moves in all of them, and so do parameters
            that the programs make later. 1 if only the other is given.
        model_steps: see ``guide_steps``.
        optimizer: makes another optimizer from the parameters.
        scheduler: makes a learning rate scheduler from the optimizer; it steps once an epoch.
        clip_norm: bound on the norm of the whole gradient.
        patience: stop after this many epochs without a lower validation loss, and restore the
            parameters and buffers of the best epoch.
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
            before the first step; no parameters to train.
        TypeError: the objective is no ``pyro.infer.ELBO``.
        FloatingPointError: an epoch's loss is not finite.

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
    objective = ELBO() if objective is None else objective
    if not isinstance(objective, pyro.infer.ELBO) or not hasattr(objective, "differentiable_loss"):
        raise TypeError(
            f"objective must be a pyro.infer.ELBO with a differentiable_loss, got {objective!r}"
        )
    _check_arguments(epochs, clip_norm, patience, validation)
    _check_learning_rate(learning_rate, optimizer)
    alternation = _alternation(guide_steps, model_steps)
    check_capture(capture)
    device = _device(device)
    started = time.perf_counter()
    with seeded(seed), programs.parameter_store(model, guide, fresh=True) as store:
        order = torch.Generator().manual_seed(torch.randint(2**62, ()).item())
        batches = Minibatches(
            data, batch_size, device=device, shuffle=True, generator=order, transform=transform
        )
        own_batches = isinstance(data, DataLoader)
        if not own_batches and batches.num_data is not None and batch_size > batches.num_data:
            raise ValueError(
                f"batch_size {batch_size} is larger than the data, {batches.num_data} rows"
            )
        held_out = None
        if validation is not None:
            held_out = Minibatches(validation, batch_size, device=device, name="validation")
        for module in modules(model, guide):
            module.to(device)
        if isinstance(objective, Objective):
            objective.to(device)
        first = batches.first()
        with programs.evaluation_mode(model, guide):  # a look must not move running averages
            trace = check_pair(model, guide, first, batches.checked)
            if held_out is not None:
                check_pair(model, guide, held_out.first(), held_out.checked)
            objective.loss(model, guide, *first)  # what it refuses, it refuses now
        _check_scale_of_global_latents(trace, batches.num_data)
        programs.bind(model, guide, store, trace)
        trainer = Trainer(
            model,
            guide,
            objective,
            batches,
            programs.parameters(model, guide, trace),
            learning_rate=learning_rate,
            optimizer=optimizer,
            scheduler=scheduler,
            clip_norm=clip_norm,
            alternation=alternation,
            capture=capture,
        )
        # Values that no look has seen yet are checked as they come, in the first pass over them.
        unseen = batches.checked is None or not observes_columns_alone(trace, first)
        with task(progress, description, epochs) as advance:
            rows = _train(trainer, held_out, epochs, patience, advance, unseen)
    history = pd.DataFrame(rows).set_index("epoch")
    best = history["validation_loss"].idxmin() if patience is not None else history.index[-1]
    seconds = time.perf_counter() - started
    return Fit(model, guide, history, int(best), seconds, trainer.execution)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device it lacks
        raise ValueError(f"device {device!r} cannot be used here: {error}") from error
    return torch.device(device)


def _check_learning_rate(learning_rate, optimizer) -> None:
    if not isinstance(learning_rate, Mapping):
        positive_number("learning_rate", learning_rate)
        return
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


def _alternation(guide_steps: int | None, model_steps: int | None) -> list[str]:
    """Return whose step each is, of one cycle."""
    if guide_steps is None and model_steps is None:
        return [BOTH]
    guide_steps = positive_integer("guide_steps", 1 if guide_steps is None else guide_steps)
    model_steps = positive_integer("model_steps", 1 if model_steps is None else model_steps)
    return ["guide"] * guide_steps + ["model"] * model_steps


def _check_arguments(epochs, clip_norm, patience, validation) -> None:
    positive_integer("epochs", epochs)
    if clip_norm is not None:
        positive_number("clip_norm", clip_norm)
    if patience is not None:
        positive_integer("patience", patience)
        if validation is None:
            raise ValueError("patience needs validation data: pass validation=")


def _check_scale_of_global_latents(trace: PairTrace, num_data: int | None) -> None:
    shared = [f.name for f in trace.guide.values() if not f.local and not f.observed]
    if shared and trace.scale == 1.0 and num_data is not None and num_data > trace.batch_size:
        raise ValueError(
            f"latent site {shared[0]!r} is shared by all {num_data} data, but a minibatch of "
            f"{trace.batch_size} would charge its whole KL. Let the minibatch stand for all data, "
            f'by `pyro.plate("data", {num_data}, subsample=x)`, or set batch_size={num_data}.'
        )


def _train(trainer, held_out, epochs, patience, advance, unseen) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    best_loss, best_state, epochs_without_gain = math.inf, None, 0
    validation_seed = torch.randint(2**62, ()).item()
    try:
        for epoch in range(1, epochs + 1):
            started = time.perf_counter()
            learning_rate = trainer.learning_rate
            validation_loss = math.nan
            validated = unseen and epoch == 1
            with pyro.validation_enabled(validated):
                loss = trainer.epoch(epochs - epoch + 1, validated=validated)
                _finite(loss, "loss", epoch)
                if held_out is not None:
                    with seeded(validation_seed):  # the same noise each time: comparable losses
                        validation_loss = trainer.evaluate(held_out)
                    _finite(validation_loss, "validation loss", epoch)
            trainer.end_epoch(loss if held_out is None else validation_loss)
            rows.append(
                {
                    "epoch": epoch,
                    "loss": loss,
                    "validation_loss": validation_loss,
                    "learning_rate": learning_rate,
                    "seconds": time.perf_counter() - started,
                }
            )
            shown = f"loss {loss:.2f}"
            advance(1, shown if held_out is None else f"{shown}, validation {validation_loss:.2f}")
            if patience is None:
                continue
            if validation_loss < best_loss:
                best_loss, best_state, epochs_without_gain = validation_loss, trainer.state(), 0
            else:
                epochs_without_gain += 1
            if epochs_without_gain == patience:
                break
    finally:
        if best_state is not None:
            trainer.restore(best_state)
    return rows


def _finite(loss: float, what: str, epoch: int) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the {what} is {loss} in epoch {epoch}. Lower the learning rate, set clip_norm, or "
            "look for a scale that falls to zero."
        )
    return loss
