"""A guide for data of which some have labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae._programs.latent_sites import LatentSite, latent_sites, surroundings
from pyro_vae._programs.sites import DATA_PLATE
from pyro_vae._utils.init_args import records_init_args
from pyro_vae.guides import _families as families
from pyro_vae.guides._families import Family
from pyro_vae.guides._lazy_modules import LazyModules
from pyro_vae.guides._model_ref import ModelRef
from pyro_vae.guides._posterior import Posterior
from pyro_vae.models import SemiSupervisedModel
from pyro_vae.models._semi_supervised import UNKNOWN, check_labels, one_hot


@records_init_args
class SemiSupervisedGuide(PyroModule):
    r""":math:`q(y|x)\, q(z|x, y)` for M2 (Kingma et al. 2014), y only where it is not known.

    A missing y is enumerated: the ELBO is averaged over all classes, :math:`\sum_y q(y|x)(\dots)`,
    and none is drawn. Importance weights cannot take an average; for :func:`pyro_vae.evidence`
    pass ``functools.partial(guide, enumerates=False)``, which draws it.

    Args:
        model: the :class:`pyro_vae.models.SemiSupervisedModel`.
        classifier: network from x to the logits of q(y|x), ``(B, C)``.
        encoder: network from x ``(B, *event)`` and the class, as zeros and ones ``(..., B, C)``, to
            features ``(..., B, F)``; ``nets.Joined`` makes one.
        family: of q(z|x, y); makes the family of D dimensions.

    Raises:
        ValueError: at the first call: the classifier gives other than C numbers; what
            :class:`pyro_vae.guides.AmortizedGuide` refuses.

    Example:
        >>> import torch, pyro_vae as pv
        >>> mlp, joined = pv.nets.MLP, pv.nets.Joined
        >>> likelihood = pv.likelihoods.Bernoulli(joined(mlp(2 + 3, [8], 16)))
        >>> model = pv.models.SemiSupervisedModel(3, pv.priors.StandardNormal(2), likelihood)
        >>> guide = pv.guides.SemiSupervisedGuide(
        ...     model, classifier=mlp(16, [8], 3), encoder=joined(mlp(16 + 3, [8]))
        ... )
        >>> x, y = torch.rand(20, 16).round(), torch.randint(-1, 3, (20,))
        >>> objective = pv.objectives.SemiSupervisedELBO(classification=2.0)
        >>> fit = pv.fit(
        ...     model, guide, (x, y), objective=objective, batch_size=10, epochs=1, progress=False
        ... )
        >>> guide.classify(x).probs.shape
        torch.Size([20, 3])
    """

    def __init__(
        self,
        model: SemiSupervisedModel,
        classifier: nn.Module,
        encoder: nn.Module,
        family: Callable[[int], Family] = families.Normal,
    ):
        super().__init__()
        self._model = ModelRef(model)
        self._family = family
        self.classifier = classifier
        self.encoder = encoder
        self.built = LazyModules()  # the head and the posterior of z, made at the first call

    def classify(self, x: Tensor) -> dist.Categorical:
        """Return q(y|x), batch shape (B,)."""
        logits = self.classifier(x)
        classes = self._model.program.classes
        if logits.shape != (x.shape[0], classes):
            raise ValueError(
                f"the classifier must map x of shape {tuple(x.shape)} to logits of shape "
                f"({x.shape[0]}, {classes}), got {tuple(logits.shape)}"
            )
        return dist.Categorical(logits=logits)

    def forward(self, x: Tensor, y: Tensor, enumerates: bool = True) -> dict[str, Tensor]:
        """Sample the latents given x, and y where it is known.

        Args:
            x: ``(B, *event)``.
            y: ``(B,)``, -1 where it is not known.
            enumerates: whether all classes are counted where it is not; else one is drawn.
        """
        check_labels(x, y, self._model.program.classes)
        q_y, known = self.classify(x), y != UNKNOWN
        if not self.built:
            features = self._features(x, y, q_y)
            sites = latent_sites(self._model.program, x, y)
            self.build(sites, features.shape[-1], like=features)
        posterior = self.built["posterior"]
        plates, masks = surroundings(posterior.sites, self._model.program, x, y)
        infer: dict[str, Any] = {"enumerate": "parallel"} if enumerates else {}
        with plates[DATA_PLATE], poutine.mask(mask=~known):
            missing = pyro.sample("y_missing", q_y, infer=infer)
        features = self._features(x, torch.where(known, y, missing), q_y)
        values = posterior(self.built["head"](features), plates, masks)
        return {"y_missing": missing, **values}

    def _features(self, x: Tensor, labels: Tensor, q_y: dist.Categorical) -> Tensor:
        classes = one_hot(labels, q_y.logits.shape[-1]).to(q_y.logits)
        features = self.encoder(x, classes)
        if features.shape[:-1] != classes.shape[:-1]:
            raise ValueError(
                f"the encoder must map x of shape {tuple(x.shape)} and classes of shape "
                f"{tuple(classes.shape)} to features of shape {(*classes.shape[:-1], 'F')}, got "
                f"{tuple(features.shape)}"
            )
        return features

    def build(self, sites: Sequence[LatentSite], width: int, like: Tensor) -> None:
        """Make the head, as the first call does.

        Args:
            sites: of the model, but y.
            width: F, of the encoder's features.
            like: a tensor of their device and type.
        """

        def make() -> dict[str, nn.Module]:
            posterior = Posterior(sites, self._family)
            return {"head": nn.Linear(width, posterior.num_parameters), "posterior": posterior}

        self.built.fill(make, sites, width, like)
