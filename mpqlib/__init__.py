"""One-shot mixed-precision quantization: train once, search bit-widths by inference alone."""

from . import data, models
from .files import load_weights, remembered, save_weights
from .network.bits import BitConfig, largest, sample, smallest
from .network.cost import bitops, bitops_at, check_budget, model_size
from .network.supernet import Supernet
from .report import plots, runs
from .report.policy import load_policy, save_policy
from .search.assignment import assignment, front, quick_table
from .search.error import batch_error, kl_error
from .search.greedy import greedy
from .search.sensitivity import Sensitivity, measure_sensitivity
from .studies.adapters import load_adapted, save_adapted
from .studies.ranks import cora
from .training.calibration import fit_steps
from .training.evaluation import correct_means, decoded, evaluate, recalibrate, select_device
from .training.loop import TrainConfig, train
from .training.step import one_shot_gradients

__all__ = [
    "BitConfig",
    "Sensitivity",
    "Supernet",
    "TrainConfig",
    "assignment",
    "batch_error",
    "bitops",
    "bitops_at",
    "check_budget",
    "cora",
    "correct_means",
    "data",
    "decoded",
    "evaluate",
    "fit_steps",
    "front",
    "greedy",
    "kl_error",
    "largest",
    "load_adapted",
    "load_policy",
    "load_weights",
    "measure_sensitivity",
    "model_size",
    "models",
    "one_shot_gradients",
    "plots",
    "quick_table",
    "recalibrate",
    "remembered",
    "runs",
    "sample",
    "save_adapted",
    "save_policy",
    "save_weights",
    "select_device",
    "smallest",
    "train",
]
