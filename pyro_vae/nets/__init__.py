"""Networks: tensors in, tensors out. They know no site, no plate and no distribution."""

from pyro_vae.nets.dense import MLP

__all__ = ["MLP"]
