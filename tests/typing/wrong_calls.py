"""Wrong calls of public functions, which the type checker must report.

``mypy`` fails if it does not find the error of a line that ends with ``type: ignore``, because
``warn_unused_ignores`` is on. The functions are never called.
"""

import torch
from torch import Tensor

import pyro_vae as pv


def unknown_argument(model: pv.LatentVariableModel, guide: pv.guides.AmortizedNormal, x: Tensor):
    pv.fit(model, guide, x, epoch=5)  # type: ignore[call-arg]


def positional_option(model: pv.LatentVariableModel, guide: pv.guides.AmortizedNormal, x: Tensor):
    pv.fit(model, guide, x, pv.objectives.ELBO())  # type: ignore[call-arg]


def name_of_the_data(model: pv.LatentVariableModel, guide: pv.guides.AmortizedNormal, x: Tensor):
    pv.fit(model, guide, "data")  # type: ignore[arg-type]
    pv.fit(model, guide, x, validation=0.1)  # type: ignore[arg-type]
    pv.evidence(model, guide, [x, x])  # type: ignore[arg-type]
    pv.encode(model, guide, {"x": x})  # type: ignore[arg-type]
    pv.compare({"a": (model, guide)}, None)  # type: ignore[arg-type]
    pv.priors.AggregatedPosterior(guide, "data")  # type: ignore[arg-type]


def text_instead_of_a_number(
    model: pv.LatentVariableModel, guide: pv.guides.AmortizedNormal, x: Tensor
):
    pv.evidence(model, guide, x, num_particles="100")  # type: ignore[arg-type]


def unknown_column(model: pv.LatentVariableModel, guide: pv.guides.AmortizedNormal, x: Tensor):
    print(pv.evidence(model, guide, x).standard_errors)  # type: ignore[attr-defined]


def missing_argument():
    pv.LatentVariableModel(pv.priors.StandardNormal(2))  # type: ignore[call-arg]


def class_of_a_prior_instead_of_a_prior(net: torch.nn.Module):
    likelihood = pv.likelihoods.Bernoulli(net)
    pv.LatentVariableModel(prior="normal", likelihood=likelihood)  # type: ignore[arg-type]


def widths_as_one_number():
    pv.nets.MLP(64, 200)  # type: ignore[arg-type]


def unknown_word(model: pv.LatentVariableModel, guide: pv.guides.AmortizedNormal, x: Tensor):
    pv.fit(model, guide, x, on_nonfinite="ignore")  # type: ignore[arg-type]


def unknown_name():
    pv.objectives.VIMCO2()  # type: ignore[attr-defined]


def arguments_in_another_order(model: pv.LatentVariableModel, guide: pv.guides.AmortizedNormal):
    pv.save(model, guide, "folder")  # type: ignore[arg-type]
