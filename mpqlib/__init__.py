"""One-shot mixed-precision quantization: train once, search bit-widths by inference alone."""

from . import data, models, plots, report
from .checkpoint import load_weights, remembered, save_weights
from .cost import bitops, bitops_at, check_budget, model_size
from .evaluation import decoded, evaluate, recalibrate, select_device
from .one_shot import one_shot_gradients
from .quantizer import compile_quantizers
from .search import batch_error, greedy
from .supernet import BitConfig, Supernet, largest, sample, smallest
from .training import TrainConfig, train

__all__ = [
    "BitConfig",
    "Supernet",
    "TrainConfig",
    "batch_error",
    "bitops",
    "bitops_at",
    "check_budget",
    "compile_quantizers",
    "data",
    "decoded",
    "evaluate",
    "greedy",
    "largest",
    "load_weights",
    "model_size",
    "models",
    "one_shot_gradients",
    "plots",
    "recalibrate",
    "remembered",
    "report",
    "sample",
    "save_weights",
    "select_device",
    "smallest",
    "train",
]
