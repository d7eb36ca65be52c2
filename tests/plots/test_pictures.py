"""Pictures of pairs whose decoder returns z, so that each pixel is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from drawn import identity_pair, scaled, texts, tiles

import pyro_vae as pv
from pyro_vae.plots._mosaic import as_images, draw_mosaic
from pyro_vae.plots._prior import PriorOfSite


def normal(size, scale=1.0):
    return dist.Normal(torch.zeros(size), scale).to_event(1)


def test_reconstructions_are_below_their_data_in_rows_of_ten():
    model, guide = identity_pair(normal(6))
    x = torch.randn(13, 6)
    (axes,) = pv.plots.reconstructions(model, guide, x, image_shape=(2, 3), seed=3).axes
    means = pv.reconstruct(model, guide, x, seed=3)
    shown = tiles(axes, 4, 10, 2, 3)
    expected = scaled(torch.cat([x, means])).unflatten(-1, (2, 3))
    torch.testing.assert_close(shown[[0, 2]].flatten(0, 1)[:13], expected[:13])
    torch.testing.assert_close(shown[[1, 3]].flatten(0, 1)[:13], expected[13:])
    assert shown[2:, 3:].isnan().all()
    assert texts(axes.get_yticklabels()) == ["data", "E[x|z]"] * 2


def test_colors_are_the_last_dimension_and_gaps_are_transparent():
    model, guide = identity_pair(normal(12))
    x = torch.rand(3, 3, 2, 2)
    (axes,) = pv.plots.reconstructions(model, guide, x).axes
    shown = tiles(axes, 2, 3, 2, 2)
    values = torch.cat([x, pv.reconstruct(model, guide, x, seed=0)])
    expected = scaled(values).movedim(1, -1).unflatten(0, (2, 3))
    torch.testing.assert_close(shown[..., :3], expected)
    assert (shown[..., 3] == 1).all()
    assert (torch.as_tensor(axes.images[0].get_array())[2, :, 3] == 0).all()


def test_samples_are_those_of_generate():
    model, _ = identity_pair(normal(4))
    x = torch.zeros(12, 1, 2, 2)
    for draw in (False, True):
        (axes,) = pv.plots.samples(model, x, draw=draw, seed=5).axes
        expected = scaled(pv.generate(model, x, draw=draw, seed=5)).flatten(0, 1)
        shown = tiles(axes, 2, 10, 2, 2)
        torch.testing.assert_close(shown.flatten(0, 1)[:12], expected)


def test_traversals_move_one_dimension_by_spreads_of_the_prior():
    scales = torch.tensor([1.0, 2.0, 0.5, 1.0])
    model, guide = identity_pair(normal(4, scales))
    x = torch.randn(3, 2, 2)
    figure = pv.plots.traversals(model, guide, x, row=2, num=5, reach=3, dimensions=[3, 1])
    steps = torch.linspace(-3, 3, 5)
    expected = x[2].flatten().repeat(2, 5, 1)
    expected[0, :, 3] += steps * scales[3]
    expected[1, :, 1] += steps * scales[1]
    shown = tiles(figure.axes[0], 2, 5, 2, 2)
    torch.testing.assert_close(shown, scaled(expected).unflatten(-1, (2, 2)), atol=1e-5, rtol=0)
    assert texts(figure.axes[0].get_yticklabels()) == ["z[3]", "z[1]"]
    assert texts(figure.axes[0].get_xticklabels()) == ["-3", "-1.5", "0", "1.5", "3"]


def test_traversals_stay_inside_of_the_support():
    model, guide = identity_pair(dist.Exponential(torch.ones(4)).to_event(1))
    x = torch.tensor([[[0.5, 6.5], [9.0, 1.0]]])
    (axes,) = pv.plots.traversals(model, guide, x, num=3, dimensions=[0, 1, 2]).axes
    spread = (math.log(1 / 0.16) - math.log(1 / 0.84)) / 2  # norm.cdf(-1) is 0.159
    expected = x[0].flatten().repeat(3, 3, 1)
    expected[0, :, 0] = torch.tensor([-math.log(0.999), 0.5, 0.5 + 2 * spread])
    expected[1, :, 1] = torch.tensor([6.5 - 2 * spread, 6.5, -math.log(0.001)])
    expected[2, :, 2] = torch.tensor([9.0 - 2 * spread, 9.0, 9.0])
    shown = tiles(axes, 3, 3, 2, 2)
    torch.testing.assert_close(shown, scaled(expected).unflatten(-1, (2, 2)), atol=3e-3, rtol=0)


def test_traversals_refuse_a_simplex():
    model, _ = identity_pair(dist.Dirichlet(torch.ones(4)))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(torch.ones(4)))

    with pytest.raises(ValueError, match=r"numbers can change alone.*Use pv.plots.interpolations"):
        pv.plots.traversals(model, guide, torch.randn(1, 2, 2))


def test_pictures_refuse_points_outside_of_the_support():
    """Each grid or path leaves a circle in the plane, and a grid leaves a simplex."""
    for prior in (dist.ProjectedNormal(torch.zeros(2)), dist.Dirichlet(torch.ones(2))):
        model, _ = identity_pair(prior)

        def guide(x, prior=prior):
            with pyro.plate("data", len(x)):
                pyro.sample("z", prior)

        x = torch.randn(1, 1, 2)
        message = "numbers can change alone.*Use pv.plots.interpolations"
        with pytest.raises(ValueError, match=message):
            pv.plots.manifold(model, x=x)
        with pytest.raises(ValueError, match=message):
            pv.plots.traversals(model, guide, x)


def test_traversals_of_many_dimensions_take_the_surest():
    """The standard deviation of the guide, relative to the prior, is the largest in 4 and 7."""
    prior, scale = torch.ones(12), torch.full((12,), 0.1)
    prior[4], scale[7] = 0.2, 0.3
    model, guide = identity_pair(normal(12, prior), scale)
    figure = pv.plots.traversals(model, guide, torch.randn(1, 3, 4), num=2)
    rows = [d for d in range(12) if d not in (4, 7)]
    assert texts(figure.axes[0].get_yticklabels()) == [f"z[{d}]" for d in rows]


def test_traversals_keep_the_covariates_of_their_row():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(4))
            pyro.sample("x", dist.Normal(z.unflatten(-1, (2, 2)) + y, 0.1).to_event(2), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - y).flatten(1), 0.1).to_event(1))

    x, y = torch.randn(3, 2, 2), torch.randn(3, 1, 1)
    (axes,) = pv.plots.traversals(model, guide, x, y, row=1, num=3, dimensions=[0]).axes
    expected = x[1].repeat(3, 1, 1)
    expected[:, 0, 0] += torch.tensor([-2.0, 0.0, 2.0])
    torch.testing.assert_close(tiles(axes, 1, 3, 2, 2)[0], scaled(expected), atol=1e-5, rtol=0)


def test_interpolations_have_one_pair_in_each_row():
    model, guide = identity_pair(normal(4))
    start, end = torch.randn(2, 3, 2, 2)
    (axes,) = pv.plots.interpolations(model, guide, start, end, num=5).axes
    expected = torch.stack([torch.lerp(start, end, t) for t in torch.linspace(0, 1, 5)], 1)
    torch.testing.assert_close(tiles(axes, 3, 5, 2, 2), scaled(expected))
    assert texts(axes.get_xticklabels()) == ["0", "0.25", "0.5", "0.75", "1"]


@pytest.mark.parametrize(
    ("prior", "quantiles"),
    [
        (dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 3.0])), None),
        (dist.Exponential(torch.tensor([1.0, 0.5])), lambda p: -(1 - p).log()),
    ],
)
def test_manifold_shows_z_at_the_quantiles_of_the_prior(prior, quantiles):
    model, guide = identity_pair(prior.to_event(1))
    x = torch.zeros(1, 1, 2)  # an image of two pixels, the numbers of z
    (axes,) = pv.plots.manifold(model, guide=guide, x=x, num=4).axes
    levels = torch.tensor([0.125, 0.375, 0.625, 0.875])
    if quantiles is None:  # those of the normal distribution (NIST tables)
        z = torch.tensor([-1.1503494, -0.3186394, 0.3186394, 1.1503494])
        across, up = 1.0 + z, -2.0 + 3.0 * z
    else:
        across, up = quantiles(levels), 2 * quantiles(levels)
    grid = torch.stack(torch.meshgrid(up.flip(0), across, indexing="ij"))  # the top row first
    expected = torch.stack([grid[1], grid[0]], -1).unsqueeze(-2)
    torch.testing.assert_close(tiles(axes, 4, 4, 1, 2), scaled(expected), atol=1e-5, rtol=0)
    shown = [float(text) for text in texts(axes.get_yticklabels())]
    torch.testing.assert_close(torch.tensor(shown), up.flip(0), atol=0.006, rtol=0)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z[0]", "z[1]")


def test_quantiles_without_a_closed_form_are_those_of_samples():
    """The distribution function at a quantile is known to 5 standard errors of 5000 samples."""
    parts = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])),
        dist.Normal(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), 0.5).to_event(1),
    )
    model, guide = identity_pair(parts)
    prior = PriorOfSite(model, guide, [torch.zeros(7, 1, 2)], None, 0)
    levels = torch.tensor([0.1, 0.5, 0.8]).double()
    found = prior.quantiles(levels)
    for dimension, means in enumerate(([-2.0, 2.0], [0.0, 1.0])):
        known = dist.Normal(torch.tensor(means).double(), 0.5)
        at = known.cdf(found[:, dimension, None]) @ torch.tensor([0.3, 0.7]).double()
        assert ((at - levels).abs() < 5 * (levels * (1 - levels) / 5000).sqrt()).all()


def test_the_scale_of_gray_ignores_missing_values():
    x = torch.tensor([[-1.0, 1.0, torch.nan, 3.0]])
    axes = draw_mosaic(None, as_images(x, (2, 2))[None])
    expected = torch.tensor([0.0, 0.5, torch.nan, 1.0]).reshape(1, 1, 2, 2)
    torch.testing.assert_close(tiles(axes, 1, 1, 2, 2), expected.double(), equal_nan=True)


MODEL, GUIDE = identity_pair(normal(4))
X = torch.rand(3, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.reconstructions(MODEL, GUIDE, X.flatten(1)), ValueError, "x must be images"),
        (
            lambda p: p.reconstructions(MODEL, GUIDE, X, image_shape=(3, 3)),
            ValueError,
            r"image_shape \(3, 3\) does not fit x of shape \(3, 2, 2\)",
        ),
        (
            lambda p: p.reconstructions(MODEL, GUIDE, X, image_shape=(2, 1, 2)),
            ValueError,
            "with 1 or 3 channels, got",
        ),
        (lambda p: p.samples(MODEL, X, image_shape=4), TypeError, "image_shape must be a sequence"),
        (lambda p: p.samples(MODEL, 1001), ValueError, "x must have at most 1000 images"),
        (lambda p: p.samples(MODEL, X, ax=3), TypeError, "ax must be axes of matplotlib, .* got 3"),
        (lambda p: p.traversals(MODEL, GUIDE, X, row=3), ValueError, "row must be below .* 3, got"),
        (
            lambda p: p.traversals(MODEL, GUIDE, X, dimensions=[0, 4]),
            ValueError,
            "dimensions must be some different numbers from 0 to 3, got",
        ),
        (lambda p: p.traversals(MODEL, GUIDE, X, dimensions=2), TypeError, "must be a sequence"),
        (lambda p: p.traversals(MODEL, GUIDE, X, num=400), ValueError, "at most 1000 images"),
        (
            lambda p: p.interpolations(MODEL, GUIDE, X.flatten(1), X.flatten(1)),
            ValueError,
            "start must be images",
        ),
        (lambda p: p.manifold(MODEL, x=X), ValueError, "site 'z' has 4. Use pv.plots.traversals"),
        (lambda p: p.manifold(MODEL, x=X, site="w"), ValueError, r"\['z'\], got site='w'"),
    ],
)
def test_pictures_refuse_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(pv.plots)


def test_the_latent_of_a_hierarchy_is_chosen_by_name():
    layer = pv.likelihoods.Normal(torch.nn.Linear(2, 3), scale=0.5)
    likelihood = pv.likelihoods.Normal(torch.nn.Linear(3, 4), scale=0.1)
    model = pv.models.HierarchicalModel(pv.priors.StandardNormal(2), [layer], likelihood)
    message = (
        r"model has 2\. Pass one of them: site='z_2' of shape \(2,\), site='z_1' of shape \(3,\)"
    )
    with pytest.raises(ValueError, match=message):
        pv.plots.manifold(model, image_shape=(2, 2))
    with pytest.raises(
        ValueError, match=r"'z_1' has 3. Use pv.plots.traversals, or pass another site"
    ):
        pv.plots.manifold(model, image_shape=(2, 2), site="z_1")
    pv.plots.manifold(model, image_shape=(2, 2), site="z_2", num=2)

    def empty(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2), obs=x)

    with pytest.raises(ValueError, match=r"the model has 0\. Sample one in the model"):
        pv.plots.manifold(empty, x=torch.zeros(1, 2, 2))


def test_an_improper_prior_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), (2,)))
            pyro.sample("x", dist.Normal(z.unsqueeze(-2), 0.1).to_event(2), obs=x)

    with pytest.raises(ValueError, match="needs samples of the prior"):
        pv.plots.manifold(model, x=torch.zeros(1, 1, 2))
