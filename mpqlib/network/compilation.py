"""Functions of tensors, compiled so that they read and write memory once."""

import logging
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch._dynamo import config

PROGRAMS = 64  # that may be compiled of one function


def _import_quietly() -> None:
    """Imports what torch.compile needs, without its warning of a CUDA toolkit that has no GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import torch.utils.cpp_extension  # noqa: F401
    finally:
        logger.setLevel(level)


@cache
def can_compile(device: str) -> bool:
    """Whether torch.compile works on this type of device, such as "cuda"; warns if not.

    A CPU needs a C++ compiler.
    """
    # If the first backward pass came after a compilation, PyTorch would start threads for it, and
    # processes that are forked from this one could not train.
    with torch.inference_mode(False), torch.enable_grad():
        torch.zeros(1, requires_grad=True).sum().backward()
    try:
        _import_quietly()
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # of many kinds, such as a missing compiler
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"mpqlib runs without torch.compile, which fails here: {reason}. Training is slower",
            stacklevel=2,
        )
        return False
    return True


@cache
def _compile(function: Callable) -> Callable:
    # One program for each number type, for tensors made in inference mode and others, and so on:
    # more than the 8 after which PyTorch would give up.
    config.recompile_limit = max(config.recompile_limit, PROGRAMS)
    # One process compiles: to start others would take longer than two small functions do.
    return torch.compile(function, dynamic=True, options={"compile_threads": 1})


def one_pass(function: Callable, device: str) -> Callable:
    """`function`, compiled for tensors of any shape on this type of device.

    Its operations then take one pass over memory together, where otherwise each takes its own. The
    first call takes some seconds; PyTorch keeps the program on disk. Returns `function` itself
    where nothing can be compiled, and within a larger function that is being compiled.
    """
    if torch.compiler.is_compiling() or not can_compile(device):
        return function
    return _compile(function)
