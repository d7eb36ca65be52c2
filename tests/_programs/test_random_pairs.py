"""Random pairs of programs against sums over all values of their discrete latents.

A pair has up to three plates in any order of dimensions, continuous and discrete latents that
depend on each other, masks, scales, and several observed sites. A discrete latent is summed out by
the model, enumerated by the guide, or sampled. The expected numbers come from Pyro's trace of the
programs at given values, one run for each combination of the summed values.
"""

import contextlib
import itertools
import math
import random
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae._utils.numerics import gradient_or_zeros

B = 4
SIZES = {"bernoulli": 2, "categorical": 3}  # the number of values of discrete latents
MANY = 800  # combinations of values in a sum


@dataclass
class Site:
    name: str
    kind: str
    plates: list
    parents: list
    seed: int
    by: str | None = None  # who sums over the values: "model", "guide", or nobody
    observed: bool = False
    mask: bool | torch.Tensor | None = None
    scale: float = 1.0

    def coefficients(self, number):
        return torch.randn(2, generator=torch.Generator().manual_seed(self.seed + number))


class RandomPair:
    """A random model and guide of x ``(B,)``."""

    def __init__(self, seed):
        self.random = random.Random(seed)  # noqa: S311 - not for secrets
        inner = self.random.choice([0, 0, 1, 1, 2])
        dims = self.random.sample(range(-1 - inner, 0), inner + 1)
        sizes = {"data": B} | {f"inner {n}": self.random.choice([1, 2, 3, 4]) for n in range(inner)}
        self.plates = {
            name: (size, dim) for (name, size), dim in zip(sizes.items(), dims, strict=True)
        }
        self.data_dim = dims[0]
        self.sites = [self.latent(n) for n in range(self.random.randint(1, 4))]
        if all(site.by == "model" for site in self.sites):  # the guide needs a latent
            self.sites[0].by = "nobody"
        for number in range(self.random.randint(1, 2)):
            self.sites.append(self.observation(number))
        self.link()
        self.sampled = [s for s in self.sites if not s.observed and s.by in (None, "nobody")]

    def site(self, name, kinds, **options):
        others = [name for name in self.plates if name != "data" and self.random.random() < 0.5]
        kind, seed = self.random.choice(kinds), self.random.randrange(10**6)
        return Site(name, kind, ["data", *others], [], seed, **options)

    def latent(self, number):
        site = self.site(f"z{number}", ["normal", "vector", "beta", *SIZES])
        if site.kind in SIZES:
            site.by = self.random.choice(["model", "guide", "nobody"])
        if site.by == "guide":
            site.plates = ["data"]
        return site

    def observation(self, number):
        return self.site(f"x{number}", ["normal", "vector", "bernoulli"], observed=True)

    def link(self):
        """Choose parents, masks and scales, within the rules for programs."""
        sums = any(site.by in ("model", "guide") for site in self.sites)
        for number, site in enumerate(self.sites):
            latents = [s for s in self.sites[:number] if not s.observed]
            site.parents = [s for s in latents if self.random.random() < 0.6 and follows(site, s)]
            if site.by not in ("model", "guide"):
                site.mask = self.random.choice([None, None, False, self.random_mask(site)])
            if not sums:
                site.scale = self.random.choice([1.0, 1.0, 0.5, 2.0])

    def shape(self, site, rows=B):
        shape = [1] * len(self.plates)
        for name in site.plates:
            size, dim = self.plates[name]
            shape[dim] = rows if name == "data" else size
        return shape

    def random_mask(self, site):
        generator = torch.Generator().manual_seed(site.seed)
        return torch.rand(self.shape(site), generator=generator) < 0.6

    def signal(self, site, values, rows):
        """Return a number for each element of the plates, from the parents of a site."""
        total = 0.3 * site.coefficients(0)[0] + torch.zeros(self.shape(site, rows))
        for number, parent in enumerate(site.parents, 1):
            if parent.name not in values:  # the guide does not have it
                continue
            value = values[parent.name].float()
            value = value.sum(-1) if parent.kind == "vector" else value
            for name in set(parent.plates) - set(site.plates):
                value = value.sum(self.plates[name][1], keepdim=True)
            slope, shift = site.coefficients(number)
            total = total + slope * torch.sin(value + shift)
        return total

    def observed_value(self, site):
        event = (2,) if site.kind == "vector" else ()
        generator = torch.Generator().manual_seed(site.seed)
        value = torch.randn(*self.shape(site), *event, generator=generator)
        return (value > 0).float() if site.kind == "bernoulli" else value

    def run(self, x, is_model):
        rows = torch.arange(len(x)) % B  # the library also runs a program on other numbers of rows
        values = {}
        sites = [s for s in self.sites if is_model or not (s.observed or s.by == "model")]
        opened = {
            name: pyro.plate(name, len(x) if name == "data" else size, dim=dim)
            for name, (size, dim) in self.plates.items()
            if any(name in site.plates for site in sites)
        }
        for site in sites:
            with contextlib.ExitStack() as stack:
                for name in site.plates:
                    stack.enter_context(opened[name])
                if site.mask is not None:
                    mask = site.mask
                    mask = mask if mask is False else mask.index_select(self.data_dim, rows)
                    stack.enter_context(poutine.mask(mask=mask))
                stack.enter_context(poutine.scale(scale=site.scale))
                signal = self.signal(site, values, len(x))
                weight = lambda s=site: 1.0 + 0.3 * s.coefficients(9)  # noqa: E731
                weight = pyro.param(f"{site.name} {is_model}", weight)
                signal = weight[0] * signal
                if not is_model:
                    along = [1] * len(self.plates)
                    along[self.data_dim] = len(x)
                    signal = signal + weight[1] * x.reshape(along)
                fn = distribution(site.kind, signal)
                if site.observed:
                    axis = self.data_dim - fn.event_dim
                    value = self.observed_value(site).index_select(axis, rows)
                    pyro.sample(site.name, fn, obs=value)
                else:
                    sums = site.by == ("model" if is_model else "guide")
                    infer = {"enumerate": "parallel"} if sums else {}
                    values[site.name] = pyro.sample(site.name, fn, infer=infer)

    def model(self, x):
        self.run(x, is_model=True)

    def guide(self, x):
        self.run(x, is_model=False)

    def combinations(self, by):
        """Yield all values of the latents that a program sums over, or skip the test."""
        sites = [site for site in self.sites if site.by == by]
        counts = [math.prod(self.shape(site)) // B for site in sites]
        if math.prod(SIZES[s.kind] ** n for s, n in zip(sites, counts, strict=True)) > MANY:
            pytest.skip("too many values for a sum over all of them")
        every = (
            itertools.product(range(SIZES[s.kind]), repeat=n)
            for s, n in zip(sites, counts, strict=True)
        )
        for chosen in itertools.product(*every):
            found = {}
            for site, values in zip(sites, chosen, strict=True):
                shape = self.shape(site)
                shape[self.data_dim] = 1
                values = torch.tensor(values).reshape(shape).expand(self.shape(site))
                found[site.name] = values.float() if site.kind == "bernoulli" else values
            yield found

    def own_layout(self, site, value):
        """Return a value ``(B, *inner plates, *event)`` in the layout of its site."""
        shape = self.shape(site)
        axis = len(shape) + self.data_dim
        rest = shape[:axis] + shape[axis + 1 :]
        event = [2] if site.kind == "vector" else []
        return value.reshape(B, *rest, *event).movedim(0, axis)

    def log_probs(self, trace, sites):
        """Return the sum of the log-densities of sites, (B,)."""
        total = torch.zeros(B, dtype=torch.double)
        for site in sites:
            node = trace.nodes[site.name]
            log_prob = node["fn"].log_prob(node["value"])
            if node["mask"] is not None:
                log_prob = torch.where(torch.as_tensor(node["mask"]), log_prob, 0.0)
            log_prob = (node["scale"] * log_prob).double().expand(self.shape(site))
            total = total + log_prob.movedim(self.data_dim, 0).reshape(B, -1).sum(1)
        return total

    def log_weight(self, x, samples):
        """Return log p(x, z) - log q(z|x) at given samples, (B,), summed over the other latents."""
        own = [s for s in self.sites if not s.observed and s.by != "model"]
        summed = [site for site in own if site.by == "guide"]
        total = 0.0
        for of_guide in self.combinations("guide"):
            given = samples | of_guide
            guide = traced(self.guide, given, x)
            log_joint = [
                self.log_probs(traced(self.model, given | of_model, x), self.sites)
                for of_model in self.combinations("model")
            ]
            log_weight = torch.stack(log_joint).logsumexp(0) - self.log_probs(guide, own)
            total = total + self.log_probs(guide, summed).exp() * log_weight
        return total

    def means(self, x, samples):
        """Return E[x|z] at given samples by site, ``(B, *inner plates, *event)``."""
        latents = [site for site in self.sites if not site.observed]
        log_joint, means = [], []
        for of_model in self.combinations("model"):
            trace = traced(self.model, samples | of_model, x)
            log_joint.append(self.log_probs(trace, latents))
            means.append({s.name: self.mean_of(s, trace) for s in self.sites if s.observed})
        weights = torch.stack(log_joint).softmax(0).float()
        return {
            name: torch.einsum("cb,cb...->b...", weights, torch.stack([m[name] for m in means]))
            for name in means[0]
        }

    def mean_of(self, site, trace):
        fn = trace.nodes[site.name]["fn"]
        mean = fn.mean.expand(*self.shape(site), *fn.event_shape)
        return mean.movedim(self.data_dim - fn.event_dim, 0)


def follows(site, parent):
    """Return whether a site may depend on a latent that comes before it."""
    if parent.by not in ("model", "guide"):
        return True
    if not set(parent.plates) <= set(site.plates):
        return False
    if site.observed or site.by == "model":
        return True
    return parent.by == "model" and parent.plates == ["data"] and site.by != "guide"


def distribution(kind, signal):
    if kind == "normal":
        return dist.Normal(signal, torch.nn.functional.softplus(signal) + 0.5)
    if kind == "vector":
        return dist.Normal(torch.stack([signal, -signal], -1), 0.7).to_event(1)
    if kind == "beta":
        return dist.Beta(signal.exp() + 0.5, torch.full_like(signal, 1.5))
    if kind == "bernoulli":
        return dist.Bernoulli(logits=signal)
    return dist.Categorical(logits=torch.stack([signal, -signal, 0.3 * signal], -1))


def traced(program, values, x):
    return poutine.trace(poutine.condition(program, data=values)).get_trace(x)


def check(seed):
    pair = RandomPair(seed)
    pyro.clear_param_store()
    torch.manual_seed(seed)
    x, count = torch.randn(B), pair.random.choice([1, 3])
    vectorize = pair.random.choice([None, None, False, "fold"])
    options = {"num_particles": count, "vectorize_particles": vectorize}
    terms = pv.terms(pair.model, pair.guide, x, **options)
    # Terms.samples refuses a guide that enumerates, so read the other samples from its runs.
    drawn = {
        site.name: torch.cat([run._value(run.guide[site.name].site) for run in terms._runs])
        for site in pair.sampled
    }
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]
    for k, log_weight in enumerate(terms.log_weight):
        samples = {s.name: pair.own_layout(s, drawn[s.name][k]) for s in pair.sampled}
        expected = pair.log_weight(x, samples)
        torch.testing.assert_close(log_weight, expected.float(), rtol=1e-3, atol=1e-3)
        weights = torch.randn(B)
        gradients = [
            [gradient_or_zeros(weights * each, p, retain_graph=True) for p in parameters]
            for each in (log_weight, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    if not any(site.by == "guide" for site in pair.sites):
        given = {name: values[0].detach() for name, values in drawn.items()}
        samples = {s.name: pair.own_layout(s, given[s.name]) for s in pair.sampled}
        found = pv.decode(pair.model, given, x=x, guide=pair.guide, by_site=True)
        for name, mean in pair.means(x, samples).items():
            torch.testing.assert_close(found[name], mean.reshape(found[name].shape).detach())


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.filterwarnings("ignore")
def test_random_pairs_have_exact_weights_gradients_and_means(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(100, 1000))
def test_more_random_pairs(seed):
    check(seed)
