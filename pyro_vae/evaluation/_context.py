"""The context of an evaluation: seed, parameter store, evaluation mode, and a checked pair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pyro_vae._programs.enumeration import sampled_guides
from pyro_vae._programs.evaluation import evaluation_mode
from pyro_vae._programs.independence import check_independence
from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import free_param_names, parameter_store
from pyro_vae._programs.particles import particle_options
from pyro_vae._programs.terms import Terms
from pyro_vae._programs.validation import check_pair
from pyro_vae._utils.random import seeded
from pyro_vae._utils.user_warnings import warn_user
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Minibatches


@contextlib.contextmanager
def evaluation_context(
    who: str,
    model: Program,
    guide: Program,
    batches: Minibatches,
    *,
    vectorize_particles: bool | None,
    seed: int | None,
    drawn_from: Program | None = None,
    needs_latents: bool = False,
    weighs: bool = False,
    may_fold: bool = True,
    weighs_particles: bool = True,
) -> Iterator[dict[str, Any]]:
    """Set the seed, open the parameter store, set evaluation mode, and check the pair.

    Sites that the guide enumerates are sampled in the block.

    Args:
        who: name of the estimator, for messages.
        model: program of p(x, z).
        guide: program of q(z|x).
        batches: the data. The pair is checked on the first minibatch. Validation of values stays
            on in the block, for the other minibatches.
        vectorize_particles: see :func:`pyro_vae.terms`.
        seed: seed of the samples inside the block.
        drawn_from: program that replaces the guide in the check, if no sample comes from the guide.
        needs_latents: whether the estimator needs latents.
        weighs: whether a sample may have a density of zero under the model, and so a weight of
            zero.
        may_fold: whether particles may become rows of the batch.
        weighs_particles: whether the estimator weighs the particles of each data point. If not, the
            pair may have global sites and points, and the block gets no options.

    Yields:
        ``plate_nesting`` and ``vectorize_particles`` for :func:`pyro_vae.terms`.

    Raises:
        ValueError: The pair breaks a rule (docs/contract.md). A site is global or scaled. The
            estimator needs latents and the pair has none. The densities of a data point depend on
            the latents of others.
    """
    drawn_from = guide if drawn_from is None else drawn_from
    with (
        seeded(seed),
        parameter_store(model, guide) as store,
        evaluation_mode(model, guide),
        sampled_guides(),
    ):
        first = batches.first()
        known = set(store["params"])
        trace = check_pair(model, drawn_from, first, batches, weighs=weighs)
        if fresh := sorted(free_param_names() - known):
            warn_user(
                f"{who} found no value of pyro.param {fresh[0]!r} and uses its initial value. Fit "
                "this pair first, or let its programs wrap fitted programs."
            )
        # Where a sample has a density of zero, later distributions may have invalid parameters.
        checked = not (weighs and trace.excluded is not None)
        if weighs_particles:
            Terms([trace]).require_independent_data(who)
            with values_checked(checked):
                check_independence(who, model, drawn_from, first)
        if needs_latents and not trace.samples():
            raise ValueError(
                f"{who} needs a latent variable, but this pair has none: its sites are "
                f"{[*trace.model, *trace.guide]}. Sample a latent variable in model and guide, in "
                'the plate "data".'
            )
        options = {}
        if weighs_particles:
            with values_checked(checked):
                options = particle_options(
                    model,
                    drawn_from,
                    first,
                    vectorize_particles=vectorize_particles,
                    may_fold=may_fold,
                )
        with values_checked(True):
            yield options
