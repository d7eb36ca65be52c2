"""Rules for the sites of a model and of its guide, checked at every run of a pair.

They look at names and shapes. Masks and rows are compared by value while torch validates
distributions, as in the first pass of a fit.
"""

from __future__ import annotations

import contextlib
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
    """Refuse a pair whose guide does not sample just the latents of its model.

    Args:
        model: the model's sites by name.
        guide: the guide's.

    Raises:
        ValueError: what a site of one lacks in the other, by name.
    """
    for name, site in guide.items():
        if site["is_observed"] and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"the guide observes site {name!r}: are model and guide swapped? A guide samples "
                "latents, given the data."
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
            f"the model observes nothing; its sites are {list(model)}. Give pyro.sample the data: "
            "obs=x."
        )
    others = {n: s for n, s in guide.items() if n not in latents and not s["is_observed"]}
    auxiliary = [name for name, site in others.items() if site["infer"].get("is_auxiliary")]
    if unknown := [name for name in others if name not in auxiliary]:
        raise ValueError(
            f"the guide samples site {unknown[0]!r}, which is no latent site of the model; those "
            f"are {latents}. Rename it."
        )
    if auxiliary:
        _check_auxiliary(auxiliary, [name for name in latents if name in guide], model, guide)


def check_rows(model: Trace, guide: Trace) -> None:
    """Refuse a guide whose plates hold other rows than those that the model states.

    Rows that are tensors of indices are compared while torch validates distributions.

    Args:
        model: trace of the model, replayed on the guide's.
        guide: trace of the guide.

    Raises:
        ValueError: The guide draws rows at random, or states other indices.
    """
    for name, node in guide.nodes.items():
        if node["type"] != "sample" or not site_is_subsample(node) or name not in model.nodes:
            continue
        own, rows = model.nodes[name]["value"], node["value"]
        if own is rows:  # the model states none, and has those of the guide
            continue
        way_out = (
            f"Open the same pyro.plate({name!r}, ..., subsample=rows) in both. For an AutoGuide of "
            "Pyro, return that plate from its create_plates argument."
        )
        if node["infer"].get(ROWS_WERE_DRAWN):
            raise ValueError(
                f"the model states which rows its plate {name!r} holds, but the guide draws rows "
                f"at random: parameters of the guide would belong to other rows. {way_out}"
            )
        indices = all(isinstance(r, Tensor) and not r.is_floating_point() for r in (own, rows))
        if indices and Distribution._validate_args and not torch.equal(own, rows.to(own)):
            raise ValueError(
                f"the plate {name!r} holds the rows {_first(own)} in the model and {_first(rows)} "
                f"in the guide: they must agree. {way_out}"
            )


def is_delta(site: Site) -> bool:
    """Tell whether a site gives its value no room."""
    return isinstance(base_distribution(site["fn"]), Delta)


def common_data_frame(sites: list[Site]) -> CondIndepStackFrame:
    """Return the frame of the plate ``"data"``, which all sites inside it must share.

    Raises:
        ValueError: no site stands in such a plate, or two stand in different ones.
    """
    frames = {site["name"]: data_frame(site) for site in sites if data_frame(site) is not None}
    if not frames:
        plates = {frame.name for site in sites for frame in site["cond_indep_stack"]}
        raise ValueError(
            'no site of the model stands in a vectorised plate named "data"; its sites are '
            f"{[site['name'] for site in sites]} and its plates "
            f"{sorted(plates - {PARTICLE_PLATE})}. Put everything that belongs to a datum inside "
            '`with pyro.plate("data", x.shape[0]):`.'
        )
    (first, frame), *others = frames.items()
    for name, other in others:
        if (other.size, other.full_size) != (frame.size, frame.full_size):
            raise ValueError(
                f'the plate "data" has size {frame.size} (of {frame.full_size}) at site {first!r} '
                f"and {other.size} (of {other.full_size}) at site {name!r}: they must agree."
            )
    return frame


def check_event_shape(site: Site) -> None:
    """Refuse a value that torch would broadcast to the event of its distribution.

    Raises:
        ValueError: the shapes differ.
    """
    event_shape, value = site["fn"].event_shape, site["value"]
    if value.shape[value.dim() - len(event_shape) :] != event_shape:
        raise ValueError(
            f"site {site['name']!r} has events of shape {tuple(event_shape)}, but its value is of "
            f"shape {tuple(value.shape)}, which does not end so."
        )


def _check_latent(name: str, site: Site, guide: Sites) -> None:
    if name not in guide or guide[name]["is_observed"]:
        raise ValueError(
            f"latent site {name!r} of the model is missing in the guide, which samples "
            f"{[n for n, s in guide.items() if not s['is_observed']]}. Add "
            f"pyro.sample({name!r}, ...) to the guide, or observe it in the model."
        )
    match = guide[name]
    inside = [data_frame(each) is not None for each in (site, match)]
    if inside[0] != inside[1]:
        where = [("outside", "inside")[flag] for flag in inside]
        raise ValueError(
            f'site {name!r} stands {where[0]} the plate "data" in the model and {where[1]} it in '
            "the guide: both must agree."
        )
    of_model, of_guide = mask_of(site), mask_of(match)
    if (of_model is None) != (of_guide is None):
        where = ("guide", "model") if of_model is None else ("model", "guide")
        raise ValueError(
            f"latent site {name!r} is masked in the {where[0]} and not in the {where[1]}: its "
            "log p and log q would be of different latents. Use the same poutine.mask in both."
        )
    if of_model is not None and _differ(of_model, of_guide):
        raise ValueError(
            f"latent site {name!r} has one mask in the model and another in the guide: its log p "
            "and log q would be of different latents. Use the same mask in both."
        )
    scales = [own_scale(each) for each in (site, match)]
    if not any(isinstance(scale, Tensor) for scale in scales) and scales[0] != scales[1]:
        raise ValueError(
            f"latent site {name!r} is scaled by {scales[0]:g} in the model and by {scales[1]:g} in "
            "the guide: scaled on one side alone, the pair gives no bound. Use the same "
            "poutine.scale and the same inner plates in both."
        )


def _check_auxiliary(names: list[str], latents: list[str], model: Sites, guide: Sites) -> None:
    """Refuse auxiliary sites that log q(z|x) would be an integral over.

    It is none where the latents are functions of them, as in Pyro's AutoGuides: the local latents,
    the global ones, or both are Deltas, of as many numbers.
    """
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
                "functions of it (Deltas, as in Pyro's AutoGuides): then log q(z|x) is an integral "
                "over that site, which is not known, and the pair reports no bound."
            )


def count_numbers(latents: Iterable[Site]) -> int:
    """Count the numbers that determine the values of latents, unconstrained."""
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


def _differ(mask: bool | Tensor, other: bool | Tensor) -> bool:
    """Tell whether two masks differ; their values are compared while torch validates."""
    if mask is other or not Distribution._validate_args:
        return False
    return not (torch.as_tensor(mask) == torch.as_tensor(other)).all()
