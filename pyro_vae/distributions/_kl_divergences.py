r"""KL divergences in closed form. The tests compare each with quadrature.

If the formula of torch or Pyro is correct, it is used. Otherwise this module has its own. For a
pair of distributions that no table here contains, the KL divergence is estimated from samples.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch import distributions as D
from torch.distributions import kl as registry
from torch.distributions import kl_divergence
from torch.distributions.transforms import Transform, _InverseTransform
from torch.nn import functional as F

from pyro_vae._utils.precision import rounds_products
from pyro_vae.distributions import _continuous_bernoulli as continuous_bernoulli

_OURS = {"torch", "pyro", "pyro_vae"}  # closed forms hold only for the log_prob of these packages

# For each type of q, the types of p for which torch's formula is correct in float64.
_RIGHT = {
    D.Beta: (D.Beta, D.Exponential, D.Gamma, D.Normal, D.Pareto, D.Uniform),
    D.Cauchy: (D.Cauchy,),
    D.ContinuousBernoulli: (D.Pareto,),
    D.Dirichlet: (D.Dirichlet,),
    D.Exponential: (
        D.Beta, D.ContinuousBernoulli, D.Exponential, D.Gamma, D.Gumbel, D.Normal, D.Pareto,
        D.Uniform,
    ),
    D.Gamma: (
        D.Beta, D.ContinuousBernoulli, D.Exponential, D.Gamma, D.Gumbel, D.Normal, D.Pareto,
        D.Uniform,
    ),
    D.Gumbel: (
        D.Beta, D.ContinuousBernoulli, D.Exponential, D.Gamma, D.Gumbel, D.Normal, D.Pareto,
        D.Uniform,
    ),
    D.HalfNormal: (D.HalfNormal,),
    D.Laplace: (
        D.Beta, D.ContinuousBernoulli, D.Exponential, D.Gamma, D.Laplace, D.Normal, D.Pareto,
        D.Uniform,
    ),
    D.Normal: (
        D.Beta, D.ContinuousBernoulli, D.Exponential, D.Gamma, D.Gumbel, D.Laplace, D.Pareto,
        D.Uniform,
    ),
    D.Pareto: (
        D.Beta, D.ContinuousBernoulli, D.Exponential, D.Gamma, D.Normal, D.Pareto, D.Uniform,
    ),
    D.Poisson: (D.Bernoulli, D.Binomial),
    D.Uniform: (D.Beta, D.Exponential, D.Gamma, D.Gumbel, D.Normal, D.Uniform),
}  # fmt: skip
# Pairs of Gaussians for which torch's formula is correct in the dtype of the parameters.
_RIGHT_AS_THEY_ARE = {
    (D.Normal, D.Normal),
    (D.LowRankMultivariateNormal, D.LowRankMultivariateNormal),
    (D.LowRankMultivariateNormal, D.MultivariateNormal),
    (D.MultivariateNormal, D.LowRankMultivariateNormal),
    (D.MultivariateNormal, D.MultivariateNormal),
}
_PARAMETERS = {
    D.Bernoulli: ("probs",), D.Beta: ("concentration1", "concentration0"),
    D.Binomial: ("total_count", "probs"), D.Cauchy: ("loc", "scale"),
    D.ContinuousBernoulli: ("logits",), D.Dirichlet: ("concentration",),
    D.Exponential: ("rate",), D.Gamma: ("concentration", "rate"), D.Gumbel: ("loc", "scale"),
    D.HalfNormal: ("scale",), D.Laplace: ("loc", "scale"), D.Normal: ("loc", "scale"),
    D.Pareto: ("scale", "alpha"), D.Poisson: ("rate",), D.Uniform: ("low", "high"),
}  # fmt: skip


def known_kl(q: Any, p: Any) -> Tensor | None:
    r"""Return :math:`\mathrm{KL}(q \| p)`, of the batch shape, or None without a trusted formula.

    Formulas that a user or another package has registered with torch are trusted.
    """
    form = _form(type(q), type(p), len(registry._KL_REGISTRY))
    return None if form is None else form(q, p)


@functools.lru_cache(maxsize=256)
def _form(of_q: type, of_p: type, number_registered: int) -> Callable[[Any, Any], Any] | None:
    """Return the closed form for two classes, or None.

    Args:
        of_q: class of q.
        of_p: class of p.
        number_registered: size of torch's registry. A new entry thus invalidates the cache.
    """
    written = _as_written(of_q) and _as_written(of_p)
    for pair in itertools.product(of_q.__mro__, of_p.__mro__):
        if pair in _OWN:
            return _OWN[pair] if written else None
        registered = registry._KL_REGISTRY.get(pair)
        if registered is None:
            continue
        if _package(registered) not in ("torch", "pyro"):
            return registered
        if written and pair in _RIGHT_AS_THEY_ARE:
            if pair == (D.Normal, D.Normal):  # it has no matrix product
                return registered
            return functools.partial(_with_exact_products, registered)
        if written and pair[1] in _RIGHT.get(pair[0], ()):
            return functools.partial(_in_float64, registered, *pair)
        return None
    return None


def _as_written(distribution: type) -> bool:
    """Return True if the log_prob of a class comes from torch, Pyro or this package."""
    owner = next(cls for cls in distribution.__mro__ if "log_prob" in vars(cls))
    return _package(owner) in _OURS


def _package(thing: Any) -> str:
    return thing.__module__.split(".")[0]


def _in_float64(formula: Callable, of_q: type, of_p: type, q: Any, p: Any) -> Tensor:
    """Evaluate a formula with both batch shapes broadcast, in float64 because of cancellation."""
    shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    wide = []
    for cls, each in ((of_q, q), (of_p, p)):
        event = tuple(each.event_shape)
        values = [getattr(each, name) for name in _PARAMETERS[cls]]
        values = {
            name: value.double().expand(shape + event)
            for name, value in zip(_PARAMETERS[cls], values, strict=True)
        }
        wide.append(cls(**values, validate_args=False))
    return formula(*wide).to(getattr(q, _PARAMETERS[of_q][0]).dtype)


def _with_exact_products(formula: Callable, q: Any, p: Any) -> Tensor:
    """Evaluate a formula for Gaussians, in float64 if float32 products would be rounded."""
    if not rounds_products(q.loc):
        return formula(q, p)
    return formula(_double(q), _double(p)).to(q.loc.dtype)


def _double(gaussian: Any) -> Any:
    """Return a Gaussian with its parameters in float64."""
    names = ["loc", "scale"]
    if isinstance(gaussian, D.LowRankMultivariateNormal):
        names = ["loc", "cov_factor", "cov_diag"]
    elif isinstance(gaussian, D.MultivariateNormal):
        names = ["loc", "scale_tril"]
    cls = next(c for c in type(gaussian).__mro__ if c.__module__.startswith("torch."))
    return cls(**{name: getattr(gaussian, name).double() for name in names}, validate_args=False)


def _of_independent(q: Any, p: Any) -> Tensor | None:
    shared = min(q.reinterpreted_batch_ndims, p.reinterpreted_batch_ndims)
    q, p = (
        each.base_dist.to_event(rest)
        if (rest := each.reinterpreted_batch_ndims - shared)
        else each.base_dist
        for each in (q, p)
    )
    kl = known_kl(q, p)
    return None if kl is None else sum_rightmost(kl, shared)


def _of_independent_normal(q: Any, p: Any) -> Tensor | None:
    plain = isinstance(q.base_dist, D.Normal) and q.reinterpreted_batch_ndims == 1
    if not (plain and _as_written(type(q.base_dist))):
        return None
    if not rounds_products(q.base_dist.loc):
        return kl_divergence(q, p)
    wide = D.Independent(_double(q.base_dist), 1)
    return kl_divergence(wide, _double(p)).to(q.base_dist.loc.dtype)


def _of_masked(q: Any, p: Any) -> Tensor | None:
    if q._mask is not p._mask:
        return None  # estimate by sampling: the two masks may differ
    kl = known_kl(q.base_dist, p.base_dist)
    if kl is None or q._mask is True:
        return kl
    return torch.where(torch.as_tensor(q._mask, device=kl.device), kl, 0.0)


def _of_transformed(q: Any, p: Any) -> Tensor | None:
    """Return the KL of the bases: a bijection that both distributions share does not change it."""
    if len(q.transforms) != len(p.transforms) or q.event_shape != p.event_shape:
        return None
    pairs = zip(q.transforms, p.transforms, strict=True)
    if not all(a.bijective and _same(a, b) for a, b in pairs):
        return None
    return known_kl(q.base_dist, p.base_dist)


def _same(one: Any, other: Any) -> bool:
    """Return True if two transforms are one object, or equal up to shared tensors.

    Numbers are compared by value. Tensors and modules must be the same objects.
    """
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, Tensor | nn.Module):
        return False
    if isinstance(one, _InverseTransform):
        return _same(one.inv, other.inv)
    if isinstance(one, Transform):
        parts, others = _made_of(one), _made_of(other)
        return parts.keys() == others.keys() and all(_same(parts[n], others[n]) for n in parts)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, int | float | str) and one == other


def _made_of(transform: Transform) -> dict[str, Any]:
    kept = {"_cache_size", "_cached_x_y", "_inv"}
    return {name: value for name, value in vars(transform).items() if name not in kept}


def _of_bernoulli(q: D.Bernoulli, p: D.Bernoulli) -> Tensor:
    """Return the KL from the logits, because probabilities are rounded to zero and one."""
    dtype, one, other = q.logits.dtype, q.logits.double(), p.logits.double()
    probs = one.sigmoid()
    probs = torch.where(_given(q, 0.0), 0.0, torch.where(_given(q, 1.0), 1.0, probs))
    log_one = torch.where(_given(p, 0.0), -math.inf, F.logsigmoid(other))
    log_zero = torch.where(_given(p, 1.0), -math.inf, F.logsigmoid(-other))
    ones = torch.xlogy(probs, probs) - _times(probs, log_one)
    zeros = torch.xlogy(1 - probs, 1 - probs) - _times(1 - probs, log_zero)
    return (ones + zeros).to(dtype)


def _given(distribution: D.Bernoulli, probability: float) -> Tensor:
    """Return True where the probability was passed as zero or one, and torch clamps its logit."""
    eps = torch.finfo(distribution.logits.dtype).eps
    clamped = distribution.logits.abs() < 1.001 * math.log((1 - eps) / eps)
    return (distribution.probs == probability) & clamped


def _times(probs: Tensor, log_prob: Tensor) -> Tensor:
    """Return the product, which is zero wherever the probability is zero."""
    return torch.where(probs == 0, 0.0, probs * log_prob)


def _of_categorical(q: D.Categorical, p: D.Categorical) -> Tensor:
    tiny = math.log(torch.finfo(p.logits.dtype).tiny)
    impossible = (p.probs == 0) & (p.logits > tiny)  # passed as zero, so torch clamps the logit
    log_p = torch.where(impossible, -math.inf, p.logits)
    return torch.where(q.probs == 0, 0.0, q.probs * (q.logits - log_p)).sum(-1)


def _of_one_hot(q: D.OneHotCategorical, p: D.OneHotCategorical) -> Tensor:
    return _of_categorical(q._categorical, p._categorical)


def _of_geometric(q: D.Geometric, p: D.Geometric) -> Tensor:
    one, other = q.logits.double(), p.logits.double()
    failures = torch.exp(-one) * (F.logsigmoid(-one) - F.logsigmoid(-other))
    return (failures + F.logsigmoid(one) - F.logsigmoid(other)).to(q.logits.dtype)


def _of_poisson(q: D.Poisson, p: D.Poisson) -> Tensor:
    one, other = q.rate.double(), p.rate.double()
    return (torch.xlogy(one, one) - torch.xlogy(one, other) - one + other).to(q.rate.dtype)


def _of_half_cauchy(q: D.HalfCauchy, p: D.HalfCauchy) -> Tensor:
    return 2 * (q.scale + p.scale).log() - (4 * q.scale).log() - p.scale.log()


def _of_inverse_gamma(q: Any, p: Any) -> Tensor | None:
    one, other = (dist.Gamma(each.concentration, each.rate) for each in (q, p))
    return known_kl(one, other)


def _of_uniform_and_pareto(q: D.Uniform, p: D.Pareto) -> Tensor:
    low, high, scale, alpha = (t.double() for t in (q.low, q.high, p.scale, p.alpha))
    width = high - low
    mean_of_log = (torch.xlogy(high, high) - torch.xlogy(low, low)) / width - 1
    kl = (alpha + 1) * mean_of_log - alpha.log() - alpha * scale.log() - width.log()
    return torch.where(low < scale, math.inf, kl).to(q.low.dtype)


def _negative_entropy(q: D.ContinuousBernoulli) -> Tensor:
    logits = q.logits.double()
    return logits * continuous_bernoulli.mean(logits) - continuous_bernoulli.log_mass(logits)


def _of_tilted(q: D.ContinuousBernoulli, p: D.ContinuousBernoulli) -> Tensor:
    one, other = q.logits.double(), p.logits.double()
    kl = (
        _negative_entropy(q)
        - other * continuous_bernoulli.mean(one)
        + continuous_bernoulli.log_mass(other)
    )
    return kl.to(q.logits.dtype)


def _of_tilted_and_exponential(q: D.ContinuousBernoulli, p: D.Exponential) -> Tensor:
    rate = p.rate.double()
    kl = _negative_entropy(q) - rate.log() + rate * continuous_bernoulli.mean(q.logits.double())
    return kl.to(q.logits.dtype)


def _of_tilted_and_normal(q: D.ContinuousBernoulli, p: D.Normal) -> Tensor:
    logits, loc, scale = q.logits.double(), p.loc.double(), p.scale.double()
    square = (
        continuous_bernoulli.variance(logits) + (continuous_bernoulli.mean(logits) - loc).square()
    )
    normal = scale.log() + 0.5 * math.log(2 * math.pi) + 0.5 * square / scale.square()
    return (_negative_entropy(q) + normal).to(q.logits.dtype)


def _of_tilted_and_uniform(q: D.ContinuousBernoulli, p: D.Uniform) -> Tensor:
    kl = _negative_entropy(q) + (p.high.double() - p.low.double()).log()
    return torch.where((p.low > 0) | (p.high < 1), math.inf, kl).to(q.logits.dtype)


def _of_uniform_and_tilted(q: D.Uniform, p: D.ContinuousBernoulli) -> Tensor:
    low, high, logits = q.low.double(), q.high.double(), p.logits.double()
    kl = continuous_bernoulli.log_mass(logits) - logits * (low + high) / 2 - (high - low).log()
    return torch.where((low < 0) | (high > 1), math.inf, kl).to(q.low.dtype)


def _of_beta_and_tilted(q: D.Beta, p: D.ContinuousBernoulli) -> Tensor:
    a, b, logits = q.concentration1.double(), q.concentration0.double(), p.logits.double()
    negative_entropy = -D.Beta(a, b, validate_args=False).entropy()
    kl = negative_entropy - logits * a / (a + b) + continuous_bernoulli.log_mass(logits)
    return kl.to(q.concentration1.dtype)


_OWN: dict[tuple[type, type], Callable[[Any, Any], Tensor | None]] = {
    (D.Independent, D.Independent): _of_independent,
    (D.Independent, D.MultivariateNormal): _of_independent_normal,
    (dist.MaskedDistribution, dist.MaskedDistribution): _of_masked,
    (D.TransformedDistribution, D.TransformedDistribution): _of_transformed,
    (D.Bernoulli, D.Bernoulli): _of_bernoulli,
    (D.Categorical, D.Categorical): _of_categorical,
    (D.OneHotCategorical, D.OneHotCategorical): _of_one_hot,
    (D.Geometric, D.Geometric): _of_geometric,
    (D.Poisson, D.Poisson): _of_poisson,
    (D.HalfCauchy, D.HalfCauchy): _of_half_cauchy,
    (D.InverseGamma, D.InverseGamma): _of_inverse_gamma,
    (D.Uniform, D.Pareto): _of_uniform_and_pareto,
    (D.ContinuousBernoulli, D.ContinuousBernoulli): _of_tilted,
    (D.ContinuousBernoulli, D.Exponential): _of_tilted_and_exponential,
    (D.ContinuousBernoulli, D.Normal): _of_tilted_and_normal,
    (D.ContinuousBernoulli, D.Uniform): _of_tilted_and_uniform,
    (D.Uniform, D.ContinuousBernoulli): _of_uniform_and_tilted,
    (D.Beta, D.ContinuousBernoulli): _of_beta_and_tilted,
}
