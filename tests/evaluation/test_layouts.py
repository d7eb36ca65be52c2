"""Means of generate and reconstruct have the layout of x, for any view the model takes of x."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv

MEANS = torch.tensor([0.0, 10.0, 20.0])


def program(observe):
    """Return a model with one latent of negligible scale."""

    def model(x, *covariates):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1e-3))
            observe(x, z, *covariates)

    return model


def guide(x, *covariates):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1e-3))


def in_plate(x, z, view=lambda x: x.T, means=MEANS):
    """Observe the columns of x in an inner plate."""
    with pyro.plate("columns", 3):
        pyro.sample("x", dist.Normal(z + means.unsqueeze(-1), 1.0), obs=view(x))


def as_event(x, z, view=lambda x: x, means=MEANS):
    pyro.sample("x", dist.Normal(z.unsqueeze(-1) + means, 1.0).to_event(1), obs=view(x))


def column_by_column(x, z, order=(2, 0, 1)):
    for i in order:
        pyro.sample(f"x{i}", dist.Normal(z + MEANS[i], 1.0), obs=x[:, i])


def sequential_plate(x, z):
    for i in pyro.plate("columns", 3):
        pyro.sample(f"x{i}", dist.Normal(z + MEANS[i], 1.0), obs=x[:, i])


def in_parts(x, z):
    first, rest = x.split([1, 2], -1)
    pyro.sample("b", dist.Normal(z.unsqueeze(-1) + MEANS[1:], 1.0).to_event(1), obs=rest)
    pyro.sample("a", dist.Normal(z, 1.0), obs=first.squeeze(-1))


def filled(x):
    result = torch.empty(3, len(x))
    result.copy_(x.T)
    return result


def under_a_mask(x, z):
    """Replace missing values by zero and mask them."""
    known = torch.arange(len(x)).unsqueeze(-1) != torch.arange(3)
    with pyro.poutine.mask(mask=known.T):
        in_plate(x, z, lambda x: torch.where(known, x, 0.0).T)


def masked(x, z):
    known = (torch.arange(len(x)) > 0).unsqueeze(-1).expand(-1, 3)
    p = dist.Normal(z.unsqueeze(-1) + MEANS, 1.0).mask(known).to_event(1)
    pyro.sample("x", p, obs=x.masked_fill(~known, 0.0))


VIEWS = {
    "transposed": in_plate,
    "moved": functools.partial(in_plate, view=lambda x: x.movedim(-1, 0)),
    "copied": functools.partial(in_plate, view=lambda x: x.T.contiguous()),
    "cast to double": functools.partial(in_plate, view=lambda x: x.double().T),
    "indexed": functools.partial(in_plate, view=lambda x: x.T[torch.tensor([0, 1, 2])]),
    "stacked": functools.partial(in_plate, view=lambda x: torch.stack(x.unbind(1))),
    "through numpy": functools.partial(in_plate, view=lambda x: torch.from_numpy(x.numpy()).T),
    "copied into a buffer": functools.partial(in_plate, view=filled),
    "reversed": functools.partial(as_event, view=lambda x: x.flip(1), means=MEANS.flip(0)),
    "permuted": functools.partial(
        as_event, view=lambda x: x[:, [1, 2, 0]], means=MEANS[torch.tensor([1, 2, 0])]
    ),
    "padded": functools.partial(
        as_event,
        view=lambda x: nn.functional.pad(x, (1, 0)),
        means=torch.cat([torch.ones(1), MEANS]),
    ),
    "beside a constant": functools.partial(
        as_event,
        view=lambda x: torch.cat([x, torch.ones(len(x), 1)], -1),
        means=torch.cat([MEANS, torch.ones(1)]),
    ),
    "unchanged": as_event,
    "column by column": column_by_column,
    "sequential plate": sequential_plate,
    "in parts": in_parts,
    "under a mask": under_a_mask,
    "masked distribution": masked,
}


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("view", VIEWS)
def test_means_have_the_layout_of_x(view, rows):
    model, random = program(VIEWS[view]), torch.randn(rows, 3)
    for x in (random, torch.zeros(rows, 3), random.T.contiguous().T):
        found = [pv.generate(model, x), pv.reconstruct(model, guide, x)]
        for means in found:
            torch.testing.assert_close(means, MEANS.expand(rows, 3), atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_generate_accepts_data_of_any_dtype(dtype):
    x = torch.zeros(4, 3, dtype=dtype)
    model = program(functools.partial(in_plate, view=lambda x: x.float().T))
    torch.testing.assert_close(pv.generate(model, x), MEANS.expand(4, 3), atol=0.02, rtol=0)


COMPUTED = {
    "whole numbers": lambda x: x.long(),
    "booleans": lambda x: (x > 0.5).float(),
    "scaled": lambda x: x / 255,
    "standardized": lambda x: (x - x.mean(0)) / (x.std(0) + 1),
    "log": lambda x: (1 + x.abs()).log(),
    "squared": lambda x: x * x,
    "weighted": lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_elementwise_functions_keep_the_layout(compute):
    model = program(functools.partial(in_plate, view=lambda x: compute(x).T))
    x = torch.randn(4, 3)
    for found in (pv.generate(model, x), pv.reconstruct(model, guide, x)):
        torch.testing.assert_close(found, MEANS.expand(4, 3), atol=0.02, rtol=0)


def images(x, z):
    """Observe images with the channel last."""
    loc = z[..., None, None, None] + torch.arange(12.0).reshape(3, 2, 2)
    p = dist.Normal(loc, 1.0).to_event(3)
    pyro.sample("x", p, obs=x.permute(0, 2, 3, 1))


def steps(x, z):
    """Observe one site per step, from the last to the first; each step is a vector."""
    for t in (2, 1, 0):
        loc = z.unsqueeze(-1) + 10 * t + torch.arange(2.0)
        pyro.sample(f"x_{t}", dist.Normal(loc, 1.0).to_event(1), obs=x[:, t])


def numbers(x, z):
    pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x[..., None])


def flat(x, z):
    pyro.sample("x", dist.Normal(z[..., None] + torch.arange(6.0), 1.0).to_event(1),
                obs=x.flatten(1))  # fmt: skip


SHAPES = {
    "images": (images, torch.arange(12.0).reshape(3, 2, 2).permute(2, 0, 1)),
    "steps": (steps, torch.tensor([0.0, 10.0, 20.0]).unsqueeze(-1) + torch.arange(2.0)),
    "numbers": (numbers, torch.tensor(0.0)),
    "flattened": (flat, torch.arange(6.0).reshape(2, 3)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_predictions_keep_the_shape_of_events_of_any_rank(shape):
    observe, means = SHAPES[shape]
    model, x = program(observe), torch.randn(4, *means.shape)
    for found in (pv.generate(model, x), pv.reconstruct(model, guide, x)):
        torch.testing.assert_close(found, means.expand(x.shape), atol=0.02, rtol=0)


def test_sites_of_covariates_are_not_sites_of_x():
    """A covariate with the shape of x is observed before x."""

    def observe(x, z, y):
        pyro.sample("y", dist.Normal(z.unsqueeze(-1) - MEANS, 1.0).to_event(1), obs=y)
        in_plate(x, z)

    model, x, y = program(observe), torch.zeros(3, 3), torch.zeros(3, 3)
    for found in (pv.generate(model, x, y), pv.reconstruct(model, guide, x, y)):
        torch.testing.assert_close(found, MEANS.expand(3, 3), atol=0.02, rtol=0)
    by_site = pv.generate(model, x, y, by_site=True)
    torch.testing.assert_close(by_site["y"], -MEANS.expand(3, 3), atol=0.02, rtol=0)
    torch.testing.assert_close(by_site["x"], MEANS.expand(3, 3), atol=0.02, rtol=0)


def twice(x, z):
    as_event(x, z)
    pyro.sample("y", dist.Normal(z, 1.0), obs=x[:, 0])


def overwritten(x):
    copy = x.clone()
    copy[:, 0] = 0.0
    return copy


def half(x, z):
    pyro.sample("x", dist.Normal(z.unsqueeze(-1) + MEANS[:2], 1.0).to_event(1), obs=x[:, :2])


def expanded(x, z):
    with pyro.plate("columns", 3):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0].expand(3, len(x)))


REFUSED = {
    "observed twice": (twice, "observed more than once"),
    "repeated": (expanded, "observed more than once"),
    "in part": (half, "4 of the 12 numbers of x cannot be traced to an observed"),
    "mixed": (functools.partial(as_event, view=lambda x: x @ torch.eye(3)), "no observed site"),
    "sum of two": (functools.partial(as_event, view=lambda x: x + x.flip(1)), "no observed site"),
    "in place": (functools.partial(as_event, view=lambda x: x.clone().mul_(2)), "no observed site"),
    "overwritten": (functools.partial(as_event, view=overwritten), "no observed site"),
    "replaced": (
        functools.partial(as_event, view=lambda x: torch.where(x[:, :1] >= 0, x, 0.0)),
        "numbers of x cannot be traced to an observed site"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_layouts_raise_and_by_site_returns_them(case):
    observe, message = REFUSED[case]
    model, x = program(observe), torch.tensor([[1.0], [-1.0], [2.0], [3.0]]).expand(4, 3).clone()
    calls = [
        functools.partial(pv.generate, model, x),
        functools.partial(pv.reconstruct, model, guide, x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{message}.*by_site=True"):
            call()
        found = call(by_site=True)
        assert set(found) == ({"x", "y"} if observe is twice else {"x"})
        wanted = torch.zeros(3) if observe is expanded else MEANS[: found["x"].shape[1]]
        torch.testing.assert_close(found["x"], wanted.expand_as(found["x"]), atol=0.02, rtol=0)


def test_generate_with_a_subsampled_plate():
    def model(x):
        with pyro.plate("data", 200, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1e-3))
            in_plate(x, z)

    found = pv.generate(model, torch.zeros(4, 3))
    torch.testing.assert_close(found, MEANS.expand(4, 3), atol=0.02, rtol=0)


def test_generate_refuses_a_plate_of_another_size():
    def model(x):
        with pyro.plate("data", 7):
            pyro.sample("x", dist.Normal(torch.zeros(7), 1.0), obs=x)

    for rows in (1, 4):
        with pytest.raises(ValueError, match=f'"data" has size 7 for a minibatch of {rows} row'):
            pv.generate(model, torch.zeros(rows))


def test_generate_returns_means_at_padded_steps():
    """Padded steps are masked, but their means are returned."""
    model = pv.models.SequenceModel(
        prior=pv.priors.StandardNormal(2),
        transition=lambda z: dist.Normal(z, 0.4).to_event(1),
        likelihood=lambda z: dist.Normal(z + 100.0, 1.0).to_event(1),
    )
    x, lengths = torch.randn(4, 3, 2), torch.tensor([3, 1, 2, 1])
    found = pv.generate(model, x, lengths, seed=0)
    sites = pv.generate(model, x, lengths, seed=0, by_site=True)
    assert torch.equal(found, torch.stack([sites[f"x_{t}"] for t in (1, 2, 3)], 1))
    assert ((found - 100).abs() < 10).all()


def test_generate_with_distributions_without_a_mean_and_with_points():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 3):
                pyro.sample("x", dist.Cauchy(z + MEANS.unsqueeze(-1), 1e-6), obs=x.T)

    found = pv.generate(model, torch.zeros(5, 3))
    torch.testing.assert_close(found - found[:, :1], MEANS.expand(5, 3), atol=0.1, rtol=0)

    def points(x):
        with pyro.plate("data", len(x)), pyro.plate("columns", 3):
            p = dist.Delta(MEANS.unsqueeze(-1).expand(3, len(x)))
            pyro.sample("x", p, obs=x.T)

    assert torch.equal(pv.generate(points, torch.zeros(5, 3)), MEANS.expand(5, 3))


def test_one_mask_for_all_rows():
    """Such a mask has no dimension, and neither has the event."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(torch.tensor(True)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(3 * x, 1e-4))

    x = torch.randn(20)
    torch.testing.assert_close(pv.reconstruct(model, guide, x), 3 * x, atol=1e-3, rtol=0)
