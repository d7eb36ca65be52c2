"""Check, at every run of a pair, that the sites of the model and of the guide agree.

The checks compare names and shapes. They compare the values of masks and of row indices only
while torch validates distributions, as in the first pass of a fit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyro_vae._programs.enumeration import is_enumerated
from pyro_vae._programs.sites import (
    PARTICLE_PLATE,
    ROWS_WERE_DRAWN,
    Site,
    base_distribution,
    data_frame,
    mask_of,
    own_scale,
)

Sites = dict[str, Site]


def check_agreement(model: Sites, guide: Sites) -> None:
    """Raise ValueError unless the guide samples exactly the latent variables of the model.

    Args:
        model: the model's sites by name.
        guide: the guide's sites by name.

    Raises:
        ValueError: A latent of the model is missing in the guide, or the guide has another site.
    """
    for name, site in guide.items():
        if site["is_observed"] and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"the guide observes site {name!r}, but a guide samples latents given the data. "
                "Are model and guide swapped?"
            )
    latents = [
        name
        for name, site in model.items()
        if not site["is_observed"] and not (name not in guide and is_enumerated(site))
    ]
    for name in latents:
        _check_latent(name, model[name], guide)
    if not any(site["is_observed"] for site in model.values()):
        raise ValueError(
            f"the model observes nothing; its sites are {list(model)}. Pass the data to "
            "pyro.sample: obs=x."
        )
    others = {n: s for n, s in guide.items() if n not in latents and not s["is_observed"]}
    auxiliary = [name for name, site in others.items() if site["infer"].get("is_auxiliary")]
    if unknown := [name for name in others if name not in auxiliary]:
        raise ValueError(
            f"the guide samples site {unknown[0]!r}, which is not a latent site of the model. The "
            f"latent sites of the model are {latents}: rename the guide's site."
        )
    if auxiliary:
        _check_auxiliary(auxiliary, [name for name in latents if name in guide], model, guide)


def check_rows(model: Trace, guide: Trace) -> None:
    """Raise ValueError if a plate of the guide holds other rows than that of the model.

    Index tensors are compared only while torch validates distributions.

    Args:
        model: trace of the model, replayed on the trace of the guide.
        guide: trace of the guide.

    Raises:
        ValueError: The guide draws its rows at random, or uses other row indices.
    """
    for name, node in guide.nodes.items():
        if node["type"] != "sample" or not site_is_subsample(node) or name not in model.nodes:
            continue
        own, rows = model.nodes[name]["value"], node["value"]
        if own is rows:  # the model gives no rows and uses those of the guide
            continue
        way_out = (
            f"Open the same pyro.plate({name!r}, ..., subsample=rows) in both. For an AutoGuide of "
            "Pyro, return that plate from its create_plates argument."
        )
        if node["infer"].get(ROWS_WERE_DRAWN):
            raise ValueError(
                f"the model gives the rows of its plate {name!r}, but the guide draws rows at "
                f"random, so its parameters would belong to other rows. {way_out}"
            )
        indices = all(isinstance(r, Tensor) and not r.is_floating_point() for r in (own, rows))
        if indices and Distribution._validate_args and not torch.equal(own, rows.to(own)):
            raise ValueError(
                f"the plate {name!r} holds the rows {_first(own)} in the model and {_first(rows)} "
                f"in the guide. Both must agree. {way_out}"
            )


def is_delta(site: Site) -> bool:
    """Return whether the distribution of a site is a Delta."""
    return isinstance(base_distribution(site["fn"]), Delta)


def has_listed_values(site: Site) -> bool:
    """Return whether the distribution of a site is discrete, with values that can be listed."""
    return getattr(site["fn"], "has_enumerate_support", False) and not is_delta(site)


def common_data_frame(sites: list[Site]) -> CondIndepStackFrame:
    """Return the frame of the plate ``"data"``, the same for all sites inside that plate.

    Raises:
        ValueError: No site is inside this plate, or its size differs between two sites.
    """
    frames = {site["name"]: data_frame(site) for site in sites if data_frame(site) is not None}
    if not frames:
        plates = {f.name: f.size for site in sites for f in site["cond_indep_stack"]}
        plates.pop(PARTICLE_PLATE, None)
        raise ValueError(
            "no site is inside a vectorized plate of the data points, whose size is the number of "
            f"rows of x. The sites are {[site['name'] for site in sites]}, and the plates are, by "
            f"size, {plates}. Put every site that has one value per data point inside "
            '`with pyro.plate("data", x.shape[0]):`.'
        )
    (first, frame), *others = frames.items()
    for name, other in others:
        if (other.size, other.full_size) != (frame.size, frame.full_size):
            raise ValueError(
                f'the plate "data" has size {frame.size} (of {frame.full_size}) at site {first!r} '
                f"and {other.size} (of {other.full_size}) at site {name!r}. Both must agree."
            )
    return frame


def check_event_shape(site: Site) -> None:
    """Raise ValueError if a value does not have the event shape of its distribution.

    Raises:
        ValueError: The shapes differ, even if torch could broadcast the value.
    """
    event_shape, value = site["fn"].event_shape, site["value"]
    if value.shape[value.dim() - len(event_shape) :] != event_shape:
        raise ValueError(
            f"site {site['name']!r} has events of shape {tuple(event_shape)}, but its value has "
            f"shape {tuple(value.shape)}. The shape of a value must end in the event shape."
        )


def _check_latent(name: str, site: Site, guide: Sites) -> None:
    if name not in guide or guide[name]["is_observed"]:
        raise ValueError(
            f"latent site {name!r} of the model is missing in the guide. The guide samples "
            f"{[n for n, s in guide.items() if not s['is_observed']]}. Add "
            f"pyro.sample({name!r}, ...) to the guide, or observe the site in the model."
        )
    match = guide[name]
    inside = [data_frame(each) is not None for each in (site, match)]
    if inside[0] != inside[1]:
        where = [("outside", "inside")[flag] for flag in inside]
        sizes = [
            [f.size for f in each["cond_indep_stack"] if f.vectorized] for each in (site, match)
        ]
        raise ValueError(
            f'site {name!r} is {where[0]} the plate "data" in the model and {where[1]} it in '
            "the guide. Both must agree. The plate of the data points has one row for each row of "
            "x, the first dimension of the first argument. The plates at this site have the sizes "
            f"{sizes[0]} in the model and {sizes[1]} in the guide."
        )
    kinds = [_kind_of_values(each) for each in (site, match)]
    if None not in kinds and kinds[0] != kinds[1] and not (is_delta(site) or is_delta(match)):
        raise ValueError(
            f"latent site {name!r} is {kinds[0]} in the model and {kinds[1]} in the guide. A "
            "probability and a density cannot be compared, so the pair has no bound. Use "
            "distributions of one kind in both. For gradients through discrete samples, relax both "
            "programs, or use OneHotCategoricalStraightThrough in the guide."
        )
    of_model, of_guide = mask_of(site), mask_of(match)
    if (of_model is None) != (of_guide is None):
        where = ("guide", "model") if of_model is None else ("model", "guide")
        raise ValueError(
            f"latent site {name!r} is masked in the {where[0]} and not in the {where[1]}. Its "
            "log p and log q would count different elements: use the same poutine.mask in both."
        )
    if of_model is not None and _differ(of_model, of_guide):
        raise ValueError(
            f"latent site {name!r} has one mask in the model and another in the guide. Its log p "
            "and log q would count different elements: use the same mask in both."
        )
    scales = [own_scale(each) for each in (site, match)]
    if _scales_differ(*scales):
        shown = [f"{s:g}" if not isinstance(s, Tensor) or s.dim() == 0 else "a tensor"
                 for s in scales]  # fmt: skip
        raise ValueError(
            f"latent site {name!r} is scaled by {shown[0]} in the model and by {shown[1]} in "
            "the guide. With different scales the pair has no bound. Use the same poutine.scale "
            "and the same inner plates in both."
        )


def _kind_of_values(site: Site) -> str | None:
    """Return whether a site is discrete or continuous, or None if it does not declare it."""
    try:
        return "discrete" if site["fn"].support.is_discrete else "continuous"
    except (AttributeError, NotImplementedError):
        return None


def _check_auxiliary(names: list[str], latents: list[str], model: Sites, guide: Sites) -> None:
    """Raise ValueError if log q(z|x) would be an integral over auxiliary sites.

    No integral is needed if the latents are functions of the auxiliary sites, as in Pyro's
    AutoGuides. Then the local latents, the global latents, or both are Deltas with at least as
    many numbers as the auxiliary sites. Discrete latents beside them have a density of their own.
    """
    latents = [name for name in latents if not has_listed_values(guide[name])]
    for local in (True, False):
        some = [n for n in names if _is_local(guide[n]) is local]
        if not some:
            continue
        count = sum(guide[n]["value"].numel() for n in some)
        beside = [n for n in latents if _is_local(guide[n]) is local]
        others = [n for n in latents if n not in beside]
        groups = [beside, others, latents]
        groups = [group for group in groups if group and all(is_delta(guide[n]) for n in group)]
        if not any(count <= count_numbers(model[n] for n in group) for group in groups):
            raise ValueError(
                f"the guide has the auxiliary site {some[0]!r}, and not all latents beside it are "
                "functions of it (Deltas, as in Pyro's AutoGuides). Then log q(z|x) is an unknown "
                "integral over that site, and the pair has no bound."
            )


def count_numbers(latents: Iterable[Site]) -> int:
    """Count the unconstrained numbers that determine the values of latents."""
    count = 0
    for site in latents:
        shape = site["value"].shape
        with contextlib.suppress(NotImplementedError):
            shape = biject_to(site["fn"].support).inverse_shape(shape)
        count += torch.Size(shape).numel()
    return count


def _first(rows: Tensor) -> list[Any]:
    return [*rows.flatten()[:4].tolist(), *(["..."] if rows.numel() > 4 else [])]


def _is_local(site: Site) -> bool:
    return data_frame(site) is not None


def _scales_differ(scale: float | Tensor, other: float | Tensor) -> bool:
    """Return whether two scales differ, up to rounding of N/B; see :func:`_differ`."""
    if not isinstance(scale, Tensor) and not isinstance(other, Tensor):
        return not math.isclose(scale, other, rel_tol=1e-6)
    if scale is other or not Distribution._validate_args:
        return False
    scale, other = (torch.as_tensor(each).double() for each in (scale, other))
    return not torch.isclose(scale, other, rtol=1e-6, atol=0.0).all()


def _differ(mask: bool | Tensor, other: bool | Tensor) -> bool:
    """Return whether two masks differ; compare values only while torch validates."""
    if mask is other or not Distribution._validate_args:
        return False
    return not (torch.as_tensor(mask) == torch.as_tensor(other)).all()
