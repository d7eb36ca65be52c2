"""Capture: a function of tensors run through Python a few times, then replayed as a graph."""

from pyro_vae.capture.captured import Captured
from pyro_vae.capture.policy import Capture, check_capture

__all__ = ["Capture", "Captured", "check_capture"]
