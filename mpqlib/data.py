"""Image data sets by name, split into images to train on, to search on and to test on."""

import io
import os
import reprlib
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from urllib.error import URLError
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from sklearn.datasets import load_digits
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TEST_SHARE = 0.2  # of all images, if a data set has no official test images
SEARCH_LIMIT = 25_000  # images for searches at most: of ImageNet, a fifth would be far too many
# Pillow's names of the formats that class folders are read in; it knows their file names.
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA"}
FORMATS |= {"TIFF", "WEBP"}
# Names of the folder of a part, in capitals or not
PART_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}
# Beside files and folders with a leading dot, what systems leave in folders of images
LEFT_BEHIND = {"__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini"}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


# Class names in the order of the labels. torchvision reads them from the data sets' own files.
CIFAR10 = _names("airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck")
CIFAR100 = _names("""
    apple, aquarium_fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge,
    bus, butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud,
    cockroach, couch, crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox,
    girl, hamster, house, kangaroo, keyboard, lamp, lawn_mower, leopard, lion, lizard, lobster,
    man, maple_tree, motorcycle, mountain, mouse, mushroom, oak_tree, orange, orchid, otter,
    palm_tree, pear, pickup_truck, pine_tree, plain, plate, poppy, porcupine, possum, rabbit,
    raccoon, ray, road, rocket, rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake,
    spider, squirrel, streetcar, sunflower, sweet_pepper, table, tank, telephone, television,
    tiger, tractor, train, trout, tulip, turtle, wardrobe, whale, willow_tree, wolf, woman, worm
    """)
PETS = _names("""
    Abyssinian, American Bulldog, American Pit Bull Terrier, Basset Hound, Beagle, Bengal, Birman,
    Bombay, Boxer, British Shorthair, Chihuahua, Egyptian Mau, English Cocker Spaniel,
    English Setter, German Shorthaired, Great Pyrenees, Havanese, Japanese Chin, Keeshond,
    Leonberger, Maine Coon, Miniature Pinscher, Newfoundland, Persian, Pomeranian, Pug, Ragdoll,
    Russian Blue, Saint Bernard, Samoyed, Scottish Terrier, Shiba Inu, Siamese, Sphynx,
    Staffordshire Bull Terrier, Wheaten Terrier, Yorkshire Terrier
    """)


@dataclass(frozen=True, eq=False, repr=False)
class Source:
    """Stored images: `images[i][0]` is a PIL image, `classes[labels[i]]` the name of its class."""

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
    def labels(self) -> Tensor:
        """Labels (N,), int64, in the order of the items. Reads no image."""
        return torch.as_tensor(self.source.labels[self.indices]).long()


@dataclass(frozen=True, eq=False, repr=False)
class InMemory(Dataset):
    """Images of equal size that are decoded once and live on a device: training needs no loader.

    Items are (float tensor (3, H, W), int label), as those of `Images`; a slice gives a batch.
    `padding`: pixels of black around an image, out of which a crop of its own size is taken at
    random; 0 takes the image itself. `flip`: mirror half of the images. `cutout`: side, in pixels,
    of a square at a random place in each image that is set to the mean (arXiv 1708.04552).
    Raises ValueError for a value that is not allowed.
    """

    images: Tensor  # (N, 3, H, W), uint8, or float from 0 to 1
    labels: Tensor  # (N,) int64, on the same device
    mean: Sequence[float]  # of the three channels, of pixel values from 0 to 1
    std: Sequence[float]
    padding: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self):
        shape, kind = tuple(self.images.shape), self.images.dtype
        if len(shape) != 4 or shape[1] != 3 or not (kind == torch.uint8 or kind.is_floating_point):
            raise ValueError(
                f"images of shape {shape} and type {kind} are not allowed: (N, 3, H, W) in uint8 or"
                " a float type"
            )
        labels, device = self.labels, self.images.device
        if (labels.shape, labels.dtype, labels.device) != (shape[:1], torch.int64, device):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype} on {labels.device} "
                f"do not fit: one torch.int64 for each of {shape[0]} images, on {device}"
            )
        _check_normalisation(self.mean, self.std)
        check_value("padding", self.padding, Integral, "a whole number from 0", lambda v: v >= 0)
        check_value("flip", self.flip, bool, "True or False")
        check_value("cutout", self.cutout, Integral, "a whole number from 0", lambda v: v >= 0)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """The images (N, 3, H, W) and labels (N,) at `indices`, augmented and normalised.

        Random numbers come from torch's global generator of the CPU, so that all devices get the
        same augmentation. Computes on the device of the images.
        Raises IndexError for an index outside the images.
        """
        chosen = torch.as_tensor(list(indices)).long()
        outside = chosen[(chosen < -len(self)) | (chosen >= len(self))].tolist()
        if outside:  # a GPU would stop with an error that names nothing
            raise IndexError(f"no images {reprlib.repr(outside)}: there are {len(self)}")
        chosen = chosen.remainder(len(self)).to(self.images.device)  # -1: the last image
        x = self.images.index_select(0, chosen)
        if self.padding:
            x = _random_crops(x, self.padding)
        if self.flip:
            mirrored = (torch.rand(len(x)) < 0.5).to(x.device)
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        x = (x - mean) / std
        if self.cutout:
            x = _cut_out(x, self.cutout)
        return x, self.labels[chosen]

    def __getitem__(self, i: int | slice) -> tuple[Tensor, int | Tensor]:
        if isinstance(i, slice):
            return self.batch(range(*i.indices(len(self))))
        x, y = self.batch([i])
        return x[0], int(y)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """The items at `indices`: a DataLoader calls this once for each batch."""
        x, y = self.batch(indices)
        return list(zip(x, y, strict=True))

    def without_augmentation(self) -> "InMemory":
        """The same tensors without random crops, flips and cutout."""
        return replace(self, padding=0, flip=False, cutout=0)

    def to(self, device: str | torch.device) -> "InMemory":
        """The images and labels on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Noise(Dataset):
    """Synthetic images for measuring speed: items are (normal noise (3, size, size), int label)."""

    count: int
    classes: int
    size: int  # pixels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.randn(3, self.size, self.size), i % self.classes


def _random_crops(x: Tensor, padding: int) -> Tensor:
    """Crops each image of `x` (N, C, H, W) at its own place in its padded copy."""
    count, _, height, width = x.shape
    top, left = torch.randint(2 * padding + 1, (2, count)).to(x.device)
    padded = F.pad(x, [padding] * 4)
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, top, left, H, W), a view
    return crops[torch.arange(count, device=x.device), :, top, left].contiguous()


def _cut_out(x: Tensor, side: int) -> Tensor:
    """Sets a square of each image of `x` (N, C, H, W) to 0, centred anywhere in the image."""
    count, _, height, width = x.shape

    def is_inside(size: int) -> Tensor:
        """Whether each place along one dimension is in the square, (N, size)."""
        first = torch.randint(size, (count, 1)) - side // 2
        places = torch.arange(size)
        return ((first <= places) & (places < first + side)).to(x.device)

    square = is_inside(height)[:, None, :, None] & is_inside(width)[:, None, None, :]
    return x.masked_fill(square, 0)


@dataclass(frozen=True)
class Splits:
    """The splits of a data set. `train`, `search` and `test` share no image.

    The first images of `calibration` and `search` are a stratified sample, however many one takes.
    """

    train: Dataset  # augmented
    calibration: Dataset  # the images of `train` without augmentation
    search: Dataset  # for scoring bit-width configurations, never trained on
    test: Dataset
    classes: tuple[str, ...]

    def to(self, device: str | torch.device) -> "Splits":
        """The same splits, with those in memory on `device`. The others are read from files."""
        stored = {name: part for name, part in vars(self).items() if isinstance(part, InMemory)}
        # Splits can share tensors: each is moved once.
        tensors = {tensor for part in stored.values() for tensor in (part.images, part.labels)}
        moved = {tensor: tensor.to(device) for tensor in tensors}
        parts = {
            name: replace(part, images=moved[part.images], labels=moved[part.labels])
            for name, part in stored.items()
        }
        return replace(self, **parts)


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB with 8 bits per channel.

    Of several frames, the first is read. Transparent pixels are drawn on white. 16-bit grey values
    are divided by 257, and float values, which must lie in 0..1, are multiplied by 255.
    Raises FileNotFoundError for a missing file, and ValueError for a damaged file or pixel values
    of unknown range. The message names the file.
    """
    with open(path, "rb") as file:
        try:
            return _to_rgb(Image.open(file))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey values of 16 bits, or floats in 0..1, to 0..255; Pillow would clip them."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode == "F":
        highest = 1
    elif image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        highest = 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1  # TIFF has 12 bits, too
    else:
        raise ValueError("the range of its integer pixel values is unknown; convert it to 8 bits")
    grey = np.asarray(image) / highest
    if not (grey.min() >= 0 and grey.max() <= 1):  # also True for NaN
        raise ValueError(f"pixel values from {grey.min()} to {grey.max()}; floats must be in 0..1")
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is stored as 0
        grey = 1 - grey
    return Image.fromarray((255 * grey).round().astype(np.uint8))


@dataclass(frozen=True, eq=False, repr=False)
class Jpegs(Sequence):
    """JPEG files one after the other in one array: items are (PIL image,)."""

    data: np.ndarray  # bytes of all files, uint8
    offsets: np.ndarray  # (N + 1,): file i is data[offsets[i] : offsets[i + 1]]
    path: Path  # where they come from, for messages

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[Image.Image]:
        file = io.BytesIO(self.data[self.offsets[i] : self.offsets[i + 1]].tobytes())
        try:
            return (_to_rgb(Image.open(file, formats=["JPEG"])),)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {i} of {self.path} cannot be read: {error}") from error


def _npz(path: Path, download: bool) -> list[Source]:
    """Read a data set of JPEG files in one .npz file.

    Its arrays, for each of the parts "train" and "test": `<part>_jpeg` (uint8), the bytes of all
    JPEG files one after the other; `<part>_offsets` (N + 1, integers from 0 to the number of
    bytes), where the files start and the last one ends; `<part>_labels` (N, integers). And
    `classes` (text), the names of the classes in the order of the labels.
    Raises ValueError, with the array's name, for a file that does not hold these. Arrays of Python
    objects, which could run code, are never read.
    """
    if not path.is_file():
        raise FileNotFoundError(f'no file {path}: for the data set "npz", root is a .npz file')
    parts, kinds = ("train", "test"), ("jpeg", "offsets", "labels")
    keys = ["classes", *(f"{part}_{kind}" for part in parts for kind in kinds)]
    try:
        # The stream is opened here, because np.load leaves that of a broken file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {key: file[key] for key in keys}
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        NotImplementedError,
        BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} is not a .npz file of {keys}: {error}") from error
    names = arrays["classes"]
    if names.dtype.kind != "U" or names.ndim != 1 or len(set(names)) < len(names):
        raise ValueError(f"{path}: classes must be a list of different names, not {names!r}")
    classes = tuple(map(str, names))
    return [
        _jpegs(path, part, *(arrays[f"{part}_{kind}"] for kind in kinds), classes) for part in parts
    ]


def _jpegs(
    path: Path,
    part: str,
    data: np.ndarray,
    offsets: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
) -> Source:
    """One part of the .npz file `path`; raises ValueError if its arrays do not fit."""
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"{path}: {part}_jpeg must hold bytes (uint8) in one dimension")
    right = offsets.dtype.kind in "iu" and offsets.ndim == 1 and len(offsets) > 1
    if (
        not right
        or (offsets[0], offsets[-1]) != (0, len(data))
        or (offsets[1:] < offsets[:-1]).any()
    ):
        raise ValueError(f"{path}: {part}_offsets must rise from 0 to the {len(data)} bytes")
    images = Jpegs(data, offsets, path)
    right = labels.dtype.kind in "iu" and labels.shape == (len(images),)
    if not right or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"{path}: {part}_labels must be {len(images)} labels from 0 to {len(classes) - 1}"
        )
    return Source(images, labels, classes)


class Pets(datasets.OxfordIIITPet):
    """The Oxford-IIIT pets, with the labels in `targets` as in torchvision's other data sets."""

    @property
    def targets(self) -> list[int]:
        """Labels (N,) in the order of the images. Reads no image."""
        return self._labels

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return read_image(self._images[i]), self._labels[i]


def _digits(root: Path, download: bool) -> tuple[Source, None]:
    digits = load_digits()  # scikit-learn ships them
    grey = (digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), stored as 0 to 16
    images = [(Image.fromarray(image),) for image in grey]
    return Source(images, digits.target, tuple("0123456789")), None


def _torchvision(
    dataset: type, classes: Sequence[str], parts: Sequence[dict], root: Path, download: bool
) -> Sequence[Source]:
    """Read a data set of torchvision from its own files, or else from one folder per class."""
    try:
        read = [dataset(root, download=download, **part) for part in parts]
    except (RuntimeError, URLError) as error:  # files are missing, damaged or out of reach
        if _part_folder(root, "train").is_dir():
            return _named_folders(root, dataset.__name__, classes)
        remedy = "check the connection" if download else "download=True fetches it"
        raise FileNotFoundError(
            f"{dataset.__name__} is not in {root}, or it is damaged: {remedy} ({error})"
        ) from error
    for part in read:
        last = len(part.classes) - 1
        outside = sorted({int(label) for label in part.targets if not 0 <= label <= last})
        if outside or len(part) != len(part.targets):
            raise ValueError(
                f"{dataset.__name__} in {root} is damaged: {len(part)} images, "
                f"{len(part.targets)} labels, of which {outside} are outside 0..{last}"
            )
    return [Source(part, np.asarray(part.targets), tuple(part.classes)) for part in read]


def _is_left_behind(name: str) -> bool:
    """Whether a file or folder is none of a data set, but was left there by a system or editor."""
    return name.startswith(".") or name in LEFT_BEHIND


@cache
def image_types() -> list[str]:
    """Endings of the names of image files in class folders, such as ".jpeg"."""
    return sorted(end for end, kind in Image.registered_extensions().items() if kind in FORMATS)


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in image_types()


class ClassFolders(datasets.ImageFolder):
    """Images in `root/<class>/*`. Others than images are listed in `skipped`, by path."""

    def __init__(self, root: Path):
        outside = [entry for entry in os.scandir(root) if entry.is_file() and _is_image(entry.path)]
        self.skipped = [entry.path for entry in outside if not _is_left_behind(entry.name)]

        def is_read(path: str) -> bool:
            if any(map(_is_left_behind, path[len(str(root)) :].split(os.sep))):
                return False
            if not _is_image(path):
                self.skipped.append(path)
            return _is_image(path)

        super().__init__(str(root), loader=read_image, is_valid_file=is_read)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Names of the class folders in order, and the label of each."""
        classes = [name for name in super().find_classes(directory)[0] if not _is_left_behind(name)]
        if not classes:
            raise FileNotFoundError(f"no class folder in {directory}")
        return classes, {name: label for label, name in enumerate(classes)}


def _class_folders(root: Path, layout: str, classes: Sequence[str] | None = None) -> Source:
    """Read `root/<class>/*`. Labels are places in `classes`, or else in the sorted folders.

    Warns of files that are not read.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; expected {layout}")
    try:
        images = ClassFolders(root)
    except FileNotFoundError as error:  # no class folder, or one without images
        types = f"images are files of the types {image_types()}"
        raise FileNotFoundError(f"{root} must hold {layout}: {error}; {types}") from error
    classes = tuple(classes or images.classes)
    if unknown := set(images.classes) - set(classes):
        raise ValueError(
            f"{root} has folders that are not classes: {reprlib.repr(sorted(unknown))}; "
            f"the classes are {reprlib.repr(list(classes))}"
        )
    if images.skipped:
        warnings.warn(
            f"{len(images.skipped)} files in {root} are not read, such as {images.skipped[0]}: "
            f"read are files in class folders, of the types {image_types()}",
            stacklevel=3,
        )
    label = np.array([classes.index(folder) for folder in images.classes])
    return Source(images, label[images.targets], classes)


def _part_folder(root: Path, part: str) -> Path:
    """The folder in `root` of "train", "test" or "val" by one of its PART_NAMES, in any case.

    `root/part` if there is none. Raises ValueError if there are several.
    """
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    found = [path for path in folders if path.name.casefold() in PART_NAMES[part]]
    if len(found) > 1:
        raise ValueError(f"{root} holds several folders for {part}/: {sorted(map(str, found))}")
    return found[0] if found else root / part


def _test_folder(root: Path) -> Path:
    """The folder of `root` for val if it replaces that for test, or else that for test."""
    test, val = _part_folder(root, "test"), _part_folder(root, "val")
    return val if val.is_dir() and not test.is_dir() else test


def _named_folders(root: Path, name: str, classes: Sequence[str]) -> list[Source]:
    """Read a known data set from class folders. Labels are places in `classes`.

    Case, spaces and punctuation of a folder's name do not matter, as mirrors differ in them.
    Raises ValueError unless there is one folder for each class and no other.
    """

    def spelling(name: str) -> str:  # the same for "T-shirt/top" and t_shirt_top
        return "".join(filter(str.isalnum, name.casefold()))

    layout = f"train/<class>/* and test/<class>/* (or val/<class>/*) for the classes of {name}"
    place = {spelling(name): label for label, name in enumerate(classes)}
    sources = []
    for part in (_part_folder(root, "train"), _test_folder(root)):
        source = _class_folders(part, layout)
        found = [spelling(folder) for folder in source.classes]
        if sorted(found) != sorted(place):
            unknown = [folder for folder in source.classes if spelling(folder) not in place]
            missing = [name for name in classes if spelling(name) not in found]
            raise ValueError(
                f"{part} does not hold {name}: of its {len(found)} folders "
                f"{reprlib.repr(unknown)} are not classes, and {reprlib.repr(missing)} are "
                f"missing; expected is one folder for each of {list(classes)}. "
                'The data set "folder" reads any classes.'
            )
        label = np.array([place[folder] for folder in found])
        sources.append(Source(source.images, label[source.labels], tuple(classes)))
    return sources


def _imagenet(root: Path, part: str) -> Source:
    layout = "train/<wnid>/* and val/<wnid>/* (imagenet_val needs val alone)"
    # Labels are places among all 1000 sorted names, so some of the folders are enough.
    return _class_folders(_part_folder(root, part), layout, ImageNetInfo().label_names())


def _folder(root: Path, download: bool) -> tuple[Source, Source | None]:
    layout = "train/<class>/* and test/<class>/* (or val/<class>/*), or <class>/* alone"
    train, test = _part_folder(root, "train"), _test_folder(root)
    if not train.is_dir() and test.is_dir() and any(path.is_file() for path in test.iterdir()):
        return _class_folders(root, layout), None  # a class of this name
    if test.is_dir():
        source = _class_folders(train, layout)
        return source, _class_folders(test, layout, source.classes)
    if not train.is_dir():
        return _class_folders(root, layout), None
    if others := _others(root, train):
        warnings.warn(
            f"test images are taken out of {train}: {root} holds no test/ or val/, and its folders "
            f"{reprlib.repr(others)} are not read",
            stacklevel=3,
        )
    return _class_folders(train, layout), None


def _others(root: Path, train: Path) -> list[str]:
    """Names of the folders beside `train`, without those that systems leave behind."""
    folders = [path.name for path in root.iterdir() if path.is_dir() and path != train]
    return sorted(name for name in folders if not _is_left_behind(name))


@dataclass(frozen=True)
class Spec:
    """How to read and augment a data set."""

    # (root, download) -> all training images, and the official test images if there are any
    read: Callable[[Path, bool], Sequence[Source | None]]
    photographs: bool = False  # of any size and shape; or else small images filled by one object
    flip: bool = True  # whether a mirrored image keeps its class


_PARTS = [{"train": True}, {"train": False}]
_PETS_PARTS = [{"split": "trainval"}, {"split": "test"}]
_FASHION = datasets.FashionMNIST.classes
DATASETS = {
    "digits": Spec(_digits, flip=False),
    "fashion-mnist": Spec(partial(_torchvision, datasets.FashionMNIST, _FASHION, _PARTS)),
    "cifar10": Spec(partial(_torchvision, datasets.CIFAR10, CIFAR10, _PARTS)),
    "cifar100": Spec(partial(_torchvision, datasets.CIFAR100, CIFAR100, _PARTS)),
    "pets": Spec(partial(_torchvision, Pets, PETS, _PETS_PARTS), photographs=True),
    "imagenet": Spec(lambda root, _: [_imagenet(root, p) for p in ("train", "val")], True),
    "folder": Spec(_folder, photographs=True),
    "npz": Spec(_npz),
}


def check_value(name: str, value, kind, allowed: str, holds: Callable[..., bool] = lambda _: True):
    """Raise ValueError unless `value` is of `kind` and `holds`."""
    # Python counts True and False among the integers.
    is_other = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
    if is_other or not holds(value):
        raise ValueError(f"{name}={value!r} is not allowed: {allowed}")


def _resolve(root: str | Path) -> Path:
    """The whole path of `root`; raises ValueError if it is none."""
    check_value("root", root, str | Path, "a folder, or the file of npz")
    return Path(root).resolve()


def _check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError unless both are three finite numbers, `std` above 0."""
    three = "a tuple or list of three numbers, all finite"
    for name, channels in dict(mean=mean, std=std).items():
        check_value(name, channels, (tuple, list), three, lambda v: len(v) == 3)
        for value in channels:
            check_value(name, value, Real, three, isfinite)
    check_value("std", std, (tuple, list), f"{three} and above 0", lambda v: min(v) > 0)


def transforms(
    spec: Spec,
    image_size: int = 64,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bilinear",
    crop_pct: float | None = None,
) -> tuple[v2.Transform, v2.Transform]:
    """For training and for evaluation: PIL image -> normalised (3, image_size, image_size).

    Evaluation resizes the shorter side to image_size / crop_pct pixels and crops the centre.
    `crop_pct`: None takes 0.875 for photographs and 1 for other data sets. Where it is 1, small
    images are shown whole, as in training: those that are not square are squeezed.
    Raises ValueError for a value that is not allowed.
    """
    crop_pct = (0.875 if spec.photographs else 1.0) if crop_pct is None else crop_pct
    check_value(
        "image_size", image_size, Integral, "a whole number of pixels from 1", lambda v: v >= 1
    )
    _check_normalisation(mean, std)
    check_value("crop_pct", crop_pct, Real, "above 0, at most 1", lambda v: 0 < v <= 1)
    modes = [mode.value for mode in v2.InterpolationMode]
    check_value("interpolation", interpolation, str, f"one of {modes}", lambda v: v in modes)
    image_size, mode = int(image_size), v2.InterpolationMode(interpolation)
    whole = [v2.Resize((image_size, image_size), mode)]
    if spec.photographs:
        augment = [v2.RandomResizedCrop(image_size, interpolation=mode)]
    else:
        padding = image_size // 8  # the usual 4 pixels for CIFAR's 32
        augment = [*whole, v2.RandomCrop(image_size, padding)]
    if spec.flip:
        augment.append(v2.RandomHorizontalFlip())
    # Rounded down as timm does. The small addend keeps torchvision's ratios (224 / 232) exact.
    shorter = int(image_size / crop_pct + 1e-6)
    centre = [v2.Resize(shorter, mode), v2.CenterCrop(image_size)]
    shown = centre if spec.photographs or crop_pct < 1 else whole
    scale = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return v2.Compose([v2.RGB(), *augment, *scale]), v2.Compose([v2.RGB(), *shown, *scale])


def _stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order (N,) of the images in which every stretch is stratified by class.

    scikit-learn's stratified splitters cannot do this: they stratify a split but not its first
    images, and refuse a class with one image.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # of each image among those of its class, from 0 to 1
    for label in np.unique(labels):
        own = np.flatnonzero(labels[shuffled] == label)
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    return shuffled[np.argsort(place, kind="stable")]


def _check_splits(pool: Source, splits: dict[str, np.ndarray], values: str) -> None:
    """Raise ValueError if the images are too few; warn of classes without a training image."""
    total, present = len(pool.labels), np.unique(pool.labels)
    if len(present) < 2:
        raise ValueError(
            f"all {total} images are of class {pool.classes[present[0]]!r}; "
            "a classifier needs two classes or more"
        )
    sizes = {part: len(indices) for part, indices in splits.items()}
    if min(sizes.values()) == 0:
        raise ValueError(f"{total} images with {values} leave a split empty: {sizes}")
    if sizes["train"] < len(present):
        raise ValueError(
            f"{total} images with {values} leave {sizes['train']} to train on: "
            f"at least {len(present)} are needed, one per class"
        )
    missing = sorted(set(present) - set(pool.labels[splits["train"]]))
    if missing:
        names = reprlib.repr([pool.classes[label] for label in missing])
        warnings.warn(f"{values} leave no image to train on of classes {names}", stacklevel=3)


def load(
    name: str,
    root: str | Path = "data",
    image_size: int = 64,
    *,
    search_share: float = 0.2,
    seed: int = 0,
    download: bool = False,
    train_images: int | None = None,
    memory_gb: float = 2.0,
    **view,
) -> Splits:
    """Split the data set `name`, one of DATASETS, stored under `root`.

    Data sets of torchvision are read from the files that it downloads, or else from image files
    in train/<class>/* and test/<class>/*. "folder" reads any classes from there, or from <class>/*
    alone. In the place of test/ there may be val/, valid/ or validation/; beside test/ they are not
    read. Capitals do not matter in these names, and hidden files are left out. For "npz", `root` is
    one .npz file of small images with the arrays train_jpeg (bytes of all JPEG files),
    train_offsets (N + 1; where each file starts), train_labels (N), the same for test, and classes
    (names).
    `image_size`: side in pixels. `search_share`: share of the training images that is held out
    for searches, at most SEARCH_LIMIT images. If the data set has no official test images, it is
    the share of all images, and TEST_SHARE of them are the test images. `seed`: of the split.
    `download`: fetch missing data.
    `train_images`: train on at most this many. `view`: mean, std, interpolation and crop_pct of
    `transforms`; `models.preprocessing` returns those that a pretrained model expects.
    `memory_gb`: the splits are `InMemory` if their images fit in so many GB (1e9 bytes): each image
    is decoded now, once. 0 reads images from their files again and again, as `Images`. So does any
    value for photographs ("pets", "imagenet", "folder"), because each epoch crops them anew out of
    their full size.
    Raises ValueError for a value that is not allowed or data that do not fit, and FileNotFoundError
    for missing data. Warns of classes without a training image, and of files and folders that are
    not read.
    """
    if not isinstance(name, str) or name not in DATASETS:
        raise ValueError(f"name={name!r} is not a data set: one of {list(DATASETS)}")
    check_value("search_share", search_share, Real, "between 0 and 1", lambda v: 0 < v < 1)
    check_value("seed", seed, Integral, "a whole number from 0", lambda v: v >= 0)
    check_value("download", download, bool, "True or False")
    check_value("memory_gb", memory_gb, Real, "a number from 0", lambda v: v >= 0)
    if train_images is not None:
        allowed = "a whole number from 1, or None for all images"
        check_value("train_images", train_images, Integral, allowed, lambda v: v >= 1)
    augmented, plain = transforms(DATASETS[name], image_size, **view)
    pool, official = DATASETS[name].read(_resolve(root), download)
    order, total = _stratified_order(pool.labels, seed), len(pool.labels)
    tested = 0 if official else round(TEST_SHARE * total)
    searched = min(round(search_share * total), SEARCH_LIMIT)
    test, search, train = np.split(order, [tested, tested + searched])
    if official:
        test = np.arange(len(official.labels))
    train = train[:train_images]
    splits = dict(train=train, search=search, test=test)
    _check_splits(pool, splits, f"search_share={search_share}, train_images={train_images}")
    stored = Splits(
        train=Images(pool, train, augmented),
        calibration=Images(pool, train, plain),
        search=Images(pool, search, plain),
        test=Images(official or pool, test, plain),
        classes=pool.classes,
    )
    size = 3 * image_size**2 * sum(map(len, splits.values()))  # bytes
    fits = size <= 1e9 * memory_gb and not DATASETS[name].photographs
    return _decode(stored, image_size) if fits else stored


def _decode(splits: Splits, size: int) -> Splits:
    """The splits, images of `size` x `size` pixels, in memory; two of them share their images."""
    train, search, test = (_in_memory(s, size) for s in (splits.train, splits.search, splits.test))
    if str(_decoder(splits.train)) == str(_decoder(splits.calibration)):
        calibration = train.without_augmentation()
    else:  # crop_pct < 1 shows less of each image
        calibration = _in_memory(splits.calibration, size)
    return Splits(train, calibration, search, test, splits.classes)


def _decoder(dataset: Images) -> v2.Transform:
    """What the transform of `dataset` does before augmentation: PIL image -> uint8 (3, H, W)."""
    later = v2.RandomCrop, v2.RandomHorizontalFlip, v2.ToDtype, v2.Normalize
    return v2.Compose([s for s in dataset.transform.transforms if not isinstance(s, later)])


def _in_memory(dataset: Images, size: int) -> InMemory:
    """Decode `dataset`, whose transform at most crops out of a padded image and flips at random."""
    stages = {type(stage): stage for stage in dataset.transform.transforms}
    decode, crop, normalise = _decoder(dataset), stages.get(v2.RandomCrop), stages[v2.Normalize]
    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    for i, index in enumerate(dataset.indices.tolist()):
        images[i] = decode(dataset.source.images[index][0])
    return InMemory(
        images,
        dataset.labels,
        mean=tuple(normalise.mean),
        std=tuple(normalise.std),
        padding=crop.padding[0] if crop and crop.padding else 0,
        flip=v2.RandomHorizontalFlip in stages,
    )


def select_classes(splits: Splits, names: Sequence[str]) -> Splits:
    """The images of some classes of `splits`; their labels are the places in `names`.

    Each split keeps the order of its images, so it is stratified if it was before.
    Raises ValueError unless `names` is a list or tuple, for fewer than two names, for one that is
    repeated or no class, and for a split that would be empty.
    """
    check_value(
        "names", names, (list, tuple), f"two or more of {reprlib.repr(list(splits.classes))}"
    )
    unknown = [name for name in names if name not in splits.classes]
    if unknown or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"names={names!r} is not allowed: two or more different ones of {list(splits.classes)}"
        )
    place = torch.full((len(splits.classes),), -1)  # -1: a class that is not selected
    place[[splits.classes.index(name) for name in names]] = torch.arange(len(names))
    images: dict[Tensor, Tensor] = {}  # splits can share a tensor: it is selected once

    def select(part: Images | InMemory) -> Images | InMemory:
        labels = place.to(part.labels.device)[part.labels]
        chosen, labels = (labels >= 0).nonzero().squeeze(1), labels[labels >= 0]
        if isinstance(part, InMemory):
            if part.images not in images:
                images[part.images] = part.images[chosen]
            return replace(part, images=images[part.images], labels=labels)
        stored = Subset(part.source.images, part.indices[chosen.numpy()].tolist())
        source = Source(stored, labels.numpy(), tuple(names))
        return replace(part, source=source, indices=np.arange(len(labels)))

    parts = {f.name: getattr(splits, f.name) for f in fields(splits) if f.name != "classes"}
    selected = {name: select(part) for name, part in parts.items()}
    sizes = {name: len(part) for name, part in selected.items()}
    if min(sizes.values()) == 0:
        raise ValueError(f"names={names!r} leave a split empty: {sizes}")
    return Splits(**selected, classes=tuple(names))


def imagenet_val(root: str | Path = "data", image_size: int = 224, **view) -> Images:
    """The images of `root/val/<wnid>/*`, of any of ImageNet's 1000 classes; `view` as in `load`."""
    _, plain = transforms(DATASETS["imagenet"], image_size, **view)
    source = _imagenet(_resolve(root), "val")
    return Images(source, np.arange(len(source.labels)), plain)


def draw(dataset: Dataset | Tensor, count: int) -> list[int]:
    """Indices of `count` items of `dataset` in a random order that never changes; or of all items.

    Data sets are often sorted by class. The first items would then be of a few classes alone, and
    so would each batch.
    """
    check_value("count", count, Integral, "a whole number from 0", lambda v: v >= 0)
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(len(dataset), generator=generator)[:count].tolist()


def loader(
    dataset: Dataset, batch_size: int, generator: torch.Generator | None = None, workers: int = 0
) -> DataLoader:
    """Batches of `dataset`: whole ones in the random order of `generator`, or else all in order.

    Raises ValueError for a value that is not allowed, such as a `batch_size` above the number of
    images together with a `generator`.
    """
    allowed = "a whole number from 1"
    check_value("batch_size", batch_size, Integral, allowed, lambda v: v >= 1)
    check_value("workers", workers, Integral, "a whole number from 0", lambda v: v >= 0)
    shuffle = generator is not None
    if shuffle:  # an incomplete batch is dropped
        images = len(dataset)
        allowed = f"at most {images}, the number of images"
        check_value("batch_size", batch_size, Integral, allowed, lambda v: v <= images)
    # Without a generator of its own the loader would draw from torch's global one.
    own = generator or torch.Generator()
    return DataLoader(
        dataset, int(batch_size), shuffle, drop_last=shuffle, num_workers=workers, generator=own
    )
