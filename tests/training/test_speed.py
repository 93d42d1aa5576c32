"""The number type that is measured to be the faster one; a clock of our own tells the time."""

from dataclasses import replace

import pytest
import torch
from conftest import TinyNet, images
from torch import nn

from mpqlib.network.bits import Candidates
from mpqlib.network.compilation import can_compile, one_pass
from mpqlib.network.quantizer import gradients, lsq, quantize
from mpqlib.network.supernet import Supernet
from mpqlib.training import speed
from mpqlib.training.loop import TrainConfig, train
from mpqlib.training.speed import check_choice, faster_dtype, is_worth_compiling

CPU = torch.device("cpu")
SHORT = TrainConfig(epochs=2, batch_size=16, lr=0.05, dtype="auto", compile="never")


@pytest.fixture
def clock(monkeypatch):
    """A clock in a list, which stands still unless it is set."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # Seconds of each call, the first to warm up
        (dict(float32=[9, 3, 3, 3], bfloat16=[9, 2, 2, 2]), "bfloat16"),
        (dict(float32=[1, 2, 2, 2], bfloat16=[90, 1, 1, 1]), "bfloat16"),
        (dict(float32=[90, 1, 1, 1], bfloat16=[1, 2, 2, 2]), "float32"),
        (dict(float32=[1, 2, 2, 2], bfloat16=[1, 1, 90, 1]), "bfloat16"),  # an interruption
        (dict(float32=[1, 2, 2, 2], bfloat16=[1, 2, 2, 2]), "float32"),
    ],
)
def test_the_faster_type_is_chosen(times, expected, clock):
    calls = {name: iter(each) for name, each in times.items()}

    def step(name):
        clock[0] += next(calls[name])

    assert faster_dtype(step, CPU) == expected
    assert [next(each, None) for each in calls.values()] == [None, None]


def test_all_processes_choose_the_same_type(clock, monkeypatch):
    def step(name):
        clock[0] += 2 if name == "float32" else 1

    def add_another_process(times):
        times += torch.tensor([2.0, 4.0])

    assert faster_dtype(step, CPU) == "bfloat16"
    monkeypatch.setattr(speed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(speed.dist, "all_reduce", add_another_process)
    assert faster_dtype(step, CPU) == "float32"


def test_other_types_are_refused():
    for name in ("auto", "float32", "bfloat16"):
        check_choice("dtype", name)
    for name in ("float16", 16, None):
        with pytest.raises(ValueError, match=r"dtype=.* is not allowed: auto, float32 or"):
            check_choice("dtype", name)
    with pytest.raises(ValueError, match="compile='yes' is not allowed: auto, never or always"):
        TrainConfig(compile="yes")


def network(one_shot):
    """A network with dropout, or a supernet of it."""
    torch.manual_seed(1)
    net = nn.Sequential(TinyNet(), nn.Dropout(0.2))
    return Supernet(net, images(16, seed=1).tensors[0], (2, 3, 4)) if one_shot else net


@pytest.mark.parametrize("wide", [Candidates((2, 9), (2,)), Candidates((2,), (2, 9))])
def test_bfloat16_is_refused_for_candidates_it_cannot_hold(wide, monkeypatch):
    torch.manual_seed(1)
    x, other = images(16, seed=1).tensors[0], Candidates((2, 8), (2, 8))
    overrides = {"pointwise": wide, "depthwise": other}
    with pytest.raises(ValueError, match=r"dtype='bfloat16' .*'pointwise' .* 9 bits.* 8 bits"):
        train(
            Supernet(TinyNet(), x, overrides=overrides),
            images(48),
            replace(SHORT, dtype="bfloat16"),
        )
    calls = choose(monkeypatch, "bfloat16")
    _, history = train(Supernet(TinyNet(), x, overrides=overrides), images(48), SHORT)
    assert not calls and history[0]["dtype"] == "float32"
    _, history = train(Supernet(TinyNet(), x, (2, 8)), images(48), SHORT)
    assert calls and history[0]["dtype"] == "bfloat16"


def choose(monkeypatch, name):
    """Both types are run on the model, and `name` is found the faster one. Returns the calls."""
    calls = []

    def measure(step, device):
        for each in ("bfloat16", "float32"):
            step(each)
        calls.append(device)
        return name

    monkeypatch.setattr("mpqlib.training.loop.faster_dtype", measure)
    return calls


def compare(found, expected):
    """Raises AssertionError unless two trainings gave the same numbers, bit for bit."""
    (model, history), (other, rows) = found, expected
    tensors = other.state_dict()
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    for row, own in zip(rows, history, strict=True):
        assert {**row, "seconds": 0} == {**own, "seconds": 0}


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_measuring_changes_nothing_else(one_shot, name, monkeypatch):
    calls = choose(monkeypatch, name)
    found = train(network(one_shot), images(48), SHORT)
    assert calls == [CPU]  # once
    assert [row["dtype"] for row in found[1]] == [name] * 2
    compare(found, train(network(one_shot), images(48), replace(SHORT, dtype=name)))
    assert len(calls) == 1


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_resumed_run_keeps_its_type(step, monkeypatch, tmp_path):
    straight = train(network(True), images(48), replace(SHORT, dtype="bfloat16"))
    options = dict(checkpoint=tmp_path / "run.pt", checkpoint_minutes=0)

    def interrupt(run):
        if run.step == step + 1:
            raise KeyboardInterrupt

    choose(monkeypatch, "bfloat16")
    with pytest.raises(KeyboardInterrupt):
        train(network(True), images(48), SHORT, watch=interrupt, **options)
    calls = choose(monkeypatch, "float32")
    compare(train(network(True), images(48), SHORT, **options), straight)
    assert not calls


def test_compilation_is_worth_it_for_long_training(monkeypatch):
    monkeypatch.setattr(speed, "can_compile", lambda device: True)
    assert not is_worth_compiling(7199, CPU)
    assert is_worth_compiling(7200, CPU)


def test_without_a_compiler_training_is_not_compiled(monkeypatch):
    def fail(function):
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(speed.torch, "compile", fail)
    can_compile.cache_clear()
    with pytest.warns(UserWarning, match=r"torch.compile, which fails here: no C\+\+ compiler\."):
        assert not is_worth_compiling(7200, CPU)
    x = torch.linspace(-2, 2, 9)
    quantized = lsq(x, torch.tensor(0.5), torch.tensor(-2.0), torch.tensor(1.0))
    assert quantized.tolist() == [-1, -1, -1, -0.5, 0, 0.5, 0.5, 0.5, 0.5]
    can_compile.cache_clear()


@pytest.mark.parametrize("long", [False, True])
def test_the_third_step_decides_about_compilation(long, monkeypatch, tmp_path):
    asked, options = [], dict(checkpoint=tmp_path / "run.pt", checkpoint_minutes=0)
    for function in (quantize, gradients):
        one_pass(function, "cpu")  # these stay compiled

    def worth(seconds, device):
        asked.append((seconds, device))
        return long

    monkeypatch.setattr("mpqlib.training.loop.is_worth_compiling", worth)
    monkeypatch.setattr("mpqlib.training.step.torch.compile", lambda model, mode: model)
    config = replace(SHORT, dtype="float32", compile="auto")
    choices = []
    train(
        network(True),
        images(48),
        config,
        watch=lambda run: choices.append((run.compile, run.one_shot.distortions.static)),
        **options,
    )
    chosen = ("always", True) if long else ("never", False)
    assert choices == [("auto", False)] * 2 + [chosen] * 4
    ((seconds, device),) = asked
    assert seconds > 0 and device == CPU
    # A resumed run keeps the choice.
    longer = network(True)
    train(longer, images(48), config, watch=choices.append, **options)
    assert len(asked) == 1
