"""The training protocols of the published tables."""

import functools

import numpy as np
import torch

import pyro_vae as pv


class WarmUp(pv.objectives.Schedule):
    """The weight of the KL in epoch e of 1, 2, ..., which is min(e / 100, 1)."""

    def __init__(self, steps_per_epoch, epochs=100):
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs

    def __call__(self, step):
        return ((torch.floor(step / self.steps_per_epoch) + 1) / self.epochs).clamp(max=1.0)

    def last_value(self):
        return 1.0


class NormalizedAdam(torch.optim.Adam):
    """Adam on gradients that are divided by their norm, for each tensor."""

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norms = torch._foreach_norm(gradients)
            torch._foreach_add_(norms, 1e-7)  # a gradient of zero stays zero
            torch._foreach_div_(gradients, norms)
        super().step()
        return loss


def binary(data, seed=777):
    """Return binary validation and test data, the same in each run."""
    generator = np.random.RandomState(seed)
    return [
        torch.from_numpy(generator.binomial(1, each.numpy())).float()
        for each in (data.validation, data.test)
    ]


def early_stopping(model, guide, data, *, epochs, patience=50, positions=False, **options):
    """Table A: normalized gradients, a warm-up, and early stopping.

    A run ends after more than 50 epochs without a lower validation loss, counted from the end of
    the warm-up, or after 2000 epochs. With ``positions``, the pair also gets those of the images.
    """
    train, (validation, _) = data.train, binary(data)
    if positions:
        train, validation = ((x, torch.arange(len(x))) for x in (train, validation))
    return pv.fit(
        model,
        guide,
        train,
        objective=pv.objectives.BetaELBO(WarmUp(-(-len(data.train) // 100))),
        transform=torch.bernoulli,
        validation=validation,
        epochs=epochs or 2000,
        patience=patience + 1,
        batch_size=100,
        optimizer=functools.partial(NormalizedAdam, lr=5e-4, fused=True),
        **options,
    )


def stages(model, guide, data, *, objective, epochs, **options):
    """Table B: stages i = 0, ..., 7 of 3^i epochs at the learning rate 0.001 * 10^(-i / 7).

    The paper sums gradients over a batch of 20 and has Adam's epsilon at 1e-4. ``pv.fit`` averages
    them, which is the same step at a twentieth of that epsilon.
    """
    stage = [i for i in range(8) for _ in range(3**i)]

    def scheduler(optimizer):
        last = len(stage) - 1
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: 10 ** (-stage[min(epoch, last)] / 7)
        )

    return pv.fit(
        model,
        guide,
        torch.cat([data.train, data.validation]),
        objective=objective,
        transform=torch.bernoulli,
        epochs=epochs or len(stage),
        batch_size=20,
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3, eps=1e-4 / 20, fused=True),
        scheduler=scheduler,
        **options,
    )


def constant_rate(model, guide, data, *, epochs, **options):
    """Table E: the ELBO by Adam at 0.001 for 200 epochs. The paper does not state its protocol."""
    return pv.fit(
        model,
        guide,
        data.train,
        transform=torch.bernoulli,
        epochs=epochs or 200,
        batch_size=100,
        **options,
    )
