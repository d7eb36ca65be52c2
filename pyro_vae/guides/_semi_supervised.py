"""A guide for partly labeled data."""

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
from pyro_vae._utils.network_outputs import output_of
from pyro_vae.guides import _families as families
from pyro_vae.guides._encoding import ONE_TENSOR_OF_FEATURES
from pyro_vae.guides._families import Family
from pyro_vae.guides._lazy_modules import LazyModules
from pyro_vae.guides._model_ref import ModelRef
from pyro_vae.guides._posterior import Posterior
from pyro_vae.models import SemiSupervisedModel
from pyro_vae.models._semi_supervised import UNKNOWN, check_labels, one_hot


@records_init_args
class SemiSupervisedGuide(PyroModule):
    r""":math:`q(y|x)\, q(z|x, y)` for M2 (Kingma et al. 2014); only a missing y is latent.

    The guide enumerates a missing y instead of sampling it. So the ELBO is averaged over all
    classes, :math:`\sum_y q(y|x)(\ldots)`. Importance weights need a sample, not an average,
    so :func:`pyro_vae.evidence` samples y. To train with importance weights, pass
    ``functools.partial(guide, enumerates=False)``.

    Args:
        model: the :class:`pyro_vae.models.SemiSupervisedModel` to build the guide for.
        classifier: network from x to the logits of q(y|x), ``(B, C)``.
        encoder: network from x ``(B, *event)`` and the one-hot class ``(..., B, C)`` to features
            ``(..., B, F)``, for example a ``nets.Joined``.
        family: function from D to the family of q(z|x, y) with D dimensions.

    Raises:
        ValueError: A call raises it if the classifier does not return C numbers per data point.
            The first call also raises the errors of :class:`pyro_vae.guides.AmortizedGuide`.

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
        """Return q(y|x), with batch shape (B,)."""
        logits = output_of("classifier", self.classifier, x, use="Return the logits of q(y|x)")
        classes = self._model.program.classes
        if logits.shape != (x.shape[0], classes):
            raise ValueError(
                f"the classifier must map x of shape {tuple(x.shape)} to logits of shape "
                f"({x.shape[0]}, {classes}), got {tuple(logits.shape)}"
            )
        return dist.Categorical(logits=logits)

    def forward(self, x: Tensor, y: Tensor, enumerates: bool = True) -> dict[str, Tensor]:
        """Sample the latents given x and the known labels.

        Args:
            x: ``(B, *event)``.
            y: labels ``(B,)``, -1 where the label is missing.
            enumerates: whether to enumerate all classes of a missing label. If False, sample one.
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
        features = output_of("encoder", self.encoder, x, classes, use=ONE_TENSOR_OF_FEATURES)
        if features.shape[:-1] != classes.shape[:-1]:
            raise ValueError(
                f"the encoder must map x of shape {tuple(x.shape)} and classes of shape "
                f"{tuple(classes.shape)} to features of shape {(*classes.shape[:-1], 'F')}, got "
                f"{tuple(features.shape)}"
            )
        return features

    def build(self, sites: Sequence[LatentSite], width: int, like: Tensor) -> None:
        """Create the head, as the first call does.

        Args:
            sites: the latent sites of the model except y.
            width: F, the number of the encoder's features.
            like: a tensor with the device and dtype of the features.
        """

        def make() -> dict[str, nn.Module]:
            posterior = Posterior(sites, self._family)
            return {"head": nn.Linear(width, posterior.num_parameters), "posterior": posterior}

        self.built.fill(make, sites, width, like)
