"""Compare ELBO surgery of nonlinear decoders with integrals on a grid.

The aggregated posterior is that of the given data, so its integrals have no sampling error.
The surgery may differ by the error of its draws alone.
"""

import functools
import itertools
import math

import pytest
import torch
from guide_table import flow
from oracles import assert_within

import pyro_vae as pv
from pyro_vae import flows, guides
from pyro_vae.priors._posteriors import posteriors

COUNT = 8
GUIDES = {
    "mean-field": guides.AmortizedNormal,
    "full covariance": guides.AmortizedMultivariateNormal,
    "planar": flow(flows.Planar),
    "IAF": flow(flows.InverseAutoregressive),
    "MAF": flow(flows.MaskedAutoregressive),
    "spline": flow(functools.partial(flows.NeuralSpline, autoregressive=True)),
}
ONE_DIMENSION = ["mean-field", "full covariance", "planar"]
PRIORS = {
    "standard": pv.priors.StandardNormal,
    "mixture": functools.partial(pv.priors.MixtureOfNormals, components=3),
    "Vamp": lambda d: pv.priors.VampPrior(d, pseudo_inputs=torch.rand(4, 6)),
    "flow": lambda d: pv.priors.FlowPrior(d, flows.Composition(d, flows.Planar, 2)),
}
CASES = [
    (d, guide, prior)
    for d, guide, prior in itertools.product((1, 2), GUIDES, PRIORS)
    if d == 2 or (guide in ONE_DIMENSION and prior != "flow")
]
QUICK = [
    (1, "mean-field", "Vamp"),
    (1, "planar", "mixture"),
    (2, "mean-field", "standard"),
    (2, "full covariance", "mixture"),
    (2, "IAF", "Vamp"),
]


def make_pair(d, guide_name, prior_name):
    prior = PRIORS[prior_name](d)
    model = pv.LatentVariableModel(prior, pv.likelihoods.Bernoulli(pv.nets.MLP(d, [7], 6)))
    guide = GUIDES[guide_name](model, pv.nets.MLP(6, [9]))
    if prior_name == "Vamp":
        prior.bind_guide(guide)
    model, guide = model.double(), guide.double()
    x = torch.bernoulli(torch.full((COUNT, 6), 0.5, dtype=torch.float64))
    guide(x)
    with torch.no_grad():
        for parameter in guide.parameters():  # so that posteriors differ
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, guide, x


def grid(q, d, fine):
    """Return grid points that cover all posteriors, and the volume of each."""
    drawn = q.sample((3000,)).flatten(0, 1)
    reach = 1.6 * drawn.abs().amax(0)
    count = 6001 if d == 1 else 421 if fine else 161
    axes = [torch.linspace(-r, r, count).double() for r in reach.tolist()]
    volume = math.prod((axis[1] - axis[0]).item() for axis in axes)
    return torch.cartesian_prod(*axes).reshape(-1, d), volume


@torch.no_grad()
def by_quadrature(model, guide, x, d, fine=False):
    """Return mutual information, marginal KL and distortion of the given data."""
    posterior = posteriors(guide, "z", (x,))
    points, volume = grid(posterior, d, fine)
    chunks = points.split(20_000)
    log_p = torch.cat([model.prior().log_prob(z) for z in chunks])
    log_q = torch.cat([posterior.log_prob(z.unsqueeze(1)) for z in chunks])
    log_x = torch.cat([model.likelihood(z.unsqueeze(1)).log_prob(x) for z in chunks])
    q = log_q.exp() * volume  # (G, N)
    torch.testing.assert_close(q.sum(0), torch.ones(COUNT).double(), atol=1e-3, rtol=0)
    log_agg = log_q.logsumexp(1) - math.log(COUNT)

    def expected(weights, values):
        return torch.where(weights > 0, weights * values, 0.0).sum().item()

    information = expected(q / COUNT, log_q - log_agg.unsqueeze(1))
    marginal = expected(log_agg.exp() * volume, log_agg - log_p)
    return information, marginal, -expected(q / COUNT, log_x)


def check(d, guide_name, prior_name):
    model, guide, x = make_pair(d, guide_name, prior_name)
    fine = guide_name == "spline"  # its density has a kink at each knot
    information, marginal, distortion = by_quadrature(model, guide, x, d, fine)
    parts = [pv.elbo_surgery(model, guide, x, num_particles=60, seed=s) for s in range(8)]
    for name, truth in (
        ("mutual_information", information),
        ("marginal_kl", marginal),
        ("distortion", distortion),
        ("rate", information + marginal),
        ("elbo", -distortion - information - marginal),
    ):
        values = torch.tensor([getattr(part, name) for part in parts])
        error = values.std().item() / 8**0.5
        # Student's t with 7 degrees of freedom exceeds 7 errors once in 5,000 runs. Rates may be
        # exact, and the grid has an error of about 1e-3 where a flow folds sharply.
        assert_within(values.mean().item(), truth, error + 2e-4, 7.0)


@pytest.mark.parametrize(("d", "guide", "prior"), QUICK)
def test_surgery_matches_quadrature(d, guide, prior):
    check(d, guide, prior)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "guide", "prior"), [case for case in CASES if case not in QUICK])
def test_surgery_matches_quadrature_for_all_cases(d, guide, prior):
    check(d, guide, prior)
