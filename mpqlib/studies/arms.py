"""Arms of an ablation: rules of training, each switched alone, and what all arms share."""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from ..network.supernet import Supernet
from ..training.loop import TrainConfig
from .parameters import Rule, check_parameters, check_subset, check_training

# The four arms of RFQuant's Table 6: name -> options of TrainConfig and of Supernet.
ARMS = {
    "plain": {"training": {"scheduler": False, "idm": False}},
    "scheduler": {"training": {"scheduler": True, "idm": False}},
    "IDM": {"training": {"scheduler": False, "idm": True}},
    "both": {"training": {"scheduler": True, "idm": True}},
}
NAMED_ARMS = Rule(
    'a dict of arms, such as {"no IDM": {"training": {"idm": False}}}',
    lambda value: isinstance(value, Mapping) and len(value) > 0,
)
# What is measured of a trained supernet, in this order, and settings that it does not depend on.
KINDS = {
    "uniform": {"levels", "search_images", "compared_images", "watched"},
    "policies": {"uniform", "primary", "compared_images", "watched"},
    "outputs": {"levels", "search_images", "uniform", "primary", "watched"},
}


@dataclass(frozen=True)
class Setting:
    """Settings of an ablation: what all arms share, and the options of each arm.

    Raises ValueError for a value that is not allowed, and TypeError for an unknown setting or
    option; the message names the arm.
    """

    model: str
    dataset: str
    train_images: int | None  # None: all
    search_share: float  # share of the training images held out for the search
    image_size: int  # side in pixels
    bits: list[int]  # candidates
    levels: list[float]  # budgets, as in `bitops_at`
    float_epochs: int
    epochs: int  # of the supernet
    search_images: int  # images that searches score on
    training: dict = field(default_factory=dict)  # options of TrainConfig, of both networks
    float_training: dict = field(default_factory=dict)  # others for the float network
    float_seed: int | None = None  # all seeds start from its float network; None: from their own
    float_cutout: int = 0  # side of the square cut out of the float network's images, in pixels
    float_weights: str | None = None  # file of a trained float network; None: train one
    arms: dict = field(default_factory=lambda: deepcopy(ARMS))  # name -> options, as ARMS
    uniform: list[int] | None = None  # uniform configurations to measure; None: all `bits`
    primary: list[int] | None = None  # those whose mean test top-1 is the primary outcome
    recalibration_images: int = 2000  # training images for batch-norm statistics
    # Images on which outputs at the smallest and largest bits are compared, as in 06_idm_density
    compared_images: int = 0
    # Bit-widths at which latent weights are recorded during training, as in 02_latent_distance
    watched: list[int] = field(default_factory=list)

    def __post_init__(self):
        check_parameters({"arms": NAMED_ARMS}, **vars(self))
        if min(self.levels) < min(self.bits):
            least = f"each at least {min(self.bits)}, the smallest of bits"
            raise ValueError(f"levels={self.levels!r} is not allowed: {least}")
        check_subset("uniform", self.uniform or [], self.bits)
        check_subset("primary", self.primary or [], self.uniform or self.bits)
        check_subset("watched", self.watched, self.bits)
        check_training("float_training", self.training | self.float_training)
        for name, options in self.arms.items():
            _check_arm(self, name, options)

    def arm_bits(self, arm: str) -> list[int]:
        """Candidates of an arm."""
        return self.arms[arm].get("bits", self.bits)

    def uniform_bits(self, arm: str) -> list[int]:
        """The uniform configurations of an arm that are measured."""
        return [b for b in self.uniform or self.bits if b in self.arm_bits(arm)]

    def arm_levels(self, arm: str) -> list[float]:
        """The budgets of an arm: those that its candidates can keep."""
        return [level for level in self.levels if level >= min(self.arm_bits(arm))]

    @property
    def kinds(self) -> list[str]:
        """What is measured: some of KINDS, in their order."""
        return [kind for kind in KINDS if kind != "outputs" or self.compared_images]

    @property
    def primary_name(self) -> str:
        """What the row of the primary outcome is called."""
        return f"mean of uniform {', '.join(map(str, self.primary))}"

    @property
    def timed_arm(self) -> str:
        """The arm whose steps are timed: the last one."""
        return list(self.arms)[-1]

    @property
    def about(self) -> dict:
        """Settings that the checkpoints of all arms share, beside their TrainConfig."""
        names = ("model", "dataset", "train_images", "image_size", "search_share", "bits")
        return {name: getattr(self, name) for name in names}

    def about_arm(self, arm: str, kind: str) -> dict:
        """Settings that the rows of an arm depend on, of one of `kinds`."""
        others = {"arms"} | KINDS[kind]
        own = {name: value for name, value in asdict(self).items() if name not in others}
        return own | {"arm": self.arms[arm]}

    def float_seed_of(self, seed: int) -> int:
        """The seed of the float network that the supernets of `seed` start from."""
        return seed if self.float_seed is None else self.float_seed

    def float_config(self, seed: int) -> TrainConfig:
        """How the float network that `seed` starts from is trained."""
        options = self.training | self.float_training
        return TrainConfig(epochs=self.float_epochs, seed=self.float_seed_of(seed), **options)

    def arm_config(self, arm: str, seed: int) -> TrainConfig:
        """How the supernet of an arm is trained. Raises ValueError for an unknown arm."""
        if arm not in self.arms:
            raise ValueError(f"arm={arm!r} is not allowed: one of {list(self.arms)}")
        options = self.training | self.arms[arm].get("training", {})
        return TrainConfig(epochs=self.epochs, seed=seed, **options)


def _check_arm(setting: Setting, name: str, options: object) -> None:
    """Raises TypeError or ValueError, with the name of the arm, for options that do not exist."""
    if not isinstance(name, str) or not name.replace(" ", "").replace("_", "").isalnum():
        raise ValueError(f"arm {name!r} is not allowed: letters, digits and spaces, for file names")
    if not isinstance(options, Mapping) or not set(options) <= {"training", "supernet", "bits"}:
        allowed = 'a dict of "training" and "supernet", each a dict of options, and "bits"'
        raise ValueError(f"arm {name!r}: {options!r} is not allowed: {allowed}")
    check_subset(f"arm {name!r}: bits", setting.arm_bits(name), setting.bits)
    check_training(f"arm {name!r}", setting.training | options.get("training", {}))
    own = dict(options.get("supernet", {}))
    known = inspect.signature(Supernet).parameters.values()
    known = [parameter.name for parameter in known if parameter.kind is parameter.KEYWORD_ONLY]
    if unknown := sorted(set(own) - set(known)):
        raise TypeError(f"arm {name!r}: unknown options of Supernet {unknown}: some of {known}")
    own.pop("overrides", None)  # they name layers of the model
    with torch.random.fork_rng(devices=[]):
        smallest = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
        try:
            Supernet(smallest, torch.rand(2, 3, 1, 1), setting.bits, **own)
        except (TypeError, ValueError) as error:
            raise type(error)(f"arm {name!r}: {error}") from error
