"""Compare fitted pairs on the same held-out data, with paired differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import Progress
from torch import Tensor

from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of, parameter_store, parameters_of
from pyro_vae._programs.validation import check_pair
from pyro_vae._utils.checks import check_call, positive_integer
from pyro_vae._utils.progress import task
from pyro_vae._utils.user_warnings import warns_once
from pyro_vae.datasets._minibatches import Data, Minibatches
from pyro_vae.evaluation import (
    CollapseReport,
    Surgery,
    collapse_report,
    evidence,
    generate,
    reconstruct,
)
from pyro_vae.evaluation._evidence import Method
from pyro_vae.evaluation._surgery.surgery import surgery_or_reason
from pyro_vae.report._comparison import Comparison, Entry, Run
from pyro_vae.report._distinct import Candidate, require_distinct
from pyro_vae.training import Fit

Pair = Fit | tuple[Program, Program]

PICTURES = 10


@warns_once
def compare(
    pairs: Mapping[str, Pair | Sequence[Pair]],
    data: Data,
    *,
    train: Data | None = None,
    method: Method = "importance",
    num_particles: int = 1000,
    vectorize_particles: bool | None = None,
    image_shape: tuple[int, int] | None = None,
    plate: str | None = None,
    seed: int | None = 0,
    progress: bool | Progress = False,
) -> Comparison:
    r"""Compare methods on the same held-out data: single pairs, or fits with several seeds.

    Methods are compared by log p(x) of each data point. For each data point, k-hat shows how
    reliable the estimate is. ELBOs should not be compared, because the gap between ELBO and log
    p(x) differs from pair to pair. The terms of ELBO surgery show in which part of the ELBO the
    methods differ.

    Two fits of one method with different seeds differ too. So a comparison of methods needs several
    fits of each: ``{"elbo": [fit, ...], "iwae": [fit, ...]}``. The errors then include the spread
    of the seeds (:meth:`Comparison.difference`), and :attr:`Comparison.best` lists the methods that
    cannot be told from the best. A method with one run is allowed, with a note. Fits of two methods
    with the same seeds are paired by seed.

    A fit trains its pair in place. So the second fit of a pair changes the result of the first fit,
    also if two pairs share only a network. An error is raised for such pairs. Two pairs may share a
    part that is frozen or that only one fit has trained.

    Args:
        pairs: dictionary from names of methods to pairs, each ``(model, guide)`` or a
            :class:`pyro_vae.training.Fit`, or to lists of them. For a Fit, the report also shows
            its history.
        data: held-out data, as in :func:`pyro_vae.fit`.
        train: data for the surgery, usually the training set. The default is the held-out data.
        method: the estimator of log p(x); see :func:`pyro_vae.evidence`.
        num_particles: importance samples per data point.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        image_shape: (height, width) of a row of data, for pictures in the report.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: seed of all samples. Run s of a method uses the seed plus s.
        progress: show progress bars, or add them to a rich Progress.

    Returns:
        The :class:`Comparison`, with the best method first.

    Raises:
        ValueError: There are no pairs. Data or an argument are invalid, or a pair breaks a rule
            (docs/contract.md). Pairs share trained parameters. A later fit changed the pair of a
            Fit. A method has the same pair twice, or two pairs with equal parameters. Two names are
            equal as text. All of these are raised before the first estimate.
        TypeError: ``pairs`` is not a dictionary.

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def good_model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z + 5.0, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0.0, 1.5))
        >>> x = 5 + 2**0.5 * torch.randn(100)
        >>> comparison = pv.compare({"at 0": (model, guide), "at 5": (good_model, guide)}, x)
        >>> comparison.best
        ['at 5']
    """
    check_call(compare, locals())
    if not isinstance(pairs, Mapping):
        raise TypeError(
            "pairs must be a dictionary of pairs or Fits by name, such as {'a': (model, guide)}, "
            f"got {type(pairs).__name__}"
        )
    if not pairs:
        raise ValueError("pairs must have at least one pair, got an empty dictionary")
    num_particles = positive_integer("num_particles", num_particles)
    if image_shape is not None:
        image_shape = _checked_shape(image_shape)
    names = [str(name) for name in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the names in pairs must differ as text, got {list(pairs)}")
    methods = {str(name): _runs(str(name), each) for name, each in pairs.items()}
    held_out = Minibatches(data, 100).in_memory()
    surgery_data = held_out if train is None else Minibatches(train, 100, name="train").in_memory()
    for runs in methods.values():
        for model, guide, _ in runs:
            name_data_plate(plate, model, guide)
    if image_shape is not None and math.prod(image_shape) != held_out[0][0].numel():
        raise ValueError(
            f"image_shape {image_shape} does not fit data of shape {tuple(held_out[0].shape)}. "
            "Pass a height and a width whose product is the number of values of a data point"
        )
    candidates = []
    num_parameters: dict[str, int] = {}
    for name, runs in methods.items():
        for number, (model, guide, fit) in enumerate(runs, start=1):
            for each in (surgery_data, held_out):
                parameters = _check(model, guide, each)
            num_parameters.setdefault(name, sum(p.numel() for p in parameters))
            label = name if len(runs) == 1 else f"{name}, run {number}"
            candidates.append(Candidate(label, model, guide, fit, parameters))
        _require_different_pairs(name, candidates[-len(runs) :])
    require_distinct(candidates)
    entries = []
    with task(progress, "evaluate", len(candidates)) as advance:
        for name, runs in methods.items():
            found = []
            for number, (model, guide, fit) in enumerate(runs):
                label = name if len(runs) == 1 else f"{name}, run {number + 1}"
                options = {
                    "vectorize_particles": vectorize_particles,
                    "seed": None if seed is None else seed + number,
                    "progress": progress,
                }
                estimate = evidence(
                    model,
                    guide,
                    held_out,
                    method=method,
                    num_particles=num_particles,
                    description=f"{label}: evidence",
                    **options,
                )
                surgery, note, collapse = _surgery_and_collapse(
                    model, guide, surgery_data, description=label, **options
                )
                found.append(Run(estimate, surgery, note, collapse, fit))
                advance(1)
            pictures = _pictures(*runs[0][:2], held_out, seed)
            entries.append(Entry(name, tuple(found), num_parameters[name], pictures))
    # Methods with NaN are the last, because no order of the others is valid with NaN.
    entries.sort(key=lambda entry: (math.isnan(entry.mean.mean), -entry.mean.mean))
    return Comparison(tuple(entries), len(surgery_data[0]), image_shape)


def _runs(name: str, pairs: Pair | Sequence[Pair]) -> list[tuple[Program, Program, Fit | None]]:
    """Return model, guide and fit of each run of a method, in the order of the seeds."""
    several = isinstance(pairs, Sequence) and all(isinstance(p, Fit | tuple) for p in pairs)
    if several and not pairs:
        raise ValueError(f"method {name!r} must have at least one run, got an empty list")
    each = list(pairs) if several else [pairs]
    runs = [
        (pair.model, pair.guide, pair) if isinstance(pair, Fit) else (*_unpack(name, pair), None)
        for pair in each
    ]
    seeds = [None if fit is None else fit.seed for _, _, fit in runs]
    if None not in seeds:
        runs = [runs[i] for i in sorted(range(len(runs)), key=seeds.__getitem__)]
    return runs


def _unpack(name: str, pair: Any) -> tuple[Program, Program]:
    try:
        model, guide = pair
    except (TypeError, ValueError):
        raise ValueError(
            f"pair {name!r} must be (model, guide), a Fit, or a list of them, got "
            f"{type(pair).__name__}"
        ) from None
    return model, guide


def _require_different_pairs(name: str, candidates: Sequence[Candidate]) -> None:
    """Raise ValueError if two runs of a method are the same pair, or have equal parameters."""
    for one, other in itertools.combinations(candidates, 2):
        if one.is_pair_of(other):
            raise ValueError(
                f"the runs {one.name!r} and {other.name!r} are the same pair. Make a new model and "
                "guide for each seed of a method."
            )
        if one.parameters and one.has_values_of(other):
            raise ValueError(
                f"the runs {one.name!r} and {other.name!r} have equal parameters, so they are one "
                "result and not two. Fit each run of a method with its own seed."
            )


def _surgery_and_collapse(
    model: Program, guide: Program, data: tuple[Tensor, ...], *, description: str, **options: Any
) -> tuple[Surgery | None, str, CollapseReport | None]:
    """Return the surgery, or None and the reason, and the activity of the latents, or None."""
    try:
        report = collapse_report(
            model, guide, data, description=f"{description}: collapse", **options
        )
    except ValueError:  # a latent without a mean, or no latents
        surgery, note = surgery_or_reason(
            model, guide, data, description=f"{description}: surgery", **options
        )
        return surgery, note, None
    return report.surgery, report.note, report


def _checked_shape(image_shape: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(image_shape, tuple | list) or len(image_shape) != 2:
        raise TypeError(f"image_shape must be (height, width), got {image_shape!r}")
    return tuple(positive_integer("each size in image_shape", size) for size in image_shape)


def _pictures(
    model: Program, guide: Program, columns: tuple[Tensor, ...], seed: int | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    x, *covariates = Minibatches(columns, PICTURES, programs=(model, guide)).first()
    try:
        reconstructions = reconstruct(model, guide, x, *covariates, seed=seed)
        return x, reconstructions, generate(model, x, *covariates, guide=guide, seed=seed)
    except ValueError:  # the model does not observe x, or needs another number of rows
        return None


def _check(model: Program, guide: Program, columns: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the trainable parameters; raise ValueError if the pair breaks the contract."""
    data = Minibatches(columns, 100, device=device_of(model, guide), programs=(model, guide))
    with parameter_store(model, guide), evaluation_mode(model, guide):
        trace = check_pair(model, guide, data.first(), data, weighs=True)
        both = parameters_of(model, guide, trace).values()
        return list(dict.fromkeys(itertools.chain(*both)))
