"""Modules that are made later than they may be loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_vae._programs.latent_sites import LatentSite
from pyro_vae._utils.random import separate_draws


class LazyModules(nn.ModuleDict):
    """Modules that a guide makes at its first call, when it has seen the model and an x.

    Values that are loaded before wait until then.

    Attributes:
        sites: of the model, which the modules are for.
        width: of the features that they take. With the sites, it is all that they are made of.
    """

    def __init__(self):
        super().__init__()
        self.sites: tuple[LatentSite, ...] = ()
        self.width = 0
        self._waiting: dict[str, Tensor] = {}

    @property
    def has_pending_state(self) -> bool:
        """Whether values that were loaded wait."""
        return bool(self._waiting)

    def fill(
        self,
        make: Callable[[], Mapping[str, nn.Module]],
        sites: Sequence[LatentSite],
        width: int,
        like: Tensor,
    ) -> None:
        """Make the modules and load the values that wait.

        Modules that exist stay: a model whose prior runs the guide has had it make them while it
        was traced. Their initial values leave the generators as they were. They can be trained
        even if they are made under ``torch.inference_mode``.

        Args:
            make: makes the modules by name.
            sites: of the model, which they are for.
            width: of the features that they take.
            like: a tensor of their device and type.

        Raises:
            ValueError: The values that wait belong to other modules.
        """
        if len(self):
            return
        names = (site.name for site in sites)
        with separate_draws(*names), torch.inference_mode(False), torch.enable_grad():
            self.update(make())
            self.to(like)
        self.sites, self.width = tuple(sites), width
        if self._waiting:
            waiting, self._waiting = self._waiting, {}
            try:
                self.load_state_dict(waiting)
            except RuntimeError as error:
                self.clear()
                self._waiting = waiting
                raise ValueError(
                    f"what was loaded belongs to a guide for another model or encoder: {error}"
                ) from error

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if len(self):
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            self._waiting = {
                key.removeprefix(prefix): value.clone()
                for key, value in state_dict.items()
                if key.startswith(prefix)
            }

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self._waiting.items()})
