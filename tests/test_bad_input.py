"""Bad input is refused before the first step: the message says what was expected and given."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_pair
from torch import nn
from torch.utils.data import DataLoader

import pyro_vae as pv

GOOD = torch.ones(30, 16)


def with_nan():
    x = GOOD.clone()
    x[7, 3] = float("nan")
    return x


def outside():
    x = GOOD.clone()
    x[25, 0] = 0.5  # beyond the first minibatch
    return x


BAD_DATA = {
    "empty": (torch.ones(0, 16), r"is empty: expected shape \(N, \*event\)"),
    "no columns": (torch.ones(5, 0), "is empty"),
    "scalar": (torch.tensor(1.0), r"is one number: expected shape \(N, \*event\)"),
    "empty loader": (DataLoader([], batch_size=3), "yields no minibatch"),
    "nan": (with_nan(), "NaN or infinite values, first in row 7"),
    "infinite": (torch.full((30, 16), torch.inf), "NaN or infinite values, first in row 0"),
    "wrong width": (torch.ones(30, 17), r"data x of shape \(\d+, 17\)"),
    "width of one": (torch.ones(30, 1), r"data x of shape \(\d+, 1\)"),
    "one dimension": (torch.ones(30), r"data x of shape \(\d+,\)"),
    "complex": (GOOD.to(torch.complex64), "must hold real numbers"),
    "unflattened": (torch.ones(30, 4, 4), r"\(\d+, 4, 4\)"),
    "integers": (GOOD.to(torch.uint8), "dtype torch.uint8"),
    "float64": (GOOD.double(), "dtype torch.float64: TypeError: .* torch.float32"),
    "float64 array": (np.ones((30, 16)), "dtype torch.float64"),
    "strings": (np.full((30, 16), "a"), "must hold numbers"),
    "a list": ([[1.0]], "must be a tensor, a numpy array"),
    "none": (None, "must be a tensor, a numpy array"),
    "outside the support": (outside(), r"outside the support of site 'x', .* first in row 25"),
    "lengths": ((GOOD, torch.ones(29)), r"must be of one length, got \[30, 29\]"),
}


@pytest.mark.parametrize("name", BAD_DATA)
@pytest.mark.parametrize("function", ["fit", "evidence", "elbo_surgery", "compare", "to_arviz"])
def test_bad_data_are_refused_with_the_reason(name, function):
    data, message = BAD_DATA[name]
    model, guide = make_pair()
    calls = {
        "fit": lambda: pv.fit(model, guide, data, batch_size=10, epochs=1, progress=False),
        "evidence": lambda: pv.evidence(model, guide, data, batch_size=10, num_particles=2),
        "elbo_surgery": lambda: pv.elbo_surgery(model, guide, data, batch_size=10),
        "compare": lambda: pv.compare({"a": (model, guide)}, data, num_particles=2),
        "to_arviz": lambda: pv.to_arviz(model, guide, data, num_draws=2),
    }
    with pytest.raises(ValueError, match=message):
        calls[function]()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.1, "optimizer": torch.optim.Adam}, "is for the default optimizer"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"clip_norm": -1.0}, "clip_norm must be positive and finite, got -1.0"),
        ({"patience": 3}, "patience needs validation data"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"patience": 0, "validation": GOOD}, "patience must be at least 1, got 0"),
        ({"validation": GOOD[:, :3]}, r"\(\d+, 3\)"),
        ({"validation": GOOD * 0.5}, "outside the support of site 'x'"),
    ],
)
def test_fit_refuses_bad_arguments(arguments, message):
    model, guide = make_pair()
    options = {"batch_size": 10, "epochs": 1, "progress": False} | arguments
    with pytest.raises(ValueError, match=message):
        pv.fit(model, guide, GOOD, **options)


def test_fit_refuses_an_objective_that_is_not_an_elbo():
    model, guide = make_pair()
    with pytest.raises(TypeError, match=r"objective must be a pyro.infer.ELBO .*, got 'elbo'"):
        pv.fit(model, guide, GOOD, objective="elbo", progress=False)


def test_fit_refuses_a_pair_without_parameters():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="have no parameters"):
        pv.fit(model, guide, torch.randn(100), progress=False)


def test_fit_refuses_a_guide_without_a_latent():
    model, _ = make_pair()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match="latent site 'z' of the model is missing in the guide"):
        pv.fit(model, guide, GOOD, batch_size=10, progress=False)


def test_evidence_refuses_a_data_plate_that_subsamples():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match='plate "data" has size 3 for a minibatch of 10 rows'):
        pv.evidence(model, guide, torch.randn(10))


def test_evidence_refuses_an_event_dim_that_is_too_small():
    class Decoder(nn.Module):
        def forward(self, z):
            return z.sum(-1)[..., None, None, None].expand(*z.shape[:-1], 1, 4, 4)

    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(Decoder(), event_dim=1)
    )
    guide = pv.guides.AmortizedNormal(model, nn.Flatten())
    with pytest.raises(ValueError, match=r"declare them with .to_event\(n\)"):
        pv.evidence(model, guide, torch.ones(10, 1, 4, 4))


def test_evidence_refuses_a_negative_scale():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, -1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="scale"):
        pv.evidence(model, guide, torch.randn(10))


def test_evidence_refuses_x_that_broadcasts_to_the_event():
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 64))
    )
    guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(1, [8]))
    with pytest.raises(
        ValueError, match=r"events of shape \(64,\), but its value has .* \(20, 1\)"
    ):
        pv.evidence(model, guide, torch.ones(20, 1), num_particles=5)


def test_evidence_refuses_one_row_as_all_data_points():
    model = pv.LatentVariableModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 64))
    )

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"Expected 64 data points, each of event shape \(64,\)"):
        pv.evidence(model, guide, torch.ones(64), num_particles=5, batch_size=64)


@pytest.mark.parametrize("value", [2.5, "3", True])
def test_counts_must_be_whole_numbers(value):
    model, guide = make_pair()
    for name, call in (
        ("num_particles", lambda: pv.evidence(model, guide, GOOD, num_particles=value)),
        ("num_particles", lambda: pv.elbo_surgery(model, guide, GOOD, num_particles=value)),
        ("num_particles", lambda: pv.objectives.IWAE(value)),
        ("num_draws", lambda: pv.to_arviz(model, guide, GOOD, num_draws=value)),
        ("epochs", lambda: pv.fit(model, guide, GOOD, epochs=value)),
        ("batch_size", lambda: pv.fit(model, guide, GOOD, batch_size=value)),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            call()


def test_mlp_refuses_one_number_as_hidden():
    with pytest.raises(TypeError, match=r"such as \[8\]"):
        pv.nets.MLP(2, 8)


def test_failed_fit_leaves_the_parameters_in_the_global_store():
    """A pair that Pyro's SVI trained is still evaluated with its trained parameters."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    pyro.param("loc", torch.tensor(50.0))
    with pytest.raises(ValueError, match="NaN"):
        pv.fit(model, guide, torch.full((5,), torch.nan), batch_size=5)
    assert pv.evidence(model, guide, torch.zeros(5), num_particles=10).mean < -100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, g: pv.evidence(m, g, GOOD, num_particles=0), "num_particles"),
        (lambda m, g: pv.evidence(m, g, GOOD, pairs_per_pass=0), "pairs_per_pass"),
        (lambda m, g: pv.elbo_surgery(m, g, GOOD, num_particles=0), "num_particles"),
        (lambda m, g: pv.to_arviz(m, g, GOOD, num_draws=0), "num_draws"),
        (lambda m, g: pv.compare({}, GOOD), "at least one pair"),
        (lambda m, g: pv.compare({"a": m}, GOOD), "pair 'a' must be"),
        (lambda m, g: pv.generate(m, None), "x must be a tensor"),
    ],
)
def test_evaluation_refuses_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make_pair())
