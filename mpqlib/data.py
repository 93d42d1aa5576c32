"""Image data sets by name, each as disjoint splits to train on, to search on and to test on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TEST_SHARE = 0.2  # of all images, where a data set has no official test split


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """Images as stored: `images[i][0]` is a PIL image, `labels[i]` its place in `classes`."""

    images: Sequence
    labels: np.ndarray  # (N,) int
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Images(Dataset):
    """Some images of a source: items are (float tensor (3, H, W), int label)."""

    source: Source
    indices: np.ndarray  # (N,) int
    transform: v2.Transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        index = int(self.indices[i])
        return self.transform(self.source.images[index][0]), int(self.source.labels[index])

    @property
    def labels(self) -> np.ndarray:
        """Labels (N,) in the order of the items, without reading an image."""
        return self.source.labels[self.indices]


@dataclass(frozen=True)
class Splits:
    """A data set's splits; train, search and test share no image.

    Every stretch of `calibration` and `search` holds the classes in the proportion of the whole,
    so that their first images are as good a sample as any.
    """

    train: Images  # augmented
    calibration: Images  # the images of `train`, not augmented
    search: Images  # what searches are scored on, never trained on
    test: Images
    classes: tuple[str, ...]


def _digits(root: Path, download: bool) -> tuple[Source, None]:
    digits = load_digits()  # scikit-learn ships them
    grey = (digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), stored as 0 to 16
    images = [(Image.fromarray(image),) for image in grey]
    return Source(images, digits.target, tuple("0123456789")), None


def _torchvision(
    dataset: type, parts: Sequence[dict], labels: str, root: Path, download: bool
) -> Sequence[Source]:
    if (root / "train").is_dir():  # as image files, one folder a class, which some mirrors offer
        return _folder(root, download)
    try:
        read = [dataset(root, download=download, **part) for part in parts]
    except RuntimeError as error:  # what torchvision raises where files are missing
        raise FileNotFoundError(
            f"{dataset.__name__} is not in {root}, or damaged: download=True fetches it ({error})"
        ) from error
    return [Source(part, np.asarray(getattr(part, labels)), tuple(part.classes)) for part in read]


def _class_folders(root: Path, layout: str, classes: Sequence[str] | None = None) -> Source:
    """Images of `root/<class>/*`, labelled by the place of the folder's name in `classes`."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; nothing to download, expected is {layout}")
    images = datasets.ImageFolder(root)
    classes = tuple(classes or images.classes)
    if unknown := set(images.classes) - set(classes):
        raise ValueError(f"{root} has folders that name no known class: {sorted(unknown)}")
    label = np.array([classes.index(folder) for folder in images.classes])
    return Source(images, label[images.targets], classes)


def _imagenet(root: Path, part: str) -> Source:
    layout = "train/<wnid>/* and val/<wnid>/* (with val alone, imagenet_val evaluates a model)"
    # All 1000 names, sorted, give the labels, so that a few of the folders are enough.
    return _class_folders(root / part, layout, ImageNetInfo().label_names())


def _folder(root: Path, download: bool) -> tuple[Source, Source | None]:
    layout = "train/<class>/* and test/<class>/* (or val/<class>/*), or <class>/* alone"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    has_parts = test is not None or (root / "train").is_dir()
    train = _class_folders(root / "train" if has_parts else root, layout)
    return train, test and _class_folders(test, layout, train.classes)


@dataclass(frozen=True)
class Spec:
    """How a data set is read and augmented."""

    # (root, download) -> all training images, and the official test images if there are any
    read: Callable[[Path, bool], Sequence[Source | None]]
    photographs: bool = False  # of any size and shape, or else small images filled by one object
    flip: bool = True  # whether a mirrored image keeps its class


_PARTS = [{"train": True}, {"train": False}], "targets"
# torchvision keeps the pets' labels to itself; to ask for each item would decode every image.
_PETS_PARTS = [{"split": "trainval"}, {"split": "test"}], "_labels"
DATASETS = {
    "digits": Spec(_digits, flip=False),
    "fashion-mnist": Spec(partial(_torchvision, datasets.FashionMNIST, *_PARTS)),
    "cifar10": Spec(partial(_torchvision, datasets.CIFAR10, *_PARTS)),
    "cifar100": Spec(partial(_torchvision, datasets.CIFAR100, *_PARTS)),
    "pets": Spec(partial(_torchvision, datasets.OxfordIIITPet, *_PETS_PARTS), photographs=True),
    "imagenet": Spec(lambda root, _: [_imagenet(root, p) for p in ("train", "val")], True),
    "folder": Spec(_folder, photographs=True),
}


def transforms(
    spec: Spec,
    image_size: int = 64,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bilinear",
    crop_pct: float | None = None,
) -> tuple[v2.Transform, v2.Transform]:
    """For training and for evaluation: PIL image -> normalised (3, image_size, image_size).

    Evaluation makes the shorter side image_size / crop_pct pixels (crop_pct None: what is usual
    for the data set) and keeps the centre. Raises ValueError for a value that is not allowed.
    """
    crop_pct = (0.875 if spec.photographs else 1.0) if crop_pct is None else crop_pct
    if image_size < 1:
        raise ValueError(f"image_size={image_size!r} is not allowed: whole pixels, from 1")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct!r} is not allowed: above 0, at most 1")
    if interpolation not in (allowed := [mode.value for mode in v2.InterpolationMode]):
        raise ValueError(f"interpolation={interpolation!r} is not allowed: one of {allowed}")
    mode = v2.InterpolationMode(interpolation)
    if spec.photographs:
        augment = [v2.RandomResizedCrop(image_size, interpolation=mode)]
    else:
        padding = image_size // 8  # 4 pixels of CIFAR's 32, the usual amount; one of the digits' 8
        augment = [v2.Resize((image_size, image_size), mode), v2.RandomCrop(image_size, padding)]
    if spec.flip:
        augment.append(v2.RandomHorizontalFlip())
    # Rounded down as timm does; the small addend keeps torchvision's pairs (224 / 232) whole.
    shorter = int(image_size / crop_pct + 1e-6)
    centre = [v2.Resize(shorter, mode), v2.CenterCrop(image_size)]
    scale = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose([v2.RGB(), *augment, *scale]), v2.Compose([v2.RGB(), *centre, *scale])


def _stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A seeded order (N,) of the images in which every stretch is stratified by class."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # of each image among those of its class, from 0 to 1
    for label in np.unique(labels):
        own = np.flatnonzero(labels[shuffled] == label)
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    return shuffled[np.argsort(place, kind="stable")]


def load(
    name: str,
    root: str | Path = "data",
    image_size: int = 64,
    *,
    search_share: float = 0.2,
    seed: int = 0,
    download: bool = False,
    train_images: int | None = None,
    **view,
) -> Splits:
    """The splits of data set `name`, one of DATASETS, stored under `root`.

    `image_size`: side in pixels. `search_share`: share of the training images (of all images where
    there is no official test split; then TEST_SHARE of them is set aside too) held out for
    searches. `seed`: of the split. `train_images`: train on at most so many. `view`: mean, std,
    interpolation and crop_pct of `transforms`; `models.preprocessing` gives them for a model.
    Raises ValueError for a value that is not allowed, FileNotFoundError for missing data.
    """
    if name not in DATASETS:
        raise ValueError(f"name={name!r} is not a data set: one of {list(DATASETS)}")
    if not 0 < search_share < 1:
        raise ValueError(f"search_share={search_share!r} is not allowed: between 0 and 1")
    if train_images is not None and train_images < 1:
        raise ValueError(f"train_images={train_images!r} is not allowed: from 1, or None for all")
    augmented, plain = transforms(DATASETS[name], image_size, **view)
    pool, official = DATASETS[name].read(Path(root).resolve(), download)
    order, total = _stratified_order(pool.labels, seed), len(pool.labels)
    tested = 0 if official else round(TEST_SHARE * total)
    test, search, train = np.split(order, [tested, tested + round(search_share * total)])
    if official:
        test = np.arange(len(official.labels))
    if not (len(train) and len(search) and len(test)):
        raise ValueError(f"search_share={search_share} of {total} images leaves a split empty")
    train = train[:train_images]
    return Splits(
        train=Images(pool, train, augmented),
        calibration=Images(pool, train, plain),
        search=Images(pool, search, plain),
        test=Images(official or pool, test, plain),
        classes=pool.classes,
    )


def imagenet_val(root: str | Path = "data", image_size: int = 224, **view) -> Images:
    """The images of `root/val/<wnid>/*`, any of ImageNet's 1000 classes; `view` as in `load`."""
    _, plain = transforms(DATASETS["imagenet"], image_size, **view)
    source = _imagenet(Path(root).resolve(), "val")
    return Images(source, np.arange(len(source.labels)), plain)


def loader(
    dataset: Dataset, batch_size: int, generator: torch.Generator | None = None, workers: int = 0
) -> DataLoader:
    """Batches: shuffled by `generator`, whole ones only, if one is given; else all, in order.

    Raises ValueError where `dataset` does not fill one whole shuffled batch.
    """
    shuffle = generator is not None
    if shuffle and len(dataset) < batch_size:
        raise ValueError(f"batch_size={batch_size} is not allowed: {len(dataset)} images at most")
    # Without a generator of its own the loader would draw from torch's global one.
    own = generator or torch.Generator()
    return DataLoader(
        dataset, batch_size, shuffle, drop_last=shuffle, num_workers=workers, generator=own
    )
