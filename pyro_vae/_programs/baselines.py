"""Baselines of score functions, which a guide site requests by ``infer={"baseline": {...}}``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import detach, scale_and_mask
from torch import Tensor

from pyro_vae._programs.pair_trace import PairTrace
from pyro_vae._programs.sites import Site, data_frame

_OPTIONS = (
    "nn_baseline",
    "nn_baseline_input",
    "baseline_value",
    "use_decaying_avg_baseline",
    "baseline_beta",
)


@dataclass(frozen=True)
class Baseline:
    """The baseline options of one guide site.

    Args:
        network: is trained to predict the signal that weights the score; None without a network.
        network_input: the argument of the network.
        value: a trained prediction without a network; None without one.
        decay: the weight of past signals in a moving average; None without an average.
    """

    network: Callable[[Any], Tensor] | None
    network_input: Any
    value: Tensor | None
    decay: float | None

    def predicted(self) -> Tensor | None:
        """Return the prediction of the network, or the value; None if there is neither."""
        return self.value if self.network is None else self.network(detach(self.network_input))


def baseline_of(site: Site) -> Baseline | None:
    """Return the baseline that a site requests, or None.

    Raises:
        ValueError: An option is unknown or missing, or two options contradict each other.
        TypeError: An option has the wrong type.
    """
    options = (site["infer"] or {}).get("baseline")
    if options is None:
        return None
    where = f"guide site {site['name']!r} has infer={{'baseline': ...}}"
    if not isinstance(options, dict):
        raise TypeError(f"{where}, which must be a dictionary of options; got {options!r}")
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise ValueError(
            f"{where} with the unknown option {unknown[0]!r}. The options are {list(_OPTIONS)}"
        )
    network, value = options.get("nn_baseline"), options.get("baseline_value")
    if network is not None and value is not None:
        raise ValueError(f"{where} with both nn_baseline and baseline_value. Remove one of them")
    if (network is None) != (options.get("nn_baseline_input") is None):
        raise ValueError(
            f"{where} with one of nn_baseline and nn_baseline_input. A network needs both: the "
            "module and its input"
        )
    if network is not None and not callable(network):
        raise TypeError(f"{where} with an nn_baseline that cannot be called: {network!r}")
    if "baseline_beta" in options and "use_decaying_avg_baseline" not in options:
        raise ValueError(
            f"{where} with baseline_beta, the decay of an average, but no average. Add "
            "use_decaying_avg_baseline=True"
        )
    decay = None
    if options.get("use_decaying_avg_baseline"):
        decay = options.get("baseline_beta", 0.9)
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ValueError(f"{where}, where baseline_beta must be in [0, 1), got {decay!r}")
    if network is None and value is None and decay is None:
        return None
    return Baseline(network, options.get("nn_baseline_input"), value, decay)


def baselines_of(run: PairTrace) -> dict[str, Baseline]:
    """Return the baselines that the guide's sites request, by site.

    Raises:
        ValueError: See :func:`baseline_of`.
        TypeError: See :func:`baseline_of`.
    """
    found = {name: baseline_of(factor.site) for name, factor in run.guide.items()}
    return {name: baseline for name, baseline in found.items() if baseline is not None}


def less_baseline(
    run: PairTrace, name: str, baseline: Baseline, signal: Tensor, average: Tensor | None
) -> Tensor:
    r"""Return zeros (K, B) whose gradient subtracts a baseline from a score and trains it.

    .. math::
        -b_k \nabla \log q(z_k|x) - \nabla (s_k - b_k)^2

    summed over the elements of inner plates, for the signal s and the baseline b. The first
    gradient holds b fixed, the second holds s fixed.

    Args:
        run: a run of the pair.
        name: the name of the guide's site.
        baseline: the baseline of the site.
        signal: s, shape (K, B).
        average: moving average of the signal in earlier steps, if the baseline has one.

    Raises:
        ValueError: The prediction does not have the site's batch shape.
        TypeError: The prediction is not a tensor.
    """
    site = run.guide[name].site
    shape = site["fn"].batch_shape
    signal = run.placed(signal.detach(), site)
    value = torch.zeros((), dtype=signal.dtype, device=signal.device)
    if average is not None:
        value = value + average.to(signal.dtype)
    if (predicted := baseline.predicted()) is not None:
        value = value + _checked(predicted, site)
    value = value.expand(shape)
    log_prob = run.masked_log_prob(site)
    result = -value.detach() * (log_prob - log_prob.detach())
    if value.requires_grad:
        error = scale_and_mask((signal - value).square(), mask=site["mask"])
        result = result - (error - error.detach())
    return run.reduced(result, site)


def _checked(value: Any, site: Site) -> Tensor:
    """Return a prediction if it has one number per element of a site, or one number in all."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the baseline of guide site {site['name']!r} must be a tensor, got "
            f"{type(value).__name__}"
        )
    shape, frame = tuple(site["fn"].batch_shape), data_frame(site)
    if value.numel() == 1:
        return value.reshape(())
    fits = value.dim() <= len(shape) and all(
        mine in (its, 1) for mine, its in zip(value.shape[::-1], shape[::-1], strict=False)
    )
    if not fits or value.dim() < -frame.dim or value.shape[frame.dim] != frame.size:
        raise ValueError(
            f"the baseline of guide site {site['name']!r} must have the site's batch shape, "
            f"{shape}; dimensions other than the data's may be missing or have size 1. Got "
            f"{tuple(value.shape)}. Remove its last dimension if the network returns (B, 1)."
        )
    return value
