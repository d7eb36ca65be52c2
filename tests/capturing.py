"""Fit a pair eagerly and captured from the same state, and compare the results."""

import contextlib
import shutil
from collections import OrderedDict

import pytest
import torch

import pyro_vae as pv
from pyro_vae._capture import inductor
from pyro_vae._utils.modules import modules

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="needs a C++ compiler to compile a captured step",
)
# Relative distance of all parameters after training, by dtype. Training amplifies rounding.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def fitted(make, x, *, double=False, **options):
    """Fit a pair from fixed initial values; return the fit and all tensors, flattened."""
    torch.manual_seed(7)
    settings = {"epochs": 4, "batch_size": 10, "seed": 3, "progress": False}
    with default_dtype(torch.float64 if double else torch.float32):
        model, guide = make()
        fit = pv.fit(model, guide, doubled(x) if double else x, **{**settings, **options})
    with pv.parameter_store(model, guide) as store:
        bare = [p.detach().flatten() for _, p in sorted(store["params"].items())]
    held = [t for m in modules(model, guide) for t in (*m.parameters(), *m.buffers())]
    return fit, torch.cat([*bare, *(t.detach().flatten() for t in held)]).double()


def doubled(x):
    """Convert floating-point numbers to float64; x may have several columns."""
    if isinstance(x, tuple):
        return tuple(map(doubled, x))
    return x.double() if x.is_floating_point() else x


def replace_compiler(monkeypatch, compiler):
    """Replace torch's compiler for a test, which must not use graphs that it compiled before."""
    monkeypatch.setattr(torch._inductor, "compile", compiler)
    monkeypatch.setattr(inductor, "_compiled", OrderedDict())


@contextlib.contextmanager
def default_dtype(dtype):
    """Set the default dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def check_same(make, x, *, double=False, execution="captured", **options):
    eager, expected = fitted(make, x, double=double, capture=False, **options)
    captured, tensors = fitted(make, x, double=double, capture=True, **options)
    assert captured.execution == execution
    assert eager.execution == "eager: capture=False"
    assert distance(tensors, expected) < TOLERANCE[torch.float64 if double else torch.float32]
    assert captured.history.loss.values == pytest.approx(eager.history.loss.values, rel=1e-5)
    return captured
