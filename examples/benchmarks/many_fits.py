"""Compare a training step of S fits in one graph (torch.vmap) with S captured steps.

python examples/benchmarks/many_fits.py                    # two minutes
python examples/benchmarks/many_fits.py --fits 3 --rounds 2 --steps 5

The pairs have the same networks and other parameters. This program takes the random numbers out of
the graph of a captured step, maps the rest over stacked parameters, and compiles it. The joint
gradients must equal those of each fit. A time is that of one step of one fit, with its random
numbers and Adam. The ways take turns, and the table shows medians over rounds.

On two cores, two processes with one thread each take captured steps of two fits at a time. So a
joint step is the better way if it takes less than half the time of a captured step.
"""

import argparse
import functools
import time
from statistics import median

import torch
from torch import fx
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae as pv
from pyro_vae._capture.inductor import compile_graph
from pyro_vae._capture.tracing import trace
from pyro_vae._programs.pair_state import state
from pyro_vae._utils.value_checks import values_checked
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.training._adam import Adam
from pyro_vae.training._step import TrainStep
from pyro_vae.training._train_state import TrainState

NETWORKS = [(64, 32, 2), (64, 128, 8), (784, 200, 50)]  # pixels, width, latents


def make_step(x, width, latents, seed, batch_size):
    """Return the training step of a new pair."""
    torch.manual_seed(seed)
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(latents),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(latents, [width], x.shape[1])),
    )
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(x.shape[1], [width]))
    guide(x[:batch_size])  # makes its last layer
    parameters = {
        name: list(each.parameters()) for name, each in (("model", model), ("guide", guide))
    }
    train_state = TrainState(model, guide, pv.objectives.ELBO(), None, parameters)
    return TrainStep(train_state, Minibatches(x, batch_size), capture=True)


def without_noise(graph):
    """Return a graph of the random numbers, and a graph of the rest, which has them as inputs."""
    nodes, early = list(graph.graph.nodes), set()
    inputs = [node for node in nodes if node.op == "placeholder"]

    def add(node):
        if node not in early:
            early.add(node)
            for each in node.all_input_nodes:
                add(each)

    for node in nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            add(node)
    if not early.isdisjoint(inputs):
        raise RuntimeError("the random numbers depend on the data or on the parameters")
    drawn = [node for node in nodes if node in early and any(u not in early for u in node.users)]
    noise, rest = fx.Graph(), fx.Graph()
    copies = {}
    for node in nodes:
        if node in early:
            copies[node] = noise.node_copy(node, copies.get)
    noise.output([copies[node] for node in drawn])
    copies = {node: rest.placeholder(node.name) for node in (*inputs, *drawn)}
    for node in nodes:
        if node not in copies and node not in early and node.op != "output":
            copies[node] = rest.node_copy(node, copies.get)
    (results,) = nodes[-1].args
    rest.output([copies[node] for node in results if node is not None])
    return fx.GraphModule({}, noise), fx.GraphModule({}, rest)


class JointStep:
    """The training step of several fits whose pairs have the same networks.

    Args:
        steps: their separate steps. The parameters are copied.
        rows: the minibatch of each fit, ``(S, B)``.
        compiled: compile the graph.
    """

    def __init__(self, steps, rows, *, compiled):
        with values_checked(False):
            traced = trace(steps[0].gradient, [rows[0]])
        self._noise, rest = without_noise(traced.graph)
        tensors = [state(*step.train_state.pair) for step in steps]
        names = {id(tensor): name for name, tensor in tensors[0].items()}
        trained = {id(tensor): n for n, tensor in enumerate(steps[0].train_state.parameters)}
        self._inputs, dims, stacked = [], [], {}
        for constant in traced.constants:
            name = names.get(id(constant))
            if name is None:  # the data, or a tensor that the programs make from numbers
                self._inputs.append(constant.detach())
            else:
                self._inputs.append(torch.stack([each[name].detach() for each in tensors]))
                if id(constant) in trained:
                    stacked[trained[id(constant)]] = self._inputs[-1]
            dims.append(None if name is None else 0)
        self.parameters = [stacked[number] for number in sorted(stacked)]
        self._optimizer = Adam(self.parameters)
        self._fits = len(steps)
        noise = self.draw()
        mapped = vmap(rest, in_dims=(0, *dims, *[0] * len(noise)))
        self._graph = make_fx(mapped)(rows, *self._inputs, *noise)
        if compiled:
            self._graph = compile_graph(self._graph, [rows, *self._inputs, *noise])

    def draw(self, seeds=None):
        """Draw the random numbers of a step of each fit, after seeding with its seed if asked."""
        drawn = []
        for number in range(self._fits):
            if seeds is not None:
                torch.manual_seed(seeds[number])
            drawn.append(self._noise())
        return [torch.stack(each) for each in zip(*drawn, strict=True)]

    @torch.no_grad()
    def gradients(self, rows, noise):
        """Return the loss and the gradients of each fit."""
        return self._graph(rows, *self._inputs, *noise)

    def __call__(self, rows):
        def closure():
            loss, *gradients = self.gradients(rows, self.draw())
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            return loss

        return self._optimizer.step(closure)


def check(joint, steps, rows):
    """Raise AssertionError if the joint gradients are not those of each fit."""
    found = joint.gradients(rows, joint.draw(seeds=range(len(steps))))
    for number, step in enumerate(steps):
        torch.manual_seed(number)
        with values_checked(False):
            expected = step.gradient(rows[number])
        for mine, its in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[number], its, rtol=1e-4, atol=1e-5)


def one_by_one(steps, rows):
    """Take a captured step of each fit."""
    for step, mine in zip(steps, rows, strict=True):
        step.step((mine,))


def milliseconds(run, count):
    """Return the mean time of a call."""
    started = time.perf_counter()
    for _ in range(count):
        run()
    return 1e3 * (time.perf_counter() - started) / count


def measure(pixels, width, latents, args):
    """Return the times of a step of one fit, by way and round."""
    x = torch.bernoulli(torch.rand(1500, pixels))
    rows = torch.stack([torch.randperm(len(x))[: args.batch_size] for _ in range(args.fits)])
    steps = [make_step(x, width, latents, seed, args.batch_size) for seed in range(args.fits)]
    ways = {"captured": functools.partial(one_by_one, steps, rows)}
    for name in ("joint", "joint, not compiled"):
        joint = JointStep(steps, rows, compiled=name == "joint")
        check(joint, steps, rows)
        ways[name] = functools.partial(joint, rows)
    times = {name: [] for name in ways}
    with values_checked(False):
        for run in ways.values():
            milliseconds(run, 5)  # captures and compiles
        for number in range(args.rounds):
            order = list(ways)
            for name in order[number % 3 :] + order[: number % 3]:
                times[name].append(milliseconds(ways[name], args.steps) / args.fits)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fits", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    print(f"{args.fits} fits, batch size {args.batch_size}, {torch.get_num_threads()} threads")
    print("| network | captured | joint | joint, not compiled | joint / captured |")
    print("|---|---|---|---|---|")
    for network in NETWORKS:
        times = measure(*network, args)
        values = " | ".join(f"{median(each):.3f} ms" for each in times.values())
        ratio = median(a / b for a, b in zip(times["joint"], times["captured"], strict=True))
        print(f"| {'-'.join(map(str, network))} | {values} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
