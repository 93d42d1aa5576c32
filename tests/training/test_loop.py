"""The training loop: its numbers, resuming, settings, and stopping when numbers are not finite."""

import copy
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL, TinyNet, images
from launch import torchrun
from torch import nn
from torch.utils.data import TensorDataset

from mpqlib.data import InMemory
from mpqlib.files import load_state, save_state, save_weights
from mpqlib.network.quantizer import Quantizer
from mpqlib.network.supernet import Supernet
from mpqlib.search.error import batch_error
from mpqlib.training.distributed import process_group, rank_and_size
from mpqlib.training.loop import Run, TrainConfig, load_batches, train


def numbers(history):
    """A history without what the clock says."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def same(a, b):
    """Whether two models hold the same tensors, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_same_seed_same_numbers_and_another_seed_others(supernet, dataset):
    runs = [
        train(copy.deepcopy(supernet), dataset, replace(SMALL, seed=seed)) for seed in (0, 0, 1)
    ]
    assert same(runs[0][0], runs[1][0]) and numbers(runs[0][1]) == numbers(runs[1][1])
    assert not same(runs[0][0], runs[2][0])


def test_training_does_not_touch_the_global_generator(supernet, dataset):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(supernet, dataset, SMALL)
    assert torch.equal(before, torch.get_rng_state())


def test_batch_norms_of_a_float_network_belong_to_its_averaged_weights():
    torch.manual_seed(0)
    dataset = images(48)
    model, _ = train(TinyNet(), dataset, replace(SMALL, lr=0.1, warmup=0))
    fresh = copy.deepcopy(model).train()
    for norm in (m for m in fresh.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0  # the running statistics are those of the last batch
    fresh(dataset.tensors[0])  # all 48 images are one batch
    for key, value in fresh.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(model.state_dict()[key], value, msg=key)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.momentum == 0.1 and not norm.training for norm in norms)
    untrained, _ = train(copy.deepcopy(model), dataset, replace(SMALL, epochs=0))
    assert same(untrained, model)


def test_norms_that_a_network_keeps_in_eval_mode_stay_as_they_are():
    class Frozen(TinyNet):
        def train(self, mode=True):
            super().train(mode)
            for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.eval()
            return self

    network = Frozen()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    model, _ = train(network, images(48), SMALL)
    after = model.state_dict()
    assert before and all(torch.equal(after[key], value) for key, value in before.items())


def test_images_in_memory_are_trained_on_in_batches():
    stored = torch.randint(256, (48, 3, 8, 8), dtype=torch.uint8)
    labels = images(48).tensors[1]
    inside = InMemory(stored, labels, mean=(0.5,) * 3, std=(0.25,) * 3)
    outside = TensorDataset((stored / 255 - 0.5) / 0.25, labels)
    found = []
    for dataset in (inside, outside):
        torch.manual_seed(0)
        found.append(train(TinyNet(), dataset, SMALL)[0].state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key])


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_in_memory_resumes_to_the_same_numbers(workers, tmp_path):
    stored = torch.randint(256, (48, 3, 8, 8), dtype=torch.uint8)
    labels, augmented = images(48).tensors[1], dict(padding=2, flip=True)
    dataset = InMemory(stored, labels, mean=(0.5,) * 3, std=(0.25,) * 3, **augmented)
    straight, history = train(network(True), dataset, SMALL)
    options = dict(checkpoint=tmp_path / "run.pt", checkpoint_minutes=0, workers=workers)
    for step in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            train(network(True), dataset, SMALL, watch=interrupt(step), **options)
    model, resumed = train(network(True), dataset, SMALL, **options)
    assert same(model, straight) and numbers(resumed) == numbers(history)
    plain, _ = train(network(True), dataset.without_augmentation(), SMALL)
    assert not same(plain, straight)


class Augmented(TensorDataset):
    """Images with noise from the global generator."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape), y


AUGMENTED = Augmented(*images(48).tensors)


def network(one_shot):
    """A network with dropout, or a supernet of it."""
    torch.manual_seed(1)
    net = nn.Sequential(TinyNet(), nn.Dropout(0.2))
    if not one_shot:
        return net
    # All four layers have a choice, so that the scheduler freezes one of them.
    return Supernet(net, images(16, seed=1).tensors[0], (2, 3, 4), edge_bits=None)


@pytest.fixture(scope="module")
def straight():
    """Uninterrupted training: float and one-shot."""
    return {one_shot: train(network(one_shot), AUGMENTED, SMALL) for one_shot in (False, True)}


def interrupt(step):
    """For `watch`: interrupts training after so many steps."""

    def watch(run):
        if run.step == step:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("minutes", [0, 10])
@pytest.mark.parametrize("one_shot", [True, False])
def test_an_interrupted_run_resumes_to_the_same_numbers(one_shot, minutes, straight, tmp_path):
    options = dict(checkpoint=tmp_path / "run.pt", checkpoint_minutes=minutes)
    for step in sorted(random.Random(minutes).sample(range(1, 10), 4)):
        with pytest.raises(KeyboardInterrupt):
            train(network(one_shot), AUGMENTED, SMALL, watch=interrupt(step), **options)
        if options["checkpoint"].exists():  # the step that was interrupted is not saved
            done = load_state(options["checkpoint"])["step"]
            assert done == (step - 1 if minutes == 0 else (step - 1) // 3 * 3)
    taken = []
    watch = lambda run: taken.append(run.step)  # noqa: E731
    model, history = train(network(one_shot), AUGMENTED, SMALL, watch=watch, **options)
    assert taken == list(range(done + 1, 10))
    assert same(model, straight[one_shot][0])
    assert numbers(history) == numbers(straight[one_shot][1])
    taken.clear()
    model, again = train(network(one_shot), AUGMENTED, SMALL, watch=watch, **options)
    assert not taken and again == history and same(model, straight[one_shot][0])


def test_workers_do_not_change_the_numbers(straight, tmp_path):
    options = dict(checkpoint=tmp_path / "run.pt", checkpoint_minutes=0)
    with pytest.raises(KeyboardInterrupt):
        train(network(True), AUGMENTED, SMALL, workers=2, watch=interrupt(5), **options)
    model, history = train(network(True), AUGMENTED, SMALL, workers=1, **options)
    assert same(model, straight[True][0]) and numbers(history) == numbers(straight[True][1])


class Workers(TensorDataset):
    """Images that hold the number of the process that loads them."""

    def __getitem__(self, index):
        return torch.full((3, 8, 8), float(os.getpid())), 0


def test_workers_stay_alive_between_epochs():
    run = Run.start(SMALL, network(False), images=48)
    batches, found = load_batches(run, Workers(*images(48).tensors), torch.device("cpu"), 2), []
    for _ in range(2):
        run.start_epoch()
        found.append({float(x.max()) for x, _ in batches})
    assert found[0] == found[1] and len(found[0]) == 2 and os.getpid() not in found[0]


def test_checkpoints_come_when_their_time_has_come(tmp_path, monkeypatch):
    clock, saved, path = [0.0], [], tmp_path / "run.pt"
    monkeypatch.setattr("mpqlib.training.loop.time.monotonic", lambda: clock[0])

    def watch(run):
        saved.append(load_state(path)["step"] if path.exists() else None)
        clock[0] += 60  # a minute a step

    config = replace(SMALL, batch_size=6, epochs=2)  # 8 steps an epoch
    train(network(False), AUGMENTED, config, checkpoint=path, checkpoint_minutes=3, watch=watch)
    assert saved == [None, None, None, 3, 3, 3, 6, 6, 8, 8, 8, 11, 11, 11, 14, 14]
    assert load_state(path)["step"] == 16


KILLS = int(os.environ.get("KILLS", 4))  # in each test; CONTRIBUTING names this variable
LONG = replace(SMALL, epochs=2 * KILLS)


def die_in_the_next_write(rng, note):
    """Kills this process when it has written a random part of its next file."""
    write = Path.write_bytes

    def write_a_part(path, data):
        write(path, data[: rng.randrange(len(data) + 1)])
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = write_a_part


def die_soon(rng, note):
    """Kills this process from outside at a random time, within some steps or a part of one."""
    command = 'sleep "$0"; touch "$1"; kill -9 "$2"'
    subprocess.Popen(["sh", "-c", command, *map(str, (rng.uniform(0, 0.03), note, os.getpid()))])


def train_and_die(folder, kills, start):
    """Trains in one of the processes of the `start`-th start, counted from 0.

    In each of the first `kills` starts, a process is killed: in every third one the first process
    in the middle of a checkpoint, in the others any process at any time. Notes beside `folder` say
    that it was killed, and that the next start found a part of a checkpoint.
    """
    if start % 3 == 1 and list(folder.glob(".run.pt.*")):
        (folder.parent / f"part{start}").touch()
    rng, steps = random.Random(start), []
    last = rng.randint(1, 4)  # step of this start

    def watch(run):
        steps.append(run.step)
        if start < kills and len(steps) == last and rank == victim:
            die(rng, folder.parent / f"death{start}")

    with process_group("cpu"):
        rank, world = rank_and_size()
        die, victim = die_soon, rng.randrange(world)
        if start % 3 == 0:
            die, victim = die_in_the_next_write, 0  # the only one that writes
        options = dict(checkpoint=folder / "run.pt", checkpoint_minutes=0, watch=watch)
        model, history = train(network(True), AUGMENTED, LONG, **options)
    found = {"model": model.state_dict(), "history": numbers(history), "starts": start + 1}
    save_state(folder / f"result{rank}", found)


def start_one_process(folder, kills):
    """Starts a process of `train_and_die` again and again until it ends by itself."""
    context = multiprocessing.get_context("fork")
    for start in range(kills + 1):
        process = context.Process(target=train_and_die, args=(folder, kills, start))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if start < kills else 0)


def start_two_processes(folder, kills):
    """Lets torchrun start two processes again and again until they end by themselves."""

    def task():
        train_and_die(folder, kills, int(os.environ["TORCHELASTIC_RESTART_COUNT"]))

    torchrun(2, task, restarts=kills)


@pytest.mark.parametrize(("start", "world"), [(start_one_process, 1), (start_two_processes, 2)])
def test_a_killed_run_resumes_to_the_same_numbers(start, world, tmp_path):
    for name, kills in {"straight": 0, "killed": KILLS}.items():
        (tmp_path / name).mkdir()
        start(tmp_path / name, kills)
    for rank in range(world):
        expected = load_state(tmp_path / "straight" / f"result{rank}")
        found = load_state(tmp_path / "killed" / f"result{rank}")
        assert (expected["starts"], found["starts"]) == (1, KILLS + 1)
        assert found["history"] == expected["history"]
        assert found["model"].keys() == expected["model"].keys()
        for name, tensor in found["model"].items():
            assert torch.equal(tensor, expected["model"][name])
    assert len(list(tmp_path.glob("death*"))) == KILLS
    assert len(list(tmp_path.glob("part*"))) == math.ceil(KILLS / 3)
    files = {"run.pt", *(f"result{rank}" for rank in range(world))}
    assert {path.name for path in (tmp_path / "killed").iterdir()} == files


def test_a_killed_writer_s_leftover_is_removed_at_the_start(supernet, dataset, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".run.pt.{gone.pid}"
    left.write_text("half")
    train(supernet, dataset, replace(SMALL, epochs=0), checkpoint=tmp_path / "run.pt")
    assert not left.exists()


@pytest.mark.parametrize(
    ("setting", "about", "named"),
    [
        ({"lr": 0.5}, {"model": "tiny"}, "lr: 0.04 there, 0.5 now"),
        ({}, {"model": "large"}, r"about\['model'\]: 'tiny' there, 'large' now"),
        ({}, {}, r"about\['model'\]: 'tiny' there, 'not set' now"),
        ({}, {"model": "tiny", "data": 1}, r"about\['data'\]: 'not set' there, 1 now"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(dataset, tmp_path, setting, about, named):
    path = tmp_path / "run.pt"
    train(TinyNet(), dataset, SMALL, checkpoint=path, about={"model": "tiny"})
    with pytest.raises(ValueError, match=rf"run.pt holds the result of other settings \({named}"):
        train(TinyNet(), dataset, replace(SMALL, **setting), checkpoint=path, about=about)


@pytest.mark.parametrize("name", ["", "a" * 253])
def test_a_checkpoint_that_cannot_be_written_is_named_before_training(dataset, tmp_path, name):
    steps = []
    with pytest.raises(ValueError, match=f"{name} cannot be written"):
        train(TinyNet(), dataset, SMALL, checkpoint=tmp_path / name, watch=steps.append)
    assert not steps


def test_a_checkpoint_of_another_network_data_set_or_kind_is_refused(supernet, dataset, tmp_path):
    path = tmp_path / "run.pt"
    train(TinyNet(), dataset, SMALL, checkpoint=path)
    with pytest.raises(ValueError, match=r"run.pt holds .* \(bits of 'depthwise': 'not set' there"):
        train(supernet, dataset, SMALL, checkpoint=path)
    with pytest.raises(ValueError, match="images: 48 there, 64 now"):
        train(TinyNet(), images(64), SMALL, checkpoint=path)
    save_state(path, {"settings": 1})
    with pytest.raises(
        ValueError, match=r"run.pt is not a checkpoint of training, or .* remove it"
    ):
        train(TinyNet(), dataset, SMALL, checkpoint=path)
    path.write_bytes(b"PK text")
    with pytest.raises(ValueError, match=r"run.pt is damaged.*remove it to start anew"):
        train(TinyNet(), dataset, SMALL, checkpoint=path)


def test_a_checkpoint_of_other_candidates_is_refused(dataset, tmp_path):
    path, x = tmp_path / "run.pt", dataset[:8][0]
    train(Supernet(TinyNet(), x, (2, 4)), dataset, SMALL, checkpoint=path)
    with pytest.raises(ValueError, match=r"bits of 'pointwise': \[\[2, 4\], \[2, 4\]\] there, "):
        train(Supernet(TinyNet(), x, (3, 4)), dataset, SMALL, checkpoint=path)


def test_numpy_scalars_paths_tuples_and_path_strings_are_resumable(dataset, tmp_path):
    config = TrainConfig(
        epochs=np.int64(2), batch_size=np.int32(16), lr=np.float32(0.25), idm=np.bool_(False)
    )
    assert config == TrainConfig(epochs=2, batch_size=16, lr=0.25, idm=False)
    assert all(type(getattr(config, f.name)) is f.type for f in fields(config))
    about = {"bits": (2, np.int64(3)), "data": tmp_path, "share": np.float64(0.1), "n": {"a": 1}}
    options = dict(checkpoint=str(tmp_path / "run.pt"), about=about)
    _, history = train(TinyNet(), dataset, config, **options)
    _, again = train(TinyNet(), dataset, config, **options)
    assert history == again


def test_about_that_cannot_be_stored_is_refused_at_the_start(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"about\['mean'\]=tensor.* \(Tensor\) cannot be stored"):
        train(TinyNet(), dataset, SMALL, about={"mean": torch.zeros(2)})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", -1, "a whole number, at least 0"),
        ("epochs", 2.5, "a whole number, at least 0"),
        ("epochs", True, "a whole number, at least 0"),
        ("batch_size", 0, "a whole number, at least 1"),
        ("schedule_parts", 10**7, "a whole number, from 1 to 100000"),
        ("batch_size", "64", "a whole number, at least 1"),
        ("batch_size", None, "a whole number, at least 1"),
        ("random_paths", 1.5, "a whole number, at least 0"),
        ("lr", -0.1, "a number, at least 0"),
        ("lr", math.nan, "a number, at least 0"),
        ("lr", math.inf, "a number, at least 0"),
        ("lr", "0.1", "a number, at least 0"),
        ("lr", True, "a number, at least 0"),
        ("ema_decay", 1.1, "a number, from 0 to 1"),
        ("seed", 2**63, "a whole number, from 0 to 9223372036854775807"),
        ("idm", 1, "True or False"),
        ("idm", "True", "True or False"),
        ("dtype", "half", "auto, float32 or bfloat16"),
        ("dtype", 16, "auto, float32 or bfloat16"),
    ],
)
def test_settings_that_are_not_allowed_are_named(name, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not allowed: {allowed}")):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("text", "hint"), [("1e-3", "1.0e-3 or 0.001"), ("5E4", "5.0e+4 or 50000")]
)
def test_a_number_that_yaml_reads_as_text_is_explained(text, hint):
    value = yaml.safe_load(text)
    message = re.escape(f"'{text}' is text in YAML: write {hint}")
    for name in ("lr", "epochs"):
        with pytest.raises(ValueError, match=f"{name}='{text}' is not allowed: .*{message}$"):
            TrainConfig(**{name: value})
    for written in hint.split(" or "):
        assert yaml.safe_load(written) == float(text)


def test_an_unknown_setting_is_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        TrainConfig(**{"epoch": 3})


def test_a_warmup_that_never_ends_is_refused():
    with pytest.raises(
        ValueError, match=r"warmup=5\.0 is not allowed: fewer parts than schedule_p"
    ):
        TrainConfig(schedule_parts=5, warmup=5)
    assert TrainConfig(schedule_parts=5, warmup=4.5).warmup == 4.5


@pytest.mark.filterwarnings("ignore:.*from a non-meta parameter:UserWarning")
def test_a_checkpoint_comes_back_on_the_model_s_device(tmp_path):
    Run.start(SMALL, network(True), images=48).save(tmp_path / "run.pt")
    run = Run.start(SMALL, network(True).to("meta"), images=48)  # stands for an accelerator
    run.load(tmp_path / "run.pt")
    assert run.first_step_sizes.device.type == "meta"


def test_settings_at_their_bounds_are_allowed():
    config = TrainConfig(epochs=0, ema_decay=1, clip_value=math.inf, grid_start=0, lr=0)
    assert TrainConfig(**asdict(config)) == config


def test_fewer_images_than_a_batch_are_refused(supernet):
    with pytest.raises(ValueError, match="batch_size=16 is not allowed: the data set has 10 image"):
        train(supernet, images(10), SMALL)


@pytest.mark.parametrize("workers", ["2", -1, True, 1.0, None])
def test_workers_that_are_no_whole_number_are_named(dataset, workers):
    with pytest.raises(ValueError, match=f"workers={workers!r} is not allowed: a whole number"):
        train(TinyNet(), dataset, SMALL, workers=workers)


def test_a_config_of_another_type_is_named(dataset):
    with pytest.raises(ValueError, match=r"config=.*epochs.* is not allowed: a TrainConfig"):
        train(TinyNet(), dataset, {"epochs": 1})


@pytest.mark.parametrize("minutes", [-1, math.nan, "10", True, None])
def test_checkpoint_minutes_that_are_not_allowed_are_named(dataset, minutes):
    with pytest.raises(ValueError, match=f"checkpoint_minutes={minutes!r} is not allowed"):
        train(TinyNet(), dataset, SMALL, checkpoint_minutes=minutes)


@pytest.mark.parametrize("one_shot", [True, False])
def test_training_stops_at_the_step_whose_loss_is_not_finite(one_shot, straight, tmp_path):
    shuffled = torch.Generator().manual_seed(0)
    torch.randint(2**31, (), generator=shuffled)
    order = torch.randperm(48, generator=shuffled)
    spoiled = Augmented(*(t.clone() for t in AUGMENTED.tensors))
    spoiled.tensors[0][order[40]] = math.nan  # read in the third of three steps
    options = dict(checkpoint=tmp_path / "run.pt", checkpoint_minutes=0)
    message = "^epoch 1 of 3, step 3 of 3: loss=nan.*first layer .* is '(0.)?stem.0'"
    with pytest.raises(FloatingPointError, match=message):
        train(network(one_shot), spoiled, SMALL, **options)
    assert load_state(options["checkpoint"])["step"] == 2
    model, history = train(network(one_shot), AUGMENTED, SMALL, **options)
    assert same(model, straight[one_shot][0])
    assert numbers(history) == numbers(straight[one_shot][1])


@pytest.mark.parametrize("one_shot", [True, False])
def test_training_that_diverges_stops(one_shot, tmp_path):
    path = tmp_path / "run.pt"
    config = replace(SMALL, epochs=20, lr=1e6, step_travel=1e6)
    message = r"^(epoch|before epoch|after epoch) \d+ of 20.*first layer that is not finite is '"
    with pytest.raises(FloatingPointError, match=message):
        train(network(one_shot), AUGMENTED, config, checkpoint=path, checkpoint_minutes=0)
    kept = load_state(path)
    tensors = [t for part in ("model", "average") for t in kept[part].values()]
    assert all(t.isfinite().all() for t in tensors)


def test_weights_that_are_not_finite_are_neither_saved_nor_returned(tmp_path):
    config = replace(SMALL, epochs=1, batch_size=48, lr=1e300, warmup=0)
    with pytest.raises(FloatingPointError, match=r"^after epoch 1 of 1: .* first layer .*'stem.0'"):
        train(TinyNet(), images(48), config, checkpoint=tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


class Root(nn.Module):
    """Adds the square root of zero, whose gradient is not a number."""

    def __init__(self):
        super().__init__()
        self.net, self.odd = TinyNet(), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.net(x) + (0 * self.odd).sqrt()


def test_a_gradient_that_is_not_finite_stops_training_although_the_loss_is_finite(dataset):
    model = Root()
    with pytest.raises(FloatingPointError, match=r"step 1 of 3: the losses are finite.*'odd'"):
        train(model, dataset, SMALL)
    assert all(p.isfinite().all() for p in model.parameters())  # the step was not taken


def test_gradients_from_before_do_not_count(dataset):
    models = [TinyNet() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].eval()(dataset.tensors[0]).sum().backward()
    first, second = (train(model, dataset, SMALL)[0] for model in models)
    assert same(first, second)


@pytest.mark.parametrize("region_decay", [True, False])
def test_frozen_weights_stay_and_the_others_train(dataset, region_decay):
    net = TinyNet()
    net.stem[0].weight.requires_grad_(False)
    supernet = Supernet(net, dataset.tensors[0], (2, 4))
    before = {name: p.clone() for name, p in supernet.named_parameters()}
    trained, _ = train(supernet, dataset, replace(SMALL, region_decay=region_decay))
    for model in (supernet, trained):
        for name, p in model.named_parameters():
            if name.endswith("op.weight"):
                assert torch.equal(p, before[name]) == ("stem" in name)


class Tied(TinyNet):
    """Two linear layers share one weight."""

    def __init__(self):
        super().__init__()
        self.middle, self.last = nn.Linear(12, 12), nn.Linear(12, 12)
        self.middle.weight = self.last.weight

    def forward(self, x):
        x = self.norm(self.depthwise(self.stem(x)))
        return self.last(self.middle(self.pointwise(x.relu()).mean((2, 3))))


def test_tied_weights_stay_tied_and_are_saved(dataset, tmp_path):
    model, _ = train(Tied(), dataset, SMALL, checkpoint=tmp_path / "run.pt")
    assert model.middle.weight is model.last.weight
    save_weights(tmp_path / "weights.safetensors", model, {})
    again, _ = train(Tied(), dataset, SMALL, checkpoint=tmp_path / "run.pt")
    assert again.middle.weight is again.last.weight and same(model, again)


def test_scheduler_freezes_only_when_it_is_on(dataset):
    supernet = network(True)
    for on in (True, False):
        config = replace(SMALL, scheduler=on)
        _, history = train(copy.deepcopy(supernet), dataset, config)
        assert history[0]["decisions"] == []  # freeze_start is 1
        (decision,) = history[1]["decisions"]
        assert decision["step"] == 3
        assert len(decision["frozen"]) == on
        assert list(decision["turbulence"]) == supernet.searchable


def test_a_short_run_makes_all_decisions_of_the_release(dataset):
    torch.manual_seed(0)
    supernet = Supernet(TinyNet(), dataset.tensors[0], (2, 3, 4))
    config = TrainConfig(epochs=25, batch_size=8, lr=0.01, step_travel=0.01)  # 150 steps
    _, history = train(supernet, dataset, config)
    steps = [decision["step"] for row in history for decision in row["decisions"]]
    assert steps == [*range(7, 108, 2), 119, 134, 149]
    for epoch, row in enumerate(history):
        assert all(decision["step"] // 6 == epoch for decision in row["decisions"])


def test_of_several_decisions_at_one_step_the_last_counts():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 3, 1) for _ in range(40)]
    net, x = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(8, 3, 2, 2)
    supernet = Supernet(net, x, (2, 4), edge_bits=None)
    run = Run.start(TrainConfig(epochs=1, batch_size=8), supernet, images=40)
    run.step = 2  # of 5: the parts 31 to 60 of 150 begin here, with decisions before 31, ..., 59
    decision = run.choose_candidates()
    share = 0.2 + 0.3 * (1 + math.cos(math.pi * 27 / 75)) / 2  # after the 27th decision
    assert len(decision["frozen"]) == int(40 * share)


def test_the_distance_that_steps_moved_is_stored(supernet, dataset):
    def sizes():
        quantizers = [m for m in supernet.modules() if isinstance(m, Quantizer)]
        return [q.step(b).item() for q in quantizers for b in q.bits]

    before = sizes()
    _, history = train(supernet, dataset, replace(SMALL, epochs=1))
    changes = [abs(now / then - 1) for now, then in zip(sizes(), before, strict=True)]
    assert max(changes) > 0
    assert history[0]["steps_moved"] == pytest.approx(sum(changes) / len(changes), rel=1e-4)


def test_idm_only_when_it_is_on(supernet, dataset):
    for on in (True, False):
        config = replace(SMALL, idm=on)
        _, history = train(copy.deepcopy(supernet), dataset, config)
        assert (history[0]["idm"] > 0) == on


def test_one_norm_for_all_pairs_trains_too(dataset):
    supernet = Supernet(TinyNet(), dataset.tensors[0], (2, 4), pair_norms=False)
    _, history = train(supernet, dataset, SMALL)
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_learns(supernet, dataset, dtype):
    config = replace(SMALL, epochs=12, dtype=dtype)
    _, history = train(supernet, dataset, config)
    assert history[-1]["accuracy"] > 0.8 > history[0]["accuracy"]
    assert history[-1]["accuracy_random"] > history[0]["accuracy_random"]


def test_each_step_trains_in_train_mode_whatever_watch_does(supernet, dataset):
    def watch(run):
        batch_error(run.model, *dataset[:8])(run.model.uniform(4))

    plain, _ = train(copy.deepcopy(supernet), dataset, SMALL)
    watched, _ = train(supernet, dataset, SMALL, watch=watch)
    assert same(plain, watched)


def test_every_step_is_watched_and_changes_nothing(dataset):
    seen, results = [], []
    config = TrainConfig(epochs=2, batch_size=16)
    for watch in (None, lambda run: seen.append((len(run.history), run.config.epochs))):
        torch.manual_seed(0)
        model, _ = train(TinyNet(), dataset, config, watch=watch)
        results.append(model.state_dict())
    assert seen == [(0, 2)] * 3 + [(1, 2)] * 3
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("clip_value", [1.0, 0.01, math.inf])
def test_float_training_is_plain_sgd(dataset, clip_value):
    torch.manual_seed(0)
    model = TinyNet()
    twin = copy.deepcopy(model).train()
    config = TrainConfig(
        epochs=1, batch_size=48, warmup=0, ema_decay=0.0, lr=0.1, clip_value=clip_value
    )
    trained, _ = train(model, dataset, config)
    generator = torch.Generator().manual_seed(0)
    torch.randint(2**31, (), generator=generator)
    order = torch.randperm(48, generator=generator)
    x, y = (t[order] for t in dataset.tensors)
    F.cross_entropy(twin(x), y).backward()
    if clip_value == 0.01:
        assert sum(int((q.grad.abs() > clip_value).sum()) for q in twin.parameters()) > 10
    for (name, p), q in zip(trained.named_parameters(), twin.parameters(), strict=True):
        gradient = q.grad.clamp(-clip_value, clip_value) + 2.5e-5 * q * (q.dim() > 1)
        # Nesterov's first step moves by 1 + momentum times the gradient
        torch.testing.assert_close(p, q - 0.1 * 1.9 * gradient, msg=name)


@pytest.mark.parametrize("clip_value", [1e-3, 1.0])
def test_one_shot_gradients_are_clipped(supernet, dataset, clip_value):
    config = replace(
        SMALL, epochs=1, batch_size=48, warmup=0, momentum=0.0, lr=1.0, clip_value=clip_value
    )
    after = list(supernet.parameters())  # the trained ones, once trained
    before = [p.detach().clone() for p in after]
    train(supernet, dataset, replace(config, weight_decay=0.0, step_travel=0.0))
    with torch.no_grad():
        moved = [float((p - q).abs().max()) for p, q in zip(after, before, strict=True)]
    if clip_value == 1e-3:
        assert max(moved) == pytest.approx(clip_value, rel=1e-3)
    else:
        assert 1e-2 < max(moved) <= 1 + 1e-6
