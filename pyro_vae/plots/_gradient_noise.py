"""Draw the signal-to-noise ratios of objectives' gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pyro_vae._utils.extras import require
from pyro_vae.evaluation import GradientNoise
from pyro_vae.plots._axes import COLORS, GRAY, WIDTH, check_axes, in_legend, label_rows, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROGRAMS = ("model", "guide")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def gradient_noise(results: GradientNoise | Mapping[str, GradientNoise]) -> Figure:
    r"""Draw the signal-to-noise ratio of each objective's gradient, for model and guide.

    A dotted line is at :math:`\sqrt{2 / \pi R}` for R gradients. A ratio near this line may be
    noise alone; see :func:`pyro_vae.gradient_noise`.

    Args:
        results: the result of :func:`pyro_vae.gradient_noise`, or several results by name, such as
            those before and after a fit.

    Returns:
        A figure with two axes, of the model and of the guide.

    Raises:
        ImportError: The extra ``report`` is not installed.
        ValueError: There is no result.
        TypeError: ``results`` has the wrong type.

    Example:
        >>> import torch, pyro_vae as pv
        >>> model = pv.LatentVariableModel(
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, [8], 16)),
        ... )
        >>> guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(16, [8]))
        >>> objectives = {"K = 1": pv.objectives.IWAE(1), "K = 10": pv.objectives.IWAE(10)}
        >>> x = torch.rand(20, 16).round()
        >>> noise = pv.gradient_noise(model, guide, x, objectives, repeats=5, seed=0)
        >>> figure = pv.plots.gradient_noise(noise)
        >>> [axes.get_title() for axes in figure.axes]
        ['model', 'guide']
    """
    check_axes(None)
    named = dict(results) if isinstance(results, Mapping) else {"": results}
    wrong = [each for each in named.values() if not isinstance(each, GradientNoise)]
    if wrong:
        raise TypeError(
            "results must be a result of pv.gradient_noise, or a dictionary of such results by "
            f"name, got {type(wrong[0]).__name__}"
        )
    if not named:
        raise ValueError("results must have at least one result, got an empty dictionary")
    objectives = list(dict.fromkeys(name for each in named.values() for name in each.moments))
    figure = new_figure(1.4 + 0.25 * len(objectives) * (1 + 0.4 * len(named)), WIDTH + 0.6)
    ticker = require("matplotlib.ticker", "report", "A plot")
    every = figure.subplots(1, 2, sharey=True)
    for axes, program in zip(every, _PROGRAMS, strict=True):
        repeats = set()
        for number, (name, noise) in enumerate(named.items()):
            found = [noise.moments.get(each, {}).get(program) for each in objectives]
            repeats |= {each.repeats for each in found if each is not None}
            ratios = [math.nan if each is None else each.signal_to_noise for each in found]
            offset = 0.5 * ((number + 0.5) / len(named) - 0.5)  # results beside each other
            axes.plot(
                np.where(np.array(ratios) > 0, ratios, np.nan),
                np.arange(len(objectives)) + offset,
                linestyle="",
                marker=_MARKERS[number % len(_MARKERS)],
                color=COLORS[number % len(COLORS)],
                label=in_legend(str(name)),
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        if len(repeats) == 1:
            floor = math.sqrt(2 / (math.pi * repeats.pop()))
            axes.axvline(floor, color=GRAY, linestyle=":", linewidth=1, zorder=0)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(program)
    label_rows(every[0], objectives)
    every[1].tick_params(axis="y", length=0)
    figure.supxlabel(
        "signal-to-noise ratio of the gradient (dotted: noise alone)", fontsize="medium"
    )
    if any(map(str, named)):
        figure.legend(
            *every[0].get_legend_handles_labels(),
            frameon=False,
            ncols=min(3, len(named)),
            loc="outside upper center",
        )
    return figure
