"""Every distribution of torch and Pyro by name: guided, or refused as a latent variable."""

import inspect
import math

import pyro.distributions as dist
import torch
from torch import distributions as D
from torch.distributions import constraints
from torch.distributions import transforms as T

ABSTRACT = {"Distribution", "ExponentialFamily", "TorchDistribution"}
t, ones, zeros = torch.tensor, torch.ones, torch.zeros


def names():
    """Return the names of all distributions that torch and Pyro export."""
    found = {
        name
        for module in (D, dist)
        for name in module.__all__
        if inspect.isclass(thing := getattr(module, name)) and issubclass(thing, D.Distribution)
    }
    return found - ABSTRACT


def gaussian(dim=1, *batch):
    return dist.MultivariateNormal(zeros(dim), torch.eye(dim)).expand(batch)


def hmm(cls, *first, **options):
    return cls(*first, gaussian(), torch.eye(1), gaussian(), torch.eye(1), gaussian(), **options)


def stable():
    return dist.Stable(1.5, 0.0).expand([1]).to_event(1)


# Distributions with a density on an open set: a guide can be made for them.
GUIDED = {
    "Beta": lambda: dist.Beta(2.0, 3.0),
    "Cauchy": lambda: dist.Cauchy(1.0, 2.0),
    "Chi2": lambda: dist.Chi2(3.0),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(0.8),
    "Dirichlet": lambda: dist.Dirichlet(t([1.0, 2.0, 3.0])),
    "Exponential": lambda: dist.Exponential(2.0),
    "FisherSnedecor": lambda: dist.FisherSnedecor(6.0, 8.0),
    "Gamma": lambda: dist.Gamma(2.0, 3.0),
    "GeneralizedPareto": lambda: dist.GeneralizedPareto(0.0, 1.0, 0.3),
    "GeneralizedPareto, bounded": lambda: dist.GeneralizedPareto(1.0, 1.0, -0.3),
    "GeneralizedPareto, exponential": lambda: dist.GeneralizedPareto(1.0, 1.0, 0.0),
    "Gumbel": lambda: dist.Gumbel(1.0, 2.0),
    "HalfCauchy": lambda: dist.HalfCauchy(1.0),
    "HalfNormal": lambda: dist.HalfNormal(1.0),
    "InverseGamma": lambda: dist.InverseGamma(3.0, 2.0),
    "Kumaraswamy": lambda: dist.Kumaraswamy(2.0, 3.0),
    "LKJCholesky": lambda: dist.LKJCholesky(3, 1.5),
    "Laplace": lambda: dist.Laplace(0.0, 1.0),
    "LogNormal": lambda: dist.LogNormal(0.0, 1.0),
    "LogisticNormal": lambda: dist.LogisticNormal(zeros(2), ones(2)),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        zeros(2), ones(2, 1), ones(2)
    ),
    "MixtureSameFamily": lambda: dist.MixtureSameFamily(
        dist.Categorical(ones(2)), dist.Normal(t([[-2.0, 0.0], [2.0, 0.0]]), 0.5).to_event(1)
    ),
    "MixtureSameFamily, scalar": lambda: dist.MixtureSameFamily(
        dist.Categorical(ones(2)), dist.Gamma(t([2.0, 9.0]), 2.0)
    ),
    "MixtureSameFamily, angles": lambda: dist.MixtureSameFamily(
        dist.Categorical(ones(2)), dist.VonMises(t([-2.0, 3.0]), 4.0)
    ),
    "MixtureSameFamily, interval": lambda: dist.MixtureSameFamily(
        dist.Categorical(ones(2)), D.Uniform(t([-1.0, -1.0]), 2.0)
    ),
    "MultivariateNormal": lambda: dist.MultivariateNormal(zeros(2), torch.eye(2)),
    "Normal": lambda: dist.Normal(0.0, 1.0),
    "Pareto": lambda: dist.Pareto(1.0, 3.0),
    "RelaxedBernoulli": lambda: dist.RelaxedBernoulli(t(0.7), t(0.3)),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(t(0.8), ones(3)),
    "StudentT": lambda: dist.StudentT(4.0),
    "Uniform": lambda: dist.Uniform(-1.0, 3.0),
    "VonMises": lambda: dist.VonMises(1.0, 2.0),
    "Weibull": lambda: dist.Weibull(1.0, 2.0),
    "TransformedDistribution": lambda: dist.TransformedDistribution(
        dist.Gamma(2.0, 1.0), T.AffineTransform(3.0, -1.0)
    ),
    "Independent": lambda: dist.Gamma(ones(2), 1.0).to_event(1),
    "AffineBeta": lambda: dist.AffineBeta(2.0, 3.0, -1.0, 4.0),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(0.0, 1.0, 2.0),
    "DiscreteHMM": lambda: dist.DiscreteHMM(
        zeros(2), zeros(2, 2), dist.Normal(t([0.0, 1.0]), 1.0), duration=2
    ),
    "DiscreteHMM, angles": lambda: dist.DiscreteHMM(
        zeros(2), zeros(2, 2), dist.VonMises(t([0.0, 1.0]), 1.0), duration=2
    ),
    "ExpandedDistribution": lambda: dist.ExpandedDistribution(dist.Gamma(2.0, 1.0), []),
    "FoldedDistribution": lambda: dist.FoldedDistribution(dist.Normal(1.0, 1.0)),
    "GaussianHMM": lambda: hmm(dist.GaussianHMM, duration=2),
    "IndependentHMM": lambda: dist.IndependentHMM(
        dist.GaussianHMM(gaussian(1, 2), torch.eye(1), gaussian(1, 2, 1), torch.eye(1), gaussian(),
                         duration=1)
    ),
    "Logistic": lambda: dist.Logistic(0.0, 1.0),
    "MaskedDistribution": lambda: dist.Gamma(2.0, 1.0).mask(t(True)),
    "MaskedMixture": lambda: dist.MaskedMixture(
        t(True), dist.Gamma(2.0, 1.0), dist.Gamma(3.0, 1.0)
    ),
    "MixtureOfDiagNormals": lambda: dist.MixtureOfDiagNormals(
        t([[-2.0, 0.0], [2.0, 0.0]]), ones(2, 2), zeros(2)
    ),
    "MixtureOfDiagNormalsSharedCovariance": lambda: dist.MixtureOfDiagNormalsSharedCovariance(
        t([[-2.0, 0.0], [2.0, 0.0]]), ones(2), zeros(2)
    ),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(4.0, zeros(2), torch.eye(2)),
    "NanMaskedMultivariateNormal": lambda: dist.NanMaskedMultivariateNormal(zeros(2), torch.eye(2)),
    "NanMaskedNormal": lambda: dist.NanMaskedNormal(0.0, 1.0),
    "RelaxedBernoulliStraightThrough": lambda: dist.RelaxedBernoulliStraightThrough(t(0.7), t(0.3)),
    "RelaxedOneHotCategoricalStraightThrough":
        lambda: dist.RelaxedOneHotCategoricalStraightThrough(t(0.8), ones(3)),
    "SineBivariateVonMises": lambda: dist.SineBivariateVonMises(t(0.), t(1.), t(2.), t(3.), t(1.)),
    "SineSkewed": lambda: dist.SineSkewed(
        dist.VonMises(t([0.0, 1.0]), 1.0).to_event(1), t([0.3, -0.2])
    ),
    "SkewLogistic": lambda: dist.SkewLogistic(0.0, 1.0, 2.0),
    "SoftLaplace": lambda: dist.SoftLaplace(0.0, 1.0),
    "Stable": lambda: dist.Stable(1.5, 0.2),
    "StableWithLogProb": lambda: dist.StableWithLogProb(1.5, 0.2),
}  # fmt: skip
if not hasattr(dist, "GeneralizedPareto"):  # added by a torch after 2.4
    GUIDED = {name: make for name, make in GUIDED.items() if "GeneralizedPareto" not in name}

_NO_MAP = "no bijection from the reals"
NOT_RUN = "cannot be sampled or expanded"
BROKEN = "cannot run"  # Pyro itself fails in a plate
# Distributions that guides refuse, with words of the message.
REFUSED = {
    "Bernoulli": (lambda: dist.Bernoulli(0.3), _NO_MAP),
    "Binomial": (lambda: dist.Binomial(4, 0.3), _NO_MAP),
    "Categorical": (lambda: dist.Categorical(ones(3)), _NO_MAP),
    "Geometric": (lambda: dist.Geometric(0.3), _NO_MAP),
    "Multinomial": (lambda: dist.Multinomial(3, ones(3)), _NO_MAP),
    "NegativeBinomial": (lambda: dist.NegativeBinomial(3, 0.4), _NO_MAP),
    "OneHotCategorical": (lambda: dist.OneHotCategorical(ones(3)), _NO_MAP),
    "OneHotCategoricalStraightThrough": (
        lambda: dist.OneHotCategoricalStraightThrough(ones(3)), _NO_MAP),
    "Poisson": (lambda: dist.Poisson(3.0), _NO_MAP),
    "Wishart": (lambda: dist.Wishart(t(3.0), torch.eye(2)), _NO_MAP),
    "AVFMultivariateNormal": (
        lambda: dist.AVFMultivariateNormal(zeros(2), torch.eye(2), 0.1 * ones(2, 1, 2)), NOT_RUN),
    "BetaBinomial": (lambda: dist.BetaBinomial(2.0, 3.0, 5), _NO_MAP),
    "CoalescentTimes": (lambda: dist.CoalescentTimes(t([0.0, 0.0, 1.0])), _NO_MAP),
    "CoalescentTimesWithRate": (
        lambda: dist.CoalescentTimesWithRate(t([0.0, 0.0, 1.0]), ones(4)), NOT_RUN),
    "Delta": (lambda: dist.Delta(t(1.0)), "it has one value"),
    "DirichletMultinomial": (lambda: dist.DirichletMultinomial(ones(3), 4), _NO_MAP),
    "Empirical": (lambda: dist.Empirical(zeros(5), zeros(5)), "a finite set"),
    "ExtendedBetaBinomial": (lambda: dist.ExtendedBetaBinomial(2.0, 3.0, 5), _NO_MAP),
    "ExtendedBinomial": (lambda: dist.ExtendedBinomial(4, 0.3), _NO_MAP),
    "GammaGaussianHMM": (
        lambda: hmm(dist.GammaGaussianHMM, dist.Gamma(5.0, 5.0), duration=2), NOT_RUN),
    "GammaPoisson": (lambda: dist.GammaPoisson(2.0, 3.0), _NO_MAP),
    "GaussianMRF": (
        lambda: dist.GaussianMRF(gaussian(), gaussian(2, 2), gaussian(2, 2)), NOT_RUN),
    "GaussianScaleMixture": (  # its log_prob takes one value at a time
        lambda: dist.GaussianScaleMixture(ones(2), zeros(2), t([1.0, 2.0])), "cannot score"),
    "GroupedNormalNormal": (
        lambda: dist.GroupedNormalNormal(t(0.0), t(1.0), t(1.0), t([0, 0, 1])), BROKEN),
    "ImproperUniform": (lambda: dist.ImproperUniform(constraints.real, (), ()), NOT_RUN),
    "LKJ": (lambda: dist.LKJ(3, t(1.5)), NOT_RUN),
    "LKJCorrCholesky": (lambda: dist.LKJCorrCholesky(3, 1.5), NOT_RUN),
    "LinearHMM": (
        lambda: dist.LinearHMM(
            stable(), torch.eye(1), stable(), torch.eye(1), stable(), duration=2),
        "cannot score"),
    "LogNormalNegativeBinomial": (
        lambda: dist.LogNormalNegativeBinomial(3.0, t(0.1), t(0.5)), NOT_RUN),
    "MixtureSameFamily, two supports": (
        lambda: dist.MixtureSameFamily(dist.Categorical(ones(2)), D.Uniform(t([0.0, 1.0]), 2.0)),
        "different supports"),
    "OMTMultivariateNormal": (
        lambda: dist.OMTMultivariateNormal(zeros(2), torch.eye(2)), NOT_RUN),
    "OneOneMatching": (lambda: dist.OneOneMatching(torch.eye(2)), _NO_MAP),
    "OneTwoMatching": (lambda: dist.OneTwoMatching(ones(4, 2)), _NO_MAP),
    "OrderedLogistic": (lambda: dist.OrderedLogistic(t(0.0), t([0.0, 1.0])), _NO_MAP),
    "ProjectedNormal": (lambda: dist.ProjectedNormal(t([1.0, 0.0, 0.0])), _NO_MAP),
    "Rejector": (
        lambda: dist.Rejector(
            dist.Normal(0.0, 1.0), lambda x: torch.where(x > 0, 0.0, -math.inf), t(-0.69)),
        "states no support"),
    "SoftAsymmetricLaplace": (lambda: dist.SoftAsymmetricLaplace(0.0, 1.0, 2.0), NOT_RUN),
    "SpanningTree": (lambda: dist.SpanningTree(zeros(3)), NOT_RUN),
    "Stable, one-sided": (lambda: dist.StableWithLogProb(0.5, 1.0), "on one side"),
    "TruncatedPolyaGamma": (lambda: dist.TruncatedPolyaGamma(t(0.0)), BROKEN),
    "Unit": (lambda: dist.Unit(t(0.0)), "without a number"),
    "VonMises3D": (lambda: dist.VonMises3D(t([3.0, 0.0, 0.0])), NOT_RUN),
    "ZeroInflatedDistribution": (
        lambda: dist.ZeroInflatedDistribution(dist.Gamma(2.0, 1.0), gate=t(0.3)),
        "has positive probability"),
    "ZeroInflatedNegativeBinomial": (
        lambda: dist.ZeroInflatedNegativeBinomial(3.0, probs=t(0.3), gate=t(0.3)), _NO_MAP),
    "ZeroInflatedPoisson": (lambda: dist.ZeroInflatedPoisson(t(3.0), gate=t(0.3)), _NO_MAP),
}  # fmt: skip
