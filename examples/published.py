"""Train one row of a published table by its protocol, and compare the result with the paper.

python examples/published.py A vae                     # hours; resumes where it was stopped
python examples/published.py A vae --data digits --epochs 3 --particles 10

Table A is dynamically binarized MNIST with the protocol of Tomczak & Welling (2018), whose numbers
are those of Norouzi et al. (2020, table 1): two gated layers of 300 units, 40 latents, gradients
that are normalized for each tensor, a warm-up of 100 epochs, early stopping after 50 epochs
without a gain, and log p(x) from 5000 samples.
"""

import argparse
import functools
import json
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv

LATENTS, HIDDEN, BATCH_SIZE, LEARNING_RATE = 40, [300, 300], 100, 5e-4
WARM_UP, PATIENCE, EPOCHS = 100, 50, 2000
PSEUDO_INPUTS = 500

# The published test log-likelihood and its standard deviation over runs, in nats.
PUBLISHED = {
    ("A", "vae"): (-84.45, 0.12),
    ("A", "vampprior"): (-82.43, 0.06),
}


class GatedEncoder(nn.Module):
    """q(z|x): two gated layers, a linear mean, and a linear log-variance clamped to [-6, 2]."""

    def __init__(self, size):
        super().__init__()
        self.hidden = pv.nets.GatedMLP(size, HIDDEN)
        self.mean, self.log_variance = (nn.Linear(HIDDEN[-1], LATENTS) for _ in range(2))
        for head in (self.mean, self.log_variance):
            nn.init.normal_(head.weight, std=(2 / head.in_features) ** 0.5)

    def forward(self, x):
        """Return q(z|x)."""
        h = self.hidden(x)
        scale = (0.5 * nn.functional.hardtanh(self.log_variance(h), -6.0, 2.0)).exp()
        return dist.Normal(self.mean(h), scale).to_event(1)


class Guide(pyro.nn.PyroModule):
    """The guide as a Pyro program."""

    def __init__(self, size):
        super().__init__()
        self.encoder = GatedEncoder(size)

    def forward(self, x):
        """Sample z."""
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.encoder(x))


class WarmUp(pv.objectives.Schedule):
    """The weight of the KL in epoch e of :math:`1, 2, ...`, which is min(e / 100, 1)."""

    def __init__(self, steps_per_epoch):
        self.steps_per_epoch = steps_per_epoch

    def __call__(self, step):
        """Return the weight at a step."""
        return ((torch.floor(step / self.steps_per_epoch) + 1) / WARM_UP).clamp(max=1.0)

    def last_value(self):
        """Return the weight after the warm-up."""
        return 1.0


class EarlyStopping(pv.training.Callback):
    """Stop after 50 epochs without a lower validation loss, counted from the end of the warm-up."""

    def __init__(self):
        self.best, self.best_epoch = float("inf"), 0

    def after_epoch(self, epoch, row):
        """Record the best epoch, and stop."""
        if row["validation_loss"] < self.best:
            self.best, self.best_epoch = row["validation_loss"], epoch
        if epoch - max(self.best_epoch, WARM_UP - 1) > PATIENCE:
            raise pv.training.StopTraining(f"no gain since epoch {self.best_epoch}")

    def state_dict(self):
        """Return the best epoch for checkpoints."""
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state):
        """Restore the best epoch of a checkpoint."""
        self.best, self.best_epoch = state["best"], state["best_epoch"]


class NormalizedAdam(torch.optim.Adam):
    """Adam on gradients that are divided by their norm, for each tensor."""

    def step(self, closure=None):
        """Compute the gradients, normalize them, and update the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norms = torch._foreach_norm(gradients)
            torch._foreach_add_(norms, 1e-7)  # a tensor of zeros stays zero
            torch._foreach_div_(gradients, norms)
        super().step()
        return loss


def make_pair(row, size):
    decoder = pv.nets.GatedMLP(LATENTS, HIDDEN, size)
    likelihood, guide = pv.likelihoods.Bernoulli(decoder), Guide(size)
    if row == "vae":
        return pv.LatentVariableModel(pv.priors.StandardNormal(LATENTS), likelihood), guide
    start = 0.05 + 0.01 * torch.randn(PSEUDO_INPUTS, size)
    prior = pv.priors.VampPrior(LATENTS, pseudo_inputs=start.clamp(0, 1))
    prior.bind_guide(guide)
    return pv.LatentVariableModel(prior, likelihood), guide


def load(name):
    """Return intensities of the training data, and the binary evaluation data of the paper."""
    data = pv.datasets.load(name, binarize="none")
    generator = np.random.RandomState(777)
    validation, test = (
        torch.from_numpy(generator.binomial(1, each.numpy())).float()
        for each in (data.validation, data.test)
    )
    return data.train, validation, test


def train_and_evaluate(args):
    train, validation, test = load(args.data)
    pyro.set_rng_seed(args.seed)
    model, guide = make_pair(args.row, train.shape[1])
    folder = args.folder / f"{args.table}-{args.row}-{args.data}-{args.seed}"
    fit = pv.fit(
        model,
        guide,
        train,
        transform=torch.bernoulli,
        objective=pv.objectives.BetaELBO(WarmUp(-(-len(train) // BATCH_SIZE))),
        validation=validation,
        epochs=args.epochs,
        batch_size=BATCH_SIZE,
        optimizer=functools.partial(NormalizedAdam, lr=LEARNING_RATE, fused=True),
        patience=args.epochs,  # restores the best epoch; EarlyStopping stops
        callbacks=[EarlyStopping()],
        checkpoint=pv.training.Checkpoint(folder, resume=True),
        seed=args.seed,
    )
    print(fit)
    start = time.perf_counter()
    estimate = pv.evidence(
        fit.model, fit.guide, test, num_particles=args.particles, seed=0, progress=True
    )
    print(estimate)
    surgery = pv.elbo_surgery(fit.model, fit.guide, torch.bernoulli(train), seed=0)
    return {
        "table": args.table,
        "row": args.row,
        "data": args.data,
        "seed": args.seed,
        "log_p": estimate.mean,
        "monte_carlo_error": estimate.monte_carlo_errors.square().sum().sqrt().item() / len(test),
        "unreliable_share": estimate.unreliable_share,
        "validation_elbo": -fit.history["validation_loss"].min(),
        "marginal_kl": surgery.marginal_kl,
        "mutual_information": surgery.mutual_information,
        "particles": args.particles,
        "test_images": len(test),
        "epochs": len(fit.history),
        "best_epoch": int(fit.history["validation_loss"].idxmin()),
        "seconds_per_epoch": fit.history["seconds"].median(),
        "seconds_of_log_p": time.perf_counter() - start,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "threads": torch.get_num_threads(),
        "device": str(next(guide.parameters()).device),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl", "pyro_vae")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=["A"])
    parser.add_argument("row", choices=[row for _, row in PUBLISHED])
    parser.add_argument("--data", default="mnist", help="any data set of pv.datasets.load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--folder", type=Path, default=Path("published"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    result = train_and_evaluate(args)
    path = args.folder / f"{args.table}-{args.row}-{args.data}-{args.seed}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    value, deviation = PUBLISHED[args.table, args.row]
    print(f"log p(x): {result['log_p']:.2f} here, {value} ± {deviation} published for MNIST")


if __name__ == "__main__":
    main()
