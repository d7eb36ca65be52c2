"""A guide without an encoder, with free parameters for each data point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae._programs.latent_sites import LatentSite, latent_sites, surroundings
from pyro_vae._utils.checks import checked, require_batch
from pyro_vae._utils.constructor_calls import constructor_call
from pyro_vae._utils.init_args import Unknown
from pyro_vae._utils.modules import modules
from pyro_vae.guides import _families as families
from pyro_vae.guides._families import Family
from pyro_vae.guides._model_ref import ModelRef
from pyro_vae.guides._posterior import Posterior


class LocalGuide(PyroModule):
    r"""Classical variational inference: separate parameters per data point (Blei et al. 2017).

    .. math:: q(z_n|x_n) = T_\# \, q_{\lambda_n}

    This guide is the best fit of a family. Compare it with an encoder's :math:`\lambda(x)` to
    measure the amortization gap. The rows of a minibatch (x and covariates) may come in any order:
    the guide looks up the parameters by the values of a row. Equal rows share their parameters.

    Args:
        model: program of p(x, z). It does not become a submodule.
        x: all data, ``(N, *event)``.
        *covariates: further arguments of the model, for all data.
        family: function from D to a family of D dimensions; see :mod:`pyro_vae.guides`.
        joint: whether several latents are joint; see :class:`pyro_vae.guides.AmortizedGuide`.

    Raises:
        ValueError: The model has no latent site in the plate ``"data"``, or its prior is a mixture
            of a guide's posteriors that has no guide. The family does not support the dimensions
            of the latents. With validation enabled, a call raises it for a row that is
            not in the data. (Without validation, the parameters of such a row are NaN.)

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([-1.0, 0.5, 2.0])
        >>> guide = pv.guides.LocalGuide(model, x)
        >>> options = {"epochs": 400, "batch_size": 3, "learning_rate": 0.03, "seed": 0}
        >>> elbo = pv.objectives.ELBO(100)
        >>> fit = pv.fit(model, guide, x, objective=elbo, **options, progress=False)
        >>> mean, _ = guide.parameters_of(x[[2]])[0]
        >>> bool((mean - 1.0).abs() < 0.1)  # of the posterior N(x / 2, 1 / 2)
        True
    """

    @checked
    def __init__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        *covariates: Any,
        family: Callable[[int], Family] = families.Normal,
        joint: bool = True,
    ):
        super().__init__()
        self._model = ModelRef(model)
        for number, column in enumerate((x, *covariates)):
            _check("x" if number == 0 else f"covariate {number}", column)
        rows = torch.unique(_flat(x, *covariates), dim=0)
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        _require_bound_prior(model)
        sites = latent_sites(model, x, *covariates)
        self._build(sites, family, joint, rows, torch.empty(0, dtype=dtype, device=x.device))

    def _build(
        self,
        sites: Sequence[LatentSite],
        family: Callable[[int], Family],
        joint: bool,
        rows: Tensor,
        like: Tensor,
    ) -> None:
        self._family, self._joint = family, joint
        self.posterior = Posterior(sites, family, joint).to(like)
        direction = torch.randn(rows.shape[-1], dtype=torch.float64, device=like.device)
        # Each column has the same share of a key, from its difference to one row. Otherwise, large
        # numbers would round off others.
        width = rows.amax(0) - rows.amin(0)
        direction = torch.where(width > 0, direction / width, 0.0)
        keys, order = ((rows - rows[0]) @ direction).sort()
        # Stored as integers, so a change of the module's dtype does not change them.
        for name, values in (("_rows", rows[order]), ("_direction", direction), ("_keys", keys)):
            self.register_buffer(name, values.view(torch.int64))
        # Not zeros: from zeros, all layers of a flow would stay equal.
        shape = (len(rows), self.posterior.num_parameters)
        self.table = nn.Parameter(0.1 * torch.randn(shape, dtype=like.dtype, device=like.device))

    def __repr__(self) -> str:
        given = {
            "model": self._model.program,
            "x": Unknown(f"{len(self._rows)} data points"),
            "family": self._family,
            "joint": self._joint,
        }
        return constructor_call(type(self), given)

    def as_arguments(self) -> dict[str, Any]:
        """Return the arguments of :meth:`of_arguments`, without the data."""
        return {
            "model": self._model.program,
            "sites": self.posterior.sites,
            "family": self._family,
            "joint": self._joint,
            "shape": tuple(self._rows.shape),
        }

    @classmethod
    def of_arguments(
        cls,
        model: Callable[..., Any],
        sites: Sequence[LatentSite],
        family: Callable[[int], Family],
        joint: bool,
        shape: tuple[int, int],
    ) -> LocalGuide:
        """Create a guide without data; load its state dict to restore the rows and parameters."""
        guide = cls.__new__(cls)
        PyroModule.__init__(guide)
        guide._model = ModelRef(model)
        guide._build(sites, family, joint, torch.zeros(shape, dtype=torch.double), torch.empty(0))
        return guide

    def forward(self, x: Tensor, *covariates: Any) -> dict[str, Tensor]:
        """Sample the latents of the data plate given x."""
        parameters = self.parameters_of(x, *covariates)
        plates, masks = surroundings(self.posterior.sites, self._model.program, x, *covariates)
        return self.posterior(parameters, plates, masks)

    def parameters_of(self, x: Tensor, *covariates: Any) -> Tensor:
        """Return the parameters of the family for each data point, ``(B, P)``."""
        rows, direction, keys = (
            values.view(torch.float64) for values in (self._rows, self._direction, self._keys)
        )
        x = _flat(x, *covariates)
        # One number per row identifies the row. It has rounding errors, so use the nearest key.
        # The row from which differences are taken has the key zero. Older files have none.
        zero = torch.searchsorted(keys, keys.new_zeros(1)).clamp(max=len(keys) - 1)
        first = torch.where(keys[zero].unsqueeze(1) == 0, rows[zero], 0.0)
        key = (x - first) @ direction
        above = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
        below = (above - 1).clamp(min=0)
        nearer = (key - keys[below]).abs() < (key - keys[above]).abs()
        found = torch.where(nearer, below, above)
        known = (rows[found] == x).all(-1)
        if torch.distributions.Distribution._validate_args and not known.all():
            row = (~known).nonzero()[0].item()
            raise ValueError(
                f"row {row} of x is not in the data of this LocalGuide, which has parameters only "
                "for its own data. Build it with these data and without random transforms, or use "
                "an amortized guide."
            )
        return torch.where(known.unsqueeze(-1), self.table[found], torch.nan)


def _require_bound_prior(model: Callable[..., Any]) -> None:
    for module in (part for whole in modules(model) for part in whole.modules()):
        if hasattr(module, "bind_guide") and getattr(module, "guide", module) is None:
            raise ValueError(
                f"the model's {type(module).__name__} has no guide. A LocalGuide cannot be its "
                "guide, because it has parameters only for its own data. Create a guide with an "
                "encoder, call prior.bind_guide(guide), then create the LocalGuide"
            )


def _check(name: str, column: Any) -> None:
    if name != "x" and not (isinstance(column, Tensor) and column.dim()):
        return
    require_batch(name, column)
    if column.is_meta:
        raise TypeError(f"{name} must hold numbers, got a tensor on device meta")
    if not torch.isfinite(column).all():
        raise ValueError(
            f"{name} must be finite, got NaN or infinite values. Remove or replace them."
        )


def _flat(*columns: Any) -> Tensor:
    """Concatenate the columns into one float64 row for each data point."""
    x, *others = columns
    kept = [x, *(c for c in others if isinstance(c, Tensor) and c.dim() and len(c) == len(x))]
    return torch.cat([column.reshape(len(x), -1).double() for column in kept], -1)
