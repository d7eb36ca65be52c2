"""Every guide of the library, for tests that each guide must pass."""

import functools

import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv
from pyro_vae import flows, guides
from pyro_vae.guides import _families as families


def flow(layer, length=3, **options):
    return functools.partial(guides.AmortizedFlow, flow=layer, length=length, **options)


# Guides with a density, by name: callables of a model and an encoder.
DENSITIES = {
    "normal": guides.AmortizedNormal,
    "multivariate normal": guides.AmortizedMultivariateNormal,
    "low rank": functools.partial(guides.AmortizedLowRankNormal, rank=1),
    "mixture": functools.partial(guides.AmortizedMixture, components=3),
    "planar": flow(flows.Planar),
    "planar, shared": flow(flows.Planar, amortized=False),
    "radial": flow(flows.Radial),
    "sylvester, orthogonal": flow(functools.partial(flows.Sylvester, size=1)),
    "sylvester, householder": flow(functools.partial(flows.Sylvester, kind="householder")),
    "sylvester, triangular": flow(functools.partial(flows.Sylvester, kind="triangular")),
    "householder": flow(flows.Householder),
    "inverse autoregressive": flow(flows.InverseAutoregressive),
    "inverse autoregressive, shared": flow(flows.InverseAutoregressive, amortized=False),
    "masked autoregressive": flow(flows.MaskedAutoregressive),
    "affine coupling": flow(flows.AffineCoupling),
    "spline coupling": flow(flows.NeuralSpline),
    "spline autoregressive": flow(functools.partial(flows.NeuralSpline, autoregressive=True)),
    "hierarchical": guides.HierarchicalGuide,
}
ONE_DIMENSION = ["normal", "multivariate normal", "low rank", "mixture", "planar", "radial",
                 "sylvester, triangular", "hierarchical"]  # fmt: skip
FLOWS = {
    "planar": flows.Planar,
    "radial": flows.Radial,
    "sylvester, orthogonal": functools.partial(flows.Sylvester, size=2),
    "sylvester, householder": functools.partial(flows.Sylvester, kind="householder"),
    "sylvester, triangular": functools.partial(flows.Sylvester, kind="triangular"),
    "householder": flows.Householder,
    "inverse autoregressive": flows.InverseAutoregressive,
    "masked autoregressive": flows.MaskedAutoregressive,
    "affine coupling": flows.AffineCoupling,
    "spline coupling": flows.NeuralSpline,
    "spline autoregressive": functools.partial(flows.NeuralSpline, autoregressive=True),
}


class Model:
    """A Gaussian latent of any event shape, seen through a random linear map; no parameters."""

    def __init__(self, event_shape=(2,), data=5, dtype=torch.float32):
        self.event_shape, self.dtype = torch.Size(event_shape), dtype
        self.loading = torch.randn(self.event_shape.numel(), data, dtype=dtype)

    def __call__(self, x):
        event_dim = len(self.event_shape)
        prior = dist.Normal(torch.zeros(self.event_shape, dtype=self.dtype), 1.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.to_event(event_dim))
            z = z.flatten(-event_dim) if event_dim else z.unsqueeze(-1)
            pyro.sample("x", dist.Normal(z @ self.loading, 1.0).to_event(1), obs=x)


def make(name, model, x, spread=1.0):
    """Make a guide with random weights; with a larger ``spread``, q(z|x) depends more on x."""
    guide = DENSITIES[name](model, pv.nets.MLP(x.shape[-1], [7])).to(x)
    guide(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(spread)
    return guide


def local_guides(model, x):
    """Yield guides that are made for given data."""
    for family in (families.Normal, families.MultivariateNormal,
                   functools.partial(families.Transformed, flow=flows.Planar)):  # fmt: skip
        yield guides.LocalGuide(model, x, family=family)
