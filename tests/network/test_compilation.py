"""What is compiled is the function itself, in all types and modes of its tensors."""

import os
import subprocess
import sys

import torch
from torch import nn

from mpqlib.network.compilation import one_pass
from mpqlib.network.quantizer import lsq, quantize


def test_one_program_after_another_is_compiled(caplog):
    """Each type, mode and kind of shape needs a program of its own: PyTorch must not give up."""
    compiled = one_pass(quantize, "cpu")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for mode, rows in ((torch.no_grad, 3), (torch.inference_mode, 3), (torch.no_grad, 1)):
            with mode():
                x = torch.linspace(-2, 2, 12).reshape(rows, -1).to(dtype)
                step = torch.full((rows, 1), 0.25, dtype=dtype)
                arguments = x, step, torch.tensor(-2.0).to(step), torch.tensor(1.0).to(step)
                assert torch.equal(compiled(*arguments), quantize(*arguments))
    assert "recompile_limit" not in caplog.text


def test_a_forked_process_can_train_after_compilation():
    """In a new process: what runs first decides whether PyTorch starts threads."""
    code = """
import os
import torch
from mpqlib.network.quantizer import lsq
bounds = torch.tensor(-2.0), torch.tensor(1.0)
lsq(torch.ones(3), torch.tensor(0.5), *bounds)
if os.fork() == 0:
    x = torch.ones(3, requires_grad=True)
    lsq(x, torch.tensor(0.5), *bounds).sum().backward()
    os._exit(0)
raise SystemExit(os.wait()[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_without_a_compiler_a_network_is_converted_with_a_warning(tmp_path):
    code = """
import torch
from torch import nn
from mpqlib import Supernet
x = torch.ones(2, 3, 4, 4)
supernet = Supernet(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 2)), x, (2, 4))
assert supernet(x, supernet.uniform(2)).shape == (2, 2)
"""
    without = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=without, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mpqlib runs without torch.compile, which fails here" in done.stderr


def test_a_compiled_network_holds_the_functions_themselves():
    class Net(nn.Module):
        def forward(self, x):
            return lsq(x, torch.tensor(0.5), torch.tensor(-2.0), torch.tensor(1.0))

    x = torch.linspace(-2, 2, 9)
    compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), Net()(x))
