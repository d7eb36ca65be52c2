"""Latent sites of a model as plain structures, and back: what a guide's first call finds out."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch.distributions.transforms import Transform

from pyro_vae._programs.latent_sites import LatentSite
from pyro_vae._utils import transform_config as mappings

_TYPES = {
    "name": str,
    "plates": tuple,
    "batch_shape": tuple,
    "event_shape": tuple,
    "bijection": list,
    "masked": bool,
    "nesting": int,
}


def to_config(site: LatentSite) -> dict[str, Any]:
    """Return the structure of a site.

    Raises:
        TypeError: its support has no name.
    """
    return {
        "name": site.name,
        "plates": tuple(tuple(frame) for frame in site.plates),
        "batch_shape": tuple(site.batch_shape),
        "event_shape": tuple(site.event_shape),
        "bijection": mappings.to_config(site.bijection),
        "masked": site.masked,
        "nesting": site.nesting,
    }


def from_config(structure: Any) -> LatentSite:
    """Return the site of a structure.

    Raises:
        ValueError: it is no such structure.
    """
    if not isinstance(structure, dict) or structure.keys() != _TYPES.keys():
        raise ValueError(f"a latent site has {[*_TYPES]}")
    bijection = mappings.from_config(structure["bijection"])
    wrong = [name for name, kind in _TYPES.items() if not isinstance(structure[name], kind)]
    if wrong or not isinstance(bijection, Transform):
        raise ValueError(f"this is no latent site: {structure}")
    try:
        plates = tuple(CondIndepStackFrame(*frame) for frame in structure["plates"])
        shapes = {name: torch.Size(structure[name]) for name in ("batch_shape", "event_shape")}
    except TypeError as error:
        raise ValueError(f"a latent site has plates and shapes that are none: {error}") from error
    return LatentSite(**{**structure, **shapes, "plates": plates, "bijection": bijection})
