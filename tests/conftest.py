import os
import signal

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import pyro_vae as pv
from pyro_vae._capture import Captured

DATA_FOLDER = os.environ.get("PYRO_VAE_DATA")  # read before a test removes it


def make_pair(latent=2, data=16, hidden=8):
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(latent),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(latent, [hidden], data)),
    )
    return model, pv.guides.AmortizedNormal(model, encoder=pv.nets.MLP(data, [hidden]))


class Rows(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


def pytest_make_parametrize_id(val, argname):
    """Name bytes by their argument: those of a compressed file contain the time."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def pair():
    return make_pair()


@pytest.fixture
def binary():
    """Binary rows of two kinds, so that a fit can learn something."""
    left = torch.arange(16) < 8
    rows = torch.where(torch.rand(50, 1) < 0.5, left, ~left)
    return torch.bernoulli(torch.where(rows, 0.9, 0.1))


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let Ctrl-C raise KeyboardInterrupt, even in a background shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def data_folder():
    if DATA_FOLDER is None:
        pytest.skip("needs real data files: set PYRO_VAE_DATA to a folder with mnist/, freyfaces/")
    return DATA_FOLDER


@pytest.fixture
def without_compiler(monkeypatch):
    """Run captured steps operation by operation, without a C++ compiler."""
    monkeypatch.setattr(Captured, "compiles", False)
