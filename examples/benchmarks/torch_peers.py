"""The parts of the benchmark of training steps that run on torch."""

import math
import warnings

import pyro
import pyro.distributions as dist
import torch
from case import flow_masks, initial_weights, intensities, settings, take_turns
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import nn
from torch.nn import functional as F

import pyro_vae as pv
from pyro_vae._programs.parameters import parameters_of
from pyro_vae._programs.validation import check_pair
from pyro_vae.datasets._minibatches import Minibatches
from pyro_vae.training._step import TrainStep
from pyro_vae.training._train_state import TrainState

PEER, HIDDEN, LATENTS, GATED, BATCH, OBJECTIVE, STEPS = settings()
PEER, _, PRECISION = PEER.partition("/")
PARTICLES = 50 if OBJECTIVE == "iwae50" else 1
X = torch.from_numpy(intensities(BATCH * STEPS))
WEIGHTS = initial_weights(HIDDEN, LATENTS, GATED)


class Network(nn.Module):
    """Linear layers with tanh or gates between them."""

    def __init__(self, weights):
        super().__init__()
        self.layers = nn.ModuleList()
        for weight, bias in zip(weights[::2], weights[1::2], strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.copy_(torch.from_numpy(bias))
            self.layers.append(layer)

    def forward(self, x):
        """Apply the network to the last dimension."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.glu(layer(x)) if GATED else torch.tanh(layer(x))
        return last(x)


class Autoregressive(nn.Module):
    """Means and log-scales of each dimension, given the previous dimensions."""

    def __init__(self):
        super().__init__()
        self.network = Network(WEIGHTS["flow"])
        masks = flow_masks(LATENTS)
        self.register_buffer("mask1", torch.from_numpy(masks[0]))
        self.register_buffer("mask2", torch.from_numpy(masks[1]))

    def forward(self, z):
        """Return mean and log-scale of each dimension."""
        first, last = self.network.layers
        h = torch.tanh(F.linear(z, first.weight * self.mask1, first.bias))
        mean, log_scale = F.linear(h, last.weight * self.mask2, last.bias).chunk(2, -1)
        return mean, log_scale


def binarize(x):
    return (torch.rand_like(x) < x).to(x.dtype)


class Guide(pyro.nn.PyroModule):
    """q(z|x), with an inverse autoregressive flow if requested."""

    def __init__(self):
        super().__init__()
        self.encoder = Network(WEIGHTS["encoder"])
        if OBJECTIVE == "iaf":
            self.flow = dist.transforms.AffineAutoregressive(Autoregressive())

    def forward(self, x):
        """Run the program."""
        loc, raw = self.encoder(x).chunk(2, -1)
        q = dist.Normal(loc, F.softplus(raw)).to_event(1)
        if OBJECTIVE == "iaf":
            q = dist.TransformedDistribution(q, [self.flow])
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", q)


class Model(pyro.nn.PyroModule):
    """p(x, z) as a Pyro user writes it."""

    def __init__(self):
        super().__init__()
        self.decoder = Network(WEIGHTS["decoder"])

    def forward(self, x):
        """Run the program."""
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class ByHand(nn.Module):
    """The loss in plain PyTorch, without Pyro."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Network(WEIGHTS["encoder"]), Network(WEIGHTS["decoder"])
        if OBJECTIVE == "iaf":
            self.flow = Autoregressive()

    def forward(self, x):
        """Return the loss per data point."""
        loc, raw = self.encoder(x).chunk(2, -1)
        scale = F.softplus(raw)
        noise = torch.randn(PARTICLES, *loc.shape) if PARTICLES > 1 else torch.randn_like(loc)
        z = loc + scale * noise
        log_q = -0.5 * noise.square() - scale.log()
        if OBJECTIVE == "iaf":
            mean, log_scale = self.flow(z)
            log_scale = log_scale.clamp(-5.0, 3.0)
            z = mean + log_scale.exp() * z
            log_q = log_q - log_scale
        log_p = -0.5 * z.square()
        logits = self.decoder(z)
        log_likelihood = -F.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        )
        log_weight = log_likelihood.sum(-1) + (log_p - log_q).sum(-1)
        if PARTICLES > 1:
            log_weight = log_weight.logsumexp(0) - math.log(PARTICLES)
        return -log_weight.mean()


def rows():
    return torch.randperm(len(X)).split(BATCH)


def ours(capture):
    model, guide = pair()
    objective = pv.objectives.IWAE(PARTICLES) if PARTICLES > 1 else pv.objectives.ELBO()
    batches = Minibatches(X, BATCH, shuffle=True, transform=binarize)
    trace = check_pair(model, guide, batches.first())
    objective.loss(model, guide, *batches.first())
    parameters = parameters_of(model, guide, trace)
    train_state = TrainState(model, guide, objective, binarize, parameters)
    train_step = TrainStep(train_state, batches, capture=capture)
    pyro.enable_validation(False)

    def epoch():
        train_step.recheck(after_user_code=True)
        train_step.begin(None)
        losses = [train_step.step(selection) for selection in batches.selections()]
        loss = torch.stack(losses).mean().item()
        if capture and train_step.execution != "captured" and STEPS > 3:
            raise RuntimeError(train_step.execution)
        return loss

    return epoch


def pair():
    """Return a model from the library, equivalent to ``Model``, and the guide."""
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(LATENTS),
        likelihood=pv.likelihoods.Bernoulli(Network(WEIGHTS["decoder"])),
    )
    return model, Guide()


def pyro_svi():
    pyro.enable_validation(False)
    loss = RenyiELBO(alpha=0, num_particles=PARTICLES, vectorize_particles=True)
    loss = loss if PARTICLES > 1 else Trace_ELBO()
    svi = SVI(Model(), Guide(), pyro.optim.Adam({"lr": 1e-3}), loss)
    return lambda: sum(svi.step(binarize(X[r])) for r in rows()) / len(X)


def by_hand(compiled):
    module = ByHand()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
    loss_of = torch.compile(lambda r: module(binarize(X[r]))) if compiled else None

    def step(r):
        optimizer.zero_grad()
        loss = loss_of(r) if compiled else module(binarize(X[r]))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return lambda: sum(step(r) for r in rows()) / STEPS


def captured_by_hand():
    """Capture a plain PyTorch step as pyro_vae does, for one module and without checks."""
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    module = ByHand()
    parameters = [p.detach() for p in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    constants = [X, *(b for _, b in module.named_buffers())]
    buffers = [name for name, _ in module.named_buffers()]

    def gradient(r, parameters, constants):
        parameters = [p.requires_grad_() for p in parameters]
        x = binarize(constants[0][r])
        tensors = dict(zip([*names, *buffers], [*parameters, *constants[1:]], strict=True))
        loss = torch.func.functional_call(module, tensors, (x,))
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    graph = make_fx(gradient)(rows()[0], [p.clone() for p in parameters], constants)
    inputs = [*parameters, *constants]
    options = {"fallback_random": True, "cpp_wrapper": True}
    flat = make_fx(lambda r, *t: graph(r, t[: len(parameters)], t[len(parameters) :]))(
        rows()[0], *inputs
    )
    for node in flat.graph.nodes:
        node.meta.clear()
    compiled = torch._inductor.compile(flat, [rows()[0], *inputs], options)
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    count = torch.zeros(())
    counts = [count] * len(parameters)

    @torch.no_grad()
    def step(r):
        loss, *gradients = compiled(r, *inputs)
        count.add_(1)
        torch._fused_adam_(
            parameters, gradients, first, second, [], counts, lr=1e-3, beta1=0.9, beta2=0.999,
            weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        return loss

    return lambda: sum(step(r) for r in rows()) / STEPS


BUILD = {
    "captured": lambda: ours(capture=True),
    "eager": lambda: ours(capture=False),
    "pyro": pyro_svi,
    "hand": lambda: by_hand(compiled=False),
    "compile": lambda: by_hand(compiled=True),
    "hand-captured": captured_by_hand,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision(PRECISION)
    torch.manual_seed(2)
    take_turns(BUILD[PEER](), STEPS)
