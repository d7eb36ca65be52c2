"""The NumPyro part of the benchmark of training steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from case import flow_masks, initial_weights, intensities, settings, take_turns
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

_, HIDDEN, LATENTS, GATED, BATCH, OBJECTIVE, STEPS = settings()
X = jnp.asarray(intensities(BATCH * STEPS))
WEIGHTS = initial_weights(HIDDEN, LATENTS, GATED)
MASKS = [jnp.asarray(mask) for mask in flow_masks(LATENTS)]


def parameters(name):
    weights = WEIGHTS[name]
    return [numpyro.param(f"{name}{i}", jnp.asarray(w)) for i, w in enumerate(weights)]


def network(name, x):
    weights = parameters(name)
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    for weight, bias in pairs[:-1]:
        x = x @ weight.T + bias
        if GATED:
            x, gate = jnp.split(x, 2, axis=-1)
            x = x * jax.nn.sigmoid(gate)
        else:
            x = jnp.tanh(x)
    weight, bias = pairs[-1]
    return x @ weight.T + bias


def autoregressive(weights, z):
    first, bias1, last, bias2 = weights
    h = jnp.tanh(z @ (first * MASKS[0]).T + bias1)
    mean, log_scale = jnp.split(h @ (last * MASKS[1]).T + bias2, 2, axis=-1)
    return mean, log_scale


def model(x):
    with numpyro.plate("data", BATCH):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(LATENTS), 1.0).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=network("decoder", z)).to_event(1), obs=x)


def guide(x):
    loc, raw = jnp.split(network("encoder", x), 2, axis=-1)
    q = dist.Normal(loc, jax.nn.softplus(raw)).to_event(1)
    if OBJECTIVE == "iaf":
        flow = InverseAutoregressiveTransform(partial(autoregressive, parameters("flow")))
        q = dist.TransformedDistribution(q, [flow])
    with numpyro.plate("data", BATCH):
        numpyro.sample("z", q)


def main():
    loss = Trace_ELBO()
    if OBJECTIVE.startswith("iwae"):
        loss = RenyiELBO(alpha=0.0, num_particles=int(OBJECTIVE.removeprefix("iwae")))
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), loss)
    state = svi.init(jax.random.PRNGKey(0), jnp.zeros((BATCH, X.shape[1])))

    @jax.jit
    def epoch(state, key):
        key, shuffle = jax.random.split(key)
        order = jax.random.permutation(shuffle, len(X)).reshape(STEPS, BATCH)

        def step(i, carry):
            state, key, total = carry
            key, noise = jax.random.split(key)
            x = jax.random.bernoulli(noise, X[order[i]]).astype(jnp.float32)
            state, loss = svi.update(state, x)
            return state, key, total + loss

        return jax.lax.fori_loop(0, STEPS, step, (state, key, 0.0))

    key = jax.random.PRNGKey(1)

    def turn():
        nonlocal state, key
        state, key, total = jax.block_until_ready(epoch(state, key))
        return total / len(X)

    take_turns(turn, STEPS)


if __name__ == "__main__":
    main()
