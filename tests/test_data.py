"""Data sets: disjoint, stratified, seeded splits; images and labels read rightly; clear errors."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mpqlib import data

PARTS = ("train", "search", "test")


FASHION = tuple(data.datasets.FashionMNIST.classes)
SPELLED = [name.lower().replace(" ", "_").replace("/", "_") for name in FASHION]


def paint(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 14), (200, 30, 90)).save(path)


def paint_classes(root, names, count):
    """`count` images for each class, in `root/<name>`."""
    for name in names:
        for i in range(count):
            paint(root / name / f"{i}.png")


def write_idx(path, array):
    """The idx format of (Fashion-)MNIST: type and dimensions, then the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = np.array(array.shape, ">i4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes())


def write_fashion(root, labels):
    """Random images with these labels in torchvision's files, for training and for testing."""
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        raw = root / "FashionMNIST" / "raw"
        images = rng.integers(0, 256, (len(labels), 28, 28))
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.array(labels))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", image_size=24)


def read_again(name, *args, **how):
    """The same splits, but each image is read whenever it is asked for: they have `indices`."""
    return data.load(name, *args, **how, memory_gb=0)


@pytest.fixture(scope="module")
def read_digits():
    return read_again("digits", image_size=24)


def test_items_are_normalised_images_with_labels(digits):
    for part in (digits.train, digits.calibration, digits.search, digits.test):
        image, label = part[3]
        assert image.shape == (3, 24, 24) and image.dtype == torch.float32
        assert type(image) is torch.Tensor and type(label) is int
        assert label == part.labels[3] and 0 <= label < len(digits.classes)
    black = -torch.tensor(data.IMAGENET_MEAN) / torch.tensor(data.IMAGENET_STD)
    assert torch.allclose(image.amin((1, 2)), black, atol=1e-6)


def test_digits_splits_are_disjoint_complete_and_stratified(digits, read_digits):
    indices = [getattr(read_digits, part).indices for part in PARTS]
    assert sorted(np.concatenate(indices)) == list(range(1797))
    assert [len(i) for i in indices] == [1079, 359, 359]
    for part in PARTS:
        labels = getattr(digits, part).labels
        for stretch in (labels, labels[:100], labels[100:200]):
            assert np.ptp(np.bincount(stretch) / len(stretch)) < 0.05


def test_calibration_is_train_without_augmentation(digits, read_digits):
    assert np.array_equal(read_digits.calibration.indices, read_digits.train.indices)
    for splits in (digits, read_digits):
        assert torch.equal(splits.calibration.labels, splits.train.labels)
        assert torch.equal(splits.calibration[0][0], splits.calibration[0][0])
        shifted = torch.stack([splits.train[0][0] for _ in range(8)])
        assert len(shifted.unique(dim=0)) > 1


def test_seed_decides_the_splits(read_digits):
    same, other = read_again("digits", image_size=24), read_again("digits", seed=1)
    for part in PARTS:
        indices = getattr(read_digits, part).indices
        assert np.array_equal(indices, getattr(same, part).indices)
        assert not np.array_equal(indices, getattr(other, part).indices)


def test_images_held_out_for_searches_are_limited(read_digits, monkeypatch):
    monkeypatch.setattr(data, "SEARCH_LIMIT", 100)
    limited = read_again("digits", image_size=24)
    sizes = [len(getattr(limited, part)) for part in ("train", "search", "test")]
    assert sizes == [1338, 100, 359]
    assert np.array_equal(limited.search.indices, read_digits.search.indices[:100])


def test_cap_and_share_leave_the_other_splits_alone(read_digits):
    capped = read_again("digits", train_images=50)
    assert len(capped.train) == len(capped.calibration) == 50
    assert set(np.bincount(capped.train.labels)) <= {4, 5, 6}
    assert np.array_equal(capped.search.indices, read_digits.search.indices)
    assert np.array_equal(capped.test.indices, read_digits.test.indices)
    shared = read_again("digits", search_share=0.4)
    assert np.array_equal(shared.test.indices, read_digits.test.indices)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (dict(name="mnist"), "name='mnist'.*'digits', 'fashion-mnist'"),
        (dict(name=["digits"]), r"name=\['digits'\].*'digits', 'fashion-mnist'"),
        (dict(name=None), "name=None.*'digits', 'fashion-mnist'"),
        (dict(image_size=0), "image_size=0 is not allowed"),
        (dict(search_share=1.0), r"search_share=1\.0 is not allowed"),
        (dict(search_share=float("nan")), "search_share=nan is not allowed"),
        (dict(search_share=0.9), r"1797 images with search_share=0\.9.* empty.*'train': 0"),
        (dict(search_share=1e-9), "search_share=1e-09.* empty.*'search': 0"),
        (dict(seed=-1), "seed=-1 is not allowed"),
        (dict(train_images=0), "train_images=0 is not allowed"),
        (dict(train_images=-1), "train_images=-1 is not allowed"),
        (dict(train_images=9), "train_images=9 leave 9 to train on: at least 10"),
        (dict(memory_gb=-1), "memory_gb=-1 is not allowed: a number from 0"),
        (dict(memory_gb=float("nan")), "memory_gb=nan is not allowed"),
        (dict(crop_pct=0), "crop_pct=0 is not allowed"),
        (dict(mean=(0.5, 0.5)), r"mean=\(0\.5, 0\.5\) is not allowed: .*three numbers"),
        (dict(std=(1, 0, 1)), r"std=\(1, 0, 1\) is not allowed: .*above 0"),
        (dict(mean=(0, float("nan"), 0)), "mean=nan is not allowed: .*finite"),
        (dict(std=(1, 1, float("inf"))), "std=inf is not allowed: .*finite"),
        (dict(interpolation="cubic"), "interpolation='cubic'.*'bicubic'"),
    ],
)
def test_refuses_values_out_of_range(value, message):
    with pytest.raises(ValueError, match=message):
        data.load(**{"name": "digits", **value})


@pytest.mark.parametrize(
    "value",
    [
        dict(image_size="64"),
        dict(image_size=64.0),
        dict(image_size=True),
        dict(search_share="0.2"),
        dict(search_share=True),
        dict(seed="a"),
        dict(seed=None),
        dict(train_images=2.5),
        dict(train_images=True),
        dict(train_images="50"),
        dict(download="false"),
        dict(memory_gb="2"),
        dict(memory_gb=None),
        dict(crop_pct="1"),
        dict(mean=0.5),
        dict(std="111"),
        dict(interpolation=2),
    ],
    ids=repr,
)
def test_refuses_values_of_another_type(value):
    ((name, given),) = value.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={given!r} is not allowed: ")):
        data.load("digits", **value)


@pytest.mark.parametrize("root", [None, 3, ["a"]])
def test_refuses_a_root_that_is_no_path(root):
    for name in ("digits", "folder", "npz"):
        with pytest.raises(ValueError, match=re.escape(f"root={root!r} is not allowed: a folder")):
            data.load(name, root)
    with pytest.raises(ValueError, match=re.escape(f"root={root!r} is not allowed: a folder")):
        data.imagenet_val(root)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_mean_and_std_hold_numbers(name):
    with pytest.raises(ValueError, match=rf"{name}='0\.5' is not allowed: .*three numbers"):
        data.load("digits", **{name: (0.5, 0.5, "0.5")})


def test_numpy_numbers_are_numbers(read_digits):
    numbers = dict(image_size=np.int64(24), seed=np.int32(0), search_share=np.float64(0.2))
    splits = data.load("digits", **numbers, train_images=np.int64(50))
    assert torch.equal(splits.train.labels, read_digits.train.labels[:50])
    assert splits.train[0][0].shape == (3, 24, 24)
    assert len(next(iter(data.loader(splits.train, np.int64(8))))[1]) == 8


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
    write_fashion(tmp_path, [i % 10 for i in range(50)])
    splits = data.load("fashion-mnist", tmp_path, 28, mean=(0, 0, 0), std=(1, 1, 1))
    assert [len(getattr(splits, part)) for part in PARTS] == [40, 10, 50]
    files = read_again("fashion-mnist", tmp_path, 28)
    assert not set(files.train.indices) & set(files.search.indices)
    image, label = splits.test[7]
    stored = files.test.source.images.data[7] / 255
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
    damaged = base / "images" / "Abyssinian_test0.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{damaged} cannot be read"):
        splits.test[0]


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
    for part in (splits.train, splits.search):
        assert set(part.labels.tolist()) == {0, 1, 999}
    validation = data.imagenet_val(imagenet, 8)
    assert [validation[i][1] for i in range(3)] == [0, 1, 999]


@pytest.mark.parametrize("part", ["train", "val"])
def test_imagenet_refuses_folders_of_other_classes(part, imagenet):
    paint(imagenet / part / "n99999999" / "0.JPEG")
    refused = rf"{imagenet}/{part} has folders that are not classes: \['n99999999'\]; .*'n01440764'"
    with pytest.raises(ValueError, match=refused):
        data.load("imagenet", imagenet)
    if part == "val":
        with pytest.raises(ValueError, match=refused):
            data.imagenet_val(imagenet)


@pytest.mark.parametrize("part", ["train", "val"])
def test_imagenet_names_a_missing_folder_and_the_layout(part, imagenet):
    (imagenet / part).rename(imagenet / "elsewhere")
    missing = (
        rf"no folder {imagenet}/{part}; expected train/<wnid>/\* .*imagenet_val needs val alone"
    )
    with pytest.raises(FileNotFoundError, match=missing):
        data.load("imagenet", imagenet)
    if part == "val":
        with pytest.raises(FileNotFoundError, match=missing):
            data.imagenet_val(imagenet)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("file", [None, "readme.txt", "0.JPEG.part"])
def test_imagenet_names_a_class_folder_without_images(part, file, imagenet):
    folder = imagenet / part / "n01484850"
    folder.mkdir()
    if file:
        (folder / file).write_bytes(b"no image")
    with pytest.raises(FileNotFoundError, match=rf"{imagenet}/{part} must .*{folder.name}.*\.jpeg"):
        data.load("imagenet", imagenet)
    if part == "val":
        with pytest.raises(FileNotFoundError, match=rf"{imagenet}/val must .*n01484850.*\.jpeg"):
            data.imagenet_val(imagenet)


@pytest.mark.parametrize("content", [None, b"garbage", b""], ids=["truncated", "garbage", "empty"])
def test_damaged_file_of_imagenet_is_named_through_workers(content, imagenet):
    broken = imagenet / "val" / "n15075141" / "0.JPEG"
    broken.write_bytes(broken.read_bytes()[:300] if content is None else content)
    for images in (data.load("imagenet", imagenet, 8).test, data.imagenet_val(imagenet, 8)):
        with pytest.raises(ValueError, match=f"{broken} cannot be read as an image"):
            list(data.loader(images, 1, workers=2))


ONE_COLOUR = {
    "L.JPEG": ("L", ("grey", 90)),
    "CMYK.JPEG": ("CMYK", ("cmyk", 10, 200, 90, 40)),
    "RGB.JPEG": ("RGB", ("rgb", 200, 30, 90)),
    "LA.png": ("LA", ("alpha", 90, 128)),
    "RGBA.png": ("RGBA", ("alpha", 200, 30, 90, 128)),
    "P.png": ("P", ("rgb", 200, 30, 90)),
    "16.png": ("I;16", ("16", 40_000)),
    "float.tiff": ("F", ("float", 0.3)),
}


def test_imagenet_files_of_any_mode_are_read_through_workers(tmp_path):
    folder = tmp_path / "val" / "n01440764"
    folder.mkdir(parents=True)
    for name, (mode, (_, *values)) in ONE_COLOUR.items():
        image = Image.new(mode, (20, 14), tuple(values) if len(values) > 1 else values[0])
        image.save(folder / name, **(dict(quality=100) if name.endswith("JPEG") else {}))
    images = data.imagenet_val(tmp_path, 8, mean=(0, 0, 0), std=(1, 1, 1))
    expected = [naive(ONE_COLOUR[name][1]) for name in sorted(ONE_COLOUR)]
    read = torch.cat([x for x, _ in data.loader(images, 3, workers=2)])
    found = 255 * read.permute(0, 2, 3, 1).numpy()  # NCHW -> NHWC
    assert found.shape == (len(ONE_COLOUR), 8, 8, 3)
    assert np.abs(found - np.array(expected)[:, None, None]).max() <= 3  # JPEG's loss


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


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
@pytest.mark.parametrize("test", ["test", "Test", "val", "valid", "validation", "Val"])
def test_folders_of_the_parts_may_be_spelled_otherwise(train, test, tmp_path):
    paint_classes(tmp_path / train, ["ant", "bee"], 5)
    paint_classes(tmp_path / test, ["ant", "bee"], 2)
    splits = data.load("folder", tmp_path, 8)
    assert splits.classes == ("ant", "bee")
    assert [len(getattr(splits, part)) for part in PARTS] == [8, 2, 4]


def test_named_and_imagenet_folders_may_be_spelled_otherwise_too(tmp_path):
    paint_classes(tmp_path / "Train", SPELLED, 5)
    paint_classes(tmp_path / "Valid", SPELLED, 1)
    assert len(data.load("fashion-mnist", tmp_path, 28).test) == 10
    paint(tmp_path / "imagenet" / "Val" / "n01440764" / "0.JPEG")
    assert len(data.imagenet_val(tmp_path / "imagenet", 8)) == 1


@pytest.mark.parametrize(
    ("part", "names"), [("train", ("train", "Train")), ("val", ("val", "valid"))]
)
def test_two_folders_for_one_part_are_named(part, names, tmp_path):
    for folder in {"train", *names}:
        paint_classes(tmp_path / folder, ["ant", "bee"], 5)
    with pytest.raises(ValueError, match=rf"several folders for {part}/: .*{names[1]}"):
        data.load("folder", tmp_path)


@pytest.mark.parametrize("layout", ["", "train"])
def test_what_systems_leave_behind_is_no_class_and_no_image(layout, tmp_path):
    root = tmp_path / layout
    paint_classes(root, ["ant", "bee", "__MACOSX", ".ipynb_checkpoints"], 10)
    paint(root / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png")
    paint(root / "__MACOSX" / "ant" / "._0.png")
    (root / "ant" / "._0.png").write_bytes(b"of a Macintosh")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (root / "bee" / name).write_bytes(b"")
    paint(tmp_path / "__MACOSX" / "0.png")
    splits = data.load("folder", tmp_path, 8)
    assert splits.classes == ("ant", "bee")
    assert sum(len(getattr(splits, part)) for part in PARTS) == 20


def test_a_folder_of_hidden_folders_alone_holds_no_classes(tmp_path):
    paint_classes(tmp_path, ["__MACOSX"], 3)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} must hold .*no class folder"):
        data.load("folder", tmp_path)


@pytest.mark.parametrize(
    "suffix", ["gif", "jfif", "jpe", "GIF", "tga", "jp2", "dib", "apng", "pnm"]
)
def test_files_of_other_image_types_are_read(suffix, tmp_path):
    paint_classes(tmp_path, ["ant", "bee"], 5)
    for i in range(3):
        kind = {"jfif": "JPEG", "jpe": "JPEG", "apng": "PNG", "pnm": "PPM", "jp2": "JPEG2000"}
        path = tmp_path / "ant" / f"other{i}.{suffix}"
        Image.new("RGB", (20, 14), (200, 30, 90)).save(path, kind.get(suffix, suffix.upper()))
    splits = data.load("folder", tmp_path, 8)
    images = [
        part[i]
        for part in (splits.calibration, splits.search, splits.test)
        for i in range(len(part))
    ]
    assert [label for _, label in images].count(0) == 8
    for image, _ in images:
        torch.testing.assert_close(image, splits.test[0][0], rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["train/ant/0.heic", "train/ant/notes.txt", "train/0.png"])
def test_files_that_are_not_read_are_named(name, tmp_path):
    paint_classes(tmp_path / "train", ["ant", "bee"], 10)
    paint(tmp_path / "other.png")
    (tmp_path / "other.png").rename(tmp_path / name)
    with pytest.warns(
        UserWarning, match=f"1 files in {tmp_path}/train are not read, such as .*{name}"
    ):
        splits = data.load("folder", tmp_path, 8)
    assert sum(len(getattr(splits, part)) for part in PARTS) == 20


def test_folders_beside_those_that_are_read_are_named(tmp_path):
    paint_classes(tmp_path / "train", ["ant", "bee"], 10)
    paint_classes(tmp_path / "holdout", ["ant", "bee"], 2)
    with pytest.warns(UserWarning, match=r"taken out of .*/train: .*\['holdout'\] are not read"):
        splits = data.load("folder", tmp_path, 8)
    assert [len(getattr(splits, part)) for part in PARTS] == [12, 4, 4]


@pytest.mark.parametrize(("name", "classes"), [("cifar10", data.CIFAR10), ("pets", data.PETS)])
def test_named_data_set_in_folders(name, classes, tmp_path):
    paint_classes(tmp_path / "train", classes, 5)
    paint_classes(tmp_path / "test", classes, 1)
    splits = data.load(name, tmp_path, 32)
    assert splits.classes == classes
    assert [len(getattr(splits, part)) for part in PARTS] == [n * len(classes) for n in (4, 1, 1)]
    assert list(splits.test.labels) == list(range(len(classes)))
    folder = data.load("folder", tmp_path, 32)  # for photographs of any shape; CIFAR's are not
    images = read_again(name, tmp_path, 32)
    same = repr(folder.train.transform) == repr(images.train.transform)
    assert same == (name == "pets")


def test_labels_of_a_named_data_set_follow_its_own_order(tmp_path):
    paint_classes(tmp_path / "train", SPELLED, 5)
    paint_classes(tmp_path / "val", SPELLED, 1)
    splits = read_again("fashion-mnist", tmp_path, 28)
    assert splits.classes == FASHION
    for part in (splits.train, splits.search, splits.test):
        for i, label in enumerate(part.labels):
            path, _ = part.source.images.samples[part.indices[i]]
            assert f"/{SPELLED[label]}/" in path


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "pets"])
@pytest.mark.parametrize("found", [["ant", "bee"], [str(i) for i in range(10)]])
def test_other_images_do_not_pass_for_a_named_data_set(name, found, tmp_path):
    paint_classes(tmp_path / "train", found, 2)
    paint_classes(tmp_path / "test", found, 1)
    with pytest.raises(ValueError, match=r'does not hold.*expected.*"folder"') as error:
        data.load(name, tmp_path)
    expected = {"cifar10": "airplane", "cifar100": "aquarium_fish", "pets": "Abyssinian"}
    for text in (str(tmp_path / "train"), found[0], expected.get(name, "Ankle boot")):
        assert text in str(error.value)


def test_named_data_set_must_be_complete_and_unambiguous(tmp_path):
    train, test = tmp_path / "train", tmp_path / "test"
    paint_classes(train, SPELLED, 5)
    with pytest.raises(FileNotFoundError, match=f"{test}; expected .*test/<class>"):
        data.load("fashion-mnist", tmp_path)
    paint_classes(test, SPELLED[1:], 1)
    with pytest.raises(ValueError, match=rf"{test} .*\['T-shirt/top'\] are missing"):
        data.load("fashion-mnist", tmp_path)
    paint_classes(test, SPELLED, 1)
    paint(train / "Ankle boot" / "0.png")  # beside ankle_boot
    with pytest.raises(ValueError, match=f"{train} .* 11 folders"):
        data.load("fashion-mnist", tmp_path)


def test_own_files_come_before_folders_of_other_images(tmp_path):
    paint_classes(tmp_path / "train", ["ant", "bee"], 2)
    write_fashion(tmp_path, [i % 10 for i in range(50)])
    assert data.load("fashion-mnist", tmp_path, 28).classes == FASHION


def test_label_outside_the_classes_is_named(tmp_path):
    write_fashion(tmp_path, [i % 11 for i in range(55)])
    with pytest.raises(ValueError, match=rf"FashionMNIST in {tmp_path}.*\[10\] are outside 0\.\.9"):
        data.load("fashion-mnist", tmp_path)


def test_every_image_needs_a_label(tmp_path):
    write_fashion(tmp_path, [i % 10 for i in range(50)])
    labels = tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(labels, np.arange(40) % 10)
    with pytest.raises(ValueError, match="50 images, 40 labels"):
        data.load("fashion-mnist", tmp_path)


def test_download_out_of_reach(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise data.URLError("no network")

    monkeypatch.setattr(data.datasets.CIFAR10, "download", offline)
    with pytest.raises(FileNotFoundError, match=f"CIFAR10 is not in {tmp_path}.*no network"):
        data.load("cifar10", tmp_path, download=True)


def test_empty_class_folder_is_named(tmp_path):
    paint_classes(tmp_path, ["ant", "bee"], 5)
    (tmp_path / "cow").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} .*cow"):
        data.load("folder", tmp_path)


def test_one_class_is_refused(tmp_path):
    paint_classes(tmp_path, ["ant"], 10)
    with pytest.raises(ValueError, match="all 10 images are of class 'ant'"):
        data.load("folder", tmp_path)


def test_classes_of_one_image(tmp_path):
    paint_classes(tmp_path, ["ant", "bee"], 10)
    paint(tmp_path / "cow" / "0.png")
    splits = data.load("folder", tmp_path)
    assert list(splits.train.labels).count(2) == 1
    with pytest.warns(UserWarning, match=r"search_share=0\.5.* no image to train on .*\['cow'\]"):
        data.load("folder", tmp_path, search_share=0.5)


def test_any_stretch_holds_the_classes_in_proportion():
    rng = np.random.default_rng(0)
    for seed in range(20):
        labels = rng.permutation(np.repeat(np.arange(6), rng.integers(1, 60, 6)))
        order = data._stratified_order(labels, seed)
        assert sorted(order) == list(range(len(labels)))
        start, stop = np.sort(rng.integers(0, len(labels) + 1, 2))
        share = np.bincount(labels) / len(labels)
        counts = np.bincount(labels[order][start:stop], minlength=6)
        # The stretch spans a part of every class, to within one image; its length sums six of them.
        assert (np.abs(counts - share * (stop - start)) <= 1 + 6 * share).all()


def naive(pixel):
    """8-bit RGB of one pixel of any mode, by the definition of the mode."""
    kind, *values = pixel
    if kind in ("grey", "rgb"):
        return (values * 3)[:3]
    if kind == "1":
        return [255 * values[0]] * 3
    if kind == "16":
        return [values[0] / 65535 * 255] * 3
    if kind == "float":
        return [values[0] * 255] * 3
    if kind == "cmyk":
        return [(255 - ink) * (255 - values[3]) / 255 for ink in values[:3]]
    *colour, alpha = values  # on white
    return [(alpha * value + (255 - alpha) * 255) / 255 for value in (colour * 3)[:3]]


BYTES = np.random.default_rng(0).integers(0, 256, (7, 5, 4)).astype(np.uint8)
WORDS = np.random.default_rng(1).integers(0, 65536, (7, 5)).astype(np.uint16)
UNITS = np.random.default_rng(2).random((7, 5)).astype(np.float32)
ALPHA = np.stack([BYTES[..., 0], BYTES[..., 1]], -1)
PALETTE = [tuple(int(v) for v in row) for row in BYTES.reshape(-1, 4)]


def indexed(opacity):
    """A palette image whose 35 pixels use 35 colours; `opacity` as PNG stores it."""
    image = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(7, 5)).convert("P")
    image.putpalette([v for row in PALETTE for v in row[:3]])
    if opacity is not None:
        image.info["transparency"] = opacity
    return image


def pixels(kind, array):
    return [(kind, *np.atleast_1d(value).tolist()) for value in array.reshape(35, -1)]


MODES = {
    "1.png": (Image.fromarray(BYTES[..., 0] > 127), pixels("1", BYTES[..., 0] > 127)),
    "L.png": (Image.fromarray(BYTES[..., 0]), pixels("grey", BYTES[..., 0])),
    "LA.png": (Image.fromarray(ALPHA), pixels("alpha", ALPHA)),
    "RGB.png": (Image.fromarray(BYTES[..., :3]), pixels("rgb", BYTES[..., :3])),
    "RGBA.png": (Image.fromarray(BYTES), pixels("alpha", BYTES)),
    "RGBA.webp": (Image.fromarray(BYTES), pixels("alpha", BYTES)),
    "RGBA.tiff": (Image.fromarray(BYTES), pixels("alpha", BYTES)),
    "P.png": (indexed(None), [("rgb", *row[:3]) for row in PALETTE]),
    "P-alpha.png": (
        indexed(bytes(row[3] for row in PALETTE)),
        [("alpha", *row) for row in PALETTE],
    ),
    "P-one.png": (
        indexed(4),
        [("alpha", *row[:3], 0 if i == 4 else 255) for i, row in enumerate(PALETTE)],
    ),
    "CMYK.tiff": (
        Image.frombytes("CMYK", (5, 7), BYTES.tobytes()),
        pixels("cmyk", BYTES),
    ),
    "16.png": (Image.fromarray(WORDS), pixels("16", WORDS)),
    "16.tiff": (Image.fromarray(WORDS), pixels("16", WORDS)),
    "16.pgm": (Image.fromarray(WORDS), pixels("16", WORDS)),
    "16-big-endian.tiff": (Image.fromarray(WORDS.astype(">u2")), pixels("16", WORDS)),
    "float.tiff": (Image.fromarray(UNITS), pixels("float", UNITS)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_read_rightly(name, tmp_path):
    image, expected = MODES[name]
    path = tmp_path / name
    image.save(path, **(dict(lossless=True, exact=True) if name.endswith("webp") else {}))
    read = data.read_image(path)
    assert read.mode == "RGB" and read.size == (5, 7)
    found = np.asarray(read, np.float64).reshape(35, 3)
    assert np.abs(found - [naive(pixel) for pixel in expected]).max() <= 1  # rounding


def test_cmyk_jpeg_is_read_rightly(tmp_path):
    ink = np.full((16, 16, 4), (10, 200, 90, 40), np.uint8)
    Image.frombytes("CMYK", (16, 16), ink.tobytes()).save(tmp_path / "a.jpg", quality=100)
    found = np.asarray(data.read_image(tmp_path / "a.jpg"), np.float64)
    assert np.abs(found - naive(("cmyk", 10, 200, 90, 40))).max() <= 3  # JPEG's loss


def write_tiff(path, bits, samples, white_is_zero):
    """A grey TIFF with one row of `samples`, whose bytes are given."""
    count = len(samples) * 8 // bits
    tags = {256: count, 257: 1, 258: bits, 259: 1, 262: int(not white_is_zero)}
    tags |= {273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: 1, 279: len(samples)}
    entries = b"".join(
        np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes()
        for tag, value in tags.items()
    )
    header = b"II*\0" + np.array([8], "<u4").tobytes() + np.array([9], "<u2").tobytes()
    path.write_bytes(header + entries + bytes(4) + samples)


@pytest.mark.parametrize("white_is_zero", [False, True])
def test_tiff_of_16_bits_may_store_white_as_zero(white_is_zero, tmp_path):
    write_tiff(tmp_path / "a.tiff", 16, np.array([0, 257, 65535], "<u2").tobytes(), white_is_zero)
    grey = np.asarray(data.read_image(tmp_path / "a.tiff"))[0, :, 0]
    assert list(grey) == ([255, 254, 0] if white_is_zero else [0, 1, 255])


def test_tiff_of_12_bits(tmp_path):
    write_tiff(tmp_path / "a.tiff", 12, bytes([0x40, 0x0F, 0xFF]), False)  # 0x400, 0xfff
    assert list(np.asarray(data.read_image(tmp_path / "a.tiff"))[0, :, 0]) == [64, 255]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4), 1.5, np.float32), "from 1.5 to 1.5"),
        (np.full((4, 4), -0.5, np.float32), "from -0.5 to -0.5"),
        (np.full((4, 4), np.nan, np.float32), "nan"),
        (np.arange(16, dtype=np.int32).reshape(4, 4), "range .* unknown"),
    ],
)
def test_images_of_unknown_range_are_refused(array, message, tmp_path):
    for name in ("ant", "bee"):
        for i in range(5):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{i}.tiff")
    splits = data.load("folder", tmp_path)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/(ant|bee)/\d.tiff cannot be read.*{message}"
    ):
        splits.test[0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp", "bmp", "ppm"])
def test_truncated_images_are_named(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(BYTES.repeat(9, 0).repeat(9, 1)[..., :3]).save(path)
    whole = path.read_bytes()
    for kept in (0, 3, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=f"{path} cannot be read as an image"):
            data.read_image(path)


def test_image_of_absurd_size_is_named(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 60000 60000 255 ")
    with pytest.raises(ValueError, match=f"{path} cannot be read.*3600000000 pixels"):
        data.read_image(path)


def test_damaged_file_is_named_through_workers(tmp_path):
    paint_classes(tmp_path, ["ant", "bee"], 10)
    splits = data.load("folder", tmp_path, 8)
    broken, _ = splits.test.source.images.samples[splits.test.indices[1]]
    with open(broken, "r+b") as file:
        file.truncate(60)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=f"{broken} cannot be read as an image"):
            list(data.loader(splits.test, 2, workers=workers))


def test_loader_shuffles_only_with_a_generator(digits):
    def batches(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return [labels for _, labels in data.loader(digits.search, 50, generator)]

    state = torch.get_rng_state()
    assert torch.equal(torch.cat(batches(None)), digits.search.labels)
    assert torch.equal(torch.cat(batches(0)), torch.cat(batches(0)))
    assert not torch.equal(torch.cat(batches(0)), torch.cat(batches(1)))
    assert {len(batch) for batch in batches(0)} == {50}
    assert torch.equal(state, torch.get_rng_state())


def test_drawn_images_are_of_all_classes_and_always_the_same(digits):
    ordered = sorted(range(len(digits.test)), key=lambda i: digits.test.labels[i])
    drawn = data.draw(ordered, 100)
    assert drawn == data.draw(ordered, 100) and len(set(drawn)) == 100
    assert {int(digits.test.labels[ordered[i]]) for i in drawn} == set(range(10))
    assert sorted(data.draw(ordered, 10**6)) == list(range(len(ordered)))
    with pytest.raises(ValueError, match="count=-1 is not allowed: a whole number from 0"):
        data.draw(ordered, -1)


def test_loader_refuses_batches_that_do_not_fit(digits):
    with pytest.raises(ValueError, match=r"batch_size=400 is not allowed: at most 359"):
        data.loader(digits.search, 400, torch.Generator())
    assert len(next(iter(data.loader(digits.search, 400)))[1]) == 359
    with pytest.raises(ValueError, match="batch_size=0 is not allowed: a whole number from 1"):
        data.loader(digits.search, 0)
    for value in ("64", 64.0, True):
        with pytest.raises(ValueError, match=f"batch_size={value!r} is not allowed"):
            data.loader(digits.search, value)
        with pytest.raises(ValueError, match=f"workers={value!r} is not allowed"):
            data.loader(digits.search, 64, workers=value)
    with pytest.raises(ValueError, match="workers=-1 is not allowed: a whole number from 0"):
        data.loader(digits.search, 64, workers=-1)


def jpegs(count, seed):
    """The arrays of one part of a .npz file: `count` random JPEG files of two classes."""
    rng, files = np.random.default_rng(seed), []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    return {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.arange(count) % 2,
    }


def write_npz(path, **changed):
    """40 images to train on and 6 to test on; `changed` replaces arrays, or drops them if None."""
    arrays = {"classes": np.array(["cat", "dog"])}
    for part, count in (("train", 40), ("test", 6)):
        arrays |= {f"{part}_{name}": array for name, array in jpegs(count, seed=count).items()}
    arrays |= changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return arrays


def test_one_npz_file_holds_a_data_set(tmp_path):
    arrays = write_npz(tmp_path / "pets.npz")
    splits = data.load("npz", tmp_path / "pets.npz", image_size=8)
    assert splits.classes == ("cat", "dog")
    assert [len(getattr(splits, part)) for part in PARTS] == [32, 8, 6]
    files = read_again("npz", tmp_path / "pets.npz", image_size=8)
    used = np.concatenate([files.train.indices, files.search.indices])
    assert sorted(used) == list(range(40))
    start, end = arrays["test_offsets"][3:5]
    file = io.BytesIO(arrays["test_jpeg"][start:end].tobytes())
    pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    image, label = splits.test[3]
    assert torch.allclose(image, (pixels - mean) / std, atol=1e-5) and label == 1


class Payload:
    """An object that would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("train_jpeg", None),
        ("test_labels", None),
        ("classes", None),
        ("train_jpeg", np.zeros(9, np.float32)),
        ("train_offsets", np.arange(41)),
        ("train_offsets", np.zeros(1, int)),
        ("test_labels", np.array([0, 1, 2, 0, 1, 0])),
        ("test_labels", np.array([0, 1, -1, 0, 1, 0])),
        ("test_labels", np.zeros(5, int)),
        ("test_labels", np.zeros(6)),
        ("classes", np.array([1, 2])),
        ("classes", np.array(["cat", "cat"])),
    ],
)
def test_npz_file_that_does_not_fit_is_refused(name, array, tmp_path):
    write_npz(tmp_path / "a.npz", **{name: array})
    with pytest.raises(ValueError, match=rf"a\.npz.*{name}"):
        data.load("npz", tmp_path / "a.npz")


def test_npz_file_never_runs_code(tmp_path):
    evil = np.array([Payload(tmp_path / "ran")], dtype=object)
    write_npz(tmp_path / "a.npz", classes=evil)
    with pytest.raises(ValueError, match=r"a\.npz is not a \.npz file"):
        data.load("npz", tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def test_missing_and_other_files_are_no_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*root is a \.npz file"):
        data.load("npz", tmp_path / "missing.npz")
    for name, content in (
        ("empty.npz", b""),
        ("text.npz", b"hello"),
        ("zip.npz", b"PK\3\4 broken"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not a \.npz file"):
            data.load("npz", tmp_path / name)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"array\.npy is not a \.npz file"):
        data.load("npz", tmp_path / "array.npy")


def test_damaged_image_of_an_npz_file_is_named(tmp_path):
    arrays = write_npz(tmp_path / "a.npz")
    broken = arrays["test_jpeg"].copy()
    broken[arrays["test_offsets"][2] :] = 0
    write_npz(tmp_path / "a.npz", test_jpeg=broken)
    named = pytest.raises(ValueError, match=r"image 2 of .*a\.npz cannot be read")
    with named:
        data.load("npz", tmp_path / "a.npz")
    test = read_again("npz", tmp_path / "a.npz").test
    with named:
        test[2]


def write_one(path, image, kind):
    """A .npz file whose only test image is `image`, a file of this kind."""
    image.save(file := io.BytesIO(), kind, quality=100)
    array = np.frombuffer(file.getvalue(), np.uint8)
    only = dict(jpeg=array, offsets=np.array([0, len(array)]), labels=np.array([1]))
    write_npz(path, **{f"test_{name}": value for name, value in only.items()})


@pytest.mark.parametrize("name", ["L.JPEG", "CMYK.JPEG", "RGB.JPEG"])
def test_every_mode_of_jpeg_in_an_npz_file_is_read_rightly(name, tmp_path):
    mode, pixel = ONE_COLOUR[name]
    colour = pixel[1:] if len(pixel) > 2 else pixel[1]
    write_one(tmp_path / "a.npz", Image.new(mode, (8, 8), colour), "JPEG")
    for get in (data.load, read_again):
        image, _ = get("npz", tmp_path / "a.npz", 8, **BLACK_IS_0).test[0]
        assert (255 * image.permute(1, 2, 0) - torch.tensor(naive(pixel))).abs().max() <= 3


@pytest.mark.parametrize("mode", ["P", "I;16", "RGBA"])
def test_other_files_than_jpeg_in_an_npz_file_are_named(mode, tmp_path):
    write_one(tmp_path / "a.npz", Image.new(mode, (8, 8)), "PNG")
    named = pytest.raises(ValueError, match=r"image 0 of .*a\.npz cannot be read")
    with named:
        data.load("npz", tmp_path / "a.npz")
    with named:
        list(data.loader(read_again("npz", tmp_path / "a.npz").test, 1, workers=2))


BLACK_IS_0 = dict(mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize(("name", "size"), [("digits", 24), ("npz", 8), ("npz", 13), ("npz", 5)])
def test_images_in_memory_are_those_of_the_files(name, size, tmp_path):
    write_npz(tmp_path / "a.npz")
    kept, files = (get(name, tmp_path / "a.npz", size) for get in (data.load, read_again))
    assert kept.classes == files.classes
    mean, std = (np.array(v)[:, None, None] for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    for part in ("calibration", "search", "test"):
        own, images = getattr(files, part), getattr(kept, part)
        assert len(images) == len(own) and torch.equal(images.labels, own.labels)
        for i in (0, 3, len(own) - 1):
            picture = own.source.images[own.indices[i]][0].convert("RGB")
            pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)) / 255
            expected = torch.tensor((pixels.transpose(2, 0, 1) - mean) / std).float()
            for image, label in (images[i], own[i]):
                torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
                assert label == own.labels[i]
        x, y = images[:6]
        assert torch.equal(x[3], images[3][0]) and torch.equal(y, own.labels[:6])


@pytest.mark.parametrize("name", ["digits", "npz"])
@pytest.mark.parametrize("get", [data.load, read_again])
def test_training_images_are_random_crops_of_the_calibration_images(get, name, tmp_path):
    write_npz(tmp_path / "a.npz")
    splits = get(name, tmp_path / "a.npz", 8, **BLACK_IS_0)
    torch.manual_seed(0)
    seen = {tuple(splits.train[2][0].flatten().tolist()) for _ in range(300)}
    flip = name != "digits"  # a mirrored digit is another sign
    possible = possible_crops(splits.calibration[2][0], 1, flip)
    assert seen == {tuple(crop.flatten().tolist()) for crop in possible}


def test_no_image_is_in_memory_twice(tmp_path):
    write_npz(tmp_path / "a.npz")
    load = lambda **how: data.load("npz", tmp_path / "a.npz", 8, **how)  # noqa: E731
    for splits in (load(), load().to("cpu"), load().to("meta")):
        assert splits.calibration.images is splits.train.images
        assert splits.calibration.labels is splits.train.labels
        for part in PARTS:
            images = getattr(splits, part).images
            assert images.untyped_storage().nbytes() == 3 * 8 * 8 * len(images)
    assert {getattr(splits, part).images.device.type for part in PARTS} == {"meta"}
    assert splits.train.padding == 1 and splits.train.flip
    assert splits.calibration.padding == 0 and not splits.calibration.flip


def test_a_part_of_each_image_can_be_shown_in_evaluation(tmp_path):
    write_npz(tmp_path / "a.npz")
    how = dict(image_size=8, crop_pct=0.5, **BLACK_IS_0)
    kept, files = (get("npz", tmp_path / "a.npz", **how) for get in (data.load, read_again))
    for part in ("calibration", "search", "test"):
        for i in range(3):
            assert torch.allclose(getattr(kept, part)[i][0], getattr(files, part)[i][0], atol=1e-6)
    assert not torch.equal(kept.calibration.images, kept.train.images)
    moved = kept.to("meta")
    assert moved.calibration.images.device.type == "meta" and moved.calibration.padding == 0


def test_images_that_are_not_square_are_shown_whole(tmp_path):
    paint_classes(tmp_path / "train", data.CIFAR10, 5)
    paint_classes(tmp_path / "test", data.CIFAR10, 1)
    half = np.full((8, 16, 3), 255, np.uint8)
    half[:, 8:] = 0
    Image.fromarray(half).save(tmp_path / "test" / "airplane" / "0.png")
    for get in (data.load, read_again):
        image, _ = get("cifar10", tmp_path, 8, interpolation="nearest", **BLACK_IS_0).test[0]
        assert image[:, :, :4].eq(1).all() and image[:, :, 4:].eq(0).all()


def test_images_stay_in_memory_if_they_fit(tmp_path):
    write_npz(tmp_path / "a.npz")
    size = 3 * 8 * 8 * (32 + 8 + 6)
    for memory, kind in ((size, data.InMemory), (size - 1, data.Images), (0, data.Images)):
        splits = data.load("npz", tmp_path / "a.npz", 8, memory_gb=memory / 1e9)
        assert {type(getattr(splits, part)) for part in PARTS} == {kind}
    assert splits.to("meta") == splits  # files have no device


def possible_crops(image, padding, flip):
    """All images that augmentation can make of `image` (3, H, W), from padding with zeros."""
    _, height, width = image.shape
    padded = torch.zeros(3, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    crops = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return crops + [crop.flip(2) for crop in crops if flip]


@pytest.mark.parametrize("flip", [False, True])
def test_batches_in_memory_are_random_crops(flip):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 5, 6), dtype=torch.uint8, generator=generator)
    labels, mean, std = torch.tensor([4, 5, 6]), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    dataset = data.InMemory(images, labels, mean, std, padding=2, flip=flip)
    possible = [[crop.tolist() for crop in possible_crops(image, 2, flip)] for image in images]
    indices, seen = [2, 0, 1] * 300, set()
    torch.manual_seed(0)
    x, y = dataset.batch(indices)
    assert y.tolist() == labels[indices].tolist() and x.dtype == torch.float32
    pixels = x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pixels = (pixels * 255).round().to(torch.uint8)
    for index, image in zip(indices, pixels.tolist(), strict=True):
        seen.add((index, possible[index].index(image)))  # raises an error for any other image
    # Each of the crops comes, some of 300 draws among 25 or 50
    assert len(seen) == 3 * 25 * (2 if flip else 1)


def test_augmentation_in_memory_draws_from_the_global_generator():
    images = torch.randint(256, (8, 3, 6, 6), dtype=torch.uint8)
    dataset = data.InMemory(images, torch.arange(8), (0, 0, 0), (1, 1, 1), padding=3, flip=True)
    torch.manual_seed(3)
    first, other = dataset.batch(range(8))[0], dataset.batch(range(8))[0]
    torch.manual_seed(3)
    assert torch.equal(dataset.batch(range(8))[0], first) and not torch.equal(first, other)
    floats = replace(dataset, images=images / 255)
    torch.manual_seed(3)
    assert torch.allclose(floats.batch(range(8))[0], first)


def test_loader_reads_batches_from_memory():
    images = torch.randint(256, (10, 3, 6, 6), dtype=torch.uint8)
    dataset = data.InMemory(images, torch.arange(10), (0, 0, 0), (1, 1, 1))
    batches = list(DataLoader(dataset, 4))
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.allclose(torch.cat([x for x, _ in batches]), images / 255)


def test_photographs_stay_in_their_files(tmp_path):
    paint_classes(tmp_path, ("a", "b"), 10)
    splits = data.load("folder", tmp_path, image_size=8)
    assert {type(getattr(splits, part)) for part in PARTS} == {data.Images}


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(4, 3, 8, 8, dtype=torch.int64), torch.zeros(4).long()),
        (torch.zeros(4, 1, 8, 8), torch.zeros(4).long()),
        (torch.zeros(3, 8, 8), torch.zeros(3).long()),
        (torch.zeros(4, 3, 8, 8), torch.zeros(3).long()),
        (torch.zeros(4, 3, 8, 8), torch.zeros(4)),
        (torch.zeros(4, 3, 8, 8), torch.zeros(4, device="meta").long()),
    ],
)
def test_images_and_labels_in_memory_must_fit(images, labels):
    with pytest.raises(ValueError, match=r"images of shape|labels of shape"):
        data.InMemory(images, labels, (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    "value",
    [
        dict(mean=(0, 0)),
        dict(mean=(0, 0, float("nan"))),
        dict(mean=("0", 0, 0)),
        dict(mean=torch.zeros(3)),
        dict(std=(1, 1, 0)),
        dict(std=1),
        dict(padding=-1),
        dict(padding=1.0),
        dict(flip=1),
    ],
    ids=repr,
)
def test_images_in_memory_refuse_settings_that_are_not_allowed(value):
    images, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4).long()
    ((name, _),) = value.items()
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed"):
        data.InMemory(images, labels, **(dict(mean=(0, 0, 0), std=(1, 1, 1)) | value))


def test_indices_outside_the_images_are_refused():
    images = torch.zeros(4, 3, 8, 8)
    dataset = data.InMemory(images, torch.arange(4), (0, 0, 0), (1, 1, 1))
    assert dataset[-1][1] == 3 and [y for _, y in dataset] == [0, 1, 2, 3]
    for right, wrong in ([0], 4), ([0, 1], -5), ([], 9):
        with pytest.raises(IndexError, match=rf"no images \[{wrong}\]: there are 4"):
            dataset.batch([*right, wrong])
    x, y = dataset.batch([])
    assert x.shape == (0, 3, 8, 8) and y.shape == (0,)


def pairs_of(dataset):
    """All items as (pixels, label)."""
    return [(image.flatten().tolist(), label) for image, label in dataset]


def check_selected(splits, names):
    """Compares `select_classes` with a plain loop over all items."""
    selected = data.select_classes(splits, names)
    assert selected.classes == tuple(names)
    for part in ("calibration", "search", "test"):
        items = pairs_of(getattr(splits, part))
        expected = [
            (image, names.index(splits.classes[label]))
            for image, label in items
            if splits.classes[label] in names
        ]
        found = getattr(selected, part)
        assert pairs_of(found) == expected
        assert found.labels.tolist() == [label for _, label in expected]
    assert torch.equal(selected.train.labels, selected.calibration.labels)
    return selected


@pytest.mark.parametrize("names", [["7", "2", "5"], ["0", "9"], list("9876543210")])
@pytest.mark.parametrize("get", [data.load, read_again])
def test_selected_classes_are_those_of_a_plain_loop(get, names):
    splits = get("digits", image_size=4)
    selected = check_selected(splits, names)
    for part in PARTS:  # the first images, too, are stratified
        labels = getattr(selected, part).labels
        for stretch in (labels, labels[: 10 * len(names)]):
            assert np.ptp(np.bincount(stretch) / len(stretch)) < 0.1


def test_classes_of_folders_are_selected(tmp_path):
    for part in ("train", "test"):
        paint_classes(tmp_path / part, ["ant", "bee", "cow"], 10)
    splits = data.load("folder", tmp_path, 8)
    selected = check_selected(splits, ["cow", "ant"])
    assert len(selected.test) == 20 and not isinstance(selected.test, data.InMemory)
    again = data.select_classes(selected, ["ant", "cow"])
    assert pairs_of(again.test) == [(image, 1 - label) for image, label in pairs_of(selected.test)]


def test_selected_classes_are_in_memory_once_and_augmented(digits):
    selected = data.select_classes(digits, ["3", "8"])
    assert selected.train.images is selected.calibration.images
    assert selected.train.padding == digits.train.padding and not selected.calibration.padding
    nbytes = selected.train.images.untyped_storage().nbytes()
    assert nbytes == 3 * 24 * 24 * len(selected.train)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("01", "names='01'"),
        (["1"], "two or more"),
        (["1", "1"], "different"),
        (["1", "ten"], "ten"),
        ([1, 2], "different ones"),
    ],
)
def test_classes_that_cannot_be_selected_are_refused(digits, names, message):
    with pytest.raises(ValueError, match=message):
        data.select_classes(digits, names)


def test_a_split_without_images_of_the_classes_is_named(digits):
    few = replace(
        digits,
        search=replace(
            digits.search, images=digits.search.images[:1], labels=digits.search.labels[:1]
        ),
    )
    others = [name for name in digits.classes if name != digits.classes[few.search.labels[0]]]
    with pytest.raises(ValueError, match=r"leave a split empty.*'search': 0"):
        data.select_classes(few, others)
