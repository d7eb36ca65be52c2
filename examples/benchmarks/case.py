"""Parts that all libraries of the benchmark share: data, initial weights, and the loop."""

import json
import sys
import time
from itertools import pairwise

import numpy as np

DATA = 784
FLOW_HIDDEN = 100


def settings():
    """Read (peer, hidden widths, latents, gated, batch size, objective, steps)."""
    return json.loads(sys.argv[1])


def intensities(rows: int) -> np.ndarray:
    """Sample gray values in [0, 1] that have five latent dimensions, (rows, 784)."""
    generator = np.random.default_rng(0)
    codes = generator.normal(size=(rows, 5))
    logits = 2 * codes @ generator.normal(size=(5, DATA)) - 2
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def initial_weights(hidden, latents, gated) -> dict[str, list[np.ndarray]]:
    """Sample weights (out, in) and biases of encoder, decoder and flow, uniform as in torch."""
    generator = np.random.default_rng(1)

    def layers(*sizes):
        for inputs, outputs in pairwise(sizes):
            bound = inputs**-0.5
            yield generator.uniform(-bound, bound, (outputs, inputs)).astype(np.float32)
            yield generator.uniform(-bound, bound, outputs).astype(np.float32)

    def network(inputs, outputs):
        weights, widths = [], [inputs, *hidden]
        for before, after in pairwise(widths):
            weights += list(layers(before, 2 * after if gated else after))
        return weights + list(layers(widths[-1], outputs))

    return {
        "encoder": network(DATA, 2 * latents),
        "decoder": network(latents, DATA),
        "flow": list(layers(latents, FLOW_HIDDEN, 2 * latents)),
    }


def flow_masks(latents) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of an autoregressive network (Germain et al. 2015, eq. 8-9)."""
    inputs = np.arange(latents)
    degrees = np.arange(FLOW_HIDDEN) % (latents - 1)
    first = degrees[:, None] >= inputs[None]
    last = np.tile(inputs, 2)[:, None] > degrees[None]
    return first.astype(np.float32), last.astype(np.float32)


def take_turns(epoch, steps) -> None:
    """Run an epoch per line on stdin; print seconds per step and mean loss per data point."""
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = float(epoch())
        print(json.dumps([(time.perf_counter() - started) / steps, loss]), flush=True)
