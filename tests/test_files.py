"""Files: whole or as they were, checked by their hash, refused in plain words, never executed."""

import hashlib
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyNet, images
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpqlib import files
from mpqlib.files import (
    load_state,
    load_weights,
    plain,
    remembered,
    remove_leftovers,
    save_atomically,
    save_json,
    save_state,
    save_together,
    save_weights,
    set_tensors,
)
from mpqlib.network.supernet import Supernet

STATE = {
    "weights": {"a": torch.arange(6.0).reshape(2, 3), 3: torch.tensor(7)},
    "rates": [0.1, math.inf, (0.9, 0.999)],
    "done": True,
    "name": 'a "quoted" \\ name',
    "nothing": None,
}
ABOUT = {"bits": [2, 3], "lr": 0.1}


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def forget():
    raise AssertionError("computed again")


# How a file of each kind is written and read.
KINDS = {
    "state": (lambda path: save_state(path, STATE), load_state),
    "weights": (
        lambda path: save_weights(path, linear(), ABOUT),
        lambda p: load_weights(p, linear()),
    ),
    "result": (
        lambda path: remembered(path, ABOUT, lambda: [{"top1": 71.25, "name": "a"}]),
        lambda path: remembered(path, ABOUT, forget),
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def refuse(read, path):
    """Asserts that `path` is refused by name, with a remedy, without PyTorch's advice."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read(path)
    message = str(caught.value)
    assert re.search("remove it to|get it again|name another file", message)
    assert "weights_only" not in message and "pickle" not in message.lower()
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@each_kind
def test_damaged_bits_and_bytes_are_found(kind, tmp_path):
    write, read = KINDS[kind]
    path, rng = tmp_path / "file", random.Random(0)
    write(path)
    read(path)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        if kind == "result" and same_json(damaged, whole):
            continue
        path.write_bytes(damaged)
        refuse(read, path)
    for _ in range(100):
        damaged = bytearray(whole)
        place = rng.randrange(len(whole))
        damaged[place : place + 8] = rng.randbytes(8)
        path.write_bytes(damaged)
        refuse(read, path)


def same_json(damaged, whole):
    """Whether a flip changed nothing but a space between two values."""
    try:
        return json.loads(damaged) == json.loads(whole)
    except ValueError:
        return False


@each_kind
def test_truncated_files_are_refused(kind, tmp_path):
    write, read = KINDS[kind]
    path, rng = tmp_path / "file", random.Random(1)
    write(path)
    whole = path.read_bytes().rstrip()
    for length in [0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:length])
        refuse(read, path)
    path.write_bytes(whole + b"more")
    refuse(read, path)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@each_kind
def test_foreign_and_malicious_files_are_refused_and_not_executed(kind, tmp_path):
    _, read = KINDS[kind]
    path, mark = tmp_path / "file", tmp_path / "executed"
    for content in (b"", b"hello\n", b"\xff\xfe\x00", b"{}", b"[1]", b"null", b"[" * 100_000):
        path.write_bytes(content)
        refuse(read, path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    refuse(read, path)
    torch.save({"a": Bomb(mark)}, path)
    refuse(read, path)
    torch.save({"a": torch.ones(2)}, path)
    refuse(read, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb(mark)))
    refuse(read, path)
    for other in KINDS.keys() - {kind}:
        path.unlink()
        KINDS[other][0](path)
        refuse(read, path)
    assert not mark.exists()


def with_hash(content, header=None):
    """A safetensors file of `content` whose own hash is right, as an attacker can make it."""
    zeros = "0" * 64
    document = content.replace("HASH", zeros)
    text = json.dumps({"__metadata__": {"mpqlib": document}} | (header or {}))
    data = len(text).to_bytes(8, "little") + text.encode()
    return data.replace(zeros.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


@pytest.mark.parametrize(
    "content",
    [
        '{"sha256": "HASH"}',
        '{"sha256": "HASH", "kind": "a checkpoint"}',
        '{"sha256": "HASH", "kind": "a checkpoint", "content": {"tensor": ["9", false]}}',
        '{"sha256": "HASH", "kind": "a checkpoint", "content": {"dict": 3}}',
        '{"sha256": "HASH", "kind": "a checkpoint", "content": {"dict": [[[], 1]]}}',
        '{"sha256": "HASH", "kind": "a checkpoint", "content": {"a": 1, "b": 2}}',
        '{"sha256": "HASH", "kind": "a checkpoint", "content": {"other": 1}}',
        '{"sha256": "HASH", "kind": "a checkpoint", "content": [1]}',
        '{"sha256": "HASH", "kind": "a checkpoint", "content": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"sha256": "HASH", "kind": "a checkpoint", "content": '
        + '{"tuple":' * 500
        + "1"
        + "}" * 501,
    ],
)
def test_states_that_are_made_up_are_refused(content, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(with_hash(content))
    refuse(load_state, path)


def test_a_state_comes_back_as_it_was(tmp_path):
    save_state(tmp_path / "state", STATE)
    found = load_state(tmp_path / "state")
    assert torch.equal(found["weights"].pop("a"), STATE["weights"]["a"])
    assert torch.equal(found["weights"].pop(3), torch.tensor(7)) and not found.pop("weights")
    assert found == {key: value for key, value in STATE.items() if key != "weights"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8, torch.bool])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tensors_come_back_with_their_type_and_order_in_memory(dtype, layout, tmp_path):
    tensor = torch.randint(2, (2, 3, 4, 5)).to(dtype).contiguous(memory_format=layout)
    save_state(tmp_path / "state", {"x": [tensor, tensor]})
    for found in load_state(tmp_path / "state")["x"]:
        assert torch.equal(found, tensor)
        assert found.dtype == dtype and found.stride() == tensor.stride()


@pytest.mark.parametrize("value", [pytest.raises, {1, 2}, object(), np.zeros(2)])
def test_values_that_cannot_be_stored_are_named(value, tmp_path):
    with pytest.raises(ValueError, match=r"state\['a'\]\[0\]\['b'\]=.* cannot be stored"):
        save_state(tmp_path / "state", {"a": [{"b": value}]})
    with pytest.raises(ValueError, match=r"about\['b'\]=.* cannot be stored"):
        save_weights(tmp_path / "weights", linear(), {"b": value})
    with pytest.raises(ValueError, match=r"about\['b'\]=.* cannot be stored"):
        remembered(tmp_path / "result", {"b": value}, forget)
    assert not list(tmp_path.iterdir())


def test_scalars_of_numpy_paths_and_tuples_become_plain():
    value = {
        "i": np.int64(3),
        "f": np.float32(0.5),
        "b": np.bool_(True),
        "s": np.str_("a"),
        "path": Path("a") / "b",
        "tuple": (1, (2.5, None)),
        4: "key",
    }
    expected = {"i": 3, "f": 0.5, "b": True, "s": "a", "path": str(Path("a", "b"))}
    expected |= {"tuple": [1, [2.5, None]], "4": "key"}
    found = plain(value, "value")
    assert found == expected and json.loads(json.dumps(found)) == expected
    assert found["b"] is True and type(found["f"]) is float and type(found["s"]) is str
    with pytest.raises(ValueError, match=r"key 0.5 of value\['a'\]"):
        plain({"a": {0.5: 1}}, "value")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_what_is_plain_stays(value):
    assert plain(value, "value") == value


@given(st.dictionaries(st.text(), JSON, max_size=3))
def test_any_state_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "any-state"
    save_state(path, value)
    assert load_state(path) == value


def test_weights_come_back_with_the_signs_of_their_ranges(tmp_path):
    x = images(48).tensors[0]
    supernet = Supernet(TinyNet(), x, (2, 3, 4))
    config = supernet.uniform(2)
    expected = supernet.eval()(x, config).detach()
    digest = save_weights(tmp_path / "w.safetensors", supernet, {"model": "tiny"})
    assert digest == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    with torch.no_grad():
        for p in supernet.parameters():
            p.mul_(1.5)
        for layer in supernet.layers.values():
            layer.weight_quantizer.signed = False
    assert load_weights(tmp_path / "w.safetensors", supernet) == {"model": "tiny"}
    assert torch.equal(supernet(x, config), expected)


def test_weights_of_other_bits_or_an_earlier_version_are_refused(supernet, tmp_path):
    path, x = tmp_path / "w.safetensors", images(16).tensors[0]
    other = Supernet(TinyNet(), x, (3, 4, 5), depthwise_min=2)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    save_weights(path, Supernet(TinyNet(), x, (2, 3, 4), depthwise_min=2), {})
    with pytest.raises(ValueError, match=r"w\.safetensors does not fit .*2, 3, 4 .*3, 4, 5 "):
        load_weights(path, other)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    fewer = Supernet(TinyNet(), x, (3, 4), depthwise_min=2)  # other shapes, too
    with pytest.raises(ValueError, match=r"other candidate bits, such as 'model\.depthwise'"):
        load_weights(path, fewer)
    tensors = {n: t for n, t in before.items() if t.dtype != torch.float64}
    with pytest.raises(ValueError, match=r"missing \('model.stem.0._extra_state'.*earlier version"):
        set_tensors(other, tensors, path)


def test_the_same_weights_give_the_same_file(tmp_path):
    digests = {save_weights(tmp_path / f"{i}", linear(), {"a": 1, "b": 2}) for i in range(5)}
    assert len(digests) == 1


class Tied(nn.Module):
    """Two linear layers that share one weight."""

    def __init__(self, tied=True):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        if tied:
            self.b.weight = self.a.weight


def test_tied_weights_are_saved_and_loaded(tmp_path):
    saved, loaded = Tied(), Tied()
    save_weights(tmp_path / "w", saved, {})
    load_weights(tmp_path / "w", loaded)
    assert loaded.a.weight is loaded.b.weight and torch.equal(loaded.a.weight, saved.a.weight)
    save_weights(tmp_path / "w", Tied(tied=False), {})
    with pytest.raises(ValueError, match=r"shared .*different .*'a.weight' and 'b.weight'"):
        load_weights(tmp_path / "w", loaded)
    assert torch.equal(loaded.a.weight, saved.a.weight)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4)), r"2 unexpected \('1.bias', '1.weight'\)"),
        (lambda: nn.Sequential(*linear(), nn.Linear(2, 2)), r"2 missing \('2.weight', '2.bias'\)"),
        (
            lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)),
            r"2 of another shape \('1.weight' \(2, 4\), in the model \(5, 4\), '1.bias'",
        ),
        (lambda: nn.Sequential(*[nn.Linear(3, 3) for _ in range(9)]), r"14 missing \(.*\.\.\.\)"),
        (
            lambda: linear().double(),
            r"4 of another type \('0.weight' torch.float32, in the model torch.float64, ",
        ),
    ],
)
def test_weights_of_another_network_are_named(other, named, tmp_path):
    save_weights(tmp_path / "w", linear(), {})
    model = other()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"w does not fit this model.*{named}"):
        load_weights(tmp_path / "w", model)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_study_resumes_after_the_last_finished_run(tmp_path):
    calls, file = [], tmp_path / "runs" / "seed0.json"

    def compute():
        calls.append(1)
        return [{"seed": np.int64(0), "top1": 71.25, "nan": math.nan}]

    about = {"bits": (2, 3), "lr": np.float64(0.1), "folder": tmp_path, "nan": math.nan}
    for _ in range(2):
        (row,) = remembered(file, about, compute)
        assert row["seed"] == 0 and row["top1"] == 71.25 and math.isnan(row["nan"])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ({"bits": [2, 3], "lr": 0.2}, "lr: 0.1 there, 0.2 now"),
        ({"bits": [2, 3]}, "lr: 0.1 there, 'not set' now"),
        (ABOUT | {"new": 1}, "new: 'not set' there, 1 now"),
        ({"bits": [2], "lr": 0.3}, r"bits: \[2, 3\] there, \[2\] now; lr: 0.1 there, 0.3 now"),
    ],
)
def test_a_result_of_other_settings_is_refused(about, named, tmp_path):
    file = tmp_path / "seed0.json"
    remembered(file, ABOUT, lambda: 1)
    with pytest.raises(
        ValueError, match=rf"seed0.json holds the result of other settings \({named}\)"
    ):
        remembered(file, about, forget)


def test_the_order_of_settings_does_not_matter(tmp_path):
    file = tmp_path / "seed0.json"
    remembered(file, {"a": 1, "b": {"c": 2, "d": None}}, lambda: 1)
    assert remembered(file, {"b": {"d": None, "c": 2}, "a": 1}, forget) == 1


@pytest.mark.parametrize("name", ["folder", "file/x.json", "a" * 253, "a" * 300])
def test_a_path_that_cannot_be_written_is_named(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{name} cannot be written"):
        save_json(tmp_path / name, 1)
    with pytest.raises(ValueError, match=f"{name} cannot be written"):
        remembered(tmp_path / name, ABOUT, forget)
    assert set(tmp_path.rglob("*")) == before


def broken(part):
    part.write_text("half")
    raise OSError("disk full")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a" / "x.json"
    save_json(file, {"a": 1})
    with pytest.raises(ValueError, match=r"x\.json cannot be written: disk full"):
        save_atomically(file, broken)
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in file.parent.iterdir()] == ["x.json"]


def test_files_that_are_written_together_stay_together(tmp_path):
    writers = {tmp_path / name: lambda part: part.write_text("new") for name in "abc"}
    for name in "ab":
        (tmp_path / name).write_text("old")
    with pytest.raises(ValueError, match="c cannot be written: disk full"):
        save_together(writers | {tmp_path / "c": broken})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        "ab", "old"
    )
    save_together(writers)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        "abc", "new"
    )


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_moved_leaves_all_as_before(tmp_path, monkeypatch, failing, error):
    writers = {tmp_path / name: lambda part: part.write_text("new") for name in "abc"}
    for name in "ac":
        (tmp_path / name).write_text("old")
    calls, replace = itertools.count(), os.replace

    def fail_once(*args):
        if next(calls) == failing:
            raise error
        replace(*args)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises((ValueError, KeyboardInterrupt)) as caught:
        save_together(writers)
    if caught.type is ValueError:
        assert str(caught.value) == f"{tmp_path / 'abc'[failing]} cannot be written: disk full"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        "ac", "old"
    )
    save_together(writers)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new"}


# Imports files.py alone, because the whole package takes seconds.
SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from files import save_atomically

def slow(part):
    with part.open("w") as file:
        file.write("half")
        file.flush()
        print("writing", flush=True)
        time.sleep(60)

save_atomically(Path(sys.argv[1]), slow)
"""


def test_a_killed_write_leaves_the_old_file_and_the_next_one_tidies_up(tmp_path):
    file = tmp_path / "c.pt"
    save_json(file, 1)
    command = [sys.executable, "-c", SLOW, str(file), str(Path(files.__file__).parent)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"writing\n"
        dead, live = writers
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert file.read_text() == "1\n" and len(list(tmp_path.iterdir())) == 3
        save_json(file, 2)
        (left,) = set(tmp_path.iterdir()) - {file}
        assert left.name.endswith(f".{live.pid}")
        assert file.read_text() == "2\n"
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()
    remove_leftovers(file)
    assert list(tmp_path.iterdir()) == [file]


def test_only_leftovers_of_this_file_and_machine_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = platform.node()
    leftovers = [f".c.pt.{gone.pid}", f".c.pt.{here}.{gone.pid}", f".c.pt.{here}.old.{gone.pid}"]
    others = [
        f".c.pt.{here}.old.{os.getpid()}",
        f".c.pt.{os.getpid()}",
        f".c.pt.{here}.{os.getpid()}",
        f".c.pt.elsewhere-{here}.{gone.pid}",
        f".d.pt.{gone.pid}",
        f".c.pt.{here}",
        "c.pt",
        ".hidden",
    ]
    for name in leftovers + others:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path / "c.pt")
    assert {path.name for path in tmp_path.iterdir()} == set(others)
