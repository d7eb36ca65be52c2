"""The program ``pyro-vae``: compare methods, or diagnose a saved pair, without Python code."""

from pyro_vae.cli._app import app, main

__all__ = ["app", "main"]
