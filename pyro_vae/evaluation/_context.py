"""The context of an evaluation: seed, parameter store, evaluation mode, and a checked pair."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from pyro_vae._programs.pair_trace import Program
from pyro_vae._programs.parameters import evaluation_mode, free_param_names, parameter_store
from pyro_vae._programs.terms import Terms, find_plate_nesting
from pyro_vae._programs.validation import check_pair
from pyro_vae._utils.random import seeded
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Minibatches


@contextlib.contextmanager
def evaluation_context(
    who: str,
    model: Program,
    guide: Program,
    batches: Minibatches,
    *,
    vectorize_particles: bool,
    seed: int | None,
    drawn_from: Program | None = None,
    needs_latents: bool = False,
    weighs: bool = False,
    stacklevel: int = 4,
) -> Iterator[int]:
    """Set the seed, open the parameter store, set evaluation mode, and check the pair.

    Args:
        who: the estimator, which messages name.
        model: program of p(x, z).
        guide: program of q(z|x).
        batches: the data. The pair is checked on the first minibatch. Validation of values stays
            on in the block, for the other minibatches.
        vectorize_particles: whether the programs must take the particles' dimension.
        seed: of the draws inside the block.
        drawn_from: replaces the guide where nothing is drawn from it.
        needs_latents: whether the estimator needs latents.
        weighs: whether draws may have a density of zero under the model, and so no weight.
        stacklevel: of a warning, which names the caller of the estimator.

    Yields:
        How many batch dimensions the programs use.

    Raises:
        ValueError: The pair breaks the contract. A site is global or scaled. There are no latents,
            and the estimator needs some.
    """
    drawn_from = guide if drawn_from is None else drawn_from
    with (
        seeded(seed),
        parameter_store(model, guide) as store,
        evaluation_mode(model, guide),
    ):
        first = batches.first()
        known = set(store["params"])
        trace = check_pair(model, drawn_from, first, batches, weighs=weighs)
        if fresh := sorted(free_param_names() - known):
            warnings.warn(
                f"{who} found no value of pyro.param {fresh[0]!r} and takes its initial one: this "
                "pair was not fitted, nor do its programs wrap ones that were",
                stacklevel=stacklevel,
            )
        Terms([trace]).require_independent_data(who)
        if needs_latents and not trace.samples():
            raise ValueError(
                f"{who} is about latents, and this pair has none: its sites are "
                f"{[*trace.model, *trace.guide]}. Let model and guide sample one in the plate "
                '"data"'
            )
        with values_checked(True):
            if vectorize_particles:
                yield find_plate_nesting(model, drawn_from, *first)
            else:
                yield trace.plate_nesting
