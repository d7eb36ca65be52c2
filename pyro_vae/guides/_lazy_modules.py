"""Modules that are created at the first call, even after a state dict was loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_vae._programs.latent_sites import LatentSite
from pyro_vae._utils.random import separate_draws


class LazyModules(nn.ModuleDict):
    """Modules that a guide creates at its first call, from the model and a minibatch.

    A state dict that is loaded before the first call is kept and applied then.

    Attributes:
        sites: the latent sites that the modules are for.
        width: number of input features. The sites and the width determine the modules.
    """

    def __init__(self):
        super().__init__()
        self.sites: tuple[LatentSite, ...] = ()
        self.width = 0
        self._waiting: dict[str, Tensor] = {}

    @property
    def has_pending_state(self) -> bool:
        """Whether a loaded state dict has not been applied yet."""
        return bool(self._waiting)

    def fill(
        self,
        make: Callable[[], Mapping[str, nn.Module]],
        sites: Sequence[LatentSite],
        width: int,
        like: Tensor,
    ) -> None:
        """Create the modules and apply a loaded state dict.

        Do nothing if the modules exist. This happens if the model's prior runs the guide, because
        tracing the model then creates them. The initial values do not change the state of the
        random generators. The modules can be trained even if this runs under
        ``torch.inference_mode``.

        Args:
            make: function that returns the modules by name.
            sites: the latent sites that the modules are for.
            width: number of input features.
            like: a tensor with the device and dtype for the modules.

        Raises:
            ValueError: The loaded state dict does not fit the modules.
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
                    "the loaded state dict belongs to a guide for another model or encoder: "
                    f"{' '.join(str(error).split())}"
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
