"""Find or download data files, and verify them.

A file is searched in the user's data folder, then in the cache, then on its mirrors. Its contents
must have the expected SHA-256, whatever the format (gzip or not, .mat or .npy). Where only a hash
of the file itself is known, the file must have it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType

import numpy as np

from pyro_vae._utils.extras import require
from pyro_vae.datasets._idx import idx_header, read_idx

FOLDER_VARIABLE = "PYRO_VAE_DATA"


@dataclass(frozen=True)
class SourceFile:
    """A file of a data set, and the array that it must contain.

    Args:
        dataset: name of the data set, and of the subfolder that contains the file.
        variants: accepted file names. The mirrors use the first.
        urls: the mirrors.
        read: function that reads the array from a file. It raises ValueError or OSError if it
            fails.
        shape: shape of the array.
        sha256: SHA-256 of the header and the array, whose dtype is uint8.
        header: bytes of the IDX format before the array.
        file_hash: the name of a hash of the file, a key of ``FILE_HASHES``, and its value. With it,
            a file is verified before it is read, and ``sha256`` is not used.
    """

    dataset: str
    variants: tuple[str, ...]
    urls: tuple[str, ...]
    read: Callable[[Path, tuple[int, ...]], np.ndarray]
    shape: tuple[int, ...]
    sha256: str = ""
    header: bytes = b""
    file_hash: tuple[str, str] | None = None

    def load(self, folder: str | Path | None = None) -> np.ndarray:
        """Return the array, from the data folder, the cache or a mirror.

        Args:
            folder: data folder. The default is the environment variable ``PYRO_VAE_DATA``.

        Raises:
            ValueError: A file in the data folder is truncated or has the wrong hash.
            FileNotFoundError: The file is not in a folder, and no mirror has it.
            ImportError: The file must be downloaded, and the extra ``data`` is not installed.
        """
        folder = folder or os.environ.get(FOLDER_VARIABLE)
        if folder is not None:
            for path in self._candidates(Path(folder)):
                return self._verified(path)
        pooch = require("pooch", "data", f"Downloading {self.variants[0]} of {self.dataset!r}")
        cache = Path(pooch.os_cache("pyro_vae"))
        for path in self._candidates(cache):
            with contextlib.suppress(ValueError):
                return self._verified(path)
            path.unlink()  # damaged in our own cache: download it again
        return self._fetch(cache, pooch)

    def _candidates(self, folder: Path) -> Iterator[Path]:
        for name in self.variants:
            path = folder / self.dataset / name
            if path.is_file():
                yield path

    def _fetch(self, cache: Path, pooch: ModuleType) -> np.ndarray:
        failures = []
        for url in self.urls:
            try:
                path = pooch.retrieve(
                    url,
                    known_hash=None,  # the contents are verified instead
                    fname=self.variants[0],
                    path=cache / self.dataset,
                    downloader=pooch.HTTPDownloader(timeout=30),
                )
            except (OSError, ValueError) as error:  # requests' errors are OSErrors
                failures.append(f"{url}: {error}")
                continue
            try:
                return self._verified(Path(path))
            except ValueError as error:
                Path(path).unlink()
                failures.append(f"{url}: {error}")
        tried = "\n  ".join(failures)
        raise FileNotFoundError(
            f"could not download {self.variants[0]} of {self.dataset!r}:\n  {tried}\nDownload the "
            f"file yourself into FOLDER/{self.dataset}/ (any of {', '.join(self.variants)}). Then "
            f"set the environment variable {FOLDER_VARIABLE} to FOLDER, or pass folder=FOLDER."
        )

    def _verified(self, path: Path) -> np.ndarray:
        where = f". Replace {path}, or remove it to download it again"
        if self.file_hash is not None:
            kind, expected = self.file_hash
            if (found := FILE_HASHES[kind](path.read_bytes())) != expected:
                raise ValueError(
                    f"{path} has the wrong contents: expected {kind} {expected}, got {found}{where}"
                )
        try:
            array = self.read(path, self.shape)
        except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error) as error:
            raise ValueError(
                f"{path} is truncated or not a file of {self.dataset}: {error}{where}"
            ) from error
        if self.file_hash is not None:
            return array
        digest = hashlib.sha256(self.header + array.tobytes()).hexdigest()
        if digest != self.sha256:
            raise ValueError(
                f"{path} has the wrong contents: expected SHA-256 {self.sha256}, got "
                f"{digest}{where}"
            )
        return array


def git_blob_id(content: bytes) -> str:
    """Return the name that git gives to the contents of a file, a SHA-1."""
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


FILE_HASHES: dict[str, Callable[[bytes], str]] = {
    "SHA-256": lambda content: hashlib.sha256(content).hexdigest(),
    "git blob": git_blob_id,
}


def read_freyfaces(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read the Frey faces from the authors' .mat file (one face per column) or from an .npy."""
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
    else:
        from scipy.io import loadmat

        try:
            array = loadmat(path)["ff"].T
        except Exception as error:  # scipy raises errors of many types for a damaged file
            raise ValueError(f"{type(error).__name__}: {error}") from error
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"expected uint8 {shape}, got {array.dtype} {array.shape}")
    return np.ascontiguousarray(array)


def read_amat(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read rows of the characters 0 and 1, each followed by a space or the end of the line."""
    content = np.fromfile(path, np.uint8)
    if len(content) != 2 * np.prod(shape):
        raise ValueError(f"expected {2 * np.prod(shape)} bytes, got {len(content)}")
    bits = content[::2] - ord("0")
    if bits.max() > 1:
        raise ValueError("expected rows of 0 and 1, with one space between them")
    return bits.reshape(shape)


def read_omniglot(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read the training images, then the test images, of the .mat file; each is transposed."""
    from scipy.io import loadmat

    content = loadmat(path)
    columns = np.concatenate([content["data"], content["testdata"]], axis=1)
    images = columns.T.astype(np.float32).reshape(-1, *shape[1:]).swapaxes(1, 2)
    if images.shape != shape:
        raise ValueError(f"expected images of shape {shape}, got {images.shape}")
    return np.ascontiguousarray(images)


def load_digits(what: str = "images") -> np.ndarray:
    """Return the digits of the package, uint8 (1797, 8, 8), 0 to 16; or their ``"labels"``."""
    with resources.files("pyro_vae.datasets").joinpath("digits.npz").open("rb") as file:
        return np.load(file, allow_pickle=False)[what]


def _train_and_test(
    dataset: str,
    mirrors: tuple[str, ...],
    kind: str,
    event_shape: tuple[int, ...],
    sha256: tuple[str, str],
) -> tuple[SourceFile, SourceFile]:
    """Return the training and test files in IDX format, named like those of MNIST."""
    train, test = (
        SourceFile(
            dataset,
            variants=(f"{part}-{kind}.gz", f"{part}-{kind}"),
            urls=tuple(f"{mirror}{part}-{kind}.gz" for mirror in mirrors),
            read=read_idx,
            shape=(count, *event_shape),
            sha256=digest,
            header=idx_header((count, *event_shape)),
        )
        for part, count, digest in zip(("train", "t10k"), (60_000, 10_000), sha256, strict=True)
    )
    return train, test


_MNIST = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_FASHION = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
MNIST = _train_and_test(
    *("mnist", _MNIST, "images-idx3-ubyte", (28, 28)),
    sha256=(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
)
MNIST_LABELS = _train_and_test(
    *("mnist", _MNIST, "labels-idx1-ubyte", ()),
    sha256=(
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)
FASHION = _train_and_test(
    *("fashion-mnist", _FASHION, "images-idx3-ubyte", (28, 28)),
    sha256=(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
)
FASHION_LABELS = _train_and_test(
    *("fashion-mnist", _FASHION, "labels-idx1-ubyte", ()),
    sha256=(
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)
FREYFACES = SourceFile(
    "freyfaces",
    variants=("frey_rawface.mat", "freyfaces.npy"),
    urls=(
        "https://cs.nyu.edu/~roweis/data/frey_rawface.mat",
        "http://www.cs.nyu.edu/~roweis/data/frey_rawface.mat",
    ),
    read=read_freyfaces,
    shape=(1965, 560),
    sha256="2438ba4f0d2a6bd8bac43de756141eaa33c8d248dd613d464bdb1210d9b7af78",
)
_STATIC = "www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
# The SHA-256 of TensorFlow Datasets, url_checksums/binarized_mnist.txt.
STATIC_MNIST = tuple(
    SourceFile(
        "static-mnist",
        variants=(f"binarized_mnist_{part}.amat",),
        urls=tuple(
            f"{scheme}://{_STATIC}binarized_mnist_{part}.amat" for scheme in ("https", "http")
        ),
        read=read_amat,
        shape=(count, 784),
        file_hash=("SHA-256", digest),
    )
    for part, count, digest in (
        ("train", 50_000, "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
        ("valid", 10_000, "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
        ("test", 10_000, "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
    )
)
# The file and its git blob are those of the repository of Burda, Grosse & Salakhutdinov (2016).
_IWAE = "78a6075484bd7dd6f47a4bb9880d2295bc7a5220/datasets/OMNIGLOT/chardata.mat"
OMNIGLOT = SourceFile(
    "omniglot",
    variants=("chardata.mat",),
    urls=(
        f"https://github.com/yburda/iwae/raw/{_IWAE}",
        f"https://raw.githubusercontent.com/yburda/iwae/{_IWAE}",
    ),
    read=read_omniglot,
    shape=(24_345 + 8_070, 28, 28),
    file_hash=("git blob", "016a3536ffe5e1d38e42563a18d7a78bfaf643ec"),
)
