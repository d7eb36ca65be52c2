"""The methods of a comparison: a baseline, and pairs that differ from it in one part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro_vae as pv

BASELINE = "baseline"
COMPONENTS = 10  # of the learned prior
FLOW_LENGTH = 4


@dataclass(frozen=True)
class Arm:
    """One method of a comparison.

    Args:
        name: its name.
        make_pair: function that returns a new model and guide, as for :func:`pyro_vae.fit_seeds`.
        options: arguments of :func:`pyro_vae.fit` for this method alone, such as the objective.
    """

    name: str
    make_pair: Callable[[], tuple[Any, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


def arms(data_size: int, latents: int, hidden: int, particles: int) -> list[Arm]:
    """Return the baseline, one change at a time of it, and a control that must tie.

    All pairs have the same decoder and encoder, so fits with one seed start from the same weights.

    Args:
        data_size: number of pixels, zeros and ones.
        latents: dimension of z.
        hidden: width of the two hidden layers of each network.
        particles: number of particles of IWAE.
    """
    sizes = {"data_size": data_size, "latents": latents, "hidden": hidden}
    plain = functools.partial(_make_pair, **sizes)
    flow = functools.partial(_make_pair, **sizes, has_flow=True)
    mixture = functools.partial(_make_pair, **sizes, components=COMPONENTS)
    return [
        Arm(BASELINE, plain),
        Arm(f"objective: IWAE-{particles}", plain, {"objective": pv.objectives.IWAE(particles)}),
        Arm("guide: flow", flow),
        Arm("prior: mixture", mixture),
        Arm("control: MeanFieldELBO", plain, {"objective": pv.objectives.MeanFieldELBO()}),
    ]


def _make_pair(
    data_size: int,
    latents: int,
    hidden: int,
    has_flow: bool = False,
    components: int | None = None,
) -> tuple[Any, Any]:
    decoder = pv.nets.MLP(latents, [hidden, hidden], data_size)
    encoder = pv.nets.MLP(data_size, [hidden, hidden])
    # Created last, so that all pairs start from the same networks. A VampPrior would need a KL
    # warm-up, which is a second change: with the plain ELBO, its posteriors collapse on the digits.
    if components is None:
        prior = pv.priors.StandardNormal(latents)
    else:
        prior = pv.priors.MixtureOfNormals(latents, components)
    model = pv.LatentVariableModel(prior=prior, likelihood=pv.likelihoods.Bernoulli(decoder))
    if has_flow:
        return model, pv.guides.AmortizedFlow(
            model, encoder, flow=pv.flows.Householder, length=FLOW_LENGTH
        )
    return model, pv.guides.AmortizedNormal(model, encoder=encoder)
