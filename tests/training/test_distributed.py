"""Several processes train as one does; they end, and start again, together."""

import copy
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TinyNet, images
from torch.utils.data import TensorDataset

from mpqlib.files import load_state, save_state
from mpqlib.network.supernet import Supernet
from mpqlib.training.loop import Run, TrainConfig, train

SMALL = TrainConfig(
    epochs=2,
    batch_size=16,
    schedule_parts=3,
    warmup=1,
    step_travel=0.01,
    freeze_start=1,
    freeze_every=1,
    grid_start=1,
)
EXACT = TensorDataset(images(48).tensors[0].double(), images(48).tensors[1])  # in float64


def network(one_shot):
    """A network in float64, or a supernet of it. All layers have a choice of bits."""
    torch.manual_seed(1)
    net = TinyNet().double()
    return Supernet(net, EXACT.tensors[0][:16], (2, 3, 4), edge_bits=None) if one_shot else net


def in_group(rank, world, folder, task):
    """Runs `task(rank)` in a process of a group, and stores what it returns."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    save_state(folder / f"{rank}", task(rank))
    dist.destroy_process_group()


def in_processes(world, folder, task):
    """What `task(rank)` returns in each of `world` processes. Forked: importing takes seconds."""
    mp.start_processes(in_group, (world, folder, task), world, start_method="fork")
    return [load_state(folder / f"{rank}") for rank in range(world)]


def trained(one_shot, config):
    """For `in_processes`: trains, and returns all numbers."""

    def task(rank):
        drawn = []
        draw = Run.draw_configs
        Run.draw_configs = lambda run: drawn.append(draw(run)) or drawn[-1]
        try:
            model, history = train(network(one_shot), EXACT, config)
        finally:
            Run.draw_configs = draw
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in history]
        return {"model": model.state_dict(), "history": history, "drawn": str(drawn)}

    return task


@pytest.mark.parametrize(("world", "one_shot"), [(2, True), (4, True), (2, False)])
def test_several_processes_train_as_one_does(world, one_shot, tmp_path):
    task = trained(one_shot, SMALL)
    alone, found = task(0), in_processes(world, tmp_path, task)
    for each in found:
        for a, b in ((each, found[0]), (each, alone)):
            print(
                {
                    k: float((a["model"][k].double() - b["model"][k].double()).abs().max())
                    for k in a["model"]
                }
            )
            print(a["history"], b["history"], a["drawn"] == b["drawn"])
