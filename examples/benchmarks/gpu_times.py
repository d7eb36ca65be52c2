"""The sections of gpu.py that measure times. Run gpu.py."""

import copy
import importlib.util
import math
import os
import random
import time
from itertools import pairwise
from statistics import median
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from case import intensities
from gpu_part import attempt, binary, make_pair, report, run
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from step import Worker
from torch import nn
from torch.nn import functional as F

import pyro_vae as pv
from pyro_vae._capture import Captured
from pyro_vae._programs.parameters import parameters_of
from pyro_vae._programs.validation import check_pair
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.training._step import TrainStep
from pyro_vae.training._train_state import TrainState

FEATURES = 784
NETWORKS = {  # hidden widths, latents, whether gated, batch size
    "784-200-200-50/20": ([200, 200], 50, False, 20),
    "784-200-200-50/100": ([200, 200], 50, False, 100),
    "784-500-500-64/256": ([500, 500], 64, False, 256),
}
SMALL = {"784-20-5/10": ([20], 5, False, 10)}
PARTICLES = {"elbo": 1, "iwae5": 5, "iwae50": 50}
ROUNDS = 7
LOSS_TOLERANCE = 0.03  # relative; the order of the data alone moves the early losses by 2%


def binarize(x):
    return (torch.rand_like(x) < x).to(x.dtype)


def network(*sizes):
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Model(pyro.nn.PyroModule):
    """p(x, z) as a Pyro user writes it."""

    def __init__(self, decoder, latents):
        super().__init__()
        self.decoder, self.latents = decoder, latents

    def forward(self, x):
        """Run the program."""
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latents), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class Guide(pyro.nn.PyroModule):
    """q(z|x), a diagonal Gaussian."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        """Run the program."""
        loc, raw = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(loc, F.softplus(raw)).to_event(1))


class Plain(nn.Module):
    """The loss in plain PyTorch."""

    def __init__(self, encoder, decoder, particles):
        super().__init__()
        self.encoder, self.decoder, self.particles = encoder, decoder, particles

    def forward(self, x):
        """Return the loss per data point."""
        loc, raw = self.encoder(x).chunk(2, -1)
        scale = F.softplus(raw)
        noise = torch.randn(self.particles, *loc.shape, device=x.device)
        z = loc + scale * noise
        logits = self.decoder(z)
        log_likelihood = -F.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        ).sum(-1)
        log_ratio = (0.5 * noise.square() + scale.log() - 0.5 * z.square()).sum(-1)
        log_weight = log_likelihood + log_ratio
        return -(log_weight.logsumexp(0) - math.log(self.particles)).mean()


class Case:
    """One network and objective, for all libraries.

    Args:
        settings: The settings of the section.
        sizes: Hidden widths, latents, whether gated, and the batch size.
        objective: A key of ``PARTICLES``.
        steps: The number of steps of an epoch.
    """

    def __init__(self, settings, sizes, objective, steps):
        self.settings, self.steps = settings, steps
        hidden, self.latents, _, self.batch_size = sizes
        self.particles = PARTICLES[objective]
        torch.manual_seed(0)
        device = settings.device
        self.encoder = network(FEATURES, *hidden, 2 * self.latents).to(device)
        self.decoder = network(self.latents, *hidden, FEATURES).to(device)
        self.x = torch.from_numpy(intensities(self.batch_size * steps)).to(device)

    def networks(self):
        """Return copies of the initial encoder and decoder."""
        return copy.deepcopy(self.encoder), copy.deepcopy(self.decoder)

    def rows(self):
        """Return the rows of the minibatches of an epoch."""
        return torch.randperm(len(self.x)).to(self.x.device).split(self.batch_size)

    def ours(self, capture, *, whole=True):
        """Return an epoch of this library, with Adam called from Python unless ``whole``."""
        encoder, decoder = self.networks()
        model = pv.LatentVariableModel(
            prior=pv.priors.StandardNormal(self.latents),
            likelihood=pv.likelihoods.Bernoulli(decoder),
        ).to(self.x.device)
        guide = Guide(encoder)
        objective = pv.objectives.ELBO()
        if self.particles > 1:
            objective = pv.objectives.IWAE(self.particles)
        objective.to(self.x.device)
        batches = Minibatches(
            self.x, self.batch_size, device=self.x.device, shuffle=True, transform=binarize
        )
        trace = check_pair(model, guide, batches.first())
        objective.loss(model, guide, *batches.first())
        parameters = parameters_of(model, guide, trace)
        train_state = TrainState(model, guide, objective, binarize, parameters)
        train_step = TrainStep(train_state, batches, capture=capture)
        if not whole:
            train_step._whole = None

        def epoch():
            if not train_step.execution.startswith("captured"):
                train_step.recheck(after_user_code=True)
            train_step.begin(None)
            losses = [train_step.step(selection) for selection in batches.selections()]
            if capture and not train_step.execution.startswith("captured"):
                raise RuntimeError(train_step.execution)
            return torch.stack(losses).mean().item()

        return epoch

    def pyro_svi(self):
        """Return an epoch of Pyro's SVI."""
        encoder, decoder = self.networks()
        loss = Trace_ELBO()
        if self.particles > 1:
            loss = RenyiELBO(alpha=0, num_particles=self.particles, vectorize_particles=True)
        model, guide = Model(decoder, self.latents), Guide(encoder)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
        return lambda: sum(svi.step(binarize(self.x[r])) for r in self.rows()) / len(self.x)

    def plain(self):
        """Return an epoch of a plain PyTorch loop."""
        module = Plain(*self.networks(), self.particles)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)

        def step(r):
            optimizer.zero_grad()
            loss = module(binarize(self.x[r]))
            loss.backward()
            optimizer.step()
            return loss.detach()

        return lambda: (sum(step(r) for r in self.rows()) / self.steps).item()

    def plain_graph(self):
        """Return an epoch of a plain PyTorch loop, whose whole step is one CUDA graph."""
        device = self.x.device
        module = Plain(*self.networks(), self.particles)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True, capturable=True)
        rows, total = self.rows()[0].clone(), torch.zeros((), device=device)

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss = module(binarize(self.x[rows]))
            loss.backward()
            optimizer.step()
            total.add_(loss.detach())

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            step()

        def epoch():
            total.zero_()
            for r in self.rows():
                rows.copy_(r)
                graph.replay()
            return (total / self.steps).item()

        return epoch

    def peers(self):
        """Return the functions that make an epoch, by the names of gpu.py."""
        made = {
            "captured": lambda: self.ours(capture=True),
            "eager": lambda: self.ours(capture=False),
            "pyro": self.pyro_svi,
            "plain": self.plain,
        }
        if self.x.is_cuda:
            made["parts"] = lambda: self.ours(capture=True, whole=False)
            made["graph"] = self.plain_graph
        return made


def in_own_store(make):
    """Return an epoch that has its own parameter store of Pyro."""
    store = pyro.get_param_store()
    with store.scope() as kept:
        epoch = make()

    def run_epoch():
        with store.scope(kept):
            return epoch()

    return run_epoch


def steps(settings):
    """Measure the steps of all libraries in turns."""
    pyro.enable_validation(False)
    networks, objectives, rounds = NETWORKS, list(PARTICLES), ROUNDS
    if settings.small:
        networks, objectives, rounds = SMALL, ["elbo", "iwae5"], 2
    cases = [(objective, name) for objective in objectives for name in networks]
    with_numpyro = importlib.util.find_spec("numpyro") is not None
    for number, (objective, name) in enumerate(cases):
        left = settings.left / (len(cases) - number)  # seconds for this case
        if settings.left < 10:
            report(f"{objective}, {name}", None, not_run="no time is left")
            continue
        count = 10 if settings.small else 25 if objective == "iwae50" else 100
        with attempt(f"{objective}, {name}"):
            measure(settings, name, networks[name], objective, count, rounds, left, with_numpyro)


def measure(settings, name, sizes, objective, count, rounds, left, with_numpyro):
    """Report the median time of a step of each library, in one case."""
    ends = time.monotonic() + left
    case = Case(settings, sizes, objective, count)
    epochs, starts, workers = {}, {}, []
    for peer, make in case.peers().items():
        with attempt(f"{objective}, {name}, {peer}"):
            began = time.perf_counter()
            epochs[peer] = in_own_store(make)
            epochs[peer]()  # warm-up and capture
            settings.synchronize()
            starts[peer] = time.perf_counter() - began
    for peer in set(epochs) - set(starts):
        del epochs[peer]  # it failed
    if with_numpyro:
        with attempt(f"{objective}, {name}, numpyro"):
            os.environ |= {
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                "JAX_PLATFORMS": settings.device.type,
            }
            worker = Worker("numpyro", sizes, objective, count)
            workers.append(worker)
            worker.epoch()
            epochs["numpyro"], starts["numpyro"] = worker.epoch, worker.setup_seconds
    seconds = {peer: [] for peer in epochs}
    losses = dict.fromkeys(epochs, math.nan)
    for number in range(rounds):
        for peer in random.sample(list(epochs), len(epochs)):
            began = time.perf_counter()
            result = epochs[peer]()
            settings.synchronize()
            taken = (time.perf_counter() - began) / count
            if peer == "numpyro":
                taken, result = result
            seconds[peer].append(taken)
            losses[peer] = result
        if number and time.monotonic() > ends:
            break
    for worker in workers:
        worker.close()
    figures = {"network": name, "objective": objective}
    for peer, taken in seconds.items():
        report(
            f"{objective}, {name}, {peer}",
            None,
            peer=peer,
            ms=1e3 * median(taken),
            rounds=len(taken),
            loss=losses[peer],
            start=starts[peer],
            **figures,
        )
    if "captured" in losses:
        ours = losses["captured"]
        off = max(abs(loss / ours - 1) for loss in losses.values())
        report(f"{objective}, {name}: equal losses", off < LOSS_TOLERANCE, largest_difference=off)


def surgery(settings):
    """Measure an ELBO surgery."""
    rows, latents, target = (500, 5, None) if settings.small else (60_000, 50, 2.0)
    torch.manual_seed(0)
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(latents),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(latents, [100], FEATURES)),
    ).to(settings.device)
    guide = pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(FEATURES, [100]))
    x = torch.randn(rows, FEATURES)
    guide(x[:1])
    guide.to(settings.device)
    on_device = x.to(settings.device)
    for name, data in (("data on the device", on_device), ("data on the CPU", x)):
        with attempt(f"surgery, {name}"):
            taken = []
            for _ in range(3):
                taken.append(
                    settings.seconds(lambda data=data: pv.elbo_surgery(model, guide, data, seed=0))
                )
                if settings.left < 2 * taken[-1]:
                    break
            best = min(taken)
            passed = None if target is None or data is x else best <= target
            size = {"rows": rows, "latents": latents}
            report(f"surgery, {name}", passed, first_s=taken[0], seconds=best, **size)


def evidence(settings):
    """Measure the evidence of 10,000 data points with 5000 particles."""
    rows, particles = (100, 50) if settings.small else (10_000, 5000)
    torch.manual_seed(0)
    model, guide = make_pair(FEATURES, (20,) if settings.small else (200, 200), 50)
    x = binary(rows, FEATURES)
    guide(x[:1])
    for module in (model, guide):
        module.to(settings.device)
    x = x.to(settings.device)
    for pairs_per_pass in (500_000, 50_000, 5_000):
        for capture in (True, False):
            name = f"evidence, {pairs_per_pass} pairs per pass, capture={capture}"
            with (
                attempt(name),
                mock.patch.object(Captured, "compiles", not settings.small),
            ):
                measure_evidence(
                    settings, name, model, guide, x, particles, pairs_per_pass, capture
                )


def measure_evidence(settings, name, model, guide, x, particles, pairs_per_pass, capture):
    """Report the time of an evidence. Extrapolate if the whole would take too long."""
    if settings.left < 5 and not settings.small:
        report(name, None, not_run="no time is left")
        return
    on_cuda = settings.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(settings.device)

    def seconds(rows):
        return settings.seconds(
            lambda: pv.evidence(
                model,
                guide,
                x[:rows],
                num_particles=particles,
                pairs_per_pass=pairs_per_pass,
                capture=capture,
                seed=0,
            )
        )

    part = len(x) // 10
    first = seconds(part)  # with capture and compilation
    second = seconds(part)  # with capture; a compiled graph comes from the cache
    whole = None
    if settings.left > 12 * second:
        whole = seconds(len(x))
    memory = {}
    if on_cuda:
        memory["peak_gb"] = torch.cuda.max_memory_allocated(settings.device) / 1e9
    report(
        name,
        None,
        seconds=10 * second if whole is None else whole,
        extrapolated=whole is None,
        first_tenth_s=first,
        second_tenth_s=second,
        rows=len(x),
        particles=particles,
        **memory,
    )


if __name__ == "__main__":
    run({"surgery": surgery, "evidence": evidence, "steps": steps})
