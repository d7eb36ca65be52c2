"""Capture: run a function of tensors through Python a few times, then replay it as a graph."""

from pyro_vae._capture.captured import Captured
from pyro_vae._capture.policy import Capture, check_capture

__all__ = ["Capture", "Captured", "check_capture"]
