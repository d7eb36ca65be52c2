"""Codes and the aggregated posterior, against closed forms."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from drawn import identity_pair, texts
from matplotlib.colors import to_hex
from matplotlib.path import Path

import pyro_vae as pv
from pyro_vae.plots._prior import PriorOfSite


def rows_with_covariance(count, variances):
    """Return rows (N, D) with that exact covariance, along random orthogonal axes."""
    size = len(variances)
    rows = torch.randn(count, size).double()
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T @ rows / count)).T
    axes = torch.linalg.qr(torch.randn(size, size).double()).Q
    return (white * torch.tensor(variances).double().sqrt()) @ axes.T, axes


def points(axes):
    """Return all points of the scatters, (N, 2)."""
    shown = [c.get_offsets() for c in axes.collections if len(c.get_offsets())]
    return torch.as_tensor(np.concatenate(shown))


def in_order(rows):
    return torch.tensor(sorted(rows.tolist()))


def test_codes_are_the_principal_components_of_known_covariance():
    z, directions = rows_with_covariance(60, [4.0, 3.0, 2.0, 1.0])
    (axes,) = pv.plots.codes(z + 7.0).axes
    first, second = (v * v[v.abs().argmax()].sign() for v in directions.T[:2])
    torch.testing.assert_close(
        in_order(points(axes)),
        in_order(torch.stack([z @ first, z @ second], -1)),
        atol=1e-5,
        rtol=0,
    )
    assert axes.get_xlabel() == "principal component 1 (40% of the variance)"
    assert axes.get_ylabel() == "principal component 2 (30% of the variance)"


@pytest.mark.parametrize("size", [2, 3])
def test_codes_of_chosen_dimensions_are_the_means_of_the_guide(size):
    prior = dist.Normal(torch.zeros(size), 1.0).to_event(1)
    model, guide = identity_pair(prior)
    x = torch.randn(20, size)
    encoding = pv.encode(model, guide, x)
    (axes,) = pv.plots.codes(encoding, dimensions=[1, 0]).axes
    torch.testing.assert_close(in_order(points(axes)), in_order(x[:, [1, 0]]))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z[1]", "z[0]")


@pytest.mark.parametrize("kind", ["integers", "strings", "tensor"])
def test_each_label_has_one_color_and_an_entry_in_the_legend(kind):
    """Twelve labels have ten colors and two markers."""
    z, numbers = torch.randn(60, 2).double(), torch.arange(60) % 12
    labels = {
        "integers": numbers.tolist(),
        "strings": [f"kind {n:02}" for n in numbers],
        "tensor": numbers,
    }[kind]
    (axes,) = pv.plots.codes(z, labels).axes
    legend = axes.get_legend()
    names = [str(n) if kind != "strings" else f"kind {n:02}" for n in range(12)]
    assert texts(legend.get_texts()) == names
    of_legend = [to_hex(handle.get_facecolor()[0]) for handle in legend.legend_handles]
    assert len(set(of_legend)) == 10
    for marker, drawn in enumerate(c for c in axes.collections if len(c.get_offsets())):
        for point, color in zip(drawn.get_offsets(), drawn.get_facecolors(), strict=True):
            row = (z - torch.as_tensor(np.asarray(point))).abs().sum(1).argmin()
            assert to_hex(color) == of_legend[numbers[row]]
            assert (numbers[row] >= 10) == marker


def test_a_label_that_starts_with_an_underscore_is_in_the_legend():
    """Matplotlib leaves such names out of a legend."""
    (axes,) = pv.plots.codes(torch.randn(4, 2), ["_unknown", "a_b", "_unknown", "a_b"]).axes
    assert [text.strip("\u200b") for text in texts(axes.get_legend().get_texts())] == [
        "_unknown", "a_b"
    ]  # fmt: skip


def test_a_legend_of_twenty_labels_is_inside_of_the_figure():
    figure = pv.plots.codes(torch.randn(40, 2), labels=torch.arange(40) % 20)
    figure.canvas.draw()
    legend = figure.axes[0].get_legend().get_window_extent()
    assert legend.height < figure.axes[0].get_window_extent().height


def test_numbers_as_labels_have_a_color_bar():
    z, labels = torch.randn(30, 2).double(), torch.randn(30)
    labels[4] = torch.nan
    axes, bar = pv.plots.codes(z, labels).axes
    (drawn,) = axes.collections
    values = torch.as_tensor(drawn.get_array().filled(torch.nan))
    for point, value in zip(drawn.get_offsets(), values, strict=True):
        row = (z - torch.as_tensor(np.asarray(point))).abs().sum(1).argmin()
        assert value == labels[row] or (row == 4 and value.isnan())
    assert bar.get_ylabel() == "label"
    assert len(pv.plots.codes(z, torch.arange(30)).axes) == 2  # too many integers for a legend


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, z: p.codes(z[:, :1]), ValueError, "encoding must have at least two numbers"),
        (lambda p, z: p.codes(z * torch.nan), ValueError, "encoding has NaN or infinite values"),
        (lambda p, z: p.codes(z, [1, 2]), ValueError, r"one label for each of 30 codes, .* \(2,\)"),
        (lambda p, z: p.codes(z, list(map(str, range(30)))), ValueError, "at most 20 different"),
        (lambda p, z: p.codes(z, dimensions=[0, 0]), ValueError, "must be 2 different numbers"),
        (lambda p, z: p.codes(z, dimensions=[0.5, 1]), TypeError, "must hold whole numbers"),
    ],
)
def test_codes_refuse_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(pv.plots, torch.randn(30, 3))


def test_data_points_with_masked_codes_are_left_out():
    mask = torch.tensor([True, True, True, False] * 10)

    def latent(loc, mask):
        with pyro.plate("data", len(loc)), pyro.poutine.mask(mask=mask):
            return pyro.sample("z", dist.Normal(loc, 0.4).to_event(1))

    def model(x, mask):
        with pyro.plate("data", len(x)):
            with pyro.poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.randn(40, 2) + 99 * (~mask).unsqueeze(-1)
    codes = pv.encode(model, latent, x, mask)
    (axes,) = pv.plots.codes(codes).axes
    torch.testing.assert_close(in_order(points(axes)), in_order(x[mask].double()))
    axes = pv.plots.codes(codes, labels=["a", "b", "a", "masked"] * 10).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    axes = pv.plots.aggregated_posterior(model, latent, x, mask).axes[0]
    assert axes.get_xlim()[1] < 50
    with pytest.raises(ValueError, match="'z' is masked for row 3"):
        pv.plots.traversals(model, latent, x, mask, row=3, image_shape=(1, 2))
    none = torch.zeros_like(mask)
    with pytest.raises(ValueError, match="masked for all data points"):
        pv.plots.codes(pv.encode(model, latent, x, none))


SHARES = torch.tensor([0.95, 0.8, 0.5]).double()


def test_regions_hold_their_shares_and_marginals_are_exact():
    """Levels come from 5000 samples of the guide: 5 of their standard errors."""
    model, guide = identity_pair(dist.Normal(torch.zeros(2), 1.0).to_event(1), 0.4)
    x = torch.randn(50, 2) * torch.tensor([1.0, 0.5]) + torch.tensor([0.5, 0.0])
    figure = pv.plots.aggregated_posterior(model, guide, x, masses=SHARES.tolist())
    axes, above, beside = figure.axes
    regions, lines = axes.collections[:2]
    samples = x.repeat(400, 1) + 0.4 * torch.randn(20_000, 2)
    q = dist.MixtureSameFamily(dist.Categorical(torch.ones(50)), dist.Normal(x, 0.4).to_event(1))
    density = q.log_prob(samples).exp().double()
    errors = (SHARES * (1 - SHARES) * (1 / 5000 + 1 / 20_000)).sqrt()
    inside = torch.stack([(density > level).double().mean() for level in regions.levels[:-1]])
    assert ((inside - SHARES).abs() < 5 * errors + 0.002).all()
    # The share of a standard normal with a density above t is 1 - 2 pi t.
    held = 1 - 2 * math.pi * torch.as_tensor(lines.levels)
    assert ((held - SHARES).abs() < 5 * (SHARES * (1 - SHARES) / 5000).sqrt() + 0.002).all()
    outline = Path(np.concatenate(lines.allsegs[0]))
    radius = np.linalg.norm(outline.vertices, axis=1)
    np.testing.assert_allclose(radius, math.sqrt(-2 * math.log(1 - held[0])), atol=0.01)
    grid, of_prior = above.lines[0].get_xdata(), above.lines[0].get_ydata()
    normal = dist.Normal(torch.zeros(()).double(), 1.0)
    np.testing.assert_allclose(of_prior, normal.log_prob(torch.tensor(grid)).exp(), atol=1e-6)
    for side, column, order in ((above, 0, [0, 1]), (beside, 1, [1, 0])):
        edge = side.collections[0].get_paths()[0].vertices[:, order]
        edge = edge[edge[:, 1] > 0.01]
        at = torch.tensor(edge[:, :1])
        exact = dist.Normal(x[:, column].double(), 0.4).log_prob(at).exp().mean(1)
        np.testing.assert_allclose(edge[:, 1], exact, atol=1e-5)


def test_the_most_active_dimensions_are_drawn():
    prior = dist.Normal(torch.zeros(4), torch.tensor([1.0, 1.0, 10.0, 1.0])).to_event(1)
    model, guide = identity_pair(prior, 0.3)
    x = torch.randn(40, 4) * torch.tensor([0.1, 1.0, 2.0, 0.8])
    axes = pv.plots.aggregated_posterior(model, guide, x).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z[1]", "z[3]")
    (single,) = pv.plots.aggregated_posterior(model, guide, x, dimensions=[2]).axes
    grid = torch.tensor(single.lines[0].get_xdata())
    exact = dist.Normal(0.0, 10.0).log_prob(grid).exp()
    np.testing.assert_allclose(single.lines[0].get_ydata(), exact, atol=1e-6)


def test_the_density_of_a_dependent_prior_is_exact_in_all_its_dimensions():
    covariance = torch.tensor([[1.0, 0.8], [0.8, 2.0]])
    prior = dist.MultivariateNormal(torch.zeros(2), covariance)
    model, guide = identity_pair(prior)
    known = PriorOfSite(model, guide, [torch.zeros(3, 2)], "z", 0)
    grids = [torch.linspace(-4, 4, 50).double(), torch.linspace(-6, 6, 60).double()]
    found = known.density([1, 0], grids)
    points = torch.stack(torch.meshgrid(*grids, indexing="ij"), -1).flip(-1).float()
    torch.testing.assert_close(
        found.joint, prior.log_prob(points).exp().double(), atol=1e-6, rtol=1e-4
    )
    assert known.density([0], grids[:1]) is None


def test_the_density_of_a_prior_with_parameters_is_drawn():
    """A learned prior has gradients, and its marginals are those of the mixture."""
    prior = pv.priors.MixtureOfNormals(2, components=3)
    model = pv.LatentVariableModel(prior, pv.likelihoods.Normal(torch.nn.Identity(), scale=0.1))
    x = torch.randn(30, 2)
    guide = identity_pair(dist.Normal(torch.zeros(2), 1.0).to_event(1))[1]
    above = pv.plots.aggregated_posterior(model, guide, x).axes[1]
    line = above.lines[0].get_xydata()
    with torch.no_grad():
        p = prior()
        normals = dist.Normal(p.loc[:, 0], p.scale[:, 0])
        exact = normals.log_prob(torch.tensor(line[:, :1])).exp() @ p.logits.softmax(0).double()
    np.testing.assert_allclose(line[:, 1], exact, atol=2e-3)


@pytest.mark.parametrize("prior", [dist.Exponential(1.0), dist.LogNormal(0.0, 0.5)])
def test_the_density_is_zero_off_the_support(prior):
    """The formula of an exponential density is above one for negative numbers."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior.expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x, 0.3).to_event(1))

    above = pv.plots.aggregated_posterior(model, guide, torch.randn(30, 2)).axes[1]
    grid, density = torch.tensor(above.lines[0].get_xydata()).T
    assert (grid < 0).any()
    positive = grid > 0
    assert (density[~positive] == 0).all()
    exact = prior.log_prob(grid[positive]).exp()
    torch.testing.assert_close(density[positive], exact, atol=1e-6, rtol=1e-5)


def test_the_lines_of_a_simplex_are_estimated():
    """Numbers of a simplex have no density on a grid of both dimensions."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.tensor([2.0, 3.0])))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(x.exp()))

    figure = pv.plots.aggregated_posterior(model, guide, torch.randn(30, 2))
    density = figure.axes[1].lines[0].get_ydata()
    assert np.isfinite(density).all()
    assert density.max() > 0.5


def test_a_prior_without_a_density_is_estimated_from_samples():
    """The prior of z_2 depends on z_1. The lines still hold their shares of it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z1", dist.Normal(0.0, 1.0))
            w = pyro.sample("z2", dist.Normal(z[..., None].expand(*z.shape, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(x[:, 0], 0.5))
            pyro.sample("z2", dist.Normal(x, 0.5).to_event(1))

    figure = pv.plots.aggregated_posterior(
        model, guide, torch.randn(30, 2), site="z2", masses=[0.5]
    )
    lines = figure.axes[0].collections[1]
    z2 = torch.randn(20_000, 1) + torch.randn(20_000, 2)
    outline = Path(np.concatenate(lines.allsegs[0]))
    inside = outline.contains_points(z2.numpy()).mean()
    assert abs(inside - 0.5) < 5 * math.sqrt(0.25 * (1 / 5000 + 1 / 20_000)) + 0.01


def test_a_latent_with_one_number_has_one_pair_of_densities():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5))

    x = torch.randn(30)
    (axes,) = pv.plots.aggregated_posterior(model, guide, x).axes
    grid = torch.tensor(axes.lines[0].get_xdata())
    exact = dist.Laplace(0.0, 1.0).log_prob(grid).exp()
    np.testing.assert_allclose(axes.lines[0].get_ydata(), exact, atol=1e-6)
    assert texts(axes.get_legend().get_texts()) == ["aggregated posterior", "prior"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"masses": [0.5, 1.0]}, ValueError, "different numbers between 0 and 1, got"),
        ({"masses": []}, ValueError, "masses must be one to 4"),
        ({"masses": 0.5}, TypeError, "masses must be a sequence"),
        ({"dimensions": [0, 1, 2]}, ValueError, "dimensions must be 2 different numbers"),
        ({"site": "w"}, ValueError, "site='w'"),
    ],
)
def test_aggregated_posterior_refuses_bad_arguments(options, error, message):
    model, guide = identity_pair(dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pytest.raises(error, match=message):
        pv.plots.aggregated_posterior(model, guide, torch.randn(5, 3), **options)


def test_discrete_latents_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(x.exp()).to_event(1))

    with pytest.raises(ValueError, match="site 'z' is discrete"):
        pv.plots.aggregated_posterior(model, guide, torch.randn(5, 2))
