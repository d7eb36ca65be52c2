"""Posteriors that are diagonal Gaussians, read from a run of the guide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pyro.distributions.transforms import OrderedTransform
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import Normal, TransformedDistribution, biject_to
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    CorrCholeskyTransform,
    ExpTransform,
    IndependentTransform,
    LowerCholeskyTransform,
    PositiveDefiniteTransform,
    SigmoidTransform,
    SoftplusTransform,
    StickBreakingTransform,
    Transform,
)

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.runs import as_guide, trace_of
from pyro_vae._programs.sites import (
    Site,
    base_distribution,
    data_frame,
    is_loss_of_guide,
    mask_of,
    random_sites,
)
from pyro_vae._utils.identity import without_handlers
from pyro_vae.datasets._minibatches import Batch


@dataclass(frozen=True)
class DiagonalGaussians:
    """The posteriors q(z|x) of B data points, with all latents of a data point in one row.

    Args:
        loc: means (B, d), float64.
        scale: standard deviations (B, d), float64.
        sites: names of the latent sites, in the order of the row.
        real: whether z itself is known to be Gaussian. False if a bijection maps a Gaussian onto z.
    """

    loc: Tensor
    scale: Tensor
    sites: tuple[str, ...]
    real: bool

    @classmethod
    def read(cls, guide: Program, batch: Batch) -> DiagonalGaussians | None:
        """Read the posteriors from one run of a guide; None if it is not a diagonal Gaussian.

        A bijection may map the Gaussian onto a support, if it is the same for all data points. It
        does not change log q(z|x_n) - log q_agg(z).
        """
        trace = trace_of(as_guide(guide), *batch)
        sites = {s["name"]: s for s in random_sites(trace) if not is_loss_of_guide(s)}
        if isinstance(program := without_handlers(guide), AutoNormal):
            names = tuple(n for n, s in sites.items() if not s["infer"].get("is_auxiliary"))
            read = [_read_auto_normal(program, sites, name) for name in names]
        else:
            read, names = [*map(_read_site, sites.values())], tuple(sites)
        if None in read:
            return None
        locs, scales, real = zip(*read, strict=True)
        return cls(torch.cat(locs, dim=1), torch.cat(scales, dim=1), names, all(real))

    @classmethod
    def is_diagonal_gaussian(cls, guide: Program, batch: Batch) -> bool:
        """Return whether a guide is a diagonal Gaussian with parameters that depend on x alone.

        The parameters of a hierarchical guide differ between two runs, because they also depend on
        samples of other latents.
        """
        first, second = cls.read(guide, batch), cls.read(guide, batch)
        if first is None or second is None:
            return False
        return torch.equal(first.loc, second.loc) and torch.equal(first.scale, second.scale)

    @classmethod
    def concatenate(cls, parts: Sequence[DiagonalGaussians]) -> DiagonalGaussians:
        """Concatenate the posteriors of several minibatches."""
        loc, scale = torch.cat([p.loc for p in parts]), torch.cat([p.scale for p in parts])
        return cls(loc, scale, parts[0].sites, parts[0].real)

    def none(self) -> DiagonalGaussians:
        """Return the posteriors of zero data points."""
        return replace(self, loc=self.loc[:0], scale=self.scale[:0])

    def codes(self, samples: dict[str, Tensor]) -> Tensor:
        """Return K codes per data point as rows, (K, B, d).

        They are the guide's samples. If a bijection maps the Gaussian onto z, they are new samples
        of the Gaussian.
        """
        if self.real:
            rows = [samples[name] for name in self.sites]
            return torch.cat([r.reshape(*r.shape[:2], -1) for r in rows], dim=2).double()
        num_particles = len(next(iter(samples.values())))
        noise = torch.randn(
            num_particles, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device
        )
        return self.loc + self.scale * noise


def _read_site(site: Site) -> tuple[Tensor, Tensor, bool] | None:
    fn, frame = site["fn"], data_frame(site)
    if site["is_observed"] or site["infer"].get("is_auxiliary") or mask_of(site) is not None:
        return None
    base = base_distribution(fn)
    real = not isinstance(base, TransformedDistribution)
    if not real and all(map(_is_fixed, base.transforms)):
        base = base_distribution(base.base_dist)
    if not isinstance(base, Normal):
        return None
    event_dim = base.loc.dim() - len(fn.batch_shape)  # of the input of the bijection
    loc, scale = (
        p.double().movedim(frame.dim - event_dim, 0).reshape(frame.size, -1)
        for p in (base.loc, base.scale)
    )
    return loc, scale, real


def _read_auto_normal(
    guide: AutoNormal, sites: dict[str, Site], name: str
) -> tuple[Tensor, Tensor, bool] | None:
    """Read the auxiliary Gaussian of a latent, a Delta that is a function of it alone."""
    if not _is_fixed(biject_to(guide.prototype_trace.nodes[name]["fn"].support)):
        return None
    read = _read_site({**sites[f"{name}_unconstrained"], "infer": {}})
    return None if read is None else (*read[:2], False)


def _is_fixed(transform: Transform) -> bool:
    """Return whether a transform is known to be the same for all data points."""
    if isinstance(transform, ComposeTransform):
        return all(map(_is_fixed, transform.parts))
    if isinstance(transform, IndependentTransform):
        return _is_fixed(transform.base_transform)
    if isinstance(transform, AffineTransform):
        return isinstance(transform.loc, int | float) and isinstance(transform.scale, int | float)
    return type(transform) in _WITHOUT_PARAMETERS


_WITHOUT_PARAMETERS = {
    CorrCholeskyTransform,
    ExpTransform,
    LowerCholeskyTransform,
    OrderedTransform,
    PositiveDefiniteTransform,
    SigmoidTransform,
    SoftplusTransform,
    StickBreakingTransform,
}
