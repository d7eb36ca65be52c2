"""A better prior for a fitted pair, with the decoder and the guide as they are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_vae import flows, priors
from pyro_vae._programs.data_plate import name_data_plate
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import device_of
from pyro_vae._programs.sites import is_real
from pyro_vae._programs.terms import Terms, terms
from pyro_vae._programs.trial_runs import kept_parameter_names
from pyro_vae._programs.validation import checked_run
from pyro_vae._utils.checks import check_call, positive_integer, require_callable, require_word
from pyro_vae._utils.messages import first_line
from pyro_vae._utils.numerics import MIN_SCALE, inverse_softplus_scale
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Batch, Data, Minibatches
from pyro_vae.evaluation._context import evaluation_context
from pyro_vae.evaluation._prior_fit import (
    UnconstrainedLatents,
    WeightedCodes,
    maximize_evidence,
    select_mixture,
    split,
)

Kind = Literal["mixture", "flow", "aggregated"]
_LAYERS_OF_FLOW = 4
_ROWS_PER_STEP = 100
_MOST_EPOCHS = 500
_PATIENCE = 20  # epochs without a gain on the held-out data points
_LEARNING_RATE = 5e-3


def refit_prior(
    model: nn.Module,
    guide: Program,
    data: Data,
    *,
    kind: Kind | nn.Module = "mixture",
    components: int | None = None,
    num_particles: int = 20,
    batch_size: int = 100,
    vectorize_particles: bool | None = None,
    plate: str | None = None,
    seed: int | None = None,
) -> nn.Module:
    r"""Return the model with another prior r, fitted to the codes of the data.

    .. math::
        \max_r \sum_n \log \frac1K \sum_k \frac{p(x_n|z_{nk}) \, r(z_{nk})}{q(z_{nk}|x_n)},
        \qquad z_{nk} \sim q(z|x_n)

    This is the log p(x) of the data, estimated as in :func:`pyro_vae.evidence`, so it is maximum
    likelihood of the prior alone. A prior that is fitted after training is also known as an ex-post
    density (Ghosh et al. 2020). ``"aggregated"`` maximizes the ELBO instead.

    The new model shares all its modules with the old one, except for the prior. The old model keeps
    its own prior. The guide is not changed, and suits both models. A later fit of the new pair
    would train the shared modules. Copy the pair by ``copy.deepcopy((model, guide))`` first, if
    the old pair is still needed.

    Args:
        model: a module with the attribute ``prior``, which returns p(z) when called without
            arguments. Each object has its own. z is its only latent, a real vector.
        guide: program of q(z|x).
        data: training data in memory, as in :func:`pyro_vae.fit`. Data points whose latent the
            programs mask are left out, because they have no code.
        kind: ``"mixture"`` fits a :class:`pyro_vae.priors.MixtureOfNormals` by the EM algorithm.
            ``"flow"`` fits a :class:`pyro_vae.priors.FlowPrior` of four coupling layers by gradient
            steps. ``"aggregated"`` is the :class:`pyro_vae.priors.AggregatedPosterior` of the data.
            Or another prior, a module with parameters, which is then fitted by gradient steps.
        components: the number of components of ``"mixture"``. By default, a fifth of the data
            selects it, from 1 to 16.
        num_particles: K per data point.
        batch_size: number of data points per minibatch.
        vectorize_particles: draw all particles in one run; see :func:`pyro_vae.terms`.
        plate: the name of the plate of the data points; see :func:`pyro_vae.terms`.
        seed: of all samples and of the order of the data. The random state of the process is
            restored afterwards.

    Returns:
        The new model, of the same class.

    Raises:
        TypeError: The model is not a module with the attribute ``prior``, or ``prior`` belongs to
            its class.
        ValueError: ``prior`` is not the p(z) of the model. The model has other latents, or z is not
            a real vector. The data are not in memory, or the latent of all of them is
            masked. The pair breaks a rule (docs/contract.md).

    Example:
        >>> import torch, pyro, pyro_vae as pv
        >>> import pyro.distributions as dist
        >>> normal = pv.likelihoods.Normal(torch.nn.Identity(), scale=0.5)
        >>> model = pv.LatentVariableModel(pv.priors.StandardNormal(2), normal)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 0.6).to_event(1))
        >>> x = 3 + torch.randn(500, 2)  # so the mean of z is 3
        >>> better = pv.evaluation.refit_prior(model, guide, x, components=1, seed=0)
        >>> better.prior().loc.round().tolist(), better.likelihood is model.likelihood
        ([[3.0, 3.0]], True)
    """
    check_call(refit_prior, locals())
    require_callable("guide", guide)
    num_particles = positive_integer("num_particles", num_particles)
    components = None if components is None else positive_integer("components", components)
    if not isinstance(kind, nn.Module):
        require_word("kind", kind, ("mixture", "flow", "aggregated"), "a prior, which is a module")
    if components is not None and kind != "mixture":
        raise ValueError(f'components is for kind="mixture", got kind={kind!r}')
    if not isinstance(model, nn.Module) or not callable(getattr(model, "prior", None)):
        raise TypeError(
            "model must be a module with the attribute prior, such as a LatentVariableModel; got "
            f"{type(model).__name__}. For other programs, write the prior as a module, and call it "
            "in the program as self.prior()"
        )
    stand_in = nn.Module()
    if _replaced(model, stand_in).prior is not stand_in:
        raise TypeError(
            "model.prior must be an attribute of the object, so that another prior can replace it; "
            f"got one of the class {type(model).__name__}. Set self.prior in __init__, such as "
            "self.prior = pv.priors.StandardNormal(2)"
        )
    name_data_plate(plate, model, guide)
    programs = (model, guide)
    batches = Minibatches(data, batch_size, device=device_of(*programs), programs=programs)
    if batches.num_data is None:
        raise ValueError("refit_prior needs data in memory, got a stream")
    with (
        evaluation_context(
            "refit_prior",
            model,
            guide,
            batches,
            vectorize_particles=vectorize_particles,
            seed=seed,
            needs_latents=True,
            may_fold=False,
            weighs=True,
        ) as options,
        kept_parameter_names(),  # runs of a prior alone, or of the new model, name its parameters
    ):
        first = batches.first()
        site, size, dtype = _latent_of(model, guide, first)
        if kind == "aggregated":
            columns = tuple(torch.cat(each) for each in zip(*batches, strict=True))
            prior = priors.AggregatedPosterior(guide, columns, site)
            return _with_prior(model, prior, guide, first)

        def draw(number: int, batch: Batch) -> Terms:
            checked_run(model, guide, batch, weighs=True)  # values are validated once
            with values_checked(False):
                return terms(model, guide, *batch, num_particles=num_particles, **options)

        latents = UnconstrainedLatents(model, first, [site])
        codes = WeightedCodes.of(draw, list(batches), latents)
        codes = codes[~codes.masked]
        if not len(codes.codes):
            raise ValueError(f"the model masks latent {site!r} of all data points")
        possible = (codes.log_rest > -torch.inf).any(1)
        if not possible.any():
            raise ValueError(
                f"no sample of latent {site!r} has a density above zero, whatever its prior. "
                "Choose a guide whose samples the factors of the model do not exclude"
            )
        if not possible.all():
            warnings.warn(
                f"{int((~possible).sum())} of {len(possible)} data points were left out, because "
                "none of their samples has a density above zero, whatever the prior. Use more "
                "particles, or a guide whose samples the factors of the model do not exclude.",
                stacklevel=2,
            )
        codes = codes[possible]
        codes = codes[torch.randperm(len(codes.codes))]
        if kind == "mixture":
            prior, gain = _mixture(codes, components)
            new = _with_prior(model, prior.to(batches.device, dtype), guide, first)
        else:
            prior = _flow(size).to(dtype) if kind == "flow" else kind
            new = _with_prior(model, prior.to(batches.device), guide, first)
            with torch.enable_grad():
                gain = _train(prior.cpu(), codes)
            prior.to(batches.device)
    if not gain > 0:
        warnings.warn(
            "the new prior does not increase log p(x) of the held-out fifth of the data, but "
            f"changes it by {gain:.2f} nats. Keep the old model, or use more particles or data.",
            stacklevel=2,
        )
    return new


def _flow(size: int) -> priors.FlowPrior:
    transform = flows.Composition(size, flows.AffineCoupling, _LAYERS_OF_FLOW)
    return priors.FlowPrior(size, transform)


def _latent_of(model: nn.Module, guide: Program, batch: Batch) -> tuple[str, int, torch.dtype]:
    """Return name, size and dtype of the only latent, after checks that its prior is known."""
    t = Terms([checked_run(model, guide, batch, weighs=True)])
    if len(t.samples) != 1:
        raise ValueError(
            f"refit_prior needs a model with one latent variable, got the latents {[*t.samples]}"
        )
    ((name, z),), masked = t.samples.items(), t.masked_data()
    try:
        p_z = model.prior()
        log_prior = p_z.log_prob(z)
        same = log_prior.shape == t.log_prior.shape and torch.allclose(
            log_prior[:, ~masked], t.log_prior[:, ~masked], rtol=1e-4, atol=1e-4
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model.prior() must be the distribution of {name!r}, but it cannot score a sample of "
            f"it: {first_line(error)}. A prior that depends on covariates cannot be fitted again"
        ) from error
    if not same:
        raise ValueError(
            f"model.prior() must be the distribution of {name!r}, but its log-density differs from "
            "that of the site in the model"
        )
    if len(p_z.event_shape) != 1 or not is_real(p_z.support):
        raise ValueError(
            f"refit_prior needs a latent that is a real vector, but {name!r} has event shape "
            f"{tuple(p_z.event_shape)} and support {p_z.support}"
        )
    return name, p_z.event_shape[0], z.dtype


def _mixture(codes: WeightedCodes, components: int | None) -> tuple[priors.MixtureOfNormals, float]:
    """Return the mixture with the largest log p(x), and its gain on held-out data points."""
    best = select_mixture(codes, components, diagonal=True)
    found = maximize_evidence(codes, best.count, best.shrinkage, diagonal=True)
    prior = priors.MixtureOfNormals(found.means.shape[1], best.count)
    scales = found.covariances.diagonal(dim1=1, dim2=2).sqrt().clamp(min=2 * MIN_SCALE)
    with torch.no_grad():
        prior.logits.copy_((found.weights / found.weights.sum()).log())
        prior.loc.copy_(found.means)
        prior.raw_scale.copy_(inverse_softplus_scale(scales))
    return prior, best.gain


def _train(prior: nn.Module, codes: WeightedCodes) -> float:
    """Train a prior by gradient steps, and return its gain on held-out data points.

    The parameters are those of the epoch with the largest log p(x) of the held-out data points.
    """
    parameters = [p for p in prior.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the new prior has no parameters, so it cannot be fitted")
    fitted, held_out = split(codes)
    if not len(held_out.codes):
        raise ValueError(
            "a prior that is trained by gradient steps needs at least five data points"
        )
    dtype = parameters[0].dtype

    def log_evidence(part: WeightedCodes) -> Tensor:
        return part.log_evidence(prior().log_prob(part.codes.to(dtype)).double())

    optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
    base, best, kept, waited = held_out.log_evidence().mean().item(), -float("inf"), None, 0
    for _ in range(_MOST_EPOCHS):
        with torch.no_grad():
            reached = log_evidence(held_out).mean().item()
        if reached > best:
            best, kept, waited = reached, copy.deepcopy(prior.state_dict()), 0
        elif (waited := waited + 1) > _PATIENCE:
            break
        for rows in torch.randperm(len(fitted.codes)).split(_ROWS_PER_STEP):
            optimizer.zero_grad()
            (-log_evidence(fitted[rows]).mean()).backward()
            optimizer.step()
    if kept is not None:
        prior.load_state_dict(kept)
    return best - base


def _with_prior(model: nn.Module, prior: nn.Module, guide: Program, batch: Batch) -> nn.Module:
    """Return :func:`_replaced` after a run of the new model."""
    new = _replaced(model, prior)
    try:
        checked_run(new, guide, batch, weighs=True)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot run with a {type(prior).__name__} as its prior: "
            f"{first_line(error)}. Choose another kind"
        ) from error
    return new


def _replaced(model: nn.Module, prior: nn.Module) -> nn.Module:
    """Return the model with another prior, and all its other modules and parameters shared."""
    shared = [*model.modules(), *model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(each): each for each in shared if each is not model}
    old: Callable[[], Any] = model.prior
    memo[id(old)] = prior
    new = copy.deepcopy(model, memo)
    if not isinstance(old, nn.Module):
        vars(new).pop("prior", None)
        new.prior = prior
    return new
