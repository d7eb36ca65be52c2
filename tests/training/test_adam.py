"""The default optimizer is torch's Adam."""

import copy
import functools
import math

import pytest
import torch
from capturing import default_dtype
from conftest import make_pair

import pyro_vae as pv
from pyro_vae.training._adam import Adam
from pyro_vae.training._gradients import all_finite, clipped


def closure_of(parameters, gradients):
    def closure():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return torch.tensor(0.0)

    return closure


def test_adam_equals_torchs_adam():
    dtypes = (torch.double, torch.complex64, torch.complex128)
    ours = [torch.randn(5, 3), torch.randn(4), *(torch.randn(2, dtype=d) for d in dtypes)]
    theirs = [p.clone().requires_grad_() for p in ours]
    ours = [p.requires_grad_() for p in ours]
    mine, reference = Adam(ours, lr=0.01), torch.optim.Adam(theirs, lr=0.01)
    calls = []
    for optimizer in (mine, reference):  # both run hooks
        optimizer.register_step_pre_hook(lambda self, args, kwargs: calls.append(len(args)))
        optimizer.register_step_post_hook(lambda self, args, kwargs: calls.append(len(args)))
    for step in range(60):
        gradients = [torch.randn_like(p) for p in ours]
        if step % 5 == 3:
            gradients[1] = None
        if step == 20:
            mine.load_state_dict(copy.deepcopy(reference.state_dict()))
        if step == 30:
            for optimizer in (mine, reference):
                optimizer.state.clear()
        if step == 40:
            for optimizer in (mine, reference):
                optimizer.param_groups[0].update(lr=0.003, maximize=True, weight_decay=0.1)
        mine.step(closure_of(ours, gradients))
        reference.step(closure_of(theirs, gradients))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert calls == [2] * 240


@pytest.mark.parametrize("resume", [False, True])
def test_steps_are_counted_in_float32(resume):
    """Torch's kernel on CUDA reads the number as float32."""
    with default_dtype(torch.float64):
        parameter = torch.randn(3, requires_grad=True)
        optimizer = Adam([parameter])
        optimizer.step(closure_of([parameter], [torch.ones(3)]))
        if resume:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step(closure_of([parameter], [torch.ones(3)]))
    assert optimizer.state[parameter]["step"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*run(s)? eagerly")
def test_sparse_gradients_need_another_optimizer():
    model, _ = make_pair(data=6)

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = torch.nn.Embedding(2, 3, sparse=True)

        def forward(self, x):
            return self.codes(x.long()).sum(-2)

    x = torch.rand(20, 6).round()
    guide = pv.guides.AmortizedNormal(model, Encoder())
    options = {"epochs": 1, "batch_size": 10, "capture": False, "progress": False}
    with pytest.raises(ValueError, match="is sparse, which Adam does not accept"):
        pv.fit(model, guide, x, **options)
    sgd = functools.partial(torch.optim.SGD, lr=0.01)
    assert math.isfinite(pv.fit(model, guide, x, optimizer=sgd, **options).history.loss[1])


class Amplitudes(torch.nn.Module):
    """An encoder with a complex weight, whose gradient is a conjugate view."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.weight).abs()


@pytest.mark.parametrize("clip_norm", [None, 0.02])
def test_complex_parameters_are_trained(clip_norm):
    fitted = []
    for chosen in ({"learning_rate": 1e-3}, {"optimizer": torch.optim.Adam}):
        torch.manual_seed(0)
        model, _ = make_pair(data=6)
        guide = pv.guides.AmortizedNormal(model, Amplitudes())
        x = torch.rand(20, 6).round()
        pv.fit(
            model, guide, x, epochs=3, batch_size=10, clip_norm=clip_norm, seed=0, capture=False,
            progress=False, **chosen
        )  # fmt: skip
        fitted.append([*model.parameters(), *guide.parameters()])
    for a, b in zip(*fitted, strict=True):
        torch.testing.assert_close(a, b)


def test_norm_of_clipped_gradients_counts_imaginary_parts():
    gradients = [torch.tensor([3.0 + 4.0j]).conj(), torch.tensor([12.0])]
    found = clipped(gradients, 1.3)
    torch.testing.assert_close(found, [torch.tensor([0.3 - 0.4j]), torch.tensor([1.2])])
    assert all_finite(gradients)
    assert not all_finite([torch.tensor([complex(1.0, math.nan)])])
