"""Classes of installed packages that a program names are not watched; its own classes are."""

import importlib
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae._capture.guards import change, state_of

SOURCE = """
class Bar:
    shown = []

    @classmethod
    def write(cls, text):
        cls.shown.append(text)


def write(text):
    Bar.write(text)
"""
PROGRAM = """
from {package} import Bar, write


def program(x, verbose=False):
    if verbose:
        {call}("a step")
"""


def imported(folder, name, source):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(source)
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize("call", ["Bar.write", "write"], ids=["class", "function"])
@pytest.mark.parametrize("folder", ["site-packages", "dist-packages", "own"])
def test_the_state_of_a_class(folder, call, tmp_path):
    """A progress bar keeps all bars in its class, as tqdm does."""
    name = f"bars_of_{folder.partition('-')[0]}_{call.lower().replace('.', '_')}"
    bars = imported(tmp_path / folder, name, SOURCE)
    program = imported(tmp_path, f"uses_{name}", PROGRAM.format(package=name, call=call)).program
    before = state_of({"model": program})
    bars.Bar.shown.append("an epoch")
    found = change(before, state_of({"model": program}))
    if folder == "own":
        assert "shown changed from" in found
    else:
        assert found is None


def test_modules_of_installed_classes_are_still_found(tmp_path):
    """The parameters of an object are watched, whatever package its class is from."""
    nets = imported(
        tmp_path / "site-packages",
        "installed_nets",
        "from torch import nn\n\n\nclass Net(nn.Linear):\n    temperature = 1.0\n",
    )
    net = nets.Net(2, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x) / net.temperature, 1.0).to_event(1), obs=x)

    before = state_of({"model": model})
    net.temperature = 2.0
    assert "temperature" in change(before, state_of({"model": model}))
    before = state_of({"model": model})
    net.weight = torch.nn.Parameter(torch.zeros(2, 2))
    assert "weight" in change(before, state_of({"model": model}))
