"""Time whole processes that fit a small VAE for 20 epochs, in pyro_vae, Pyro and NumPyro.

python examples/benchmarks/short_runs.py                          # about five minutes
python examples/benchmarks/short_runs.py --peers pyro_vae pyro --rounds 1 --epochs 2

The processes of a round alternate. A run starts Python, imports the library, makes the data, and
trains a Bernoulli VAE with batches of 100 and Adam. The data are 1500 images of 8 x 8 pixels
("digits") or 5000 of 28 x 28 ("images"). The table shows medians over rounds.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

SIZES = {"digits": (1500, 64, 32, 2), "images": (5000, 784, 200, 50)}  # rows, pixels, width, D

START = """
import json, sys, time
started = time.perf_counter()
rows, pixels, width, latents, epochs = json.loads(sys.argv[1])
import numpy as np
generator = np.random.default_rng(0)
codes = generator.normal(size=(rows, 5))
x = 1 / (1 + np.exp(2 - 2 * codes @ generator.normal(size=(5, pixels))))
x = (generator.uniform(size=x.shape) < x).astype("float32")
"""

PROGRAMS = {
    "pyro_vae": """
import torch, pyro_vae as pv
imported = time.perf_counter()
decoder = pv.nets.MLP(latents, [width], pixels)
model = pv.LatentVariableModel(pv.priors.StandardNormal(latents), pv.likelihoods.Bernoulli(decoder))
guide = pv.guides.AmortizedNormal(model, pv.nets.MLP(pixels, [width]))
fit = pv.fit(model, guide, torch.from_numpy(x), epochs=epochs, batch_size=100, progress=False)
loss = fit.history["loss"].iloc[-1]
""",
    "pyro": """
import torch, pyro, pyro.distributions as dist
from torch import nn
imported = time.perf_counter()
decoder = nn.Sequential(nn.Linear(latents, width), nn.Tanh(), nn.Linear(width, pixels))
encoder = nn.Sequential(nn.Linear(pixels, width), nn.Tanh(), nn.Linear(width, 2 * latents))
def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)
def guide(x):
    pyro.module("encoder", encoder)
    loc, raw = encoder(x).chunk(2, -1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))
optimizer, elbo = pyro.optim.Adam({"lr": 1e-3}), pyro.infer.TraceMeanField_ELBO()
svi = pyro.infer.SVI(model, guide, optimizer, elbo)
x = torch.from_numpy(x)
for _ in range(epochs):
    loss = sum(svi.step(x[batch]) for batch in torch.randperm(rows).split(100)) / rows
""",
    "numpyro": """
import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
from numpyro.infer import SVI, TraceMeanField_ELBO
imported = time.perf_counter()
def network(name, x, outputs):
    for i, size in enumerate([width, outputs]):
        shape, bound = (x.shape[-1], size), x.shape[-1] ** -0.5
        x = jnp.tanh(x) if i else x
        init = lambda key, s=shape, b=bound: jax.random.uniform(key, s, minval=-b, maxval=b)
        weight = numpyro.param(f"{name}{i}", init)
        x = x @ weight + numpyro.param(f"{name}b{i}", jnp.zeros(size))
    return x
def model(x):
    with numpyro.plate("data", x.shape[0]):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(latents), 1.0).to_event(1))
        logits = network("decoder", z, pixels)
        numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)
def guide(x):
    loc, raw = jnp.split(network("encoder", x, 2 * latents), 2, axis=-1)
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(raw)).to_event(1))
svi = SVI(model, guide, numpyro.optim.Adam(1e-3), TraceMeanField_ELBO())
x = jnp.asarray(x)
state = svi.init(jax.random.PRNGKey(0), x[:100])
@jax.jit
def epoch(state, key):
    order = jax.random.permutation(key, rows).reshape(-1, 100)
    def step(carry, batch):
        state, loss = svi.update(carry, x[batch])
        return state, loss
    state, losses = jax.lax.scan(step, state, order)
    return state, losses.sum() / rows
for key in jax.random.split(jax.random.PRNGKey(1), epochs):
    state, loss = epoch(state, key)
loss = float(loss)
""",
}

END = """
print(json.dumps([imported - started, time.perf_counter() - imported, float(loss)]))
"""


def run(peer, size, epochs):
    """Return the seconds of a process, of its imports and of its training, and the loss."""
    program = START + PROGRAMS[peer] + END
    settings = json.dumps([*SIZES[size], epochs])
    start = time.perf_counter()
    result = subprocess.run(  # noqa: S603 - no user input
        [sys.executable, "-W", "ignore", "-c", program, settings],
        capture_output=True,
        text=True,
        check=True,
    )
    return [time.perf_counter() - start, *json.loads(result.stdout)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    print("| data | library | seconds | imports | training | ratio to pyro_vae | loss, nats |")
    print("|---|---|---|---|---|---|---|")
    for size in args.sizes:
        rounds = [
            {peer: run(peer, size, args.epochs) for peer in args.peers} for _ in range(args.rounds)
        ]
        for peer in args.peers:
            seconds, imports, training, loss = (
                median(each[peer][i] for each in rounds) for i in range(4)
            )
            ratio = median(each[peer][0] / each[args.peers[0]][0] for each in rounds)
            print(
                f"| {size} | {peer} | {seconds:.1f} | {imports:.1f} | {training:.1f} | "
                f"{ratio:.2f} | {loss:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
