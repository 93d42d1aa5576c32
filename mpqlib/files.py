"""Files that survive interruptions, carry a hash of their content and are never executed."""

import hashlib
import json
import os
import platform
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

# The hash inside a safetensors file, and what stands in its place while the hash is computed.
HASH = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')
NO_HASH = "0" * 64


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, then moves that file to `path`.

    `path` holds the old content or the new one, never a part. Makes its folder, and removes
    leftovers of killed writers. Raises ValueError if the file cannot be written, such as on a full
    disk.
    """
    save_together({Path(path): write})


def save_together(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes several files as `save_atomically` does. If one cannot be written, all stay as before.

    `writers`: path -> what writes the file at a temporary path. Only if the process is killed while
    files are moved to their paths, some are new and some old.
    """
    parts: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            check_writable(path)
            parts[path] = _temporary(path)
            with _named(path):
                write(parts[path])
        _replace_all(parts)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within the block, an OSError becomes a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error


def _replace_all(parts: Mapping[Path, Path]) -> None:
    """Moves each part to its path; after an error, all paths hold what they held before."""
    others = list(parts)[:-1]  # nothing can fail after the last one, so it needs no copy
    earlier = {path: _temporary(path, ".old") for path in others if path.exists()}
    moved = []
    try:
        for path, old in earlier.items():
            with _named(path):
                shutil.copy2(path, old)
        for path, part in parts.items():
            with _named(path):
                os.replace(part, path)
            moved.append(path)
    except BaseException:
        for path in moved:
            if path in earlier:
                os.replace(earlier[path], path)
            else:
                path.unlink()
        raise
    finally:
        for old in earlier.values():
            old.unlink(missing_ok=True)


def _temporary(path: Path, suffix: str = "") -> Path:
    return path.with_name(f".{path.name}.{platform.node()}{suffix}.{os.getpid()}")


def stored_run(path: Path) -> Path | None:
    """The stored run that `path` lies in: a folder results/<notebook>/<run> with a provenance.json.

    None if it lies in no such folder.
    """
    path = Path(path).resolve()
    for folder in (path, *path.parents):
        in_results = folder.parent.parent.name == "results"
        if in_results and os.path.isfile(folder / "provenance.json"):
            return folder
    return None


def check_writable(path: Path) -> None:
    """Raises ValueError if no file can be written at `path`, and for one in a stored run.

    Makes its folder, and removes leftovers of killed writers.
    """
    if run := stored_run(path):
        other = "/".join(["runs", *run.parts[-2:]])
        raise ValueError(
            f"{path} would change the stored run {run}: write to another folder, such as {other}, "
            "then store it by python -m mpqlib.report.store"
        )
    with _named(path):
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        _temporary(path).touch()
        _temporary(path).unlink()


def remove_leftovers(path: Path) -> None:
    """Removes temporary files of `path` whose process on this machine was killed while writing."""
    path = Path(path)
    prefix = f".{path.name}."
    for part in path.parent.glob(".*"):
        if not part.name.startswith(prefix):
            continue
        machine, _, process = part.name.removeprefix(prefix).rpartition(".")
        machine = machine.removesuffix(".old")  # earlier content, kept while files are replaced
        # Earlier versions did not write the machine's name.
        if process.isdecimal() and machine in ("", platform.node()) and not _is_running(process):
            part.unlink(missing_ok=True)


def _is_running(process: str) -> bool:
    """Whether a process of this number runs; True where that cannot be asked."""
    if os.name != "posix":  # on Windows, the signal 0 is Ctrl+C
        return True
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True


def plain(value: object, name: str) -> object:
    """`value` in the types that JSON reads back: None, bool, int, float, str, list and dict.

    Converts numpy scalars, paths, tuples and integer keys. Raises ValueError, with `name` and the
    key, for a value of another type, such as a tensor.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if wrong := [k for k in value if isinstance(k, bool) or not isinstance(k, (str, Integral))]:
            raise ValueError(f"key {wrong[0]!r} of {name} is not allowed: a string or an integer")
        return {str(key): plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    raise ValueError(
        f"{name}={value!r} ({type(value).__name__}) cannot be stored: allowed are None, bool, "
        "numbers, strings and paths, and lists, tuples and dicts of them"
    )


def save_json(path: Path, value: object) -> None:
    """Writes `value` as JSON, atomically."""
    save_atomically(path, partial(write_json, value=value))


def write_json(path: Path, value: object) -> None:
    """Writes `value` as JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def check_settings(path: Path, saved: Mapping, now: Mapping) -> None:
    """Raises ValueError, naming the differences, if the settings of `path` are not those of now."""

    def texts(settings: Mapping) -> dict[str, str]:
        """The settings as JSON, in which NaN is equal to itself."""
        return {key: json.dumps(value, sort_keys=True) for key, value in settings.items()}

    there, here = texts(saved), texts(now)
    different = [
        f"{key}: {saved.get(key, 'not set')!r} there, {now.get(key, 'not set')!r} now"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if different:
        listed, more = "; ".join(different[:5]), len(different) - 5
        rest = f"; and {more} more" if more > 0 else ""
        raise ValueError(
            f"{path} holds the result of other settings ({listed}{rest}): use another folder, or "
            "remove the file"
        )


def remembered(path: Path, about: Mapping, compute: Callable[[], object]) -> object:
    """Returns the value stored in `path`, or calls `compute` and stores what it returns.

    A study of many runs calls this once per run, and resumes after the last finished run when it is
    interrupted. `about`: the settings that the value depends on. Both are stored as `plain` makes
    them. Raises ValueError if `path` is damaged, is another kind of file, or holds the result of
    other settings; and, before `compute` is called, if it cannot be written.
    """
    path, about = Path(path), plain(dict(about), "about")
    if not os.path.isfile(path):  # unlike Path's, it raises no error for a path that is too long
        check_writable(path)
        value = plain(compute(), "value")
        save_json(path, {"about": about, "value": value, "sha256": json_hash([about, value])})
    remedy = "remove it to compute the result again"
    try:
        kept = json.loads(path.read_text("utf-8"))
        saved, value, digest = dict(kept["about"]), kept["value"], kept["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged, or is not a stored result: {remedy}") from None
    if digest != json_hash([saved, value]):
        raise ValueError(f"{path} is damaged, its content does not match its SHA-256: {remedy}")
    check_settings(path, saved, about)
    return value


def json_hash(value: object) -> str:
    """SHA-256 of `value` as JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_state(path: Path, state: Mapping) -> None:
    """Writes nested dicts, lists and tuples of tensors, numbers and strings, atomically.

    The file is a safetensors file with a hash of its content. Raises ValueError for another type.
    """
    tensors: list[Tensor] = []
    content = _without_tensors(dict(state), tensors, "state")
    _write(path, "a checkpoint", {str(i): tensor for i, tensor in enumerate(tensors)}, content)


def load_state(path: Path) -> dict:
    """Reads what `save_state` wrote, tensors on the CPU.

    Raises ValueError if the file is damaged or was not written by `save_state`.
    """
    tensors, content = _read(path, "a checkpoint", remedy := "remove it to start anew")
    try:
        return dict(_with_tensors(content, tensors))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path} is not a checkpoint of mpqlib: {remedy}") from None


def _without_tensors(value: object, tensors: list[Tensor], name: str) -> object:
    """`value` for JSON; appends its tensors to `tensors` and puts their index in their place."""
    if isinstance(value, Tensor):
        tensors.append(value)
        # The order in memory matters: a fused optimizer goes over a weight and its momentum as one.
        channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        return {"tensor": [str(len(tensors) - 1), channels_last]}
    if isinstance(value, Mapping):  # as a list of pairs, because a JSON key is always a string
        items = [
            (plain(k, f"a key of {name}"), _without_tensors(v, tensors, f"{name}[{k!r}]"))
            for k, v in value.items()
        ]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [_without_tensors(v, tensors, f"{name}[{i}]") for i, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    return plain(value, name)


def _with_tensors(value: object, tensors: Mapping[str, Tensor]) -> object:
    """What `_without_tensors` was given."""
    if isinstance(value, list):
        return [_with_tensors(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        name, channels_last = content
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return tensors[name].contiguous(memory_format=layout)
    if kind == "tuple":
        return tuple(_with_tensors(v, tensors) for v in content)
    return {k: _with_tensors(v, tensors) for k, v in content}


def save_weights(path: Path, model: nn.Module, about: Mapping, kind: str = "weights") -> str:
    """Writes a model's tensors and `about` as a safetensors file; returns the file's SHA-256.

    `about`: stored as `plain` makes it. `kind`: what the file holds, in words; `load_weights` reads
    "weights" alone. A tensor that several modules share is stored once for each. The file also
    carries a hash of its content, which is checked when it is read.
    """
    return _write(path, kind, model.state_dict(), plain(dict(about), "about"))


def read_weights(path: Path, kind: str = "weights") -> tuple[dict[str, Tensor], dict]:
    """The tensors by name and the `about` that `save_weights` wrote as this `kind`.

    Raises ValueError if the file is damaged or holds something else.
    """
    return _read(path, kind, "get it again, or save it again")


def load_weights(path: Path, model: nn.Module) -> dict:
    """Loads the tensors that `save_weights` wrote into `model`; returns the file's `about`.

    Raises ValueError if the file is damaged, was not written by `save_weights` or does not fit the
    model. The model is then unchanged.
    """
    tensors, about = read_weights(path)
    set_tensors(model, tensors, path)
    return about


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Copies `tensors`, which come from `path` (a file, or words for it), into the model.

    Raises ValueError, with the first names, if tensors are missing, unexpected, of another shape or
    type, if they differ where the model shares one tensor, or if they belong to other bit-widths
    than the model's. The model is then unchanged.
    """
    own = model.state_dict(keep_vars=True)
    both = [n for n in own if n in tensors]
    shapes = [n for n in both if own[n].shape != tensors[n].shape]
    if layers := [n.removesuffix("._extra_state") for n in shapes if n.endswith("._extra_state")]:
        raise ValueError(
            f"{path} does not fit this model: its layers have other candidate bits, such as "
            f"{layers[0]!r}; build the supernet with the stored bits"
        )
    types = [n for n in both if own[n].dtype != tensors[n].dtype]
    sharing = defaultdict(list)
    for name, tensor in own.items():
        sharing[id(tensor)].append(name)
    wrong = {
        "missing": [repr(n) for n in own if n not in tensors],
        "unexpected": [repr(n) for n in sorted(tensors) if n not in own],
        "of another shape": [
            f"{n!r} {tuple(tensors[n].shape)}, in the model {tuple(own[n].shape)}" for n in shapes
        ],
        "of another type": [
            f"{n!r} {tensors[n].dtype}, in the model {own[n].dtype}" for n in types
        ],
    }
    if not any(wrong.values()):
        wrong["shared in the model, different in the file"] = [
            f"{names[0]!r} and {n!r}"
            for names in sharing.values()
            for n in names[1:]
            if not tensors[n].equal(tensors[names[0]])
        ]
    if any(wrong.values()):
        found = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in wrong.items()
            if names
        )
        earlier = all(n in tensors or n.endswith("_extra_state") for n in own)
        hint = ". An earlier version of mpqlib wrote it" if wrong["missing"] and earlier else ""
        raise ValueError(f"{path} does not fit this model. Its tensors: {found}{hint}")
    try:
        model.load_state_dict(tensors)
    except ValueError as error:  # bits of a supernet, which it compares before it changes anything
        raise ValueError(f"{path} does not fit this model: {error}") from error


def _write(path: Path, kind: str, tensors: Mapping[str, Tensor], content: object) -> str:
    """Writes a safetensors file that carries its own hash; returns the SHA-256 of the whole file.

    The hash is computed with zeros in its place. All of it is one entry of the metadata, because
    safetensors writes several in no fixed order.
    """
    # Contiguous copies, because safetensors takes no tensors that share memory.
    copies = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    document = json.dumps({"sha256": NO_HASH, "kind": kind, "content": content})
    data = bytearray(save(copies, {"mpqlib": document}))
    start, end = HASH.search(data).span(1)
    data[start:end] = hashlib.sha256(data).hexdigest().encode()
    save_atomically(path, lambda part: part.write_bytes(data))
    return hashlib.sha256(data).hexdigest()


def _read(path: Path, kind: str, remedy: str) -> tuple[dict[str, Tensor], object]:
    """Tensors and content that `_write` stored as `kind`; raises ValueError for any other file."""
    data = Path(path).read_bytes()
    found = HASH.search(data)
    if found is None:
        what = "empty" if not data else f"damaged, or is not a file of mpqlib that holds {kind}"
        raise ValueError(f"{path} is {what}: {remedy}")
    start, end = found.span(1)
    digest = hashlib.sha256(memoryview(data)[:start])
    digest.update(NO_HASH.encode())
    digest.update(memoryview(data)[end:])
    if digest.hexdigest() != found[1].decode():
        raise ValueError(f"{path} is damaged, its content does not match its SHA-256: {remedy}")
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        document = json.loads(header["__metadata__"]["mpqlib"])
        found_kind, content = document["kind"], document["content"]
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is not a file of mpqlib that holds {kind}: {remedy}") from None
    if found_kind != kind:
        raise ValueError(f"{path} holds {found_kind}, not {kind}: name another file")
    return tensors, content
