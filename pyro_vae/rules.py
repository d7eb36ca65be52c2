"""What the sites of a model and of its guide must keep to, told by name where they do not.

These rules cost a look at names and shapes, no arithmetic, and hold at every run of a pair.
"""

from __future__ import annotations

from pyro.distributions import Delta
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_vae.enumeration import is_enumerated
from pyro_vae.sites import PARTICLE_PLATE, Site, base_distribution, data_frame, own_scale

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
    for name in auxiliary:
        beside = [n for n in latents if _is_local(guide[n]) is _is_local(guide[name])]
        if not beside or not all(is_delta(guide[n]) for n in beside):
            raise ValueError(
                f"the guide has the auxiliary site {name!r}, and not all latents beside it are "
                "functions of it (Deltas, as in Pyro's AutoGuides): then log q(z|x) is an integral "
                "over that site, which is not known, and what the pair reports is no bound."
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
    masked = [_is_masked(each) for each in (site, match)]
    if masked[0] != masked[1]:
        where = ("model", "guide") if masked[0] else ("guide", "model")
        raise ValueError(
            f"latent site {name!r} is masked in the {where[0]} and not in the {where[1]}: its "
            "log p and log q would be of different latents. Use the same poutine.mask in both."
        )
    scales = [own_scale(each) for each in (site, match)]
    if not any(isinstance(scale, Tensor) for scale in scales) and scales[0] != scales[1]:
        raise ValueError(
            f"latent site {name!r} is scaled by {scales[0]:g} in the model and by {scales[1]:g} in "
            "the guide: scaled on one side alone, the pair gives no bound. Use the same "
            "poutine.scale and the same inner plates in both."
        )


def _is_local(site: Site) -> bool:
    return data_frame(site) is not None


def _is_masked(site: Site) -> bool:
    base = base_distribution(site["fn"])
    masks = (site["mask"], getattr(base, "_mask", None))  # by poutine, or by Distribution.mask
    return any(mask is not None and mask is not True for mask in masks)
