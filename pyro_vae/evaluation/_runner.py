"""The runner of an estimate: seed, evaluation mode, processes, progress, interrupt and resume."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of
from pyro_vae._utils.distributed import interleave
from pyro_vae._utils.interrupts import Interrupted
from pyro_vae._utils.precision import Precision, current_precision, matmul_precision
from pyro_vae._utils.progress import task
from pyro_vae._utils.random import seeded
from pyro_vae.datasets._minibatches import Batch, Data, Minibatches
from pyro_vae.evaluation._context import evaluation_context
from pyro_vae.evaluation._group import Group, LazyBatch, Shard, lazy_batches

Part = tuple[Any, ...]  # results of a minibatch; the first is a tensor of a row per data point


@dataclass(frozen=True)
class PartialState:
    """The finished work of an interrupted call, from which another call resumes.

    Args:
        who: the name of the function.
        num_done: how many data points are done.
        seed: of the samples. If the caller passed None, it is the randomly chosen seed.
        settings: arguments that must be the same in the call that resumes, by name.
        parts: the results of each part of the data that is done.
        digest: a hash of the first rows of the data, or None for a stream.
    """

    who: str
    num_done: int
    seed: int
    settings: Mapping[str, Any]
    parts: list[Part]
    digest: str | None = None

    def check_seed(self, who: str, seed: int | None, settings: Mapping[str, Any]) -> int:
        """Check that a call may resume from this state, and return the seed.

        Raises:
            ValueError: The state comes from another function, other settings, or another seed.
        """
        if self.who != who:
            raise ValueError(
                f"resume comes from {self.who}, but this call is {who}. Call {self.who} to resume"
            )
        for name, value in settings.items():
            if self.settings.get(name) != value:  # None if an older version lacked the argument
                raise ValueError(
                    f"resume comes from a call with {name}={self.settings.get(name)!r}, got "
                    f"{name}={value!r}. Pass the arguments of that call"
                )
        if seed not in (None, self.seed):
            raise ValueError(
                f"resume has samples of seed {self.seed}, got seed={seed}. Leave seed out"
            )
        return self.seed

    def check_data(self, digest: str | None) -> None:
        """Check that a call has the data of this state, unless one of them is a stream.

        Raises:
            ValueError: The first rows, the shape or the dtype of the data differ.
        """
        if None not in (digest, self.digest) and digest != self.digest:
            raise ValueError(
                f"resume comes from a call of {self.who} with other data. Pass the same data"
            )


@dataclass(frozen=True)
class Runner:
    """Evaluates a pair, minibatch by minibatch, in all processes of a group.

    Args:
        who: the name of the estimator.
        group: the processes.
        model: program of p(x, z).
        guide: program that the latents are sampled from.
        batches: the data.
        particle_options: ``plate_nesting`` and ``vectorize_particles``; see :func:`pyro_vae.terms`.
        seed: of all samples.
        settings: arguments that must be the same in a call that resumes, by name.
        done: the parts that the interrupted call has finished, if this call resumes it.
        show: shows progress.
    """

    who: str
    group: Group
    model: Program
    guide: Program
    batches: Minibatches
    particle_options: dict[str, Any]
    seed: int
    settings: Mapping[str, Any]
    done: list[Part]
    show: Callable[..., None]

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        who: str,
        model: Program,
        guide: Program,
        data: Data,
        *,
        batch_size: int,
        vectorize_particles: bool | None,
        seed: int | None,
        resume: Interrupted | PartialState | None,
        settings: Mapping[str, Any],
        progress: bool | Progress,
        description: str,
        precision: Precision | None = None,
        done: Sequence[Part] = (),
        data_name: str = "data",
        steps_per_row: int = 1,
        drawn_from: Program | None = None,
        **checks: bool,
    ) -> Iterator[Runner]:
        """Prepare the pair and the processes, and yield a runner.

        Args:
            who: the name of the estimator, for messages.
            model: program of p(x, z).
            guide: program of q(z|x).
            data: the data as passed to the estimator.
            batch_size: data points at a time.
            vectorize_particles: run many particles at once.
            seed: of the samples. None chooses a random seed for all processes.
            resume: the exception of an interrupted call, its state, or None.
            settings: arguments that must be the same in a call that resumes, by name.
            progress: show a progress bar, or add one to a rich Progress.
            description: text before the bar.
            precision: of float32 matrix products; None keeps the current one.
            done: parts that are done, if there is nothing to resume.
            data_name: the name of the argument with the data.
            steps_per_row: steps of the bar for each data point.
            drawn_from: replaces the guide if no samples come from it.
            checks: ``needs_latents``, ``weighs`` and ``weighs_particles`` of
                :func:`evaluation_context`.

        Raises:
            TypeError: ``resume`` has no state to resume from.
            ValueError: The call cannot resume from the state, or the pair breaks a rule.
        """
        state = _state_of(resume)
        with matmul_precision(precision), Group() as group:
            settings = {**settings, "precision": current_precision()}
            if state is not None:
                seed, done = state.check_seed(who, seed, settings), state.parts
            seed = group.common_seed(seed)
            device = device_of(model, guide)
            batches = Minibatches(
                data, batch_size, device=device, name=data_name, programs=(model, guide)
            )
            if state is not None:
                state.check_data(batches.digest())
            with (
                evaluation_context(
                    who,
                    model,
                    guide,
                    batches,
                    vectorize_particles=vectorize_particles,
                    seed=seed,
                    drawn_from=drawn_from,
                    **checks,
                ) as particle_options,
                task(
                    progress,
                    description,
                    batches.num_data and batches.num_data * steps_per_row,
                    transient=True,
                ) as show,
            ):
                yield cls(
                    who=who,
                    group=group,
                    model=model,
                    guide=guide if drawn_from is None else drawn_from,
                    batches=batches,
                    particle_options=particle_options,
                    seed=seed,
                    settings=settings,
                    done=list(done),
                    show=show,
                )

    @property
    def programs(self) -> dict[str, Program]:
        """The programs by name, for the messages of a capture."""
        return {"model": self.model, "guide": self.guide}

    @property
    def interrupted(self) -> bool:
        """Whether this process or another one was interrupted."""
        return self.group.interrupted

    def advance(self, count: int = 1, status: str = "") -> None:
        """Show progress, then raise a deferred interrupt."""
        self.show(count, status)
        self.group.check()

    def map_batches(
        self,
        function: Callable[[Batch], Part],
        batches: Iterable[LazyBatch] | None = None,
        *,
        done: Sequence[Part] = (),
        max_rows: int = sys.maxsize,
        steps_per_row: int = 1,
        last: bool = True,
    ) -> list[Part]:
        """Call a function on each minibatch, and return the results of all processes in order.

        If :attr:`interrupted` is true afterwards, only the first minibatches have results.

        Args:
            function: returns the results of a minibatch. The first is a tensor with a row for each
                data point.
            batches: minibatches, in the same order in all processes. The default is all
                minibatches of the data.
            done: results of the first minibatches, if these are done already.
            max_rows: the largest number of rows of a part. Larger minibatches are split.
            steps_per_row: steps of the progress bar for each data point.
            last: whether this is the last exchange between the processes.

        Raises:
            KeyboardInterrupt: The call was interrupted before any minibatch was done.
            ValueError: ``done`` does not fit the data, or the data differ between the processes.
        """
        shard = Shard(
            self.group,
            lazy_batches(self.batches) if batches is None else batches,
            max_rows=max_rows,
            num_done=sum(len(part[0]) for part in done),
            advance=lambda count: self.advance(steps_per_row * count),
        )
        own: list[Part] = []
        try:
            for batch, seed in shard:
                with seeded(seed):
                    part = function(batch)
                own.append(tuple(each.cpu() if isinstance(each, Tensor) else each for each in part))
        except KeyboardInterrupt:
            self.group.stop()
        counts = (shard.num_data, shard.num_parts)
        shares, all_counts = zip(*self.group.gather_last((own, counts), last=last), strict=True)
        if not self.interrupted and len(set(all_counts)) > 1:
            met = ", ".join(f"{data} data points in {parts} parts" for data, parts in all_counts)
            raise ValueError(
                f"all processes of a group must get the same data, got {met}. Pass all data in "
                "each process, because it evaluates only its own share"
            )
        parts = [*done, *interleave(shares)]
        if self.interrupted and not parts:
            raise KeyboardInterrupt
        return parts

    def raise_if_interrupted(self, result: object, num_done: int, parts: list[Part]) -> None:
        """Raise the exception from which another call resumes, if the work was interrupted.

        Args:
            result: the result of the estimator for the data points that are done.
            num_done: how many data points are done.
            parts: the results of the parts that are done.

        Raises:
            Interrupted: The work was interrupted.
        """
        if self.interrupted:
            message = (
                f"{self.who} was stopped after {num_done} data points. Their results are in the "
                "attribute `partial` of this exception. Pass the exception as resume= to resume"
            )
            state = PartialState(
                self.who, num_done, self.seed, self.settings, parts, self.batches.digest()
            )
            raise Interrupted(message, result, state)


def _state_of(resume: object) -> PartialState | None:
    """Return the state to resume from, or None if there is nothing to resume.

    Raises:
        TypeError: The argument is not an :class:`Interrupted` of an estimator, nor its state.
    """
    state = resume.state if isinstance(resume, Interrupted) else resume
    if resume is None or isinstance(state, PartialState):
        return state
    if isinstance(resume, Interrupted):
        raise TypeError("resume must come from an estimator. Resume a fit from its checkpoint")
    raise TypeError(
        "resume must be the pyro_vae.evaluation.Interrupted that the interrupted call raised, got "
        f"{type(resume).__name__}"
    )
