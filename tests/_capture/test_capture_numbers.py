"""Numbers that programs compute from shapes, and one-hot values, can be captured."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from capturing import check_same, fitted, needs_compiler
from torch import nn

import pyro_vae as pv
from pyro_vae._capture import Captured

N, D, C = 20, 4, 3
COMPILED = [pytest.mark.slow, needs_compiler]


@pytest.fixture(params=["captured, not compiled", pytest.param("captured", marks=COMPILED)])
def execution(request, monkeypatch):
    """Run each test without the compiler; as a slow test, also with it."""
    monkeypatch.setattr(Captured, "compiles", request.param == "captured")
    return request.param


def number_of_elements(x):
    return torch.prod(torch.tensor(x.shape[1:])).item()


def largest_of_numbers(x):
    sizes = torch.tensor([2.0, float(x.shape[1])])
    return int((sizes * 2).view(-1).max().item()) // 2


@pytest.mark.parametrize("count", [number_of_elements, largest_of_numbers])
def test_number_from_a_shape(count, execution):
    def make():
        decoder, encoder = nn.Linear(2, D), nn.Linear(D, 2)

        def model(x):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                loc = decoder(z).reshape(*z.shape[:-1], count(x))
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        return model, pv.guides.AmortizedNormal(model, encoder)

    check_same(make, torch.randn(N, D), execution=execution)


def test_one_hot_covariate(execution):
    def make():
        decoder, encoder = nn.Linear(2 + C, D), pv.nets.MLP(D, [4])

        def model(x, labels):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                known = nn.functional.one_hot(labels, C).float()
                loc = decoder(torch.cat([z, known], -1))
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        class OfX(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = encoder

            def forward(self, x, labels):
                return self.encoder(x)

        return model, pv.guides.AmortizedNormal(model, OfX())

    x, labels = torch.randn(N, D), torch.randint(0, C, (N,))
    check_same(make, (x, labels), execution=execution)


def test_one_hot_sample(execution):
    """A discrete latent that the guide samples, with the gradient of the score function."""

    def make():
        decoder, encoder = nn.Linear(C, D), nn.Linear(D, C)

        def model(x):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.OneHotCategorical(torch.ones(C)))
                pyro.sample("x", dist.Normal(decoder(c), 1.0).to_event(1), obs=x)

        def guide(x):
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x)):
                pyro.sample("c", dist.OneHotCategorical(logits=encoder(x)))

        return model, guide

    check_same(make, torch.randn(N, D), execution=execution)


@pytest.mark.parametrize("way", ["fill", "item", "view"])
def test_values_in_a_tensor_of_numbers_are_refused(way):
    """A tensor of numbers no longer holds numbers when a value is put in."""

    def make():
        decoder, encoder = nn.Linear(2, D), nn.Linear(D, 2)

        def model(x):
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                number, value = torch.tensor([1.0, 1.0]), z.detach().abs().mean()
                if way == "fill":
                    number.add_(value)
                elif way == "item":
                    number[0] = value
                else:
                    number.view(2, 1)[0] += value
                scale = 1.0 + number.sum().item()
                pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

        return model, pv.guides.AmortizedNormal(model, encoder)

    with pytest.warns(UserWarning, match="control flow depends on values of tensors"):
        fit, _ = fitted(make, torch.randn(N, D), capture=True)
    assert fit.execution.startswith("eager: its control flow depends")
