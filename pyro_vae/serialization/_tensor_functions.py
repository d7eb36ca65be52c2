"""Programs as functions of tensors: x -> parameters of q(z|x), and z -> E[x|z].

Such a function draws no random numbers and checks no values, so ``torch.export`` can trace it. The
number of rows remains a symbol.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import free_param_names
from pyro_vae._programs.predictions import drawn_observations, known_mean
from pyro_vae._programs.runs import plain_trace, trace_of
from pyro_vae._programs.sites import (
    Site,
    Unobserve,
    data_frame,
    random_sites,
    was_observed,
)
from pyro_vae._utils.modules import modules
from pyro_vae._utils.random import seeded
from pyro_vae.distributions._moments import closed_form_mean, closed_form_moments
from pyro_vae.distributions._supports import is_angle

SEEDS = (0, 1)  # of two runs whose results must agree


class TensorFunction(nn.Module):
    """A program as a function of tensors, created in the open parameter store of its pair.

    The modules of the program are submodules. The values of its ``pyro.param`` statements are
    constants.

    Attributes:
        inputs: names of the tensors that it takes.
        outputs: names of the tensors that it returns.
        example: tensors that it takes.
        row_dims: the dimension of the data points in each of them.
    """

    inputs: list[str]
    outputs: list[str]
    example: tuple[Tensor, ...]
    row_dims: list[int]

    def __init__(self, program: Program):
        super().__init__()
        found = [program] if isinstance(program, nn.Module) else modules(program)
        self.modules_of_program = nn.ModuleList(found)
        self._of_program = (program,)  # not a submodule a second time
        store = pyro.get_param_store()
        self._params = {name: store[name].detach().clone() for name in free_param_names()}

    @property
    def program(self) -> Any:
        """The program."""
        return self._of_program[0]

    def run(
        self, args: Sequence[Tensor], values: Mapping[str, Tensor], at_means: Collection[str]
    ) -> poutine.Trace:
        """Run the program without its observations, with some values of its sites.

        Args:
            args: a minibatch x, and covariates.
            values: values of latents, by name.
            at_means: names of sites whose values are their means instead of samples.
        """
        with _Fixed(self._params, values, at_means):
            return plain_trace(Unobserve()(self.program), *args)


class Encoder(TensorFunction):
    """Maps x to the means and standard deviations of q(z|x), or to the guide's parameters.

    Args:
        guide: program of q(z|x).
        args: a minibatch x, and covariates.

    Raises:
        ValueError: q(z|x) has no closed-form mean or standard deviation at a site, and the guide
            has no ``parameters_of``. Or they depend on samples of other sites.
    """

    def __init__(self, guide: Program, args: Sequence[Tensor]):
        super().__init__(guide)
        runs = [_moments(guide, args, seed) for seed in SEEDS]
        unknown = [name for name, moments in runs[0].items() if not moments]
        if not unknown:
            _require_equal(*runs, "q(z|x) depends on samples of other sites, as in a hierarchy")
        elif not callable(getattr(guide, "parameters_of", None)):
            raise ValueError(
                f"site {unknown[0]!r} of the guide has no closed-form mean and standard deviation, "
                "and the guide has no method parameters_of. Export its network by torch.export"
            )
        self.sites = [] if unknown else [*runs[0]]
        self.inputs = _names_of(args)
        self.outputs = [f"{name}.{part}" for name in self.sites for part in ("mean", "stddev")]
        self.outputs = self.outputs or ["parameters"]
        self.example, self.row_dims = tuple(args), [0] * len(args)

    def forward(self, *args: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name."""
        if not self.sites:
            with _Fixed(self._params, {}, ()):
                return {"parameters": self.program.parameters_of(*args)}
        nodes = self.run(args, {}, self.sites).nodes
        found = [nodes[name]["fn"] for name in self.sites]
        parts = [part for fn in found for part in _mean_and_stddev(fn)]
        return dict(zip(self.outputs, parts, strict=True))


class Decoder(TensorFunction):
    """Maps latents to the mean of each observed site.

    Args:
        model: program of p(x, z).
        args: a minibatch x, and covariates.

    Raises:
        ValueError: p(x|z) has no closed-form mean at a site. Or the mean depends on x, or on sites
            other than the latents of the data points.
    """

    def __init__(self, model: Program, args: Sequence[Tensor]):
        super().__init__(model)
        x, *covariates = args
        with seeded(SEEDS[0]):
            trace = trace_of(Unobserve()(model), *args)
        observed = drawn_observations(trace)
        self.outputs = [site["name"] for site in observed]
        latents = [
            site
            for site in random_sites(trace)
            if data_frame(site) is not None and not site["is_observed"] and not was_observed(site)
        ]
        if not latents or not observed:
            lack = "no observed site" if latents else "no latent site"
            raise ValueError(f"the model has {lack} in the plate of the data points")
        for site in observed:
            if known_mean(site) is None:
                raise ValueError(
                    f"p(x|z) at the observed site {site['name']!r} has no closed-form mean"
                )
        self.latents = [site["name"] for site in latents]
        self.inputs = self.latents + _names_of(args)[1:]
        self.example = (*(site["value"].detach() for site in latents), *covariates)
        self.row_dims = [_row_dim(site) for site in latents] + [0] * len(covariates)
        self._event_shape, self._like = x.shape[1:], {"dtype": x.dtype, "device": x.device}
        runs = []
        for each, seed in zip((x, torch.zeros_like(x)), SEEDS, strict=True):
            with seeded(seed):
                means = self._means(each, self.example, ())
            runs.append({name: (mean,) for name, mean in means.items()})
        _require_equal(
            *runs, "E[x|z] depends on x itself, or on sites other than the latents of data points"
        )

    def forward(self, *args: Tensor) -> dict[str, Tensor]:
        """Return the mean of each observed site by name."""
        x = torch.zeros((args[0].shape[self.row_dims[0]], *self._event_shape), **self._like)
        return self._means(x, args, self.outputs)

    def _means(
        self, x: Tensor, args: Sequence[Tensor], at_means: Collection[str]
    ) -> dict[str, Tensor]:
        count = len(self.latents)
        latents = dict(zip(self.latents, args[:count], strict=True))
        nodes = self.run((x, *args[count:]), latents, at_means).nodes
        return {name: closed_form_mean(nodes[name]["fn"]) for name in self.outputs}


class _Fixed(Messenger):
    """Fixes the values of ``pyro.param`` statements and of sites."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        at_means: Collection[str],
    ):
        super().__init__()
        self._params, self._values, self._at_means = params, values, at_means

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self._params:
            msg["value"], msg["done"] = self._params[msg["name"]], True

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._values:
            msg["value"], msg["done"] = self._values[msg["name"]], True
        elif msg["name"] in self._at_means:
            msg["value"], msg["done"] = closed_form_mean(msg["fn"]), True


def _moments(guide: Program, args: Sequence[Tensor], seed: int) -> dict[str, tuple[Tensor, ...]]:
    """Return the mean and standard deviation of each latent, or () if either has no closed form."""
    with seeded(seed):
        trace = trace_of(guide, *args)
    latents = [site for site in random_sites(trace) if not site["is_observed"]]
    found: dict[str, tuple[Tensor, ...]] = {}
    for site in latents:
        if data_frame(site) is not None:
            found[site["name"]] = () if known_mean(site) is None else _mean_and_stddev(site["fn"])
    if not found:
        raise ValueError("the guide has no latent site in the plate of the data points")
    return found


def _mean_and_stddev(fn: TorchDistributionMixin) -> tuple[Tensor, ...]:
    """Return the mean and standard deviation of a distribution, or () without closed form."""
    if is_angle(fn):
        return closed_form_moments(fn) or ()
    try:
        return fn.mean, fn.stddev
    except NotImplementedError:
        return ()


def _require_equal(
    first: Mapping[str, tuple[Tensor, ...]], second: Mapping[str, tuple[Tensor, ...]], reason: str
) -> None:
    for name, values in first.items():
        for one, other in zip(values, second[name], strict=True):
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True):
                raise ValueError(
                    f"{reason}: it differs between two runs at site {name!r}. Only functions of "
                    "the inputs can be exported"
                )


def _names_of(args: Sequence[Tensor]) -> list[str]:
    return ["x"] + [f"covariate_{number}" for number in range(1, len(args))]


def _row_dim(site: Site) -> int:
    """Return the dimension of the data points in the value of a site, from the left."""
    frame, fn = data_frame(site), site["fn"]
    return site["value"].dim() - fn.event_dim + frame.dim
