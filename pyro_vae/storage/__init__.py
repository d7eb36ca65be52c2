"""One nested structure in, one folder out, and back: tensors beside a record that can be read."""

from pyro_vae.storage.files import UnreadableFile
from pyro_vae.storage.reading import read
from pyro_vae.storage.writing import write

__all__ = ["UnreadableFile", "read", "write"]
