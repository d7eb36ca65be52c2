"""Observed values are checked against the support of their site, per minibatch."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv

FIT = {"epochs": 2, "batch_size": 10, "seed": 1, "progress": False}


def latent():
    return pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def total_of_minibatch(x):
    with pyro.plate("data", len(x)):
        z = latent()
        pyro.sample("x", dist.Multinomial(int(x.sum(-1).max()), logits=z), obs=x)


def largest_of_minibatch(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Binomial(x.max(), logits=latent()).to_event(1), obs=x)


def total_of_row(x, n):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Binomial(n[:, None], logits=latent()).to_event(1), obs=x)


def range_of_row(x, n):
    with pyro.plate("data", len(x)):
        latent()
        pyro.sample("x", dist.Uniform(torch.zeros(3), n[:, None].expand(-1, 3)).to_event(1), obs=x)


def fixed_total(x, n):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Binomial(9.0, logits=latent()).to_event(1), obs=x)


def levels(x, n):
    with pyro.plate("data", len(x)):
        z = latent()
        logits = torch.stack([z, 2 * z, 0 * z, -z], -1)
        pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = pv.nets.MLP(3, [4])

    def forward(self, x, *covariates):
        return self.net(x)


def counts():
    x = torch.poisson(torch.full((100, 3), 2.0)).clamp(max=9)
    x[:, 0] = (x[:, 0] + 1).clamp(max=9)
    return x


def calls(model, columns):
    guide = pv.guides.AmortizedNormal(model, Encoder())
    guide(*columns)
    data = columns if len(columns) > 1 else columns[0]
    loader = DataLoader(TensorDataset(*columns), batch_size=10)
    return {
        "fit": lambda: pv.fit(model, guide, data, validation=data, **FIT),
        "loader": lambda: pv.fit(model, guide, loader, **FIT),
        "evidence": lambda: pv.evidence(model, guide, data, num_particles=3, batch_size=10),
        "surgery": lambda: pv.elbo_surgery(model, guide, data, batch_size=10, progress=False),
        "compare": lambda: pv.compare({"a": (model, guide)}, data, num_particles=3, progress=False),
    }


@pytest.mark.parametrize(
    "model", [largest_of_minibatch, pytest.param(total_of_minibatch, marks=pytest.mark.slow)]
)
def test_bounds_may_depend_on_the_minibatch(model):
    for call in calls(model, (counts(),)).values():
        call()


def test_total_count_may_depend_on_the_minibatch():
    found = calls(total_of_minibatch, (counts(),))
    found["fit"]()
    found["evidence"]()


@pytest.mark.parametrize("model", [total_of_row, range_of_row])
def test_bounds_may_depend_on_the_row(model):
    x = counts()
    for call in calls(model, (x, x.max(1).values + 1)).values():
        call()


@pytest.mark.parametrize("first_is_wide", [False, True])
@pytest.mark.parametrize("model", [total_of_row, range_of_row])
def test_value_outside_the_bounds_of_its_row_is_refused(model, first_is_wide):
    """Also if the bounds of the first minibatch include all data."""
    x = counts()
    n = x.max(1).values + 1
    if first_is_wide:
        n[:10] = 100.0
    x[77, 1] = n[77] + 1
    for call in calls(model, (x, n)).values():
        with pytest.raises(ValueError, match="outside the support of site 'x'"):
            call()


def test_value_outside_the_bounds_of_every_minibatch_is_refused():
    x = counts()
    x[55] = torch.tensor([-1.0, 0.0, 0.0])
    for call in calls(total_of_minibatch, (x,)).values():
        with pytest.raises(ValueError, match=r"outside the support of site 'x', .*in \[-1, 0\]"):
            call()


def test_pair_that_fails_on_copies_of_one_row_is_accepted():
    class Standardized(Encoder):
        def forward(self, x, *covariates):
            return super().forward((x - x.mean(0)) / x.std(0))  # NaN if all rows are equal

    x = counts().clamp(max=3)
    guide = pv.guides.AmortizedNormal(levels, Standardized())
    assert pv.fit(levels, guide, (x, x[:, 0]), **FIT).history.loss.notna().all()


@pytest.mark.parametrize(("model", "bad"), [(fixed_total, 10.0), (levels, 4.0)])
def test_constant_bounds_are_checked_before_the_first_step(model, bad):
    x = counts().clamp(max=3)
    for call in calls(model, (x, x[:, 0])).values():
        call()
    x[66] = torch.tensor([0.0, 0.0, bad])  # its sum is extreme at 10, and not at 4
    found = calls(model, (x, x[:, 0]))
    for name in ("fit", "evidence", "surgery", "compare"):
        with pytest.raises(ValueError, match=r"outside the support of site 'x', .*first in row 66"):
            found[name]()


def test_constant_bounds_do_not_delay_capture(without_compiler):
    """The first epoch is captured."""
    x = counts().clamp(max=3)
    guide = pv.guides.AmortizedNormal(levels, Encoder())
    result = pv.fit(levels, guide, (x, x[:, 0]), capture=True, **FIT | {"epochs": 1})
    assert result.execution == "captured, not compiled"
