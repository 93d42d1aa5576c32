"""What each parameter of a study or notebook may be: a wrong one is named before any work."""

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..data import DATASETS
from ..files import check_writable
from ..models import create, is_torchvision
from ..network.bits import LARGEST, SMALLEST
from ..training.loop import RANGES, TrainConfig, explain_text

_MOST = 10**9  # what is larger is a slip of the pen


class Rule(NamedTuple):
    """What is allowed, in words, and whether a value is."""

    allowed: str
    holds: Callable[[object], bool]


def whole(least: int, most: int = _MOST) -> Rule:
    """A whole number. True and False are none."""

    def holds(value: object) -> bool:
        right = isinstance(value, Integral) and not isinstance(value, bool)
        return right and least <= value <= most

    return Rule(f"a whole number from {least} to {most}", holds)


def number(least: float) -> Rule:
    """A number from `least` to _MOST. True and False are none."""

    def holds(value: object) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and least <= value <= _MOST

    return Rule(f"a number from {least} to {_MOST}", holds)


def one_of(names: Collection[str]) -> Rule:
    """One of some names."""
    return Rule(f"one of {list(names)}", lambda value: isinstance(value, str) and value in names)


def items(rule: Rule, least: int = 1) -> Rule:
    """A list of at least so many entries, each allowed by `rule`, and none of them twice."""

    def holds(value: object) -> bool:
        right = isinstance(value, (list, tuple)) and all(map(rule.holds, value))
        return right and len(set(value)) == len(value) >= least

    return Rule(f"a list of {least} or more, none twice, each {rule.allowed}", holds)


def entries(**rules: Rule) -> Rule:
    """A dict with exactly these keys."""

    def holds(value: object) -> bool:
        right = isinstance(value, Mapping) and value.keys() == rules.keys()
        return right and all(rule.holds(value[name]) for name, rule in rules.items())

    listed = "; ".join(f"{name!r}: {rule.allowed}" for name, rule in rules.items())
    return Rule(f"a dict of {listed}", holds)


def named(rule: Rule, least: int = 1, most: int = _MOST) -> Rule:
    """A dict of at least so many names, each with a value that `rule` allows."""

    def holds(value: object) -> bool:
        right = isinstance(value, Mapping) and least <= len(value) <= most
        return right and all(isinstance(n, str) and rule.holds(v) for n, v in value.items())

    count = f"{least}" if most == least else f"{least} or more"
    return Rule(f"a dict of {count} names, each with {rule.allowed}", holds)


def optional(rule: Rule) -> Rule:
    """None, or what `rule` allows."""
    return Rule(f"{rule.allowed}; or None", lambda value: value is None or rule.holds(value))


def _is_classifier(value: object) -> bool:
    try:
        return is_torchvision(value) in (True, False)
    except ValueError:
        return False


TRUTH = Rule("True or False", lambda value: isinstance(value, bool))
NAME = Rule("a name", lambda value: isinstance(value, str) and value != "")
PLACE = Rule("a path", lambda value: isinstance(value, (str, Path)) and str(value) != "")
OPTIONS = Rule(
    'a dict of options, such as {}; for papermill: -y "name: {}"',
    lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
)
MODEL = Rule("the name of a CNN of torchvision or timm", _is_classifier)
WIDTH = whole(SMALLEST, LARGEST)
BITS = items(WIDTH)._replace(
    allowed=f"a list of different whole numbers from {SMALLEST} to {LARGEST}; for papermill: "
    '-y "bits: [2, 4]"'
)
SHARE = Rule("a number between 0 and 1", lambda value: number(0).holds(value) and 0 < value < 1)
LEVELS = items(number(1))

# The rule of each parameter that several studies have.
_RULES = {
    "model": MODEL,
    "dataset": one_of(DATASETS),
    "data_root": PLACE,
    "output_dir": PLACE,
    "download": TRUTH,
    "pretrained": TRUTH,
    "scheduler": TRUTH,
    "idm": TRUTH,
    "layer": NAME,
    "device": NAME,
    "train_images": optional(whole(1)),
    "search_share": SHARE,
    "image_size": whole(1, 10_000),
    "bits": BITS,
    "levels": LEVELS,
    "uniform": optional(items(whole(1))),
    "primary": optional(items(whole(1))),
    "float_epochs": whole(0),
    "epochs": whole(0),
    "batch_size": whole(1),
    "bitops": number(0),
    "lr": number(0),
    "float_lr": number(0),
    "search_images": whole(1),
    "probe_images": whole(1),
    "recalibration_images": whole(2),
    "compared_images": whole(0),
    "watched": items(WIDTH, least=0),
    "repeats": whole(1),
    "workers": whole(0, 1000),
    "training": OPTIONS,
    "float_training": OPTIONS,
    "float_seed": optional(whole(0, RANGES["seed"][1])),
    "float_cutout": whole(0),
    "float_weights": optional(PLACE),
    "search": OPTIONS,
    "judged": one_of(("top1", "search_top1")),
    "seed": whole(0, RANGES["seed"][1]),
    "seeds": items(whole(0, RANGES["seed"][1])),
}


def check_parameters(rules: Mapping[str, Rule] | None = None, /, **parameters: object) -> None:
    """Checks parameters by name; raises ValueError for the first one that is not allowed.

    `rules`: of parameters that only this study has, or for which it allows other values. In a
    notebook, raises TypeError for a parameter that papermill sets but the notebook does not have.
    """
    _check_names()
    rules = _RULES | (rules or {})
    for name, value in parameters.items():
        _check(name, value, rules[name])
        if name in ("training", "float_training"):
            check_training(name, value)


def _check_names() -> None:
    """Raises TypeError, in a notebook, for a parameter of papermill that it does not have.

    papermill only warns of one. It puts what it sets into a cell of its own, behind the cell of
    the notebook's parameters.
    """
    ipython = sys.modules.get("IPython")  # loaded in a notebook; a machine may have none
    shell = ipython and ipython.get_ipython()
    known: set[str] = set()
    for cell in shell.user_ns["In"] if shell else ():  # the cells that ran, in this order
        names = set(re.findall(r"^(\w+)(?: *:.*?)? *=", cell, re.MULTILINE))
        # Without parameters of its own, a notebook takes any.
        if cell.startswith("# Parameters\n") and known and not names <= known:
            unknown = sorted(names - known)
            raise TypeError(f"unknown parameters {unknown}: this notebook has {sorted(known)}")
        known |= names


def _check(name: str, value: object, rule: Rule) -> None:
    if not rule.holds(value):
        message = f"{name}={value!r} is not allowed: {rule.allowed}"
        raise ValueError(message + explain_text(value))


def check_training(name: str, options: object, own: Sequence[str] = ("epochs", "seed")) -> None:
    """Checks options of TrainConfig. `own`: those that the study sets itself.

    Raises TypeError or ValueError, with `name`, for options and values that are not allowed.
    """
    _check(name, options, OPTIONS)
    known = [field.name for field in fields(TrainConfig) if field.name not in own]
    if wrong := [key for key in options if key not in known]:
        raise ValueError(f"{name}: {wrong} are not allowed here: options are {known}")
    try:
        TrainConfig(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def check_subset(name: str, chosen: Collection, among: Collection) -> None:
    """Raises ValueError, with `name`, if something chosen is not among the others."""
    if not set(chosen) <= set(among):
        raise ValueError(f"{name}={chosen!r} is not allowed: some of {list(among)}")


def check_layers(name: str, chosen: Sequence[str], model: str, kernel: int | None = None) -> None:
    """Raises ValueError, with `name`, unless all are convolutions of a model.

    `kernel`: side of their kernels; None: any.
    """
    convs = {n: m for n, m in create(model, 10).named_modules() if isinstance(m, nn.Conv2d)}
    check_subset(name, chosen, [n for n, m in convs.items() if kernel in (None, *m.kernel_size)])


def open_folder(output_dir: str | Path) -> Path:
    """The folder to write to. Raises ValueError, before any work, if it cannot be written to."""
    check_parameters(output_dir=output_dir)
    try:
        check_writable(Path(output_dir) / "metrics.csv")
    except ValueError as error:
        raise ValueError(f"output_dir={output_dir!r} is not allowed: {error}") from error
    return Path(output_dir)
