"""Ancestral samples: latents from the prior of a model, and data given these latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_vae._programs.runs import as_guide, trace_of
from pyro_vae._programs.sites import (
    Site,
    Unobserve,
    base_distribution,
    data_frame,
    is_factor,
    is_loss_of_guide,
    own_scale,
    random_sites,
    sum_to_data_points,
    to_particle_layout,
    was_observed,
)


class JointSample:
    """Samples of latents, or of latents and data together, from the model.

    There is one sample for each data point of a minibatch.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x).
        args: positional arguments of both programs.
        kwargs: keyword arguments of both programs.
    """

    def __init__(self, model: Callable, guide: Callable, args: tuple, kwargs: dict):
        self._model, self._guide = model, guide
        self._args, self._kwargs = args, kwargs

    @cached_property
    def latents(self) -> dict[str, Tensor]:
        """The latents of the plate ``"data"``, each ``(B, *inner plates, *event)``."""
        return {
            name: to_particle_layout(site["value"], site, None)[0]
            for name, site in self._run(self._model).items()
            if not site["is_observed"] and data_frame(site) is not None
        }

    @cached_property
    def _sites(self) -> dict[str, Site]:
        """Latents, and data given these latents."""
        return self._run(Unobserve()(self._model))

    def _run(self, model: Callable) -> dict[str, Site]:
        trace = trace_of(model, *self._args, **self._kwargs)
        return {site["name"]: site for site in random_sites(trace)}

    def log_guide(self) -> Tensor:
        r"""Return :math:`\log q(z|x)` of the sampled latents and data, shape (B,).

        The gradient does not reach the model.

        Raises:
            ValueError: The model observes a value that is not an argument, or has a factor. The
                guide cannot score latents that it did not sample.
        """
        for name, site in self._sites.items():
            if was_observed(site) and is_factor(site):
                raise ValueError(
                    f"the model has the factor {name!r}, which is not a density, so data cannot be "
                    "sampled from the model. Remove the factor, or use sleep=0"
                )
        latents = {
            name: site["value"].detach()
            for name, site in self._sites.items()
            if not was_observed(site)
        }
        guide = poutine.condition(as_guide(self._guide), data=latents)
        trace = trace_of(guide, *self._args_with_samples(), **self._kwargs)
        total = 0.0
        for site in random_sites(trace):
            if is_loss_of_guide(site) and site["name"] not in latents:
                continue
            if not site["is_observed"] or isinstance(base_distribution(site["fn"]), Delta):
                raise ValueError(
                    f"the guide must score latents sampled by the model, but its site "
                    f"{site['name']!r} is a Delta or samples its own value, as in Pyro's AutoGuides"
                )
            if (frame := data_frame(site)) is not None:
                log_prob = scale_and_mask(
                    site["fn"].log_prob(site["value"]), own_scale(site), site["mask"]
                )
                total = total + sum_to_data_points(log_prob, site, frame.size, None, 1)[0]
        return total

    def _args_with_samples(self) -> list[Any]:
        """Return the arguments, with each observed one replaced by its sample from the model."""
        args, taken = list(self._args), set()
        observed = {
            name: site
            for name, site in self._sites.items()
            if was_observed(site) and not is_factor(site)
        }
        for name, site in observed.items():
            for number, arg in enumerate(self._args):
                if _is_same(site["infer"]["obs"], arg):
                    args[number] = site["value"].detach().reshape(arg.shape)
                    taken.add(name)
        if missing := [name for name in observed if name not in taken]:
            raise ValueError(
                f"the guide needs the model's sample of site {missing[0]!r} as an argument, but "
                "the site's obs= is not an argument of the programs. Pass the observed values as "
                "an argument, and observe that argument unchanged"
            )
        return args


def _is_same(observation: Any, arg: Any) -> bool:
    """Return whether an observation is an argument, or a view of all of it in the same order."""
    if not isinstance(observation, Tensor) or not isinstance(arg, Tensor):
        return False
    in_order = observation.is_contiguous() and arg.is_contiguous()
    whole = observation.numel() == arg.numel() and observation.dtype == arg.dtype and in_order
    return observation is arg or (whole and observation.data_ptr() == arg.data_ptr())
