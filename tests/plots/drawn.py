"""Numbers that a plot shows, read from the artists of matplotlib."""

import pyro
import pyro.distributions as dist
import torch


def tiles(axes, rows, columns, height, width):
    """Return the images of a mosaic as a tensor (rows, columns, height, width, ...)."""
    shown = torch.as_tensor(axes.images[0].get_array().filled(torch.nan))
    gap = max(1, round(min(height, width) / 14))
    assert shown.shape[:2] == (rows * (height + gap) - gap, columns * (width + gap) - gap)
    parts = [
        shown[r * (height + gap) :, c * (width + gap) :][:height, :width]
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.stack(parts).unflatten(0, (rows, columns))


def scaled(values):
    """Return values on the scale of the plot: 0 to 1, or wider if values lie outside."""
    low, high = min(0.0, values.min().item()), max(1.0, values.max().item())
    return (values.double() - low) / (high - low)


def texts(labels):
    return [label.get_text() for label in labels]


def identity_pair(prior, scale=0.1):
    """Return a pair whose decoder returns z and whose code is x.

    Args:
        prior: distribution of z, without batch dimensions.
        scale: standard deviation of p(x|z) and q(z|x), one number or one for each dimension.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            mean = z.reshape(*z.shape[:-1], *x.shape[1:])
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(x.dim() - 1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1), scale).to_event(1))

    return model, guide
