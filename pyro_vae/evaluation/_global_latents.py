"""Latents that all data points share, in calls that run a model on several minibatches."""

from __future__ import annotations

from torch import Tensor

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.runs import AtValues, as_guide, plain_trace, trace_of
from pyro_vae._programs.sites import data_frame, random_sites
from pyro_vae._programs.trial_runs import trial_run
from pyro_vae._programs.validation import PROGRAM_ERRORS
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Batch


def at_global_latents(model: Program, guide: Program | None, batch: Batch) -> Program:
    """Return a model whose global latents have one sample in all of its runs.

    They are sampled from the guide, or from the model without a guide. If the model has no global
    latents, this call has no effect on later runs.

    Args:
        model: program of p(x, z).
        guide: program of q(z|x), or None.
        batch: a minibatch, whose values of x may be placeholders.

    Raises:
        ValueError: The guide cannot run on the minibatch.
    """
    with values_checked(False):
        with trial_run(model):
            names = _global_latents(model, batch).keys()
        if not names:
            return model
        values = _global_latents(model, batch)
        if guide is not None:
            try:
                sites = plain_trace(as_guide(guide), *batch).nodes
            except PROGRAM_ERRORS as error:
                raise ValueError(
                    f"the guide, which samples the global latents {sorted(names)}, cannot run on x "
                    f"of shape {tuple(batch[0].shape)}: {type(error).__name__}: "
                    f"{first_line(error)}. Pass data as x, or leave out guide to sample these "
                    "latents from their prior"
                ) from error
            values |= {name: sites[name]["value"] for name in names if name in sites}
    return AtValues(values)(model)


def _global_latents(model: Program, batch: Batch) -> dict[str, Tensor]:
    return {
        site["name"]: site["value"]
        for site in random_sites(trace_of(model, *batch))
        if data_frame(site) is None and not site["is_observed"]
    }
