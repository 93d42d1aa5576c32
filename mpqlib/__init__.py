"""One-shot mixed-precision quantization: train once, search bit-widths by inference alone."""

from . import data, models
from .files import load_weights, remembered, save_weights
from .network.bits import BitConfig, largest, sample, smallest
from .network.cost import bitops, bitops_at, check_budget, model_size
from .network.supernet import Supernet
from .report import plots, runs
from .report.policy import load_policy, save_policy
from .search.error import batch_error
from .search.greedy import greedy
from .training.evaluation import decoded, evaluate, recalibrate, select_device
from .training.loop import TrainConfig, train
from .training.step import one_shot_gradients

__all__ = [
    "BitConfig",
    "Supernet",
    "TrainConfig",
    "batch_error",
    "bitops",
    "bitops_at",
    "check_budget",
    "data",
    "decoded",
    "evaluate",
    "greedy",
    "largest",
    "load_policy",
    "load_weights",
    "model_size",
    "models",
    "one_shot_gradients",
    "plots",
    "recalibrate",
    "remembered",
    "runs",
    "sample",
    "save_policy",
    "save_weights",
    "select_device",
    "smallest",
    "train",
]
