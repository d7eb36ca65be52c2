"""Every public function and class as a call of one argument, the others being good ones."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv

GOOD = (torch.arange(20).reshape(5, 4) % 3 == 0).float()
QUIET = {"seed": 0}


def make_pair(likelihood=pv.likelihoods.Bernoulli):
    torch.manual_seed(0)
    model = pv.LatentVariableModel(pv.priors.StandardNormal(2), likelihood(pv.nets.MLP(2, [3], 4)))
    return model, pv.guides.AmortizedNormal(model, pv.nets.MLP(4, [3]))


def trained(x, **options):
    model, guide = make_pair()
    options = {"epochs": 1, "batch_size": 3, "progress": False, "capture": False} | options
    fit = pv.fit(model, guide, x, **QUIET | options)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), fit.history.loss.tolist()


def evidence(x, **options):
    options = {"num_particles": 3, "batch_size": 2, "capture": False} | options
    return pv.evidence(*make_pair(), x, **QUIET | options).values


def quick_ais(**options):
    return pv.evaluation.AIS(
        **{"num_chains": 2, "num_temperatures": 3, "leapfrog_steps": 1, "pilot": 2} | options
    )


def annealed(x, **options):
    return pv.evidence(*make_pair(), x, method=quick_ais(**options), capture=False, **QUIET).values


def sandwich(x, **options):
    found = pv.sandwich(*make_pair(), like=x, ais=quick_ais(), capture=False, **QUIET | options)
    return found.lower, found.upper


def surgery(x, **options):
    found = pv.elbo_surgery(*make_pair(), x, **QUIET | {"batch_size": 2} | options)
    return found.elbo, found.mutual_information, found.marginal_kl


def gaps(x, **options):
    ascent = pv.evaluation.Ascent(num_particles=2, window=2, max_steps=4, patience=1)
    options = {"ascent": ascent, "num_particles": 3, "capture": False} | options
    found = pv.inference_gaps(*make_pair(), x, **QUIET | options)
    return found.best_elbo.values, found.amortized_elbo.values


def noise(x, **options):
    options = {"repeats": 2, "objectives": [pv.objectives.ELBO()]} | options
    return pv.gradient_noise(*make_pair(), x, **QUIET | options).table.signal_to_noise.tolist()


def curve(x, betas=(1.0,), **options):
    options = {"num_particles": 2, "epochs": 1, "batch_size": 3, "capture": False} | options
    return pv.rate_distortion(*make_pair(), x, betas, **QUIET | options).table["elbo"].tolist()


def compared(x, **options):
    options = {"num_particles": 3, "seed": 0} | options
    entry = pv.compare({"a": make_pair()}, x, **options).entries[0]
    return entry.evidence.values, 0.0 if entry.surgery is None else entry.surgery.elbo


def arviz(x, **options):
    container = pv.to_arviz(*make_pair(), x, **QUIET | {"num_draws": 2} | options)
    return torch.tensor(container["sample_stats"]["log_weight"].values)


def collapse(x, **options):
    options = {"num_particles": 3} | options
    return pv.collapse_report(*make_pair(), x, **QUIET | options).rate


def holes(x, **options):
    options = {"num_samples": 20, "quantile": 0.2} | options
    return pv.prior_holes(*make_pair(), x, **QUIET | options).share


def terms(x, **options):
    torch.manual_seed(0)
    pair = make_pair()
    torch.manual_seed(0)
    return pv.terms(*pair, x, **options).log_weight.detach()


def loss(objective: Callable[[], Any], x):
    torch.manual_seed(0)
    pair = make_pair()
    torch.manual_seed(0)
    return objective().loss(*pair, x)


def saved(folder=None, **notes):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pair" if folder is None else folder
        pair = make_pair()
        pair[1](GOOD)
        pv.save(folder, *pair, notes=notes)
        found = pv.load(folder)
        return [t for t in found.notes.values() if isinstance(t, Tensor)]


def aggregated(x, **options):
    torch.manual_seed(0)
    guide = make_pair()[1]
    torch.manual_seed(0)
    prior = pv.priors.AggregatedPosterior(guide, x, **options)
    return prior().log_prob(torch.zeros(2))


def vamp(x, **options):
    torch.manual_seed(0)
    prior = pv.priors.VampPrior(2, pseudo_inputs=x, **options)
    model = pv.LatentVariableModel(prior, pv.likelihoods.Bernoulli(pv.nets.MLP(2, [3], 4)))
    prior.bind_guide(pv.guides.AmortizedNormal(model, pv.nets.MLP(4, [3])))
    return prior().log_prob(torch.zeros(2)).detach()


def exemplars(x, **options):
    torch.manual_seed(0)
    prior = pv.priors.ExemplarPrior(2, exemplars=x, **options)
    model = pv.LatentVariableModel(prior, pv.likelihoods.Bernoulli(pv.nets.MLP(2, [3], 4)))
    prior.bind_guide(pv.guides.AmortizedNormal(model, pv.nets.MLP(4, [3])))
    torch.manual_seed(0)
    return prior().log_prob(torch.zeros(2)).detach()


def local(x):
    torch.manual_seed(0)
    guide = pv.guides.LocalGuide(make_pair()[0], x)
    return [bool(torch.isfinite(p).all()) for p in guide.parameters()]


DATA: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "fit": ("data|site", trained),
    "fit: validation": ("validation|data|site", lambda x: trained(GOOD, validation=x)),
    "evidence": ("data|site", evidence),
    "evidence by AIS": ("data|site", annealed),
    "sandwich": ("like|data|site", sandwich),
    "elbo_surgery": ("data|site", surgery),
    "prior_holes": ("data|site", holes),
    "inference_gaps": ("data|site", gaps),
    "collapse_report": ("data|site", collapse),
    "rate_distortion": ("data|site", curve),
    "compare": ("data|site", compared),
    "compare: train": ("train|data|site", lambda x: compared(GOOD, train=x)),
    "to_arviz": ("data|site", arviz),
    "generate": ("x", lambda x: pv.generate(make_pair()[0], x, **QUIET)),
    "reconstruct": ("x", lambda x: pv.reconstruct(*make_pair(), x, **QUIET)),
    "gradient_noise": ("x", noise),
    "terms": ("x", terms),
    "terms of particles": ("x", lambda x: terms(x, num_particles=3)),
    "objectives.ELBO.loss": ("x", lambda x: loss(pv.objectives.ELBO, x)),
    "objectives.IWAE.loss": ("x", lambda x: loss(lambda: pv.objectives.IWAE(3), x)),
    "objectives.MeanFieldELBO.loss": ("x", lambda x: loss(pv.objectives.MeanFieldELBO, x)),
    "priors.AggregatedPosterior": ("data|posterior|x", aggregated),
    "priors.VampPrior": ("pseudo_inputs|x", vamp),
    "priors.ExemplarPrior": ("exemplars|x", exemplars),
    "guides.LocalGuide": ("x", local),
    "guides.AmortizedNormal": ("x", lambda x: _drawn(make_pair()[1], x)),
    "LatentVariableModel": ("x", lambda x: _drawn(make_pair()[0], x)),
    "save: notes": ("notes|note", lambda x: saved(x=x)),
}


def _drawn(program: Callable, x: Any) -> Any:
    torch.manual_seed(0)
    found = program(x)
    found = [*found.values()] if isinstance(found, dict) else found
    return [t.detach() for t in found] if isinstance(found, list | tuple) else found.detach()


def _seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


Identity = nn.Identity

LIKELIHOODS: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "Bernoulli": (lambda: pv.likelihoods.Bernoulli(Identity()), torch.zeros(5, 4)),
    "ContinuousBernoulli": (
        lambda: pv.likelihoods.ContinuousBernoulli(Identity()),
        torch.zeros(5, 4),
    ),
    "Normal": (lambda: pv.likelihoods.Normal(Identity()), torch.zeros(5, 4)),
    "Normal, optimal scale": (
        lambda: pv.likelihoods.Normal(Identity(), pv.likelihoods.OptimalScale()),
        torch.zeros(5, 4),
    ),
    "Laplace": (lambda: pv.likelihoods.Laplace(Identity()), torch.zeros(5, 4)),
    "StudentT": (lambda: pv.likelihoods.StudentT(Identity()), torch.zeros(5, 4)),
    "Categorical": (lambda: pv.likelihoods.Categorical(Identity(), 2), torch.zeros(5, 8)),
    "DiscretizedLogistic": (
        lambda: pv.likelihoods.DiscretizedLogistic(Identity(), 2),
        torch.zeros(5, 8),
    ),
    "DiscretizedLogisticMixture": (
        lambda: pv.likelihoods.DiscretizedLogisticMixture(Identity(), 2, 2),
        torch.zeros(5, 24),
    ),
    "Poisson": (lambda: pv.likelihoods.Poisson(Identity()), torch.zeros(5, 4)),
    "NegativeBinomial": (lambda: pv.likelihoods.NegativeBinomial(Identity()), torch.zeros(5, 4)),
}

FLOWS = {
    name: functools.partial(_seeded, functools.partial(getattr(pv.flows, name), 4))
    for name in (
        "AffineCoupling",
        "Householder",
        "InverseAutoregressive",
        "MaskedAutoregressive",
        "NeuralSpline",
        "Planar",
        "Radial",
        "Sylvester",
    )
}
PRIORS = {
    "StandardNormal": lambda: pv.priors.StandardNormal(4),
    "MixtureOfNormals": lambda: pv.priors.MixtureOfNormals(4, 3),
    "FlowPrior": lambda: pv.priors.FlowPrior(4, pv.flows.Composition(4, length=1)),
}
NETS = {
    "MLP": lambda: pv.nets.MLP(4, [3], 2),
    "GatedMLP": lambda: pv.nets.GatedMLP(4, [3], 2),
    "Joined": lambda: pv.nets.Joined(pv.nets.MLP(4, [3], 2)),
    "ConvEncoder": lambda: pv.nets.ConvEncoder((1, 5, 4), (2,)),
    "ConvDecoder": lambda: pv.nets.ConvDecoder(4, (1, 4, 4), (2,)),
    "ResidualEncoder": lambda: pv.nets.ResidualEncoder((1, 5, 4), (2,), 1),
    "ResidualDecoder": lambda: pv.nets.ResidualDecoder(4, (1, 4, 4), (2,), 1, 1),
    "ResidualBlock": lambda: pv.nets.ResidualBlock(5),
}


def _scored(name: str, x: Any) -> Tensor:
    make, numbers = LIKELIHOODS[name]
    return _seeded(make)(numbers).log_prob(x).detach()


def _numbers(name: str, z: Any) -> Tensor:
    """Score by a likelihood whose decoder is fed z."""
    make, numbers = LIKELIHOODS[name]
    torch.manual_seed(0)
    likelihood = make()
    likelihood.decoder = pv.nets.MLP(4, [3], numbers.shape[-1])
    found = likelihood(z)
    return found.log_prob(torch.ones(found.event_shape)).detach()


def _moved(name: str, x: Any) -> tuple[Tensor, Tensor]:
    flow = FLOWS[name]()
    f = flow(torch.linspace(-1, 1, flow.num_parameters))
    y = f(x)
    return y.detach(), f.log_abs_det_jacobian(x, y).detach()


def _made(name: str, numbers: Any) -> Tensor:
    f = FLOWS[name]()(numbers)
    return f(torch.ones(5, 4)).detach()


VALUES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{
        f"likelihoods.{name}: x": ("value|x", functools.partial(_scored, name))
        for name in LIKELIHOODS
    },
    **{
        f"likelihoods.{name}: z": ("z|x|inputs", functools.partial(_numbers, name))
        for name in LIKELIHOODS
    },
    **{
        f"priors.{name}: z": (
            "value|z|x|y",
            lambda z, make=make: _seeded(make)().log_prob(z).detach(),
        )
        for name, make in PRIORS.items()
    },
    **{
        f"nets.{name}": ("x|z|inputs", lambda x, make=make: _seeded(make)(x).detach())
        for name, make in NETS.items()
    },
    **{f"flows.{name}: x": ("x|y|value", functools.partial(_moved, name)) for name in FLOWS},
    **{
        f"flows.{name}: parameters": ("parameters", functools.partial(_made, name))
        for name in FLOWS
    },
    # NaN, where there are too few to tell.
    "khat": ("log_weights", lambda x: torch.nan_to_num(pv.evaluation.khat(x))),
}

# By class: a way to make one with good arguments, by name, and what to try with it.
MLP = functools.partial(pv.nets.MLP, 4, [3])
X, Z = GOOD, torch.zeros(5, 2)


def _call(*inputs):
    return lambda made: made(*inputs)


def _score(value, *inputs):
    return lambda made: made(*inputs).log_prob(value)


def _flow(made):
    return made(torch.ones(made.num_parameters))(torch.ones(5, made.dim))


def _guide(made):
    return made(X)


def _model():
    return make_pair()[0]


def _guide_of(name, **options):
    return getattr(pv.guides, name)(_model(), **options)


def _likelihood(name, numbers, **more):
    return (
        getattr(pv.likelihoods, name),
        {"decoder": Identity(), "event_dim": 1} | more,
        _score(X, torch.zeros(5, numbers)),
    )


def _particles(cls, **more):
    return cls, {"num_particles": 2} | more, lambda made: torch.tensor(loss(lambda: made, X))


CLASSES: dict[str, tuple[Callable, dict[str, Any], Callable[[Any], Any]]] = {
    "likelihoods.Bernoulli": _likelihood("Bernoulli", 4),
    "likelihoods.ContinuousBernoulli": _likelihood("ContinuousBernoulli", 4),
    "likelihoods.Normal": _likelihood("Normal", 4, scale=1.0),
    "likelihoods.Laplace": _likelihood("Laplace", 4, scale=1.0),
    "likelihoods.StudentT": _likelihood("StudentT", 4, scale=1.0, df=3.0),
    "likelihoods.Categorical": _likelihood("Categorical", 8, levels=2),
    "likelihoods.DiscretizedLogistic": _likelihood("DiscretizedLogistic", 8, levels=2),
    "likelihoods.DiscretizedLogisticMixture": _likelihood(
        "DiscretizedLogisticMixture", 24, levels=2, components=2
    ),
    "likelihoods.Poisson": _likelihood("Poisson", 4),
    "likelihoods.NegativeBinomial": _likelihood("NegativeBinomial", 4, dispersion=1.0),
    "likelihoods.Levels": (pv.likelihoods.Levels, {"levels": 2}, lambda m: m.check(X).float()),
    "likelihoods.SharedScale": (pv.likelihoods.SharedScale, {"initial": 1.0}, _call(X)),
    "likelihoods.ScalePerOutput": (
        lambda shape, initial: pv.likelihoods.ScalePerOutput(shape, initial=initial),
        {"shape": 4, "initial": 1.0},
        _call(X),
    ),
    "likelihoods.OptimalScale": (
        pv.likelihoods.OptimalScale,
        {"momentum": 0.1, "least": 1e-3},
        lambda made: pv.likelihoods.Normal(Identity(), made)(X).log_prob(X + 1),
    ),
    "priors.StandardNormal": (
        lambda event_shape: pv.priors.StandardNormal(event_shape),
        {"event_shape": 2},
        lambda made: made().sample(),
    ),
    "priors.MixtureOfNormals": (
        pv.priors.MixtureOfNormals,
        {"dim": 2, "components": 3},
        lambda made: made().sample(),
    ),
    "priors.FlowPrior": (
        pv.priors.FlowPrior,
        {"dim": 2, "transform": pv.flows.Composition(2, length=1)},
        lambda made: made().sample(),
    ),
    "priors.VampPrior": (
        lambda event_shape, pseudo_inputs, bounds: pv.priors.VampPrior(
            event_shape, pseudo_inputs=pseudo_inputs, bounds=bounds
        ),
        {"event_shape": 2, "pseudo_inputs": X, "bounds": (0.0, 1.0)},
        lambda made: made.rows(),
    ),
    "priors.ExemplarPrior": (
        pv.priors.ExemplarPrior,
        {"dim": 2, "exemplars": X, "num_drawn": 2},
        lambda made: made.rows(),
    ),
    "priors.AggregatedPosterior": (
        lambda **options: pv.priors.AggregatedPosterior(make_pair()[1], X, **options),
        {"site": "z", "subset": 2},
        lambda made: made().sample(),
    ),
    "nets.MLP": (
        pv.nets.MLP,
        {"in_features": 4, "hidden": [3], "out_features": 2, "activation": nn.Tanh},
        _call(X),
    ),
    "nets.GatedMLP": (
        pv.nets.GatedMLP,
        {"in_features": 4, "hidden": [3], "out_features": 2},
        _call(X),
    ),
    "nets.Joined": (pv.nets.Joined, {"network": MLP(2)}, _call(X)),
    "nets.ConvEncoder": (
        pv.nets.ConvEncoder,
        {"image_shape": (1, 5, 4), "channels": (2,), "activation": nn.ReLU},
        _call(X[None]),
    ),
    "nets.ConvDecoder": (
        pv.nets.ConvDecoder,
        {
            "in_features": 4,
            "image_shape": (1, 5, 4),
            "channels": (2,),
            "parameters_per_output": 1,
            "activation": nn.ReLU,
        },
        _call(X),
    ),
    "nets.ResidualEncoder": (
        pv.nets.ResidualEncoder,
        {"image_shape": (1, 5, 4), "channels": (2,), "blocks": 1, "activation": nn.ReLU},
        _call(X[None]),
    ),
    "nets.ResidualDecoder": (
        pv.nets.ResidualDecoder,
        {
            "in_features": 4,
            "image_shape": (1, 5, 4),
            "channels": (2,),
            "parameters_per_output": 1,
            "blocks": 1,
            "activation": nn.ReLU,
        },
        _call(X),
    ),
    "nets.ResidualBlock": (
        pv.nets.ResidualBlock,
        {"channels": 5, "activation": nn.ReLU},
        _call(X[None, ..., None]),
    ),
    **{
        f"flows.{name}": (getattr(pv.flows, name), {"dim": 3} | more, _flow)
        for name, more in {
            "AffineCoupling": {"context": 2, "hidden": [4]},
            "Householder": {},
            "InverseAutoregressive": {"context": 2, "hidden": [4]},
            "MaskedAutoregressive": {"context": 2, "hidden": [4]},
            "NeuralSpline": {
                "autoregressive": False,
                "bins": 3,
                "bound": 5.0,
                "context": 2,
                "hidden": [4],
            },
            "Planar": {},
            "Radial": {},
            "Sylvester": {"kind": "orthogonal", "size": 2},
        }.items()
    },
    "flows.Composition": (
        pv.flows.Composition,
        {"dim": 3, "flow": pv.flows.Planar, "length": 2},
        lambda made: made()(torch.ones(5, made.dim)),
    ),
    "layers.Absolute": (
        pv.surjections.Absolute,
        {"signs": None, "event_dim": 1},
        lambda made: made.infer(X).sample(),
    ),
    "layers.GenerativeAbsolute": (
        pv.surjections.GenerativeAbsolute,
        {"signs": None, "event_dim": 1},
        lambda made: made.infer(X).sample(),
    ),
    "layers.Augment": (
        pv.surjections.Augment,
        {"size": 4, "noise": pv.priors.StandardNormal(2), "conditional": False},
        lambda made: made.infer(X).sample(),
    ),
    "layers.Slice": (
        pv.surjections.Slice,
        {"size": 2, "noise": pv.priors.StandardNormal(2), "conditional": False},
        lambda made: made.infer(X).sample(),
    ),
    "layers.Maximum": (
        pv.surjections.Maximum,
        {"noise": lambda: dist.HalfNormal(torch.ones(3)).to_event(1), "conditional": False},
        lambda made: made.infer(X).sample(),
    ),
    "layers.Bijection": (
        pv.surjections.Bijection,
        {"transform": torch.distributions.transforms.ExpTransform(), "event_dim": 1},
        lambda made: made.infer(X + 1).sample(),
    ),
    "layers.UniformDequantization": (
        pv.surjections.UniformDequantization,
        {"levels": 2, "event_dim": 1},
        lambda made: made.infer(X).sample(),
    ),
    "layers.VariationalDequantization": (
        pv.surjections.VariationalDequantization,
        {
            "levels": 2,
            "noise": lambda x: dist.Uniform(torch.zeros_like(x), 1.0).to_event(1),
            "event_dim": 1,
        },
        lambda made: made.infer(X).sample(),
    ),
    "layers.Stochastic": (
        pv.surjections.Stochastic,
        {
            "encoder": lambda x: dist.Normal(x, 1.0).to_event(1),
            "decoder": lambda z: dist.Normal(z, 1.0).to_event(1),
        },
        lambda made: made.infer(X).sample(),
    ),
    "LatentVariableModel": (
        pv.LatentVariableModel,
        {"prior": pv.priors.StandardNormal(2), "likelihood": pv.likelihoods.Bernoulli(MLP(4))},
        None,
    ),
    "ConditionalModel": (
        pv.models.ConditionalModel,
        {
            "prior": pv.priors.StandardNormal(2),
            "likelihood": pv.likelihoods.Bernoulli(MLP(4)),
            "conditional_prior": False,
        },
        None,
    ),
    "HierarchicalModel": (
        pv.models.HierarchicalModel,
        {
            "prior": pv.priors.StandardNormal(2),
            "layers": [pv.likelihoods.Normal(pv.nets.MLP(2, [3], 2))],
            "likelihood": pv.likelihoods.Bernoulli(pv.nets.MLP(2, [3], 4)),
            "skip": False,
        },
        _guide,
    ),
    "MixtureModel": (
        pv.models.MixtureModel,
        {
            "prior": pv.priors.MixtureOfNormals(2, 3),
            "likelihood": pv.likelihoods.Bernoulli(pv.nets.MLP(2, [3], 4)),
        },
        _guide,
    ),
    "SemiSupervisedModel": (
        pv.models.SemiSupervisedModel,
        {
            "classes": 2,
            "prior": pv.priors.StandardNormal(2),
            "likelihood": pv.likelihoods.Bernoulli(pv.nets.Joined(pv.nets.MLP(4, [3], 4))),
        },
        None,
    ),
    "SequenceModel": (
        pv.models.SequenceModel,
        {
            "prior": pv.priors.StandardNormal(2),
            "transition": lambda z: dist.Normal(z, 1.0).to_event(1),
            "likelihood": pv.likelihoods.Bernoulli(pv.nets.MLP(2, [3], 4)),
        },
        None,
    ),
    "FlowModel": (
        pv.surjections.FlowModel,
        {
            "prior": pv.priors.StandardNormal(4),
            "layers": [pv.surjections.Bijection(pv.flows.Composition(4, length=1))],
        },
        _guide,
    ),
    **{
        f"guides.{name}": (
            functools.partial(_guide_of, name),
            {"encoder": MLP()} | more,
            _guide,
        )
        for name, more in {
            "AmortizedDelta": {"log_density": 0.0},
            "AmortizedFlow": {
                "flow": pv.flows.Planar,
                "length": 2,
                "amortized": True,
                "joint": True,
            },
            "AmortizedLowRankNormal": {"rank": 1, "joint": True},
            "AmortizedMixture": {"components": 2, "joint": True},
            "AmortizedMultivariateNormal": {"joint": True},
            "AmortizedNormal": {},
            "HierarchicalGuide": {
                "family": pv.guides.families.Normal,
                "order": "bottom-up",
                "history": None,
                "hidden": [3],
            },
        }.items()
    },
    "guides.SemiAmortized": (
        pv.guides.SemiAmortized,
        {"guide": make_pair()[1], "steps": 2, "step_size": 0.05, "through": False},
        _guide,
    ),
    "guides.SequenceGuide": (
        lambda **options: pv.guides.SequenceGuide(_model(), **options),
        {"recurrent": 3, "hidden": [3], "encoder": None},
        None,
    ),
    "objectives.ELBO": _particles(pv.objectives.ELBO),
    "objectives.IWAE": _particles(pv.objectives.IWAE),
    "objectives.MeanFieldELBO": _particles(pv.objectives.MeanFieldELBO),
    "objectives.MIWAE": _particles(pv.objectives.MIWAE, num_bounds=2),
    "objectives.PIWAE": _particles(pv.objectives.PIWAE, num_bounds=2),
    "objectives.CIWAE": _particles(pv.objectives.CIWAE, beta=0.5),
    "objectives.Renyi": _particles(pv.objectives.Renyi, alpha=0.5),
    "objectives.CUBO": _particles(pv.objectives.CUBO, n=2.0),
    "objectives.TVO": _particles(pv.objectives.TVO, num_points=3, first=0.1),
    "objectives.VIMCO": _particles(pv.objectives.VIMCO),
    "objectives.DReG": _particles(pv.objectives.DReG),
    "objectives.StickingTheLanding": _particles(pv.objectives.StickingTheLanding),
    "objectives.ScoreFunction": _particles(pv.objectives.ScoreFunction, baseline=None),
    "objectives.ReweightedWakeSleep": _particles(
        pv.objectives.ReweightedWakeSleep, wake=1.0, sleep=0.0
    ),
    "objectives.BetaELBO": _particles(pv.objectives.BetaELBO, beta=1.0),
    "objectives.BetaTCVAE": _particles(
        pv.objectives.BetaTCVAE,
        beta=2.0,
        mutual_information=1.0,
        dimension_wise=1.0,
        num_data=10,
    ),
    "objectives.InfoVAE": _particles(pv.objectives.InfoVAE, alpha=1.0, scale=10.0),
    "objectives.FreeBits": _particles(pv.objectives.FreeBits, least=0.5, per="site", over="batch"),
    "objectives.CapacityELBO": _particles(pv.objectives.CapacityELBO, capacity=1.0, weight=10.0),
    "objectives.SemiSupervisedELBO": (
        pv.objectives.SemiSupervisedELBO,
        {"classification": 1.0, "num_particles": 1},
        None,
    ),
    "objectives.Constant": (pv.objectives.Constant, {"value": 1.0}, _call(torch.zeros(()))),
    "objectives.Linear": (
        pv.objectives.Linear,
        {"steps": 3, "start": 0.0, "end": 1.0},
        _call(torch.ones(())),
    ),
    "objectives.Cyclical": (
        pv.objectives.Cyclical,
        {"period": 3, "rise": 0.5, "start": 0.0, "end": 1.0},
        _call(torch.ones(())),
    ),
    "MixtureOfNormals": (
        pv.distributions.MixtureOfDiagNormals,
        {"logits": torch.zeros(3), "loc": torch.zeros(3, 2), "scale": torch.ones(3, 2)},
        lambda made: made.log_prob(torch.zeros(2)),
    ),
    "datasets.load": (
        pv.datasets.load,
        {"name": "digits", "binarize": "fixed", "seed": 0},
        lambda made: made.test,
    ),
    "datasets.load_labels": (
        pv.datasets.load_labels,
        {"name": "digits"},
        lambda made: made.test.float(),
    ),
    "AIS": (
        quick_ais,
        {
            "num_chains": 2,
            "num_temperatures": 3,
            "start": "guide",
            "leapfrog_steps": 1,
            "target_acceptance": 0.65,
            "pilot": 2,
            "step_size": None,
            "schedule": "sigmoid",
        },
        lambda made: pv.evidence(*make_pair(), X, method=made, capture=False, seed=0).values,
    ),
    "Ascent": (
        pv.evaluation.Ascent,
        {
            "learning_rate": 1e-3,
            "num_particles": 2,
            "window": 2,
            "patience": 1,
            "max_steps": 4,
        },
        None,
    ),
}

# The scalar arguments of functions, by name, with good values to stand beside them.
FUNCTIONS: dict[str, tuple[Callable, dict[str, Any], Callable[[Any], Any]]] = {
    name: (lambda function=function, **options: function(GOOD, **options), options, lambda x: x)
    for name, function, options in (
        (
            "fit",
            trained,
            {
                "batch_size": 3,
                "learning_rate": 0.01,
                "clip_norm": 1.0,
                "seed": 0,
                "epochs": 1,
                "patience": None,
                "guide_steps": None,
                "model_steps": None,
                "on_nonfinite": "raise",
                "skip_limit": 3,
                "device": "cpu",
                "objective": pv.objectives.ELBO(),
                "validation": None,
                "transform": None,
                "optimizer": None,
                "scheduler": None,
                "after_epoch": None,
            },
        ),
        (
            "evidence",
            evidence,
            {
                "num_particles": 3,
                "batch_size": 2,
                "pairs_per_pass": 5,
                "method": "importance",
                "seed": 0,
                "resume": None,
            },
        ),
        ("sandwich", sandwich, {"batch_size": 2, "pairs_per_pass": 5, "seed": 0, "resume": None}),
        (
            "elbo_surgery",
            surgery,
            {"num_particles": 1, "batch_size": 2, "estimator": "exact", "seed": 0, "resume": None},
        ),
        (
            "prior_holes",
            holes,
            {"num_samples": 20, "quantile": 0.2, "batch_size": 2, "seed": 0},
        ),
        (
            "inference_gaps",
            gaps,
            {"num_particles": 3, "batch_size": 2, "pairs_per_pass": 5, "seed": 0, "evidence": None},
        ),
        (
            "collapse_report",
            collapse,
            {
                "threshold": 0.01,
                "num_particles": 3,
                "estimator": "exact",
                "batch_size": 2,
                "seed": 0,
            },
        ),
        (
            "rate_distortion",
            curve,
            {
                "betas": [1.0],
                "num_particles": 2,
                "training_particles": 1,
                "refit": "guide",
                "seed": 0,
                "evidence": None,
            },
        ),
        ("compare", compared, {"num_particles": 3, "image_shape": (2, 2), "seed": 0}),
        ("to_arviz", arviz, {"num_draws": 2, "seed": 0}),
        ("gradient_noise", noise, {"repeats": 2, "objectives": [pv.objectives.ELBO()], "seed": 0}),
        ("terms", terms, {"num_particles": 2, "plate_nesting": 1}),
    )
} | {
    "generate": (
        lambda **options: pv.generate(make_pair()[0], GOOD, **options),
        {"seed": 0, "guide": None},
        lambda x: x,
    ),
    "reconstruct": (
        lambda **options: pv.reconstruct(*make_pair(), GOOD, **options),
        {"seed": 0},
        lambda x: x,
    ),
    "save": (saved, {"folder": None}, lambda x: x),
    "load": (
        lambda **options: pv.load(**{"folder": "/nowhere"} | options),
        {"folder": "/nowhere", "model": None, "guide": None, "device": "cpu"},
        lambda x: [],
    ),
    "load_checkpoint": (
        lambda **options: pv.load_checkpoint(**{"folder": "/nowhere"} | options),
        {"folder": "/nowhere", "model": None, "guide": None, "device": "cpu"},
        lambda x: [],
    ),
    "evidence: programs": (
        lambda model, guide: pv.evidence(model, guide, GOOD, num_particles=2, seed=0).values,
        dict(zip(("model", "guide"), make_pair(), strict=True)),
        lambda x: x,
    ),
    "fit: programs": (
        lambda model, guide: pv.fit(model, guide, GOOD, batch_size=3, epochs=1, progress=False),
        dict(zip(("model", "guide"), make_pair(), strict=True)),
        lambda x: [],
    ),
}
