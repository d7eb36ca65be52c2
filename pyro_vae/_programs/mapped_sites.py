"""The parameters of the distributions at the sites of a program, changed in unconstrained space."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae._programs.sites import Site
from pyro_vae._utils.messages import first_line
from pyro_vae.distributions._parameter_maps import Parameter, map_parameters

_CLOSE = 1e-3  # an absolute (nats) and relative tolerance for a distribution that is made again


class MapSites(Messenger):
    """Map the parameters of the distributions at some sites.

    Args:
        names: the sites.
        function: returns the new unconstrained value of a parameter of a site.
    """

    def __init__(self, names: set[str], function: Callable[[str, Parameter], Tensor]):
        super().__init__()
        self._names, self._function = names, function

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._names:
            msg["fn"] = map_parameters(msg["fn"], functools.partial(self._function, msg["name"]))


def parameters_of_site(site: Site) -> list[Parameter]:
    """Return the parameters of the distribution at a site, in unconstrained space."""
    found: list[Parameter] = []

    def collect(parameter: Parameter) -> Tensor:
        found.append(parameter)
        return parameter.value

    map_parameters(site["fn"], collect)
    return found


def require_known_parameters(site: Site) -> None:
    """Raise ValueError if a distribution cannot be made from its parameters.

    The message is the reason alone.
    """
    try:
        again = map_parameters(site["fn"], lambda parameter: parameter.value)
    except NotImplementedError as error:
        raise ValueError(first_line(error)) from error
    scores = (fn.log_prob(site["value"]) for fn in (site["fn"], again))
    if not torch.allclose(*scores, rtol=_CLOSE, atol=_CLOSE, equal_nan=True):
        raise ValueError("its constructor makes another distribution")
