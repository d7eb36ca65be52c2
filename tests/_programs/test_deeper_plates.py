"""Programs that open deeper plates for some arguments, such as data with labels."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

import pyro_vae as pv
from pyro_vae.objectives import ELBO

VALUES = 2  # of the enumerated site


def make(enumerated, dim):
    """Return a pair; with a second argument (B, T), the model opens a plate of T times."""
    infer = {"enumerate": "parallel"} if enumerated else {}

    def model(x, series=None):
        with pyro.plate("data", len(x), dim=-1):
            loc = torch.zeros(())
            if enumerated:
                loc = 3.0 * pyro.sample("k", dist.Bernoulli(0.3), infer=infer)
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if series is not None:
                with pyro.plate("times", series.shape[1], dim=dim):
                    pyro.sample("series", dist.Normal(z + loc, 1.0), obs=series.T)

    def guide(x, series=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    return model, guide


@pytest.mark.parametrize("dim", [-2, None])
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("steps", [1, VALUES, 3])
@pytest.mark.parametrize("enumerated", [False, True])
def test_an_objective_is_right_for_other_arguments_of_the_same_programs(
    enumerated, steps, num_particles, dim
):
    """A plate as large as the number of values or particles must not share their dimension."""
    model, guide = make(enumerated, dim)
    x, series = torch.randn(5), torch.randn(5, steps)
    objective = ELBO(num_particles)
    for _ in range(2):
        objective.loss(model, guide, x)
        objective.loss(model, guide, x, series)
    layout = {"max_plate_nesting": 2, "num_particles": num_particles}
    layout |= {"vectorize_particles": num_particles > 1}
    reference = TraceEnum_ELBO(**layout) if enumerated else Trace_ELBO(**layout)
    for args in ([x, series], [x]):
        losses = []
        for each in (objective, reference):
            pyro.set_rng_seed(1)
            losses.append(each.loss(model, guide, *args))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_terms_refuse_a_nesting_that_is_too_small(num_particles):
    model, guide = make(enumerated=num_particles == 1, dim=None)
    options = {"plate_nesting": 1, "num_particles": num_particles, "vectorize_particles": True}
    with pytest.raises(ValueError, match=r"use [23] batch dimensions, but plate_nesting=1"):
        pv.terms(model, guide, torch.randn(5), torch.randn(5, VALUES), enumerates=True, **options)
