"""Files that survive interruptions and are never executed: safetensors, tensors and JSON."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, then puts the file in place at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_json(path: Path, value: object) -> None:
    """Writes `value` as JSON, atomically."""
    save_atomically(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def remembered(path: Path, about: Mapping, compute: Callable[[], object]) -> object:
    """What `compute` returned when it was last asked, or returns now: a value that JSON can hold.

    So a study of many runs goes on where it stopped. Raises ValueError where `path` holds the value
    of other settings than `about`.
    """
    path, about = Path(path), json.loads(json.dumps(dict(about)))
    if not path.exists():
        save_json(path, {"about": about, "value": compute()})
    kept = json.loads(path.read_text())
    if kept["about"] != about:
        raise ValueError(f"{path} holds a result of {kept['about']}: keep to that, or remove it")
    return kept["value"]


def save_state(path: Path, state: Mapping) -> None:
    """Writes nested dicts and lists of tensors, numbers and strings, atomically."""
    save_atomically(path, lambda part: torch.save(dict(state), part))


def load_state(path: Path) -> dict:
    """What `save_state` wrote, onto the CPU; nothing in the file is executed."""
    return torch.load(path, map_location="cpu", weights_only=True)


def save_weights(path: Path, model: nn.Module, about: Mapping) -> str:
    """Writes a model's tensors as safetensors, with `about` as JSON; returns the file's SHA-256."""
    tensors = {name: t.contiguous().cpu() for name, t in model.state_dict().items()}
    metadata = {"about": json.dumps(dict(about))}
    save_atomically(path, lambda part: save_file(tensors, part, metadata))
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_weights(path: Path, model: nn.Module) -> dict:
    """Loads what `save_weights` wrote into a model of the same build; returns its `about`.

    Raises RuntimeError where a tensor is missing, unknown or of another shape.
    """
    model.load_state_dict(load_file(path))
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["about"])
