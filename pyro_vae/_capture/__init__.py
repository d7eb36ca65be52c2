"""Capture: a function of tensors run through Python a few times, then replayed as a graph."""

from pyro_vae._capture.captured import Captured
from pyro_vae._capture.policy import Capture, check_capture

__all__ = ["Capture", "Captured", "check_capture"]
