"""A dimension of particles is used only where each particle has the values of its own run."""

import contextlib
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional

import pyro_vae as pv
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.particles import particle_options

B, D, K = 6, 4, 3
QUIET = {"progress": False, "seed": 1}


def pair_of(decode, encode=None):
    """Return a model of x given decode(z), z and x in R^D, and a guide."""

    def model(x):
        if isinstance(decode, nn.Module):
            pyro.module("decoder", decode)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.zeros(D))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, 0.7).to_event(1))

    return model, guide


class Layer(nn.Module):
    """A layer with random parameters, followed by nonlinear functions."""

    def __init__(self, layer, before=None):
        super().__init__()
        self.layer, self.before = layer, before or nn.Identity()
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, z):
        out = self.layer(torch.sin(self.before(z)))
        return (out[0] if isinstance(out, tuple) else out) + z


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(D, 1)

    def forward(self, z):
        rows = z if z.dim() == 3 else z[:, None]
        return self.layer(rows, rows, rows)[0].reshape(z.shape)


class Trained(nn.BatchNorm1d):
    """A layer with running averages that are not the initial ones."""

    def __init__(self, channels):
        super().__init__(channels)
        self.running_mean.normal_()
        self.running_var.uniform_(0.5, 2)


# Layers whose result on (K, B, D) has the right shape and the wrong values, at B rows.
WRONG = {
    "norm of B channels": lambda: Layer(
        lambda z: functional.batch_norm(
            z, torch.zeros(z.shape[1]), torch.ones(z.shape[1]), training=True
        )
    ),
    "mean over rows": lambda: lambda z: z - z.mean(0),
    "softmax over rows": lambda: lambda z: z.softmax(0),
    "cumulative sum": lambda: lambda z: z + z.cumsum(0),
    "first row": lambda: lambda z: z + z[0],
    "last row": lambda: lambda z: z + z[-1],
    "flip": lambda: lambda z: z + z.flip(0),
    "roll": lambda: lambda z: z.roll(1, 0),
    "order": lambda: lambda z: z.sort(0).values,
    "recurrent": lambda: Layer(nn.GRU(D, D)),
    "attention": Attention,
    "distances": lambda: lambda z: z + torch.cdist(z, z).sum(-1).amax(0).sum(),
}
# Layers whose result is right for (B, C) alone, with C channels. They fit (K, B, C) if B = C.
CHANNELS = {
    "batch norm": lambda: Trained(B),
    "batch norm, untrained": lambda: nn.BatchNorm1d(B),
    "group norm": lambda: nn.GroupNorm(2, B),
}


def of_channels(layer):
    return lambda: Layer(nn.Sequential(nn.Linear(D, B), layer(), nn.Linear(B, D)))


OVER_ROWS = WRONG | {name: of_channels(layer) for name, layer in CHANNELS.items()}


def single_or_right(decode, x, call):
    """Return how many warnings a call gives, and its results by default and without vectors."""
    results = []
    for options in ({"vectorize_particles": False}, {}):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide = pair_of(decode())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(2)
            results.append(torch.as_tensor(call(model, guide, x, **options)))
    count = sum("leading dimension of particles" in str(w.message) for w in caught)
    return count, results


def weights(model, guide, x, **options):
    return pv.terms(model, guide, x, num_particles=K, **options).log_weight.detach()


def weights_of_nesting(model, guide, x, **options):
    return pv.terms(
        model, guide, x, num_particles=K, plate_nesting=1, **options
    ).log_weight.detach()


def losses(model, guide, x, **options):
    objective = pv.objectives.IWAE(K, **options)
    return (
        pv.fit(model, guide, x, objective=objective, epochs=2, batch_size=B, capture=False, **QUIET)
        .history["loss"]
        .to_numpy()
    )


@pytest.mark.parametrize("call", [weights, weights_of_nesting, losses])
@pytest.mark.parametrize("name", OVER_ROWS)
def test_layers_over_rows_get_runs_of_their_own(name, call):
    decode = OVER_ROWS[name]
    x = torch.randn(B, D)
    count, (expected, found) = single_or_right(decode, x, call)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert count == 1


@pytest.mark.parametrize("name", OVER_ROWS)
def test_evaluation_of_layers_over_rows_has_no_dimension_of_particles(name):
    torch.manual_seed(0)
    pair = pair_of(OVER_ROWS[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with evaluation_mode(*pair):
            layout = particle_options(*pair, (torch.randn(B, D),), may_fold=True)
    assert layout["vectorize_particles"] == ("fold" if name in CHANNELS else False)


RIGHT = {
    "linear": lambda: Layer(nn.Linear(D, D)),
    "dropout": lambda: Layer(nn.Dropout(0.5), nn.Linear(D, D)),
    "functional dropout": lambda: lambda z: functional.dropout(z, 0.3),
    "noise": lambda: lambda z: z + torch.randn_like(z) * torch.rand(z.shape),
    "uniform noise": lambda: lambda z: z + torch.empty_like(z).uniform_(),
    "layer norm": lambda: Layer(nn.LayerNorm(D)),
    "large values": lambda: lambda z: 1e4 * z,
    "untrained zero": lambda: lambda z: 0 * z,
    "convolution": lambda: Layer(nn.Conv1d(B, B, 1)),
    "matrix of rows": lambda: lambda z: torch.linspace(-1, 1, B * B).reshape(B, B) @ z,
    "norm of rows": lambda: lambda z: functional.layer_norm(z, z.shape[-2:]),
    "permuted": lambda: lambda z: z.mT.mT,
}


@pytest.mark.parametrize("name", RIGHT)
def test_layers_over_the_last_dimension_have_one_run(name):
    torch.manual_seed(0)
    model, guide = pair_of(RIGHT[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed = name in ("convolution", "matrix of rows")
        for x in (torch.randn(B, D), torch.randn(B if fixed else 1, D)):
            terms = pv.terms(model, guide, x, num_particles=K)
            assert len(terms._runs) == 1
    pv.terms(model, guide, x, num_particles=K, vectorize_particles=True)


@pytest.mark.parametrize("name", OVER_ROWS)
def test_insisting_on_wrong_values_is_an_error(name):
    model, guide = pair_of(OVER_ROWS[name]())
    with pytest.raises(ValueError, match="leading dimension of particles"):
        pv.terms(model, guide, torch.randn(B, D), num_particles=K, vectorize_particles=True)


def test_a_flag_that_is_set_later_is_seen():
    class Decoder(nn.Module):
        centered = False

        def forward(self, z):
            return z - z.mean(0) if self.centered else z

    decode = Decoder()
    model, guide = pair_of(decode)
    x = torch.randn(B, D)
    assert len(pv.terms(model, guide, x, num_particles=K)._runs) == 1
    decode.centered = True
    with pytest.warns(UserWarning, match="leading dimension"):
        assert len(pv.terms(model, guide, x, num_particles=K)._runs) == K


def test_training_and_evaluation_are_compared_separately():
    class Centering(nn.Module):
        def forward(self, z):
            return z - z.mean(0) if self.training else z

    x = torch.randn(B, D)
    decode = Centering()
    model, guide = pair_of(decode)
    objective, single = pv.objectives.IWAE(K), pv.objectives.IWAE(K, vectorize_particles=False)
    for training in (False, True, False):
        decode.train(training)
        told = pytest.warns(UserWarning, match="leading dim") if training else quiet()
        losses = []
        with told:
            for each in (single, objective):
                torch.manual_seed(0)
                losses.append(each.loss(model, guide, x))
        assert not training or losses[0] == pytest.approx(losses[1], rel=1e-5)
    fit = pv.fit(model, guide, x, objective=objective, epochs=1, batch_size=B, **QUIET)
    assert fit.history["loss"].notna().all()


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_comparison_changes_no_state():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.count = nn.BatchNorm1d(B), 0

        def forward(self, z):
            self.count += 1
            return self.norm(z) if z.dim() == 3 else z

    x, found = torch.randn(B, D), []
    for options in ({"vectorize_particles": False}, {}):
        pyro.clear_param_store()
        norm = Norm()
        model, guide = pair_of(norm)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pv.terms(model, guide, x, num_particles=K, **options)
        state = {name: value.tolist() for name, value in norm.norm.state_dict().items()}
        found.append((state, norm.count, torch.get_rng_state().tolist()))
    assert found[0] == found[1]


def test_the_comparison_is_made_once():
    sizes = []

    def decode(z):
        sizes.append(float(z.numel()))
        return z

    model, guide = pair_of(decode)
    objective = pv.objectives.IWAE(K)
    for rows in (B, B, 2, B):
        objective.differentiable_loss(model, guide, torch.randn(rows, D))
    assert sizes[-3:] == [K * B * D, K * 2 * D, K * B * D]
    for rows in (B, B + 1, B):
        pv.terms(model, guide, torch.randn(rows, D), num_particles=K)
    assert sizes[-2:] == [K * (B + 1) * D, K * B * D]
