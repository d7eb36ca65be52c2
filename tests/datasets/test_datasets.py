import dataclasses
import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pooch
import pytest
import scipy.io
import torch

import pyro_vae as pv
from pyro_vae.datasets import _download as download
from pyro_vae.datasets._datasets import _omniglot
from pyro_vae.datasets._download import SourceFile, read_amat, read_freyfaces
from pyro_vae.datasets._idx import idx_header, read_idx

SHAPE = (7, 28, 28)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


@pytest.fixture
def content(images):
    return idx_header(SHAPE) + images.tobytes()


@pytest.fixture
def source(content):
    return SourceFile(
        "toy",
        variants=("toy-ubyte.gz", "toy-ubyte"),
        urls=("https://one.invalid/toy-ubyte.gz", "https://two.invalid/toy-ubyte.gz"),
        read=read_idx,
        shape=SHAPE,
        sha256=hashlib.sha256(content).hexdigest(),
        header=idx_header(SHAPE),
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use an empty cache and no data folder, to ignore the files of this machine."""
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.delenv(download.FOLDER_VARIABLE, raising=False)
    return tmp_path / "cache" / "pyro_vae" / "toy"


def put(folder, name, content):
    path = Path(folder) / "toy" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def mirrors(monkeypatch):
    """Mirrors by host name: the bytes that each serves, or None if it does not answer."""
    served = {"one": None, "two": None}
    asked = []

    def retrieve(url, known_hash, fname, path, downloader):
        asked.append(url)
        content = served[url.split("//")[1].split(".")[0]]
        if content is None:
            raise OSError("no route to host")
        Path(path).mkdir(parents=True, exist_ok=True)
        target = Path(path) / fname
        target.write_bytes(content)
        return str(target)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    served["asked"] = asked
    return served


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_data_folder_is_used_first(
    source, images, content, zipped, by, tmp_path, monkeypatch, mirrors
):
    name = "toy-ubyte.gz" if zipped else "toy-ubyte"
    put(tmp_path, name, gzip.compress(content) if zipped else content)
    if by == "environment":
        monkeypatch.setenv(download.FOLDER_VARIABLE, str(tmp_path))
    array = source.load(tmp_path if by == "argument" else None)
    assert np.array_equal(array, images)
    assert mirrors["asked"] == []


def test_mirrors_are_tried_in_turn_and_files_are_cached(source, images, content, mirrors, cache):
    mirrors["two"] = gzip.compress(content)
    assert np.array_equal(source.load(), images)
    assert len(mirrors["asked"]) == 2
    assert np.array_equal(source.load(), images)
    assert len(mirrors["asked"]) == 2
    assert list(cache.iterdir()) == [cache / "toy-ubyte.gz"]


def test_mirror_with_a_wrong_file_is_skipped(source, images, content, mirrors, cache):
    other = bytearray(content)
    other[500] ^= 1
    mirrors["one"], mirrors["two"] = gzip.compress(bytes(other)), gzip.compress(content)
    assert np.array_equal(source.load(), images)


def test_damaged_cache_is_downloaded_again(source, images, content, mirrors, cache):
    cache.mkdir(parents=True)
    (cache / "toy-ubyte.gz").write_bytes(gzip.compress(content)[:-50])
    mirrors["one"] = gzip.compress(content)
    assert np.array_equal(source.load(), images)


def test_error_without_network_names_the_file_and_folder(source, mirrors):
    with pytest.raises(FileNotFoundError) as caught:
        source.load()
    message = str(caught.value)
    for part in (
        "toy-ubyte.gz",
        "https://one.invalid",
        "no route to host",
        "FOLDER/toy/",
        "PYRO_VAE_DATA",
    ):
        assert part in message


def flip(content):
    return content[:500] + bytes([content[500] ^ 1]) + content[501:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: gzip.compress(flip(c)), r"expected SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}"),
        (lambda c: gzip.compress(c)[:-100], "truncated"),
        (lambda c: gzip.compress(c[:-100]), "expected 5504 bytes, got 5404"),
        (lambda c: gzip.compress(c + b"more"), "expected 5504 bytes, got more than 5504"),
        (lambda c: gzip.compress(c[::-1]), "expected an IDX header"),
        (lambda c: b"<html>not found</html>", "expected 5504 bytes, got 22"),
        (lambda c: b"", "expected 5504 bytes, got 0"),
        (lambda c: gzip.compress(bytes(2**28)), "got more than 5504"),  # a bomb of 256 MiB
        (lambda c: gzip.compress(c)[:20] + bytes(200), "truncated or not a file of toy"),
    ],
)
def test_wrong_files_in_the_data_folder_are_refused_by_name(
    source, content, damage, message, tmp_path, mirrors
):
    path = put(tmp_path, "toy-ubyte.gz", damage(content))
    with pytest.raises(ValueError, match=message) as caught:
        source.load(tmp_path)
    assert str(path) in str(caught.value)
    assert path.exists()  # files of the user are not removed


def test_freyfaces_are_read_from_both_formats(tmp_path):
    faces = np.random.default_rng(0).integers(0, 256, (6, 560), dtype=np.uint8)
    scipy.io.savemat(tmp_path / "f.mat", {"ff": faces.T})
    np.save(tmp_path / "f.npy", faces)
    for name in ("f.mat", "f.npy"):
        assert np.array_equal(read_freyfaces(tmp_path / name, (6, 560)), faces)
    with pytest.raises(ValueError, match=r"expected uint8 \(7, 560\)"):
        read_freyfaces(tmp_path / "f.npy", (7, 560))
    path = tmp_path / "freyfaces" / "frey_rawface.mat"
    path.parent.mkdir()
    whole = (tmp_path / "f.mat").read_bytes()
    for length in (0, 60, len(whole) // 2):  # scipy raises errors of several types
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is truncated or not a file of freyfaces"):
            pv.datasets.load("freyfaces", folder=tmp_path)


def as_amat(bits):
    return "".join(" ".join(map(str, row)) + "\n" for row in bits.tolist()).encode()


@pytest.fixture
def static_files(tmp_path, monkeypatch):
    """Three files of a few rows in the format of Larochelle, with their own hashes."""
    bits = [np.random.default_rng(i).integers(0, 2, (3 + i, 784), dtype=np.uint8) for i in range(3)]
    folder = tmp_path / "static-mnist"
    folder.mkdir()
    sources = []
    for source, rows in zip(download.STATIC_MNIST, bits, strict=True):
        (folder / source.variants[0]).write_bytes(as_amat(rows))
        file_hash = ("SHA-256", hashlib.sha256(as_amat(rows)).hexdigest())
        sources.append(dataclasses.replace(source, shape=rows.shape, file_hash=file_hash))
    monkeypatch.setattr(download, "STATIC_MNIST", tuple(sources))
    return bits


def test_static_mnist_is_the_bits_of_its_files(static_files, tmp_path):
    for binarize in ("none", "fixed", "dynamic"):
        data = pv.datasets.load("static-mnist", binarize=binarize, seed=3, folder=tmp_path)
        for found, bits in zip((data.train, data.validation, data.test), static_files, strict=True):
            assert torch.equal(found, torch.from_numpy(bits).float())
    assert data.image_shape == (28, 28)


def test_published_sizes_of_static_mnist():
    sizes = [2 * int(np.prod(source.shape)) for source in download.STATIC_MNIST]
    assert sizes == [78_400_000, 15_680_000, 15_680_000]


@pytest.mark.parametrize("damage", [flip, lambda c: c[:-2], lambda c: c + b"0\n", lambda c: b""])
def test_other_files_of_static_mnist_are_refused(static_files, damage, tmp_path):
    path = tmp_path / "static-mnist" / "binarized_mnist_valid.amat"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"valid.amat has the wrong contents: expected SHA-256"):
        pv.datasets.load("static-mnist", folder=tmp_path)


def test_amat_files_are_rows_of_bits(tmp_path):
    path = tmp_path / "rows.amat"
    path.write_bytes(b"0 1 1\n1 0 0\n")
    assert read_amat(path, (2, 3)).tolist() == [[0, 1, 1], [1, 0, 0]]
    for content, message in ((b"0 1 2\n1 0 0\n", "rows of 0 and 1"), (b"0 1\n", "expected 12")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_amat(path, (2, 3))


def test_omniglot_is_upright_and_split_like_that_of_the_iwae(tmp_path, monkeypatch):
    """Images in the file are columns, transposed. Its hash is the name of the file in git."""
    images = np.random.default_rng(0).random((20, 28, 28))
    columns = images.swapaxes(1, 2).reshape(20, 784).T
    path = tmp_path / "omniglot" / "chardata.mat"
    path.parent.mkdir()
    scipy.io.savemat(path, {"data": columns[:, :14], "testdata": columns[:, 14:]})
    file_hash = ("git blob", download.git_blob_id(path.read_bytes()))
    source = dataclasses.replace(download.OMNIGLOT, shape=(20, 28, 28), file_hash=file_hash)
    monkeypatch.setattr(download, "OMNIGLOT", source)
    splits, image_shape = _omniglot(tmp_path, held_out=(4, 6))
    assert image_shape == (28, 28)
    expected = torch.from_numpy(images).float().flatten(1)
    order = np.random.RandomState(123).permutation(14)
    for found, rows in zip(splits, (order[:10], order[10:], range(14, 20)), strict=True):
        torch.testing.assert_close(found, expected[list(rows)])
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"wrong contents: expected git blob [0-9a-f]{40}, got"):
        pv.datasets.load("omniglot", folder=tmp_path)


def test_the_name_of_a_file_in_git_is_known():
    assert download.git_blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert download.git_blob_id(b"hello world\n") == "3b18e512dba79e4c8300dd08aeb37f8e728b8dad"


def test_a_pickle_in_the_data_folder_is_not_run(tmp_path, mirrors):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (canary,))

    path = tmp_path / "freyfaces" / "freyfaces.npy"
    path.parent.mkdir()
    np.save(path, np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="freyfaces"):
        pv.datasets.load("freyfaces", folder=tmp_path)
    assert not canary.exists()


def test_digits_are_included_and_their_split_is_fixed():
    data = pv.datasets.load("digits", binarize="none")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [1297, 200, 300]
    assert data.image_shape == (8, 8)
    everything = torch.cat([data.train, data.validation, data.test])
    assert (everything * 16 == (everything * 16).round()).all()
    digest = hashlib.sha256((data.test * 16).to(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest == "3337a4cde065b85efce889551872afddc3a75e0efb4b9a206efac1a6232e2d4a"


def test_binarize_none_fixed_and_dynamic():
    gray = pv.datasets.load("digits", binarize="none")
    fixed = [pv.datasets.load("digits", seed=seed) for seed in (0, 0, 1)]
    dynamic = pv.datasets.load("digits", binarize="dynamic")
    assert torch.equal(fixed[0].train, fixed[1].train)
    assert not torch.equal(fixed[0].train, fixed[2].train)
    assert fixed[0].train.unique().tolist() == [0.0, 1.0]
    # Each pixel is 1 with the probability of its intensity: a sum of Bernoullis.
    spread = (gray.train * (1 - gray.train)).sum().sqrt()
    assert abs(fixed[0].train.sum() - gray.train.sum()) < 4 * spread
    assert torch.equal(dynamic.train, gray.train)
    assert dynamic.transform is torch.bernoulli
    assert gray.transform is fixed[0].transform is None
    assert torch.equal(dynamic.test, fixed[0].test)
    assert torch.equal(dynamic.validation, fixed[0].validation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnits",), "expected one of digits, mnist, .*static-mnist, omniglot"),
        (("digits", "maybe"), 'binarize must be "none", "fixed" or "dynamic", got .maybe.'),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    name, *binarize = arguments
    with pytest.raises(ValueError, match=message):
        pv.datasets.load(name, **({"binarize": binarize[0]} if binarize else {}))


def test_mnist_and_freyfaces_are_loaded(data_folder):
    mnist = pv.datasets.load("mnist", binarize="none", folder=data_folder)
    assert [len(s) for s in (mnist.train, mnist.validation, mnist.test)] == [50_000, 10_000, 10_000]
    assert mnist.image_shape == (28, 28)
    assert mnist.train.mean().item() == pytest.approx(0.1307, abs=2e-3)
    faces = pv.datasets.load("freyfaces", binarize="none", folder=data_folder)
    assert [len(s) for s in (faces.train, faces.validation, faces.test)] == [1565, 200, 200]
    assert faces.image_shape == (28, 20)


def test_one_flipped_bit_of_mnist_is_refused(data_folder, tmp_path):
    name = "t10k-images-idx3-ubyte.gz"
    (tmp_path / "mnist").mkdir()
    shutil.copy(Path(data_folder) / "mnist" / "train-images-idx3-ubyte.gz", tmp_path / "mnist")
    content = gzip.decompress((Path(data_folder) / "mnist" / name).read_bytes())
    (tmp_path / "mnist" / name).write_bytes(gzip.compress(flip(content), 1))
    with pytest.raises(ValueError, match=f"{name} has the wrong contents"):
        pv.datasets.load("mnist", folder=tmp_path)


def test_labels_match_their_rows():
    """Most digits are nearest to the mean of their class."""
    data, labels = pv.datasets.load("digits", binarize="none"), pv.datasets.load_labels("digits")
    means = torch.stack([data.train[labels.train == c].mean(0) for c in range(10)])
    for rows, classes in ((data.test, labels.test), (data.validation, labels.validation)):
        nearest = torch.cdist(rows, means).argmin(1)
        assert (nearest == classes).double().mean() > 0.8
    with pytest.raises(ValueError, match="no labels for 'freyfaces': expected one of digits"):
        pv.datasets.load_labels("freyfaces")


def test_labels_of_mnist_match_the_ink_of_its_images(data_folder):
    labels = pv.datasets.load_labels("mnist", folder=data_folder)
    assert [len(part) for part in (labels.train, labels.validation, labels.test)] == [
        *(50_000, 10_000, 10_000)
    ]
    assert labels.train[:5].tolist() == [5, 0, 4, 1, 9]
    data = pv.datasets.load("mnist", binarize="none", folder=data_folder)
    for part in ("train", "validation", "test"):  # a zero has more ink than a one
        images, classes = getattr(data, part), getattr(labels, part)
        ink = [images[classes == c].mean() for c in (0, 1)]
        assert ink[0] > 2 * ink[1]
