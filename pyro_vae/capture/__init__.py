"""Capture: a function of tensors run once through Python, then replayed as compiled code."""

from pyro_vae.capture.captured import Captured
from pyro_vae.capture.tracing import Uncapturable

__all__ = ["Captured", "Uncapturable"]
