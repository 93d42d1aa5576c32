"""The training command: profiles, options, the dry run and what it logs."""

import ast
import contextlib
import copy
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from conftest import TinyNet

import mpqlib
from mpqlib import data, models
from mpqlib.files import read_weights
from mpqlib.network.supernet import Supernet
from mpqlib.training.command import MEANINGS, Log, Profile, load_images, main, read_profile
from mpqlib.training.loop import TrainConfig, train

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("imagenet_*.yaml"))
OWN = {"workers", "checkpoint_minutes", "log_dir"}  # settings that the notebook does not have


@pytest.fixture
def tiny(monkeypatch):
    """Any model's name gives a tiny network."""

    def create(name, classes, pretrained):
        net = TinyNet()
        net.last = torch.nn.Linear(12, classes)
        return net

    monkeypatch.setattr(models, "create", create)


def notebook_parameters():
    """Names and defaults of the parameters of 03_train."""
    notebook = json.loads((ROOT / "notebooks" / "03_train.ipynb").read_text())
    (cell,) = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
    body = ast.parse("".join(cell["source"])).body
    return {a.targets[0].id: ast.literal_eval(a.value) for a in body}


def test_settings_and_defaults_are_those_of_the_notebook():
    own = {name: value for name, value in vars(Profile()).items() if name not in OWN}
    notebook = notebook_parameters() | {"data_root": None}  # here, it must be named
    assert own == {name: notebook[name] for name in own}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_of_the_paper_are_complete(path):
    profile = read_profile(path, {})
    config = profile.supernet_config
    assert (config.epochs, config.batch_size, config.lr) == (150, 512, 0.04)
    assert not config.sync_norms  # the release: norms of each GPU's share
    assert profile.pretrained and profile.dataset == "imagenet"
    assert models.preprocessing(profile.model)["image_size"] == profile.image_size == 224


def test_there_is_a_profile_for_each_network():
    names = [read_profile(path, {}).model for path in PROFILES]
    assert names == ["tf_efficientnet_lite0", "mobilenet_v2", "resnet18"]


def test_options_override_the_profile(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("epochs: 7\nbits: [2, 4]\ntraining: {lr: 0.3, momentum: 0.8}\n")
    profile = read_profile(path, {"epochs": 9, "training": {"lr": 0.1}})
    assert (profile.epochs, profile.bits, profile.seed) == (9, [2, 4], 0)
    assert profile.training == {"lr": 0.1, "momentum": 0.8}
    assert profile.float_config == TrainConfig(epochs=4, batch_size=64, lr=0.1, momentum=0.8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "some.yaml: ['epoch'] are not settings; allowed are ['model', 'pretrained'"),
        ("- 3", "some.yaml holds no settings"),
        ("training: 3", "training=3 is not allowed"),
        ("training: {epochs: 8}", "training: ['epochs'] are not allowed here"),
        ("a: b: c", "mapping values are not allowed here"),
    ],
)
def test_profiles_that_are_not_allowed_are_named(text, message, tmp_path, capsys):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        main(["--profile", str(path)])
    assert message in capsys.readouterr().err


def test_dry_run_says_how_long_training_takes_and_writes_nothing(tiny, tmp_path, capsys):
    path = tmp_path / "some.yaml"
    settings = dict(dataset="imagenet", image_size=8, bits=[2, 4], epochs=2, batch_size=16)
    settings |= dict(device="cpu", training={"compile": "never"})
    path.write_text(yaml.safe_dump(settings))
    main(["--profile", str(path), "--dry-run", "--output-dir", str(tmp_path / "out")])
    first, second, speed, hours, memory = capsys.readouterr().out.splitlines()
    # 1,281,167 images without those for searches
    assert first == (
        "resnet18: 1256167 synthetic images of imagenet at 8 px, 2 epochs of 78510 steps"
    )
    assert second == "processes: 1 on cpu, 16 images each in a step"
    rate = float(speed.split()[0])
    assert speed.endswith("% of the time waiting for images, in 20 timed steps")
    expected = 2 * 78510 * 16 / rate / 3600
    assert float(hours.split()[0]) == pytest.approx(expected, rel=0.02)
    assert hours.endswith("hours are expected for 157020 steps of the supernet")
    assert 0.1 < float(memory.split()[0]) < 64 and " GB of memory" in memory
    assert not (tmp_path / "out").exists()


def test_dry_runs_add_rows_to_a_table(tiny, tmp_path, capsys):
    command = ["--dry-run", "--dataset", "imagenet", "--image-size", "8", "--bits", "[2, 4]"]
    command += ["--device", "cpu", "--training", "{compile: never}", "--epochs", "2"]
    for batch in (8, 16):
        file = tmp_path / "out" / "timings.csv"
        main([*command, "--batch-size", str(batch), "--timings", str(file)])
    rows = pd.read_csv(file)
    assert rows["batch_size"].tolist() == [8, 16] and rows["processes"].eq(1).all()
    steps = 2 * (1256167 // rows["batch_size"])
    assert rows["hours"].tolist() == pytest.approx(
        (steps * rows["seconds_per_step"] / 3600).tolist()
    )
    speed = rows["batch_size"] / rows["seconds_per_step"]
    assert rows["images_per_second"].tolist() == pytest.approx(speed.tolist())
    assert [path.name for path in file.parent.iterdir()] == ["timings.csv"]
    for content in ("", "arm,seed\nx,1\n", '{"a": 1}'):
        (tmp_path / "other.csv").write_text(content)
        with pytest.raises(ValueError, match=r"timings=.*other.csv'"):
            main([*command, "--timings", str(tmp_path / "other.csv")])
        assert (tmp_path / "other.csv").read_text() == content
    with pytest.raises(SystemExit):
        main(["--timings", "a.csv"])
    assert "timings='a.csv' needs --dry-run" in capsys.readouterr().err


def test_a_dry_run_downloads_no_weights_and_a_training_does(monkeypatch):
    asked = []

    def create(name, classes, pretrained):
        asked.append(pretrained)
        raise InterruptedError

    monkeypatch.setattr(models, "create", create)
    monkeypatch.setattr(models, "preprocessing", lambda name: {})
    for more in (["--dry-run"], []):
        with pytest.raises(InterruptedError):
            main(["--pretrained", "true", "--image-size", "8", "--device", "cpu", *more])
    assert asked == [False, True]


def test_pretrained_networks_see_images_as_in_their_training(monkeypatch):
    seen = []

    def load(dataset, root, **view):
        seen.append(view)
        raise InterruptedError

    monkeypatch.setattr(data, "load", load)
    for pretrained in (False, True):
        profile = Profile(model="resnet18", pretrained=pretrained, image_size=40, train_images=9)
        with pytest.raises(InterruptedError):
            load_images(profile, synthetic=False)
    own = {"image_size": 40, "train_images": 9}
    assert seen == [own, models.preprocessing("resnet18") | own]


def test_the_seed_alone_decides_and_the_notebook_reads_what_is_written(
    tiny, events, tmp_path, capsys
):
    command = ["--image-size", "8", "--train-images", "64", "--float-epochs", "1", "--epochs", "1"]
    command += ["--device", "cpu", "--bits", "[2, 4]", "--log-dir", str(tmp_path / "logs")]
    found = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # of no effect
        main([*command, "--seed", str(seed), "--output-dir", str(tmp_path / str(i))])
        found.append(read_weights(tmp_path / str(i) / "supernet.safetensors")[0])
    equal = [all(t.equal(other[n]) for n, t in found[0].items()) for other in found[1:]]
    assert equal == [True, False]
    written = yaml.safe_load((tmp_path / "0" / "profile.yaml").read_text())
    assert written.keys() <= notebook_parameters().keys() and written["output_dir"].endswith("0")
    net = TinyNet()
    net.last = torch.nn.Linear(12, 10)
    supernet = Supernet(net, torch.randn(8, 3, 8, 8), (2, 4))
    needed = mpqlib.bitops(supernet.table, supernet.uniform(4)) / 1e9
    budget = float(capsys.readouterr().out.split()[-1])
    assert needed <= budget < needed + 1e-3


def test_a_dry_run_of_too_few_steps_is_refused(tiny):
    with pytest.raises(ValueError, match="epochs=1 is not allowed: a dry run needs 25 steps"):
        main(["--dry-run", "--image-size", "8", "--epochs", "1", "--bits", "[2, 4]"])


def test_a_folder_that_is_not_read_is_named():
    with pytest.raises(ValueError, match="data_root='images' is not read by dataset='digits'"):
        main(["--dry-run", "--data-root", "images"])


def test_a_data_set_without_its_folder_is_named():
    with pytest.raises(ValueError, match="data_root is not set: name the folder of dataset='pets'"):
        main(["--dataset", "pets"])


@pytest.mark.parametrize("name", ["mpqlib.training", "mpqlib.training.command"])
@pytest.mark.filterwarnings("ignore:'mpqlib.training.* found in sys.modules")  # imported above
def test_the_module_is_a_command(name, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__")
    text = " ".join(capfd.readouterr().out.split())
    assert "torchrun" in text and "--profile FILE YAML file of settings" in text
    assert "--bits VALUE candidate bit-widths, each from 2 to 16 (default: [2, 3, 4, 5, 6])" in text
    for setting, meaning in MEANINGS.items():
        assert f"--{setting.replace('_', '-')} VALUE {meaning} (default: " in text
    assert MEANINGS.keys() == vars(Profile()).keys()


def test_without_tensorboard_log_dir_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="log_dir='logs' needs TensorBoard: uv sync --extra"):
        Log("logs")


@pytest.fixture
def events(monkeypatch):
    """What TensorBoard shows after `Log("logs")`: rows of folder, name, value and step.

    TensorBoard is not installed everywhere.
    """
    rows = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            self.folder = log_dir
            rows[:] = [row for row in rows if row[0] != log_dir or row[3] < purge_step]

        def add_scalar(self, *row):
            rows.append((self.folder, *row))

        def flush(self):
            pass

    fake = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    return rows


def test_losses_and_speed_are_logged_for_tensorboard(dataset, events, capsys):
    config = TrainConfig(epochs=2, batch_size=16)
    log = Log("logs")
    train(TinyNet(), dataset, replace(config, epochs=1), watch=log)
    _, history = train(TinyNet(), dataset, config, watch=log)
    names = ["loss", "accuracy", "seconds_per_step", "images_per_second", "waiting"]
    assert [row[:2] for row in events] == 2 * [(str(Path("logs/float")), name) for name in names]
    found = {(name, step): value for _, name, value, step in events}
    assert found["loss", 6] == pytest.approx(history[1]["loss"])
    assert 0 <= found["waiting", 6] <= 1 and found["images_per_second", 6] > 0
    assert "epoch 2 of 2, step 3 of 3: loss" in capsys.readouterr().out


def test_no_step_appears_twice_after_a_resume(supernet, dataset, events, tmp_path, monkeypatch):
    monkeypatch.setattr("mpqlib.training.command.LOG_EVERY", 1)
    config = TrainConfig(epochs=3, batch_size=16)
    train(TinyNet(), dataset, config, watch=Log("logs"))  # 9 steps
    log, how = Log("logs"), dict(checkpoint=tmp_path / "run.pt", checkpoint_minutes=1000)

    def killed(run):
        log(run)
        if run.step == 5:  # the checkpoint is that of step 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(copy.deepcopy(supernet), dataset, config, watch=killed, **how)
    train(supernet, dataset, config, watch=Log("logs"), **how)
    losses = [(Path(folder).name, step) for folder, name, _, step in events if name == "loss"]
    of_float = [("float", step) for step in range(2, 10)]  # the first step starts the clock
    assert losses == of_float + [("supernet", step) for step in (2, 3, 5, 6, 7, 8, 9)]
