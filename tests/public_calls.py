"""Every public function and class of the library, with valid arguments.

The names of the arguments come from the signatures. The tables here add values for one small call
of each, and the numbers of its result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv

X = (torch.arange(20).reshape(5, 4) % 3 == 0).float()
WITHOUT_A_CALL = {
    **dict.fromkeys(("Terms", "surjections.Image", "surjections.Preimage"), "users do not make it"),
    **dict.fromkeys(("datasets.names", "training.group_of_torchrun"), "it has no argument"),
    "datasets.from_anndata": "an object of another library; tests/datasets/test_anndata.py",
    "datasets.from_idx": "it reads files; tests/datasets/test_idx_folder.py",
    "datasets.from_torchvision": "an object of another library; tests/datasets/test_torchvision.py",
    **dict.fromkeys(("flows.Flow", "flows.FlowTransform", "guides.Family"), "abstract"),
    "training.Callback": "it has no argument",
    "distributions.WrappedNormal": "a torch distribution, which torch validates",
    "flows.collapse_expanded_dims": "authors of flows call it, at each step",
    "objectives.gradient": "authors of objectives call it, at each step",
    **dict.fromkeys(("likelihoods.Scale", "likelihoods.Likelihood"), "abstract"),
    **dict.fromkeys(("objectives.Objective", "objectives.Schedule"), "abstract"),
    **dict.fromkeys(("priors.GuideMixturePrior", "surjections.Surjection"), "abstract"),
    **dict.fromkeys(("surjections.GenerativeSurjection", "surjections.SurVAELayer"), "abstract"),
    "surjections.InferenceSurjection": "abstract",
    "surjections.Split": "users do not make it",
    "likelihoods.ScaleFromDecoder": "it has no argument",
    "surjections.check_batch": "it checks the result of a layer",
    "surjections.check_support": "it checks the distribution of a layer",
}
MLP = functools.partial(pv.nets.MLP, 4, [3])


def make_pair(likelihood: Callable = pv.likelihoods.Bernoulli) -> tuple[Any, Any]:
    torch.default_generator.manual_seed(0)
    decoder = pv.nets.MLP(2, [3], 4)
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood(decoder))
    return model, pv.guides.AmortizedNormal(model, MLP())


@functools.cache
def _folders() -> dict[str, Path]:
    place, pair = Path(tempfile.mkdtemp()), make_pair()
    pv.fit(*pair, X, epochs=1, checkpoint=place / "checkpoint", progress=False, seed=0)
    pv.save(place / "pair", *pair)
    return {"load": place / "pair", "load_checkpoint": place / "checkpoint"}


@functools.cache
def _result(name: str) -> Any:
    """Return the result of a function with the arguments of its row, which plots draw."""
    return call(name)


def _numbers_of(figure: Any) -> list[Any]:
    """Return images, bars and the points of lines and scatters that a figure shows."""
    found: list[Any] = []
    for axes in figure.axes:
        found += [each.get_array() for each in axes.images]
        found += [each.get_xydata() for each in axes.lines]
        found += [each.get_width() for each in axes.patches]
        found += [each.get_offsets() for each in axes.collections]
    return [torch.as_tensor(np.nan_to_num(np.ma.filled(f, 0.0).astype(float))) for f in found]


def _normal(value: Tensor) -> Any:
    return dist.Normal(value, 1.0).to_event(1)


# Values by argument name, for each call whose row in ROWS has no other value.
COMMON: dict[str, Any] = {
    **dict.fromkeys(("context", "levels", "length", "subset", "num_particles", "rank", "size"), 2),
    **dict.fromkeys(("num_draws", "num_drawn", "num_samples", "num_bounds", "repeats", "step"), 2),
    **dict.fromkeys(("blocks", "training_particles", "epochs", "event_dim"), 1),
    **dict.fromkeys(("components", "bins", "recurrent", "steps", "period", "num_points"), 3),
    **dict.fromkeys(("dim", "in_features"), 4),
    **{"out_features": 2, "batch_size": 3, "pairs_per_pass": 5, "num_data": 10, "seed": 0},
    **{"beta": 0.5, "alpha": 0.5, "df": 3.0, "dispersion": 1.0, "clip_norm": 1.0},
    **{"capacity": 1.0, "classification": 1.0, "value": 1.0},
    **{"hidden": [4], "channels": (2,), "event_shape": (4,), "shape": (4,), "betas": [1.0]},
    **{"image_shape": (1, 4, 4), "progress": False, "capture": False, "device": "cpu"},
    **dict.fromkeys(("data", "x", "args", "like", "exemplars", "pseudo_inputs"), X),
    **{"decoder": nn.Identity(), "activation": nn.Tanh, "transition": _normal},
    **{"family": pv.guides.families.Normal, "flow": pv.flows.Planar, "log_weights": X},
}
# The same, created for each call.
MADE: dict[str, Callable[[], Any]] = {
    "encoder": MLP,
    "program": lambda: make_pair()[0],
    "network": lambda: MLP(2),
    "prior": lambda: pv.priors.StandardNormal(2),
    "likelihood": lambda: pv.likelihoods.Bernoulli(pv.nets.MLP(2, [3], 4)),
    "layers": lambda: [pv.likelihoods.Normal(pv.nets.MLP(2, [3], 2))],
    "noise": lambda: pv.priors.StandardNormal(2),
    "ais": lambda: pv.evaluation.AIS(**ROWS["evaluation.AIS"]()),
    "ascent": lambda: pv.evaluation.Ascent(**ROWS["evaluation.Ascent"]()),
    "objectives": lambda: [pv.objectives.ELBO()],
    "pairs": lambda: {"a": make_pair()},
    "folder": lambda: Path(tempfile.mkdtemp()) / "pair",
}
# Values for one callable, by its name.
ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    "distributions.MixtureOfDiagNormals": lambda: {
        "logits": torch.zeros(3),
        **dict.fromkeys(("loc", "scale"), torch.ones(3, 4)),
    },
    "distributions.NanMasked": lambda: {"distribution": dist.Normal(X, 1.0), "event_dims": 1},
    **{
        name: lambda: {"name": "digits", "folder": None}
        for name in ("datasets.load", "datasets.load_labels")
    },
    "evaluation.AIS": lambda: {
        **dict.fromkeys(("num_chains", "pilot"), 2),
        **{"num_temperatures": 3, "leapfrog_steps": 1},
    },
    "evaluation.Ascent": lambda: {"window": 2, "max_steps": 4, "patience": 1, "num_particles": 2},
    "fit_seeds": lambda: {
        **{"make_pair": make_pair, "seeds": 2, "num_workers": 1},
        "fit_options": {"epochs": 1, "batch_size": 3},
    },
    "decode": lambda: {"z": X[:, :2], "x": X},
    "interpolate": lambda: {"start": X, "end": 1 - X, "num": 3},
    **{
        f"serialization.{name}": lambda: {"file": Path(tempfile.mkdtemp()) / "program.pt2"}
        for name in ("export_encoder", "export_decoder")
    },
    "prior_holes": lambda: {"num_samples": 20, "quantile": 0.2},
    "impute": lambda: {"num_samples": 30, "observed": X < 2, "covariates": ()},
    "evaluation.refit_prior": lambda: {"kind": "aggregated", "components": None},
    "load_checkpoint": lambda: {"folder": _folders()["load_checkpoint"]},
    "load": lambda: {"folder": _folders()["load"], "model": None, "guide": None},
    "compare": lambda: {"image_shape": (2, 2)},
    "diagnose": lambda: {
        **{"train": X, "test": X, "num_particles": 30, "refit": False, "annealing": None},
        "ascent": pv.evaluation.Ascent(**ROWS["evaluation.Ascent"]()),
    },
    "rate_distortion": lambda: {"fit_options": {"epochs": 1, "batch_size": 3}},
    "guides.SemiAmortized": lambda: {"steps": 2},
    "guides.SemiSupervisedGuide": lambda: {
        "model": pv.models.SemiSupervisedModel(**arguments("models.SemiSupervisedModel")),
        "classifier": MLP(2),
        "encoder": pv.nets.Joined(pv.nets.MLP(6, [3])),
    },
    "guides.SequenceGuide": lambda: {"encoder": None},
    "likelihoods.DiscretizedLogisticMixture": lambda: {"components": 2},
    "models.MixtureModel": lambda: {"prior": pv.priors.MixtureOfNormals(2, 3)},
    "models.SemiSupervisedModel": lambda: {
        "classes": 2,
        "likelihood": pv.likelihoods.Bernoulli(pv.nets.Joined(MLP(4))),
    },
    "nets.ResidualBlock": lambda: {"channels": 5},
    "objectives.CUBO": lambda: {"n": 2.0},
    **{
        f"plots.{name}": lambda: {"image_shape": (2, 2), "num": 3}
        for name in ("reconstructions", "samples", "traversals", "manifold")
    },
    "plots.codes": lambda: {"encoding": X, "labels": X[:, 0]},
    "plots.interpolations": lambda: {"start": X, "end": 1 - X, "num": 3, "image_shape": (2, 2)},
    "plots.learning_curves": lambda: {"fits": _result("fit")},
    "plots.diagnosis": lambda: {"result": _result("diagnose")},
    "plots.differences": lambda: {"comparison": _result("compare")},
    "plots.surgery": lambda: {"results": _result("elbo_surgery")},
    "plots.gradient_noise": lambda: {"results": _result("gradient_noise")},
    "plots.rate_distortion": lambda: {"curve": _result("rate_distortion")},
    "priors.ExemplarPrior": lambda: {"dim": 2},
    "priors.FlowPrior": lambda: {"transform": pv.flows.Composition(4, length=1)},
    "priors.VampPrior": lambda: {"event_shape": (2,)},
    "surjections.Augment": lambda: {"size": 4, "conditional": False},
    "surjections.Slice": lambda: {"conditional": False},
    "surjections.Bijection": lambda: {"transform": torch.distributions.ExpTransform()},
    "surjections.FlowGuide": lambda: {
        "model": pv.surjections.FlowModel(**arguments("surjections.FlowModel"))
    },
    "surjections.FlowModel": lambda: {
        "prior": pv.priors.StandardNormal(4),
        "layers": [pv.surjections.Bijection(pv.flows.Composition(4, length=1))],
    },
    "surjections.Maximum": lambda: {
        "noise": lambda: dist.HalfNormal(torch.ones(3)).to_event(1),
        "conditional": False,
    },
    "surjections.Stochastic": lambda: {"encoder": _normal, "decoder": _normal},
    "surjections.VariationalDequantization": lambda: {
        "noise": lambda x: dist.Uniform(torch.zeros_like(x), 1.0).to_event(1)
    },
    "terms": lambda: {"plate_nesting": 1},
}


def _public_callables() -> dict[str, Callable]:
    """Return the public functions and classes, each once, by its shortest path.

    Exceptions and the records that functions return are left out. Users do not create them.
    """
    found: dict[int, tuple[str, Callable]] = {}

    def look(module: Any, path: str) -> None:
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", 0) == module.__name__]
        for name in getattr(module, "__all__", [n for n in own if not n.startswith("_")]):
            value = getattr(module, name)
            if inspect.ismodule(value):
                look(value, f"{path}{name}.")
            elif inspect.isroutine(value) or inspect.isclass(value):
                known = found.get(id(value), (path + name, value))
                found[id(value)] = min(known, (path + name, value), key=lambda it: len(it[0]))

    look(pv, "")
    return {
        name: value
        for name, value in found.values()
        if not (inspect.isclass(value) and issubclass(value, BaseException))
        and (name in ROWS or not dataclasses.is_dataclass(value))
    }


PUBLIC = _public_callables()


def arguments(name: str) -> dict[str, Any]:
    """Return arguments for a small valid call; optional arguments may be missing."""
    names = inspect.signature(PUBLIC[name]).parameters
    pair = make_pair() if {"model", "guide"} & names.keys() else (None, None)
    known = COMMON | {"model": pair[0], "guide": pair[1]} | ROWS.get(name, dict)()
    known |= {key: MADE[key]() for key in MADE if key in names and key not in known}
    return {key: known[key] for key in names if key in known}


def call(name: str, **changed: Any) -> Any:
    """Call a public function or class with valid arguments, except for those in ``changed``."""
    torch.default_generator.manual_seed(0)
    signature = inspect.signature(PUBLIC[name])
    values = arguments(name) | changed
    bound = inspect.BoundArguments(
        signature, {k: values[k] for k in signature.parameters if k in values}
    )
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL and parameter.name in values:
            several = values[parameter.name]
            bound.arguments[parameter.name] = (
                several if isinstance(several, tuple | list) else (several,)
            )
    torch.default_generator.manual_seed(0)
    made = PUBLIC[name](*bound.args, **bound.kwargs)
    if isinstance(made, contextlib.AbstractContextManager):
        with made:
            return None
    return made


def _loss(objective: Any) -> Any:
    if isinstance(objective, pv.objectives.SemiSupervisedELBO):
        return []  # has a guide and labels of its own
    return torch.tensor(objective.loss(*make_pair(), X))


def _log_prob(likelihood: Any) -> Tensor:
    count = {"Categorical": 8, "DiscretizedLogistic": 8, "DiscretizedLogisticMixture": 24}
    return likelihood(torch.zeros(5, count.get(type(likelihood).__name__, 4))).log_prob(X)


def _transformed(flow: Any) -> Tensor:
    transform = flow() if isinstance(flow, pv.flows.Composition) else None
    return (transform or flow(torch.ones(flow.num_parameters)))(torch.ones(5, flow.dim))


# Functions that return the numbers of a result, by its class.
NUMBERS: dict[type, Callable[[Any], Any]] = {
    pv.flows.Flow: _transformed,
    pv.flows.Composition: _transformed,
    pv.likelihoods.Likelihood: _log_prob,
    pv.objectives.Objective: _loss,
    pv.objectives.Schedule: lambda schedule: schedule(torch.ones(())),
    pv.training.Fit: lambda fit: [
        fit.history.loss.tolist(),
        *map(Tensor.detach, fit.model.parameters()),
    ],
    pv.evaluation.Encoding: lambda codes: [codes.mean, codes.std],
    pv.evaluation.Evidence: lambda evidence: evidence.values,
    pv.evaluation.Sandwich: lambda bounds: [bounds.lower, bounds.upper],
    pv.evaluation.Imputation: lambda filled: [filled.mean, filled.draws],
    pv.evaluation.Surgery: lambda surgery: [surgery.elbo, surgery.marginal_kl],
    pv.evaluation.PriorHoles: lambda holes: holes.share,
    pv.evaluation.CollapseReport: lambda report: report.rate,
    pv.evaluation.InferenceGaps: lambda gaps: [gaps.best_elbo.values, gaps.amortized_elbo.values],
    pv.evaluation.GradientNoise: lambda noise: noise.table.signal_to_noise.tolist(),
    pv.report.RateDistortion: lambda curve: curve.table["elbo"].tolist(),
    pv.report.Diagnosis: lambda diagnosis: [diagnosis["log p(x), test"].value],
    pv.report.Comparison: lambda comparison: comparison.entries[0].runs[0].evidence.values,
    Figure: _numbers_of,
    Tensor: torch.nan_to_num,
}


def numbers(made: Any) -> Any:
    """Return the numbers of a result; an empty list if its class is not in NUMBERS."""
    torch.default_generator.manual_seed(0)
    if type(made).__name__ == "InferenceData":
        return torch.tensor(made["sample_stats"]["log_weight"].values)
    return next((of(made) for kind, of in NUMBERS.items() if isinstance(made, kind)), [])
