"""Data sets: disjoint, stratified, seeded splits; labels by class; refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from mpqlib import data

PARTS = ("train", "search", "test")


def paint(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 14), (200, 30, 90)).save(path)


def write_idx(path, array):
    """The idx format of (Fashion-)MNIST: type and dimensions, then the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = np.array(array.shape, ">i4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", image_size=24)


def test_items_are_normalised_images_with_labels(digits):
    for part in (digits.train, digits.calibration, digits.search, digits.test):
        image, label = part[3]
        assert image.shape == (3, 24, 24) and image.dtype == torch.float32
        assert type(image) is torch.Tensor and type(label) is int
        assert label == part.labels[3] and 0 <= label < len(digits.classes)
    black = -torch.tensor(data.IMAGENET_MEAN) / torch.tensor(data.IMAGENET_STD)
    assert torch.allclose(image.amin((1, 2)), black, atol=1e-6)


def test_digits_splits_are_disjoint_complete_and_stratified(digits):
    indices = [getattr(digits, part).indices for part in PARTS]
    assert sorted(np.concatenate(indices)) == list(range(1797))
    assert [len(i) for i in indices] == [1079, 359, 359]
    for part in PARTS:
        labels = getattr(digits, part).labels
        for stretch in (labels, labels[:100], labels[100:200]):
            assert np.ptp(np.bincount(stretch) / len(stretch)) < 0.05


def test_calibration_is_train_without_augmentation(digits):
    assert np.array_equal(digits.calibration.indices, digits.train.indices)
    assert torch.equal(digits.calibration[0][0], digits.calibration[0][0])
    shifted = torch.stack([digits.train[0][0] for _ in range(8)])
    assert len(shifted.unique(dim=0)) > 1


def test_seed_decides_the_splits(digits):
    same, other = data.load("digits", image_size=24), data.load("digits", seed=1)
    for part in PARTS:
        indices = getattr(digits, part).indices
        assert np.array_equal(indices, getattr(same, part).indices)
        assert not np.array_equal(indices, getattr(other, part).indices)


def test_cap_and_share_leave_the_other_splits_alone(digits):
    capped = data.load("digits", train_images=50)
    assert len(capped.train) == len(capped.calibration) == 50
    assert set(np.bincount(capped.train.labels)) <= {4, 5, 6}
    assert np.array_equal(capped.search.indices, digits.search.indices)
    assert np.array_equal(capped.test.indices, digits.test.indices)
    shared = data.load("digits", search_share=0.4)
    assert np.array_equal(shared.test.indices, digits.test.indices)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dict(name="mnist"), "name='mnist'.*'digits', 'fashion-mnist'"),
        (dict(image_size=0), "image_size=0 is not allowed"),
        (dict(search_share=1.0), r"search_share=1\.0 is not allowed"),
        (dict(search_share=0.9), r"search_share=0\.9 of 1797 images leaves"),
        (dict(train_images=0), "train_images=0 is not allowed"),
        (dict(crop_pct=0), "crop_pct=0 is not allowed"),
        (dict(interpolation="cubic"), "interpolation='cubic'.*'bicubic'"),
    ],
)
def test_refuses_what_is_not_allowed(value, message):
    with pytest.raises(ValueError, match=message):
        data.load(**{"name": "digits", **value})


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "pets"])
def test_missing_data_names_the_place_and_the_remedy(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/here.*download=True"):
        data.load(name, "here")


@pytest.mark.parametrize(("name", "missing"), [("imagenet", "here/train"), ("folder", "here")])
def test_missing_folders_name_the_layout(name, missing, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/{missing};.*<"):
        data.load(name, tmp_path / "here")


def test_grey_images_get_three_channels(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 50), ("t10k", 10)):
        raw = tmp_path / "FashionMNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    splits = data.load("fashion-mnist", tmp_path, 28, mean=(0, 0, 0), std=(1, 1, 1))
    assert [len(getattr(splits, part)) for part in PARTS] == [40, 10, 10]
    assert not set(splits.train.indices) & set(splits.search.indices)
    image, label = splits.test[7]
    stored = splits.test.source.images.data[7] / 255
    assert label == 7 and torch.allclose(image, stored.expand(3, 28, 28), atol=1e-6)


def test_pets_keep_their_official_test_images(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, count in (("trainval", 10), ("test", 4)):
        names = [f"{('Abyssinian', 'beagle')[i % 2]}_{split}{i}" for i in range(count)]
        rows = [f"{name} {i % 2 + 1} 1 1\n" for i, name in enumerate(names)]
        (base / "annotations" / f"{split}.txt").write_text("".join(rows))
        for name in names:
            paint(base / "images" / f"{name}.jpg")
    splits = data.load("pets", tmp_path, 8)
    assert splits.classes == ("Abyssinian", "Beagle")
    assert [len(getattr(splits, part)) for part in PARTS] == [8, 2, 4]
    assert list(splits.test.labels) == [0, 1, 0, 1]
    assert sorted(splits.search.labels) == [0, 1]
    assert splits.train[0][0].shape == splits.test[0][0].shape == (3, 8, 8)


@pytest.fixture
def imagenet(tmp_path):
    """Three of ImageNet's classes: labels 0, 1 and 999 of 1000."""
    for wnid in ("n01440764", "n01443537", "n15075141"):
        for i in range(5):
            paint(tmp_path / "train" / wnid / f"{i}.JPEG")
        paint(tmp_path / "val" / wnid / "0.JPEG")
    return tmp_path


def test_imagenet_labels_come_from_the_full_list(imagenet):
    splits = data.load("imagenet", imagenet, 8)
    assert len(splits.classes) == 1000
    assert list(splits.test.labels) == [0, 1, 999]
    assert set(splits.train.labels) == set(splits.search.labels) == {0, 1, 999}
    validation = data.imagenet_val(imagenet, 8)
    assert [validation[i][1] for i in range(3)] == [0, 1, 999]


def test_imagenet_refuses_unknown_folders_and_missing_training_images(imagenet):
    paint(imagenet / "val" / "n99999999" / "0.JPEG")
    with pytest.raises(ValueError, match="n99999999"):
        data.imagenet_val(imagenet)
    (imagenet / "train").rename(imagenet / "elsewhere")
    with pytest.raises(FileNotFoundError, match="imagenet_val"):
        data.load("imagenet", imagenet)


def test_evaluation_keeps_the_centre(tmp_path):
    image = np.zeros((40, 80, 3), np.uint8)
    image[5:35, 20:55] = 255
    folder = tmp_path / "val" / "n01440764"
    folder.mkdir(parents=True)
    Image.fromarray(image).save(folder / "0.png")
    plain = dict(mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest", crop_pct=0.75)
    (x, _), *_ = data.imagenet_val(tmp_path, 30, **plain)
    assert torch.equal(x, torch.tensor(image[5:35, 25:55]).permute(2, 0, 1) / 255)


def test_folder_layouts(tmp_path):
    for name in ("ant", "bee"):
        for i in range(10):
            paint(tmp_path / "train" / name / f"{i}.png")
    splits = data.load("folder", tmp_path / "train", 8)
    assert splits.classes == ("ant", "bee")
    assert [len(getattr(splits, part)) for part in PARTS] == [12, 4, 4]
    assert len(set(np.concatenate([getattr(splits, part).indices for part in PARTS]))) == 20

    paint(tmp_path / "val" / "bee" / "0.png")  # label 1, though the only class there
    splits = data.load("folder", tmp_path, 8)
    assert [len(getattr(splits, part)) for part in PARTS] == [16, 4, 1]
    assert splits.test[0][1] == 1
    paint(tmp_path / "val" / "cow" / "0.png")
    with pytest.raises(ValueError, match="cow"):
        data.load("folder", tmp_path)


def test_cifar_may_be_folders_of_images(tmp_path):
    for part, count in (("train", 10), ("test", 3)):
        for name in ("airplane", "bird"):
            for i in range(count):
                paint(tmp_path / part / name / f"{i}.png")
    splits = data.load("cifar10", tmp_path, 32)
    assert splits.classes == ("airplane", "bird")
    assert [len(getattr(splits, part)) for part in PARTS] == [16, 4, 6]
    folder = data.load("folder", tmp_path, 32)  # for photographs of any shape; CIFAR's are not
    assert repr(folder.train.transform) != repr(splits.train.transform)


def test_loader_shuffles_only_with_a_generator(digits):
    def batches(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return [labels for _, labels in data.loader(digits.search, 50, generator)]

    state = torch.get_rng_state()
    assert torch.equal(torch.cat(batches(None)), torch.tensor(digits.search.labels))
    assert torch.equal(torch.cat(batches(0)), torch.cat(batches(0)))
    assert not torch.equal(torch.cat(batches(0)), torch.cat(batches(1)))
    assert {len(batch) for batch in batches(0)} == {50}
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match=r"batch_size=400 .* 359"):
        data.loader(digits.search, 400, torch.Generator())
