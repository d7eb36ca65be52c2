"""Parts that all sections of gpu.py share: settings, time and results."""

import argparse
import contextlib
import json
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from gpu import MARK

import pyro_vae as pv


@dataclass(frozen=True)
class Settings:
    """The settings of a section.

    Args:
        device: The device that is checked.
        small: Whether the sizes are small.
        deadline: When the section should end, as a value of ``time.monotonic``.
    """

    device: torch.device
    small: bool
    deadline: float

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        """Wait until the device has run all its kernels."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the time of a call, with all its kernels."""
        self.synchronize()
        began = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - began


def report(check: str, passed: bool | None = None, **figures) -> None:
    """Send a result to gpu.py. ``passed`` is None if it is a measurement alone."""
    print(MARK + json.dumps({"check": check, "passed": passed, **figures}), flush=True)


@contextlib.contextmanager
def attempt(check: str, **figures) -> Iterator[None]:
    """Report an error inside the block as a failed check, and continue after the block."""
    try:
        yield
    except Exception as error:
        message = (str(error).splitlines() or [""])[0]
        shown = f"{type(error).__name__}: {message}"
        report(check, False, error=shown, traceback=traceback.format_exc(), **figures)


def report_warnings_of_captures() -> None:
    """Report each warning that a function is not captured, once."""
    reported = set()

    def show(message, *others):
        text = str(message)
        if "captured" in text and text not in reported:
            reported.add(text)
            report("a warning", None, warning=text[:500])

    warnings.showwarning = show


def run(sections: Mapping[str, Callable[[Settings], None]]) -> None:
    """Run the section that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=sections)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    if on_cuda and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    settings = Settings(device, arguments.small, time.monotonic() + arguments.seconds)
    if on_cuda:
        torch.cuda.set_device(settings.device)
    name = torch.cuda.get_device_name(settings.device) if on_cuda else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "name": name}
    print(MARK + json.dumps({"environment": versions}), flush=True)
    report_warnings_of_captures()
    try:
        sections[arguments.section](settings)
    except Exception as error:
        report(
            "no error outside of the checks",
            False,
            error=f"{type(error).__name__}: {error}",
            traceback=traceback.format_exc(),
        )
        sys.exit(1)


def make_pair(features=16, hidden=(8,), latents=2, guide=None):
    """Return a Bernoulli VAE. ``guide`` makes the guide from the model and the encoder."""
    model = pv.LatentVariableModel(
        prior=pv.priors.StandardNormal(latents),
        likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(latents, [*hidden], features)),
    )
    guide = pv.guides.AmortizedNormal if guide is None else guide
    return model, guide(model, pv.nets.MLP(features, [*hidden]))


def binary(rows: int, features: int = 16, seed: int = 0) -> torch.Tensor:
    """Return binary rows of two kinds, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.arange(features) < features // 2
    kinds = torch.where(torch.rand(rows, 1, generator=generator) < 0.5, left, ~left)
    return torch.bernoulli(torch.where(kinds, 0.9, 0.1), generator=generator)
