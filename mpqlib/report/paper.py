"""What the papers claim, and what we claim ourselves: each judged by one measure on one run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

OURS = "ours: "  # marked our own findings in the texts of earlier claims.json files
# Columns that are measured without images, or on data that each seed has of its own. All others are
# measured on images that the seeds of a run share, or on some of the same.
WITHOUT_IMAGES = (
    *("distance", "spread", "movement", "extent", "crossings", "flips"),
    *("direction_variance", "norm_variance", "gradient_variance", "seconds"),
)


@dataclass(frozen=True)
class Claim:
    """States that the value of one arm is above or below that of another.

    `value`: a column of the metrics. `arm`, `base`: two entries of the column "arm". `sign`: of the
    difference arm minus base, +1 or -1. `paper`: the paper's own figure. `unit`: the column whose
    entries are paired, such as "seed"; the rows of one entry are averaged first. `where`: only rows
    with these entries, by column. `source`: "paper" or "ours". `margin`: the claim also holds if
    the difference has the other sign but is smaller than this, such as for "no worse than float".
    Raises ValueError for another sign or source, or a negative margin.
    """

    text: str
    value: str
    arm: str
    base: str
    sign: int
    paper: str = "no figure"
    unit: str = "seed"
    where: Mapping[str, str | int | float] = field(default_factory=dict)
    source: str = "paper"
    margin: float = 0.0

    def __post_init__(self):
        if self.text.startswith(OURS):
            object.__setattr__(self, "text", self.text.removeprefix(OURS))
            object.__setattr__(self, "source", "ours")
        if self.sign not in (1, -1):
            raise ValueError(f"sign={self.sign!r} is not allowed: +1 or -1")
        if self.source not in ("paper", "ours"):
            raise ValueError(f"source={self.source!r} is not allowed: 'paper' or 'ours'")
        if not self.margin >= 0:
            raise ValueError(f"margin={self.margin!r} is not allowed: a number from 0")

    @property
    def shares_images(self) -> bool:
        """Whether the units of the claim, such as seeds, are measured on the same images."""
        return self.unit != "image" and self.value not in WITHOUT_IMAGES


@dataclass(frozen=True, kw_only=True)
class Listed(Claim):
    """A claim of the first page: where it is made, how it is measured, and which run judges it.

    `place`: paper and figure or table. `measure`: what `value` is, with its unit. `notebook`: the
    one that tests the claim. `run`: of that notebook, None if there is none yet.
    """

    place: str
    measure: str
    notebook: str
    run: str | None


TOP1 = "test top-1 (%)"
LITE0 = "ImageNet top-1 (%), EfficientNet-Lite0"
FIG1 = dict(  # a random pass of 2 or 4 bits beside each 4-bit pass, or a second 4-bit pass
    sign=+1,
    arm="shared",
    base="alone",
    place="RFQuant, Fig. 1",
    notebook="01_interference",
    run="seeds",
)
OFF, ON = ({"setting": "primary", "optimum": f"{where} the grid"} for where in ("off", "on"))
SPREAD = "spread of the weights over the second half of training (no unit)"
DIRECTION = "variance of the direction of the gradient (0 to 1)"
SMALL = dict(  # candidates 2 to 6, or 4 to 6
    arm="with 2 and 3", base="without", notebook="02_latent_distance", run="digits"
)
ABLATION = dict(
    value="top1",
    base="plain",
    where={"configuration": "searched 3"},
    place="RFQuant, Table 6",
    measure=f"{TOP1} of the policy searched at the BitOPs of 3 bits",
    notebook="05_scheduler_ablation",
    run="cifar10",
)

# The run of each claim is the largest there is; it is not chosen by its result.
PAPER = [
    Listed(
        "Optimum off the 4-bit grid: if 2 bits share the weights, 4-bit weights are less stable.",
        value="spread",
        where=OFF,
        measure=SPREAD,
        **FIG1,
    ),
    Listed(
        "Optimum on the 4-bit grid: if 2 bits share the weights, 4-bit weights are less stable.",
        value="spread",
        where=ON,
        measure=SPREAD,
        **FIG1,
    ),
    Listed(
        "Optimum off the 4-bit grid: if 2 bits share, the L2-normalised gradient varies more.",
        value="direction_variance",
        where=OFF,
        measure=DIRECTION,
        **FIG1,
    ),
    Listed(
        "Optimum on the 4-bit grid: if 2 bits share, the L2-normalised gradient varies more.",
        value="direction_variance",
        where=ON,
        measure=DIRECTION,
        **FIG1,
    ),
    Listed(
        "With 2 and 3 bits as candidates, latent weights are farther from their 4-bit values.",
        sign=+1,
        value="distance",
        where={"bits": 4},
        place="RFQuant, Fig. 2",
        measure="distance (share of the weights' norm)",
        **SMALL,
    ),
    Listed(
        "With 2 and 3 bits as candidates, latent weights are farther from their 6-bit values.",
        sign=+1,
        value="distance",
        where={"bits": 6},
        place="RFQuant, Fig. 2",
        measure="distance (share of the weights' norm)",
        **SMALL,
    ),
    Listed(
        "With 2 and 3 bits as candidates, the network is less accurate at 6 bits.",
        sign=-1,
        value="top1",
        where={"bits": 6},
        place="RFQuant, Table 1",
        measure=f"{TOP1} at uniform 6 bits",
        **SMALL,
    ),
    Listed(
        "The scheduler makes searched policies more accurate.",
        sign=+1,
        arm="scheduler",
        paper="+0.8 points (ImageNet)",
        **ABLATION,
    ),
    Listed(
        "IDM makes searched policies more accurate.",
        sign=+1,
        arm="IDM",
        paper="+0.4 points (ImageNet)",
        **ABLATION,
    ),
    Listed(
        "Scheduler and IDM together make searched policies more accurate.",
        sign=+1,
        arm="both",
        paper="+1.2 points (ImageNet)",
        **ABLATION,
    ),
    Listed(
        "IDM brings the densities of 2-bit outputs nearer to those of 6-bit outputs.",
        sign=-1,
        value="js",
        arm="IDM",
        base="no IDM",
        place="RFQuant, Fig. 3 and 4",
        measure="Jensen-Shannon distance (0 to 1), mean of all layers",
        notebook="06_idm_density",
        run="digits",
    ),
    Listed(
        "A searched policy is more accurate than uniform 4 bits at equal BitOPs.",
        sign=+1,
        value="top1",
        arm="greedy",
        base="uniform",
        where={"study": "front", "level": 4},
        paper="+0.9 points (EfficientNet-Lite0, ImageNet)",
        place="RFQuant, main tables",
        measure=TOP1,
        notebook="04_search",
        run="cifar10_variants",
    ),
    Listed(
        "On ImageNet, policies at the BitOPs of 4 bits are as accurate as the paper reports.",
        sign=+1,
        value="top1",
        arm="searched",
        base="paper",
        margin=0.5,
        paper="ResNet18 71.0, MobileNetV2 70.7, EfficientNet-Lite0 73.2",
        place="RFQuant, main tables",
        measure="ImageNet top-1 (%), at most 0.5 points below the paper's",
        notebook="07_imagenet",
        run=None,
    ),
    Listed(
        "A supernet that is fine-tuned on another data set is on par with the float network.",
        sign=+1,
        value="top1",
        arm="searched",
        base="float",
        margin=1.0,
        place="RFQuant, transfer",
        measure=f"{TOP1}, at most 1 point below float; short, float has four times the updates",
        notebook="08_transfer",
        run="cifar10",
    ),
    Listed(
        "A searched policy needs no retraining.",
        sign=+1,
        value="top1",
        arm="searched",
        base="retrained",
        margin=0.5,
        place="RFQuant, title",
        measure=f"{TOP1}, at most 0.5 points below the retrained policy",
        notebook="13_retraining",
        run=None,
    ),
    Listed(
        "One weight bit-width for all layers beats mixed bit-widths at equal model size.",
        sign=+1,
        value="top1",
        arm="one",
        base="mixed",
        place="One Weight Bitwidth",
        measure=f"{TOP1} at equal size, mean of all families and sizes; the width is free",
        notebook="09_one_bitwidth",
        run="cifar10_small",
    ),
    Listed(
        "Low-rank adapters recover a part of the accuracy that 4-bit weights lose.",
        sign=+1,
        value="top1",
        arm="adapters",
        base="quantized",
        where={"study": "recovery", "bits": 4, "granularity": "channel", "norms": "kept"},
        place="CoRa",
        measure=f"{LITE0}, norms kept, uniform ranks, 5% added weights",
        notebook="10_cora",
        run="lite0",
    ),
    Listed(
        "Searched adapter ranks beat uniform ranks at equal size.",
        sign=+1,
        value="top1",
        arm="searched",
        base="uniform",
        where={"study": "ranks", "bits": 4},
        place="CoRa",
        measure=f"{LITE0}, 4 bits, norms measured again, 5% added weights",
        notebook="10_cora",
        run="lite0_ranks",
    ),
]

SEARCH = dict(source="ours", place="ours", notebook="04_search", run="cifar10_variants")
ASSIGNMENT = dict(
    sign=-1,
    value="judged",
    arm="assignment",
    base="greedy",
    where={"study": "front"},
    measure="cross-entropy on unseen images (nats), mean of all budgets",
)
UNTRAINED = dict(
    sign=+1,
    value="percent_correct",
    arm="assignment",
    unit="image",
    source="ours",
    place="ours",
    notebook="07_imagenet",
)
LITES = {f"lite{i}": f"EfficientNet-Lite{i}" for i in range(3)}
FINDINGS = [
    *(
        Listed(
            f"Assignment finds policies with lower errors than greedy search: {setting}.",
            **ASSIGNMENT,
            **SEARCH | dict(run=run),
        )
        for setting, run in {
            "small network, digits": "digits",
            "small network, CIFAR-10": "cifar10",
            "ResNet18, digits": "resnet18",
        }.items()
    ),
    Listed(
        "Greedy search finds more accurate policies than random search.",
        sign=+1,
        value="top1",
        arm="greedy",
        base="random",
        where={"study": "front"},
        measure=f"{TOP1}, mean of all budgets",
        **SEARCH,
    ),
    Listed(
        "Greedy search finds more accurate policies than evolutionary search.",
        sign=+1,
        value="top1",
        arm="greedy",
        base="evolution",
        where={"study": "front"},
        measure=f"{TOP1}, mean of all budgets",
        **SEARCH,
    ),
    Listed(
        "Greedy search by error per saved BitOPs beats the paper's rule, a weighted sum of both:"
        " small network, CIFAR-10.",
        sign=-1,
        value="judged",
        arm="ratio",
        base="paper",
        where={"study": "rule"},
        measure="cross-entropy on unseen images (nats)",
        **SEARCH,
    ),
    Listed(
        "A hundredfold weight of IDM makes the network more accurate at 2 bits.",
        sign=+1,
        value="top1",
        arm="IDM x100",
        base="no IDM",
        measure=f"{TOP1} at uniform 2 bits",
        source="ours",
        place="ours",
        notebook="06_idm_density",
        run="digits",
    ),
    Listed(
        "At equal size, 6 bits alone beat 4 bits with adapters, if ranges hold all weights.",
        sign=+1,
        value="top1",
        arm="bits alone",
        base="shared filters",
        where={"study": "depth-wise"},
        source="ours",
        place="ours",
        measure=f"{LITE0}, 6 bits per weight in all",
        notebook="10_cora",
        run="lite0_range",
    ),
    *(
        Listed(
            f"Without training, assignment on 16 images beats uniform bits: {network}.",
            base="uniform",
            where={"study": "uniform"},
            measure="ImageNet top-1 (%), mean of the budgets of 4, 5 and 6 bits",
            run=run,
            **UNTRAINED,
        )
        for run, network in LITES.items()
    ),
    *(
        Listed(
            f"Without training, assignment on {count} images beats the SQNR list: {network}.",
            base="SQNR list",
            where={"study": "policies"},
            measure="ImageNet top-1 (%), mean of six budgets",
            run=run,
            **UNTRAINED,
        )
        for run, network, count in [
            *((run, network, 16) for run, network in LITES.items()),
            ("lite0_search", LITES["lite0"], 64),
        ]
    ),
]
