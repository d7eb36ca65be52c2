"""Splits of data sets with torchvision's interface."""

import numpy as np
import pytest
import torch

import pyro_vae as pv


class Picture:
    """An image like those of PIL: numpy reads it, with the channels last."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


class Images:
    """A data set with the interface of torchvision's, from an array (N, ...) of uint8."""

    def __init__(self, data, targets, transform=Picture, keeps=True):
        self.rows, self.labels, self.transform, self.reads = data, targets, transform, 0
        if keeps:
            self.data, self.targets = data, targets

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        self.reads += 1
        return self.transform(np.asarray(self.rows[i])), int(self.labels[i])


@pytest.fixture
def gray():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 4, 3), dtype=np.uint8))


@pytest.fixture
def labels():
    return torch.arange(40) % 7


def everything(data):
    """Return the rows and labels of all splits, in the order of the rows' numbers."""
    rows = torch.cat([data.train, data.validation, data.test])
    classes = torch.cat([data.labels.train, data.labels.validation, data.labels.test])
    return rows, classes


def test_splits_are_a_partition_with_labels(gray, labels):
    data = pv.datasets.from_torchvision(Images(gray, labels))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [28, 4, 8]
    assert data.image_shape == (4, 3)
    assert data.name == "images"
    rows, classes = everything(data)
    order = torch.from_numpy(np.random.RandomState(777).permutation(40))
    assert torch.equal(rows, gray[order].flatten(1).float() / 255)
    assert torch.equal(classes, labels[order])


def test_data_attribute_is_used_only_if_the_items_agree(gray, labels):
    stored, items = Images(gray, labels), Images(gray, labels, keeps=False)
    flipped = Images(gray, labels, transform=lambda image: Picture(image[::-1]))
    found = [pv.datasets.from_torchvision(source) for source in (stored, items, flipped)]
    assert stored.reads == 2
    assert items.reads == flipped.reads == 42
    assert torch.equal(found[0].train, found[1].train)
    images = found[0].train.unflatten(1, (4, 3))
    assert torch.equal(found[2].train, images.flip(1).flatten(1))
    assert torch.equal(found[0].labels.train, found[2].labels.train)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_color_images_have_their_channels_first(first, keeps, labels):
    data = np.random.default_rng(0).integers(0, 256, (40, 5, 4, 3), dtype=np.uint8)
    stored = np.moveaxis(data, -1, 1) if first else data
    transform = (lambda image: Picture(np.moveaxis(image, 0, -1))) if first else Picture
    found = pv.datasets.from_torchvision(Images(stored, labels.tolist(), transform, keeps))
    assert found.image_shape == (3, 5, 4)
    order = np.random.RandomState(777).permutation(40)[:28]
    wanted = torch.from_numpy(np.moveaxis(data, -1, 1)[order]).float() / 255
    assert torch.equal(found.train, wanted.flatten(1))


def test_own_test_images_tensors_and_binarization(gray, labels):
    def to_tensor(image):
        return torch.from_numpy(image).unsqueeze(0).float() / 255

    train, test = Images(gray[:30], labels[:30], to_tensor), Images(gray[30:], labels[30:])
    plain = pv.datasets.from_torchvision(train, test, num_validation=10)
    assert [len(part) for part in (plain.train, plain.validation, plain.test)] == [20, 10, 10]
    assert torch.equal(plain.test, gray[30:].flatten(1).float() / 255)
    assert torch.equal(plain.labels.test, labels[30:])
    labels_of_validation = pv.datasets.from_torchvision(train, test).labels.validation
    fixed = pv.datasets.from_torchvision(train, test, binarize="fixed")
    assert set(fixed.train.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(fixed.labels.validation, labels_of_validation)
    dynamic = pv.datasets.from_torchvision(train, test, binarize="dynamic")
    assert dynamic.transform is torch.bernoulli
    assert len(dynamic.train.unique()) > 2
    assert torch.equal(dynamic.test, fixed.test)


def test_items_without_integer_labels_have_none(gray):
    items = [(Picture(np.asarray(image)), {"box": 1}) for image in gray]
    assert pv.datasets.from_torchvision(items).labels is None
    assert pv.datasets.from_torchvision([(np.asarray(image),) for image in gray]).labels is None


def test_wrong_data_sets_are_refused(gray, labels):
    def changed(image):
        return [(torch.zeros(1, 4, 3), 0)] * 20 + [(image, 0)] + [(torch.zeros(1, 4, 3), 0)] * 20

    refused = [
        (changed(torch.zeros(1, 3, 3)), ValueError, r"train\[20\] must be an image of shape"),
        (changed(torch.full((1, 4, 3), 2.0)), ValueError, r"train\[20\] has values in \[2, 2\]"),
        (changed(torch.full((1, 4, 3), torch.nan)), ValueError, r"train\[20\] has values"),
        (changed("a string"), TypeError, r"train\[20\] must be an image"),
        (iter([]), TypeError, "train must be a data set with a length"),
        (7, TypeError, "train must be a data set with a length"),
        ([], TypeError, "train must be a data set with a length"),
        (changed(torch.zeros(1, 4, 3))[:2], ValueError, "train must have more than 2 images"),
    ]
    for source, kind, message in refused:
        with pytest.raises(kind, match=message):
            pv.datasets.from_torchvision(source)
    images = Images(gray, labels)
    with pytest.raises(ValueError, match="num_test must be None if test"):
        pv.datasets.from_torchvision(images, images, num_test=3)
    with pytest.raises(ValueError, match=r"test must have images of shape \(1, 4, 3\)"):
        pv.datasets.from_torchvision(images, Images(gray[:, :3], labels))
    with pytest.raises(ValueError, match='binarize must be "none", "fixed" or'):
        pv.datasets.from_torchvision(images, binarize="maybe")
    with pytest.raises(ValueError, match="num_validation must be at least 1"):
        pv.datasets.from_torchvision(images, num_validation=0)


def test_real_torchvision_data_set():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    fake = torchvision.datasets.FakeData(size=30, image_size=(3, 8, 6), num_classes=4)
    data = pv.datasets.from_torchvision(fake)
    assert data.image_shape == (3, 8, 6)
    assert data.train.shape == (21, 144)
    assert data.labels.train.max() < 4
