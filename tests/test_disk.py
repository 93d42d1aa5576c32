"""On a full disk or in a read-only folder, the error names file and cause, and nothing is lost."""

import copy
import os
import resource
import shlex
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from conftest import SMALL, TinyNet

import mpqlib
from mpqlib.report import runs

NOBODY = 65534  # the user who owns nothing
FULL = "No space left on device|File too large"


@pytest.fixture(params=["small disk", "limit of file sizes"])
def folder(request, tmp_path):
    """A folder for `full`: a disk of its own where we may mount one, or else a plain folder."""
    if request.param == "small disk":
        mount = f"mount -t tmpfs -o size=1m none {shlex.quote(str(tmp_path))}"
        subprocess.run(mount, shell=True, capture_output=True)
    yield tmp_path
    if os.path.ismount(tmp_path):
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@contextmanager
def full(folder, limit=500):
    """No space: the disk of `folder` is filled, or files cannot grow beyond `limit` bytes."""
    filler, (soft, hard) = folder / "filler", resource.getrlimit(resource.RLIMIT_FSIZE)
    own_disk = os.path.ismount(folder)
    if own_disk:
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(2**21))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        filler.unlink(missing_ok=True)


@contextmanager
def read_only(folder):
    """The folder cannot be written to, not even by root, who becomes another user."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def save_policy(folder, supernet, value):
    mpqlib.save_policy(folder, supernet, supernet.uniform(2), {"value": value})


def save_run(folder, supernet, value):
    figure, axis = plt.subplots()
    axis.plot(torch.rand(100))
    metrics = pd.DataFrame({"value": [value]})
    runs.save_run(folder, parameters={}, metrics=metrics, source={}, figures={"curve": figure})
    plt.close(figure)


def save_table(folder, supernet, value):
    errors = {config: value + i for i, config in enumerate(map(supernet.uniform, (2, 3, 4)))}
    table = mpqlib.measure_sensitivity(supernet, lambda config: errors.get(config, value))
    table.save(folder / "table.csv")


# How a file is saved, and the file that is named if there is no space.
SAVERS = {
    "policy": (save_policy, "supernet.safetensors"),
    "run": (save_run, "parameters.yaml|curve.png"),  # the first that does not fit
    "table": (save_table, "table.csv"),
}
each_saver = pytest.mark.parametrize("saver", SAVERS)


def contents(folder):
    """Name -> bytes of all files, hidden ones included."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@each_saver
def test_what_was_saved_before_the_disk_was_full_stays(saver, folder, supernet):
    save, name = SAVERS[saver]
    save(folder, supernet, 1.0)
    before = contents(folder)
    with full(folder), pytest.raises(ValueError, match=f"({name}) cannot be written: .*({FULL})"):
        save(folder, supernet, 2.0)
    assert contents(folder) == before
    save(folder, supernet, 2.0)
    after = contents(folder)
    assert after.keys() == before.keys() and after != before


@each_saver
def test_nothing_is_left_of_a_first_save_on_a_full_disk(saver, folder, supernet):
    save, name = SAVERS[saver]
    with full(folder), pytest.raises(ValueError, match=f"({name}) cannot be written: .*({FULL})"):
        save(folder, supernet, 1.0)
    assert not list(folder.iterdir())


def test_no_weights_are_left_of_a_policy_that_does_not_fit(tmp_path, supernet):
    about = {"note": [0] * 20_000}  # takes more space in policy.json than beside the weights
    config, folder = supernet.uniform(2), tmp_path / "full"
    policy = mpqlib.save_policy(tmp_path / "free", supernet, config, about)
    size = (policy.parent / "supernet.safetensors").stat().st_size
    save_policy(folder, supernet, 1.0)
    before = contents(folder)
    with full(folder, size), pytest.raises(ValueError, match=rf"policy\.json cannot .*({FULL})"):
        mpqlib.save_policy(folder, supernet, config, about)
    assert contents(folder) == before


def test_training_resumes_after_the_disk_was_full(folder, dataset):
    file, network = folder / "run.pt", TinyNet()
    expected, _ = mpqlib.train(copy.deepcopy(network), dataset, SMALL)
    first_epoch = []

    with ExitStack() as disk:

        def fill(run):
            if run.step == run.steps + 1:
                first_epoch.append(file.read_bytes())
                disk.enter_context(full(folder, 10_000))

        with pytest.raises(ValueError, match=rf"run\.pt cannot be written: .*({FULL})"):
            mpqlib.train(copy.deepcopy(network), dataset, SMALL, checkpoint=file, watch=fill)
    assert contents(folder) == {"run.pt": first_epoch[0]}
    resumed, history = mpqlib.train(copy.deepcopy(network), dataset, SMALL, checkpoint=file)
    assert len(history) == SMALL.epochs
    assert all(map(torch.equal, resumed.state_dict().values(), expected.state_dict().values()))


@each_saver
def test_a_read_only_folder_is_named_and_stays_as_it_was(saver, supernet):
    save, _ = SAVERS[saver]
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to other users
        folder = Path(name)
        save(folder, supernet, 1.0)
        before = contents(folder)
        with (
            read_only(folder),
            pytest.raises(ValueError, match=f"{folder}.* cannot be written: .*Permission denied"),
        ):
            save(folder, supernet, 2.0)
        assert contents(folder) == before


def test_a_checkpoint_in_a_read_only_folder_is_refused_before_training(dataset):
    steps = []
    with tempfile.TemporaryDirectory() as name, read_only(Path(name)):
        file = Path(name) / "run.pt"
        with pytest.raises(ValueError, match=f"{file} cannot be written: .*Permission denied"):
            mpqlib.train(TinyNet(), dataset, SMALL, checkpoint=file, watch=steps.append)
        assert not steps and not list(Path(name).iterdir())


def test_a_study_in_a_read_only_folder_computes_nothing():
    with tempfile.TemporaryDirectory() as name, read_only(Path(name)):
        file = Path(name) / "run.json"
        with pytest.raises(ValueError, match=f"{file} cannot be written: .*Permission denied"):
            mpqlib.remembered(file, {}, lambda: pytest.fail("computed"))
