"""Functions that need gradients enable them under torch.no_grad and torch.inference_mode."""

import pytest
import torch
from conftest import make_pair
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae import objectives as o

FIT = {"epochs": 2, "batch_size": 20, "seed": 0, "progress": False}
ASCENT = pv.evaluation.Ascent(learning_rate=0.1, window=3, patience=1)


def normalized_pair():
    model, _ = make_pair()
    encoder = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh())
    return model, pv.guides.AmortizedNormal(model, encoder)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("capture", "wrap"),
    [
        (False, lambda x: x),
        pytest.param(True, lambda x: x, marks=pytest.mark.slow),
        (False, lambda x: DataLoader(TensorDataset(x), batch_size=20)),
    ],
)
def test_fit_is_the_same_without_gradients(mode, capture, wrap, binary, without_compiler):
    histories = []
    for context in (torch.enable_grad, mode):
        torch.manual_seed(3)
        model, guide = normalized_pair()
        guide.eval()(binary)
        guide.train()
        with context():
            x = binary.clone()  # made in this context
            objective = o.BetaELBO(o.Linear(5))
            result = pv.fit(model, guide, wrap(x), objective=objective, validation=x,
                            capture=capture, **FIT)  # fmt: skip
        histories.append(result.history.drop(columns="seconds"))
        assert all(not p.is_inference() for p in guide.parameters())
    assert histories[0].equals(histories[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gaps_and_gradient_noise_are_the_same_without_gradients(mode, binary):
    model, guide = make_pair()
    pv.fit(model, guide, binary, **FIT)
    found = []
    for context in (torch.enable_grad, mode):
        with context():
            x = binary.clone()
            gaps = pv.inference_gaps(
                model, guide, x, num_particles=5, ascent=ASCENT, seed=0, progress=False
            )
            noise = pv.gradient_noise(
                model, guide, x, [o.ScoreFunction(2, "average")], repeats=3, seed=0
            )
            found.append([gaps.amortization_gap.mean, noise.table.norm.sum()])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_parameters_made_under_inference_mode_are_refused_by_name(binary):
    with torch.inference_mode():
        model, guide = make_pair()
    for call in (
        lambda: pv.fit(model, guide, binary, **FIT),
        lambda: pv.inference_gaps(model, guide, binary, num_particles=5, ascent=ASCENT),
        lambda: pv.gradient_noise(model, guide, binary, [o.ELBO()], repeats=2),
    ):
        with pytest.raises(ValueError, match=r"'likelihood.decoder.0.weight' of the model was made "
                                             r"under torch.inference_mode\(\)"):  # fmt: skip
            call()
    model, guide = normalized_pair()
    with torch.inference_mode():
        guide.encoder[1].running_mean = torch.zeros(8)
    with pytest.raises(ValueError, match=r"'encoder.1.running_mean' of the guide"):
        pv.fit(model, guide, binary, **FIT)
