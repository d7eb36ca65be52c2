"""In a fit, Pyro's objectives have the same loss per data point as the library's."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from torch import nn

import pyro_vae as pv
from pyro_vae import objectives as o

N = 25


class Pair(nn.Module):
    """A Gaussian latent, and an enumerated class of three values if ``enumerate_``."""

    def __init__(self, *, subsample, enumerate_=False, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.subsample, self.enumerate_ = subsample, enumerate_
        self.centers = nn.Parameter(torch.randn(3, 2))
        self.encoder = nn.Linear(2, 2, bias=not norm)
        self.norm = nn.BatchNorm1d(2) if norm else nn.Identity()

    def plate(self, x):
        return pyro.plate("data", N, subsample=x) if self.subsample else pyro.plate("data", len(x))

    def model(self, x):
        pyro.module("pair", self)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.centers[0]
            if self.enumerate_:
                c = pyro.sample(
                    "c", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"}
                )
                loc = self.centers[c]
            pyro.sample("x", dist.Normal(loc + z[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with self.plate(x):
            loc, log_scale = self.norm(self.encoder(x)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def history(objective, *, held_out=True, epochs=3, learning_rate=0.01, **changes):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(N, 2, generator=generator), torch.randn(7, 2, generator=generator)
    pair = Pair(**{"subsample": True} | changes)
    found = pv.fit(
        pair.model, pair.guide, x, objective=objective, validation=y if held_out else None,
        epochs=epochs, batch_size=10, learning_rate=learning_rate, seed=2, progress=False,
    ).history  # fmt: skip
    return torch.tensor(found[["loss", "validation_loss"]].to_numpy())


SAMPLED = {
    "Trace": infer.Trace_ELBO,
    "JitTrace": infer.JitTrace_ELBO,
    "TMC": lambda: infer.TraceTMC_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
}
CLOSED = {"MeanField": infer.TraceMeanField_ELBO, "JitMeanField": infer.JitTraceMeanField_ELBO}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("subsample", [False, True])
@pytest.mark.parametrize("name", [*SAMPLED, *CLOSED])
def test_history_equals_that_of_the_librarys_objective(name, subsample, norm):
    """Use the same noise, with minibatches of 10, 10 and 5 rows and 7 validation rows."""
    make, own = (SAMPLED | CLOSED)[name], o.ELBO if name in SAMPLED else o.MeanFieldELBO
    found = history(make(), subsample=subsample, norm=norm)
    expected = make if name == "TMC" else own  # TMC samples in another order
    expected = history(expected(), subsample=False, norm=norm)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [infer.TraceEnum_ELBO, infer.JitTraceEnum_ELBO])
@pytest.mark.parametrize("subsample", [False, True])
def test_validation_loss_with_enumerated_latents(kind, subsample):
    """With a negligible rate, both are averages of 2000 draws, equal to seven standard errors."""
    at_rest = {"learning_rate": 1e-9, "epochs": 1, "enumerate_": True, "subsample": subsample}
    found = history(kind(2000, max_plate_nesting=1, vectorize_particles=True), **at_rest)
    expected = history(o.ELBO(2000), **at_rest)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.3)
    assert history(kind(max_plate_nesting=1), enumerate_=True).isfinite().all()
    assert (
        history(kind(max_plate_nesting=1), enumerate_=True, held_out=False)[:, 0].isfinite().all()
    )


def test_tensor_monte_carlo_of_enumerated_latents_is_refused():
    """Pyro's loss is too large by log 3 for each data point of an enumerated class."""
    with pytest.raises(ValueError, match=r"TraceTMC_ELBO .* logarithm of the number of values"):
        history(infer.TraceTMC_ELBO(max_plate_nesting=1), enumerate_=True)


@pytest.mark.parametrize(
    ("objective", "instead"),
    [
        (infer.RenyiELBO(), "pyro_vae.objectives.Renyi"),
        (infer.ReweightedWakeSleep(), "pyro_vae.objectives.ReweightedWakeSleep"),
        (infer.TraceGraph_ELBO(), "pyro_vae.objectives.ELBO"),
        (infer.JitTraceGraph_ELBO(), "pyro_vae.objectives.ELBO"),
        (infer.TraceTailAdaptive_ELBO(2, vectorize_particles=True), "pyro_vae.objectives.Renyi"),
    ],
)
def test_refused_pyro_objectives_name_a_replacement(objective, instead):
    with pytest.raises(TypeError, match=f"with a differentiable_loss and a loss.* {instead}"):
        history(objective)
