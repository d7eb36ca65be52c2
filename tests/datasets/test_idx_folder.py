"""Splits of folders with files in the format of MNIST."""

import gzip

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.datasets._idx import idx_header

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
LABELS = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")


def write(path, array, *, zipped=False):
    content = idx_header(array.shape) + array.tobytes()
    if zipped:
        path, content = path.with_name(path.name + ".gz"), gzip.compress(content)
    path.write_bytes(content)


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0).integers
    images = [draw(0, 256, (count, 5, 4), dtype=np.uint8) for count in (60, 20)]
    return images, [draw(0, 26, count, dtype=np.uint8) for count in (60, 20)]


@pytest.fixture
def folder(tmp_path, arrays):
    path = tmp_path / "letters"
    path.mkdir()
    (train, test), labels = arrays
    write(path / TRAIN, train, zipped=True)
    write(path / TEST, test)
    for name, each in zip(LABELS, labels, strict=True):
        write(path / name, each, zipped=True)
    return path


def test_splits_are_in_the_order_of_the_files(folder, arrays):
    (train, test), labels = arrays
    data = pv.datasets.from_idx(folder, binarize="none")
    rows = torch.cat([data.train, data.validation])
    assert torch.equal(rows, torch.tensor(train).reshape(60, 20) / 255)
    assert torch.equal(data.test, torch.tensor(test).reshape(20, 20) / 255)
    found = torch.cat([data.labels.train, data.labels.validation, data.labels.test])
    assert found.tolist() == np.concatenate(labels).tolist()
    assert str(data) == "letters: 50 training, 10 validation and 20 test images of 5 x 4"
    assert len(pv.datasets.from_idx(str(folder), num_validation=7).validation) == 7


def test_binarization_is_that_of_load(folder):
    fixed = pv.datasets.from_idx(folder)
    assert set(fixed.train.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(fixed.train, pv.datasets.from_idx(folder).train)
    assert not torch.equal(fixed.train, pv.datasets.from_idx(folder, seed=1).train)
    dynamic = pv.datasets.from_idx(folder, binarize="dynamic")
    assert dynamic.transform is torch.bernoulli
    assert len(dynamic.train.unique()) > 2
    assert torch.equal(dynamic.test, fixed.test)


def test_labels_are_optional(folder):
    (folder / f"{LABELS[1]}.gz").unlink()
    assert pv.datasets.from_idx(folder).labels is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TEST, b"", "truncated or not an IDX file: expected an IDX header of uint8, got "),
        (TEST, b"<html>not found</html>", "expected an IDX header of uint8, got 3c68746d"),
        (TEST, idx_header((2, 5, 4)) + bytes(39), "expected 56 bytes, got 55"),
        (TEST, idx_header((2, 5, 4)) + bytes(41), "expected 56 bytes, got more than 56"),
        (TEST, idx_header((2, 5, 4))[:9], "expected "),
        (TEST, idx_header((2, 4, 5)) + bytes(40), r"shape of the training images, \(5, 4\), got"),
        (
            TEST,
            idx_header((40,)) + bytes(40),
            r"must have images \(N, height, width\), got \(40,\)",
        ),
        (TEST, idx_header((0, 5, 4)), "must have images"),
        (TEST, idx_header((2**31,) * 3) + bytes(10), "expected 99035203142830421991929938"),
        (f"{TRAIN}.gz", b"\x1f\x8bnonsense", "truncated or not an IDX file"),
        (f"{LABELS[0]}.gz", gzip.compress(idx_header((59,)) + bytes(59)), "must have 60 labels"),
    ],
)
def test_damaged_files_are_refused(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pv.datasets.from_idx(folder)


def test_arguments_and_folders_that_do_not_fit(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="must have the file train-images-idx3-ubyte or"):
        pv.datasets.from_idx(tmp_path)
    for number, message in ((60, "more than 60 training images"), (0, "at least 1")):
        with pytest.raises(ValueError, match=message):
            pv.datasets.from_idx(folder, num_validation=number)
    with pytest.raises(ValueError, match="binarize must be"):
        pv.datasets.from_idx(folder, binarize="maybe")
