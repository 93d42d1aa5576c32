"""Several processes train as one does. They end and start again together."""

import gc
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import yaml
from conftest import SMALL, TinyNet, images
from launch import torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.utils.data import TensorDataset

from mpqlib import models
from mpqlib.files import load_state, load_weights, save_state
from mpqlib.network.supernet import Supernet
from mpqlib.training import loop
from mpqlib.training.command import main
from mpqlib.training.distributed import (
    copy_from_first,
    from_first,
    process_group,
    synced_batch_norm,
)
from mpqlib.training.loop import Run, train

SHORT = replace(SMALL, epochs=2)
EXACT = TensorDataset(images(48).tensors[0].double(), images(48).tensors[1])  # float64


def network(one_shot):
    """A network in float64, or a supernet of it, in which all layers have a choice of bits."""
    torch.manual_seed(1)
    net = TinyNet().double()
    return Supernet(net, EXACT.tensors[0][:16], (2, 3, 4), edge_bits=None) if one_shot else net


def result(one_shot, config=SHORT, dataset=EXACT, **options):
    """Trains; returns all numbers, or the text of an error."""
    try:
        model, history = train(network(one_shot), dataset, config, **options)
    except (ValueError, FloatingPointError) as error:
        return {"error": str(error)}
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in history]
    return {"model": model.state_dict(), "history": history}


def in_group(rank, world, folder, task):
    """Runs `task(rank)` in one process of a group, and stores what it returns."""
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=world)
    save_state(folder / f"result{rank}", task(rank))
    dist.destroy_process_group()


def in_processes(world, folder, task):
    """What `task(rank)` returns in `world` processes. They are forked: importing takes seconds."""
    mp.start_processes(in_group, (world, folder, task), world, start_method="fork")
    return [load_state(folder / f"result{rank}") for rank in range(world)]


def check_equal(found, expected, tolerance):
    """Asserts that numbers of `result` are equal up to a relative and absolute tolerance."""
    close = dict(rtol=tolerance, atol=tolerance)
    for name, tensor in found["model"].items():
        torch.testing.assert_close(tensor, expected["model"][name], **close)
    for row, other in zip(found["history"], expected["history"], strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if name in ("loss", "loss_random", "idm", "steps_moved"):
                assert value == pytest.approx(other[name], rel=tolerance, abs=tolerance)
            elif name.startswith("accuracy"):
                assert value == pytest.approx(other[name], abs=1e-6)  # float32
            else:
                assert value == other[name]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Uninterrupted one-shot training in two processes."""
    return in_processes(2, tmp_path_factory.mktemp("pair"), lambda rank: result(True))


def test_two_processes_train_a_supernet_as_one_does(pair):
    check_equal(pair[0], result(True), 1e-12)
    check_equal(pair[1], pair[0], 0)


@pytest.mark.parametrize(("world", "one_shot"), [(4, True), (2, False)])
def test_more_processes_and_float_networks(world, one_shot, tmp_path):
    found = in_processes(world, tmp_path, lambda rank: result(one_shot))
    check_equal(found[0], result(one_shot), 1e-12)
    for other in found[1:]:
        check_equal(other, found[0], 0)


def test_without_synced_norms_processes_agree_on_other_numbers(pair, tmp_path):
    config = replace(SHORT, sync_norms=False)
    found = in_processes(2, tmp_path, lambda rank: result(True, config))
    check_equal(found[1], found[0], 0)
    assert abs(found[0]["history"][-1]["loss"] - pair[0]["history"][-1]["loss"]) > 1e-4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_process_takes_what_the_first_one_has(layout, tmp_path):
    def task(rank):
        tensor = torch.full((2, 3, 2, 2), float(rank)).to(memory_format=layout)
        copy_from_first([tensor])
        return {"tensor": tensor, "value": from_first({"rank": rank})}

    for found in in_processes(2, tmp_path, task):
        assert found["tensor"].count_nonzero() == 0 and found["value"] == {"rank": 0}


def test_every_process_draws_the_same_configurations(tmp_path, monkeypatch):
    drawn, draw = [], Run.draw_configs
    monkeypatch.setattr(Run, "draw_configs", lambda run: drawn.append(draw(run)) or drawn[-1])

    def task(rank):
        result(True)
        return {"drawn": [str(config) for configs in drawn for config in configs]}

    first, second = in_processes(2, tmp_path, task)
    assert first == second and len(set(first["drawn"])) > 12  # 4 in each of 6 steps


@pytest.mark.parametrize("affine", [True, False])
def test_synced_norm_is_the_norm_of_the_whole_batch(affine, tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(6, 3, 2, 5, generator=generator).double() for _ in range(2))
    x = 100 + x.to(memory_format=torch.channels_last)
    own = [torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([0.0, 1.0, -1.0]).double()]

    def outputs(norm, rows):
        part = x[rows].detach().requires_grad_()
        affines = [t.clone().requires_grad_() for t in own] if affine else []
        running = [torch.zeros(3).double(), torch.ones(3).double()] if affine else [None, None]
        y = norm(part, *running, *affines, training=True, momentum=0.3, eps=1e-3)
        (y * weights[rows]).sum().backward()
        grads = [t.grad for t in affines]
        return {"y": y.detach(), "x": part.grad, "running": running if affine else [], "own": grads}

    half = lambda rank: slice(3 * rank, 3 * rank + 3)  # noqa: E731
    found = in_processes(2, tmp_path, lambda rank: outputs(synced_batch_norm, half(rank)))
    expected = outputs(F.batch_norm, slice(None))
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([each[name] for each in found]), expected[name])
    for each in found:
        torch.testing.assert_close(each["running"], expected["running"])
    summed = [sum(parts) for parts in zip(*(each["own"] for each in found), strict=True)]
    torch.testing.assert_close(summed, expected["own"])


def test_a_number_that_is_not_finite_in_one_process_ends_all(tmp_path):
    spoiled = TensorDataset(*(t.clone() for t in EXACT.tensors))
    spoiled.tensors[0][7] = math.nan
    found = in_processes(2, tmp_path, lambda rank: result(True, dataset=spoiled))
    assert "loss=nan" in found[0]["error"] and found[0] == found[1]


def test_what_processes_cannot_share_is_refused(tmp_path):
    odd, compiled = replace(SHORT, batch_size=15), replace(SHORT, compile="always")
    task = lambda rank: {"found": [result(True, config) for config in (odd, compiled)]}  # noqa: E731
    for each in in_processes(2, tmp_path, task):
        first, second = (found["error"] for found in each["found"])
        assert first == "batch_size=15 is not allowed: a multiple of 2, the number of processes"
        assert second.startswith("compile='always' is not allowed for several processes with sync")


def test_processes_that_read_different_checkpoints_end(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "from_first", lambda value: 3)
    with pytest.raises(ValueError, match="at step 0 here, but at step 3 for the first process"):
        train(network(False), EXACT, SHORT, checkpoint=tmp_path / "run.pt")


def test_a_forked_process_does_not_collect_the_garbage_of_its_parent(tmp_path):
    class Garbage:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            (tmp_path / f"collected {os.getpid()}").touch()

    gc.disable()  # not before the fork
    Garbage()
    in_processes(1, tmp_path, lambda rank: {"n": gc.collect()})
    gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.glob("collected*")] == [f"collected {os.getpid()}"]


def fail():
    raise OSError("the disk is full")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("end", "message"), [(fail, "the disk is full"), (die, "SIGKILL")])
def test_a_process_that_fails_ends_the_job_with_its_error(end, message):
    def watch(run):
        if run.step == 2 and dist.get_rank() == 2:
            end()

    def task():
        with process_group("cpu"):
            train(network(False), EXACT, replace(SHORT, batch_size=12), watch=watch)

    # A busy machine looks so late, too: all processes would have ended with some error.
    with pytest.raises(ChildFailedError, match=rf"rank +: 2 [^$]*{message}"):
        torchrun(3, task, interval=2)


def test_torchrun_restarts_and_training_resumes_to_the_same_numbers(pair, tmp_path):
    taken = []

    def watch(run):
        taken.append(run.step)
        if (
            run.step == 4
            and dist.get_rank() == 1
            and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    def task():
        options = dict(checkpoint=tmp_path / "run.pt", checkpoint_minutes=0, watch=watch)
        with process_group("cpu"):
            save_state(
                tmp_path / f"result{dist.get_rank()}", result(True, **options) | {"n": taken}
            )

    torchrun(2, task, restarts=1)
    for rank in range(2):
        found = load_state(tmp_path / f"result{rank}")
        assert found["n"] in ([4, 5, 6], [5, 6])
        check_equal(found, pair[0], 0)


def test_a_process_without_an_accelerator_of_its_own_is_named(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name, number in {"cuda": 2, "cuda:1": 0}.items():
        monkeypatch.setenv("LOCAL_RANK", str(number))
        found = torch.device(name)
        monkeypatch.setattr("mpqlib.training.distributed.select_device", lambda _, d=found: d)
        message = (
            f"device='{name}' is not allowed for 3 processes .* 'cpu', or 'cuda' for at most 2"
        )
        with pytest.raises(ValueError, match=message), process_group(name):
            pass


def test_the_command_trains_in_two_processes_and_resumes(tmp_path, monkeypatch, capfd):
    def create(name, classes, pretrained):
        net = TinyNet()
        net.last = torch.nn.Linear(12, classes)
        return net

    monkeypatch.setattr(models, "create", create)
    command = ["--output-dir", str(tmp_path), "--image-size", "8", "--train-images", "128"]
    command += ["--float-epochs", "1", "--epochs", "2", "--device", "cpu", "--bits", "[2, 4]"]
    torchrun(2, main, command)
    text = capfd.readouterr().out
    assert "resnet18: 128 images of digits at 8 px, 2 epochs of 2 steps" in text
    assert text.count("epoch 2 of 2, step 2 of 2: loss") == 1  # printed by one process
    assert "images/s" in text and "of the time waiting for images" in text
    assert f"papermill notebooks/03_train.ipynb out.ipynb -f {tmp_path / 'profile.yaml'}" in text
    names = ["float.pt", "history.json", "profile.yaml", "supernet.pt", "supernet.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    stored = yaml.safe_load((tmp_path / "profile.yaml").read_text())
    assert stored["epochs"] == 2 and not {"data_root", "workers"} & stored.keys()
    net = Supernet(create("", 10, False), torch.randn(8, 3, 8, 8), (2, 4))
    about = load_weights(tmp_path / "supernet.safetensors", net)
    assert about["model"] == "resnet18" and about["bits"] == [2, 4]
    main(command)  # in one process: both trainings are done
    assert "loss" not in capfd.readouterr().out
