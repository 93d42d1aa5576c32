"""Stored policies: the bits of every layer with the weights they belong to."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import json_hash, load_weights, plain, save_json, save_weights
from ..models import create
from ..network.bits import BitConfig, Candidates
from ..network.cost import COST_MODEL, bitops
from ..network.layers import QuantConvBN
from ..network.observation import check_outputs, noise_image, record_outputs
from ..network.supernet import Supernet, check_steps, check_supernet
from ..training.evaluation import check_statistics, move_channels_last, select_device

POLICY, WEIGHTS = "policy.json", "supernet.safetensors"  # stored beside one another
POLICY_HASH = "policy_sha256"  # entry of policy.json: the hash of its other entries


class Policy(nn.Module):
    """A supernet that runs at the bits of one policy: `policy(images)`.

    `supernet`: the network, with the weights of all bit-widths. `config`: the bits of each layer.
    `about`: the other contents of policy.json.
    """

    def __init__(self, supernet: Supernet, config: BitConfig, about: Mapping):
        super().__init__()
        supernet.check(config)
        self.supernet, self.config, self.about = supernet, config, dict(about)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) at the bits of the policy."""
        return self.supernet(x, self.config)


def describe_policy(supernet: Supernet, config: BitConfig, sha256: str, about: Mapping) -> dict:
    """The contents of policy.json: bits per layer, cost, what `load_policy` needs, and a hash.

    Some outputs in float mode are among them: `load_policy` knows the network by them. `sha256`: of
    the weights, from `save_weights`. `about`: further entries, such as those of
    `save_policy`; stored as `plain` makes them.
    """
    supernet.check(config)
    convs = [layer for layer in supernet.layers.values() if isinstance(layer, QuantConvBN)]
    content = {
        **plain(dict(about), "about"),
        "cost_model": COST_MODEL,
        "first": {name: "float input, counted at its bits below" for name in supernet.first},
        "last": supernet.last,
        "input_shape": list(supernet.input_shape),
        "pair_norms": all(layer.pair_norms for layer in convs),
        "granularity": supernet.granularity,
        "scale_step_gradient": supernet.scale_step_gradient,
        "tie_inputs": any(info.input_of for info in supernet.table),
        "candidates": {name: list(map(list, c)) for name, c in supernet.candidates.items()},
        "checkpoint_sha256": sha256,
        "float_outputs": record_outputs(supernet, supernet.input_shape),
        "bitops_g": bitops(supernet.table, config) / 1e9,
        "layers": {name: list(bits) for name, bits in config.items()},
    }
    content.pop(POLICY_HASH, None)  # `about` may come from another policy
    return content | {POLICY_HASH: json_hash(content)}


def _staged(folder: Path, sha256: str) -> Path:
    """Where the weights lie until policy.json refers to them."""
    return folder / f"staged.{sha256}.safetensors"


def save_policy(
    folder: str | Path, supernet: Supernet, config: BitConfig, about: Mapping | None = None
) -> Path:
    """Writes supernet.safetensors and policy.json into `folder`; returns the path of policy.json.

    Call `recalibrate` at `config` before: the batch norms are stored with their present statistics.
    `about`: further entries of policy.json. With "model" (a name that `models.create` knows) and
    "classes" (their number), `load_policy` can build the network itself; "width" is 1 by default.
    Replaces an earlier policy in `folder`; after an interruption, either the earlier or the new one
    loads. Raises ValueError, before anything is written, for another model, if `config` does not
    fit the supernet, if batch norms hold statistics of another configuration, if a step size is 0,
    or for `about` that cannot be stored; and if a file cannot be written, which leaves the earlier
    policy as it was.
    """
    folder, about = Path(folder), plain(dict(about or {}), "about")
    check_supernet("supernet", supernet)
    check_statistics(supernet, config)
    new = folder / f"new.{WEIGHTS}"
    sha256 = save_weights(new, supernet, about)
    staged = _staged(folder, sha256)
    is_known = staged.exists()  # an interrupted call left them: a policy.json may refer to them
    new.replace(staged)
    # This replaces the earlier policy. Until then, its weights must stay in their place.
    try:
        save_json(folder / POLICY, describe_policy(supernet, config, sha256, about))
    except Exception:  # such as a full disk: weights that nothing refers to would take space
        if not is_known:
            staged.unlink()
        raise
    staged.replace(folder / WEIGHTS)
    for left in folder.glob(_staged(folder, "*").name):  # by interrupted calls
        left.unlink()
    return folder / POLICY


def _read(path: Path) -> dict:
    """The contents of a policy file; raises ValueError if they are no policy of this version."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: give the path of a policy.json")
    try:
        stored = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): give the path of a policy.json") from error
    expected = {"layers", "cost_model", "checkpoint_sha256", "bitops_g", POLICY_HASH}
    if not isinstance(stored, dict) or not expected <= stored.keys():
        raise ValueError(f"{path} is no policy: it needs the keys {sorted(expected)}")
    if missing := [key for key in ("tie_inputs", "float_outputs") if key not in stored]:
        raise ValueError(
            f"{path} was written by an earlier version of mpqlib, which did not store {missing}: "
            "use the version that wrote it"
        )
    if stored["cost_model"] != COST_MODEL:
        raise ValueError(
            f"{path} has the cost model {stored['cost_model']!r}, but this version of mpqlib has "
            f"{COST_MODEL!r}: its BitOPs cannot be compared; use the version that wrote it"
        )
    content = {key: value for key, value in stored.items() if key != POLICY_HASH}
    if stored[POLICY_HASH] != json_hash(content):
        raise ValueError(
            f"{path} was changed: it does not match its {POLICY_HASH}. Save the policy again"
        )
    return stored


def _check_weights(path: Path, sha256: str, policy: Path) -> None:
    """Raises FileNotFoundError or ValueError unless `path` holds the weights of `policy`."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{path} {what}: {policy} needs its weights beside it, or pass weights=<file>"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} does not hold the weights of {policy}: its SHA-256 is {found}, not {sha256}"
        )


def _convert(stored: Mapping, path: Path, model: nn.Module | None) -> Supernet:
    """The supernet that `stored` describes, with fresh weights."""
    if model is None:
        if missing := [key for key in ("model", "classes") if key not in stored]:
            raise ValueError(f"{path} lacks {missing}, so the network cannot be built")
        model = create(stored["model"], stored["classes"], width=stored.get("width", 1.0))
    candidates = {n: Candidates(*map(tuple, c)) for n, c in stored["candidates"].items()}
    # Steps and signs, which the example would set, are stored with the weights.
    example = noise_image(model, stored["input_shape"])
    edge_bits = 8 if stored["first"] or stored["last"] else None
    return Supernet(
        model,
        example,
        edge_bits=edge_bits,
        overrides=candidates,
        tie_inputs=stored["tie_inputs"],
        pair_norms=stored["pair_norms"],
        granularity=stored.get("granularity", "tensor"),  # earlier versions had no other
        scale_step_gradient=stored.get("scale_step_gradient", False),  # nor did they store this
    )


def _check_options(supernet: Supernet, stored: Mapping) -> None:
    """Raises ValueError if the supernet was built with other options than the stored one."""
    own = {
        "tie_inputs": any(info.input_of for info in supernet.table),
        "scale_step_gradient": supernet.scale_step_gradient,
    }
    for name, value in own.items():
        if value != stored.get(name, False):
            raise ValueError(f"its {name} is {value}, that of the policy {not value}")


@torch.inference_mode(False)  # parameters made in inference mode could not be trained
def load_policy(
    path: str | Path,
    *,
    weights: str | Path | None = None,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> Policy:
    """A stored policy, ready to run: `load_policy("policy.json")(images)`. In eval mode.

    `path`: a policy.json. `weights`: its safetensors file; None: supernet.safetensors beside it.
    `model`: the float network, or an already converted Supernet, both of the same build as the
    stored one; it is changed in place. None: `models.create` builds the network by its stored name.

    Raises FileNotFoundError if a file is missing. Raises ValueError if policy.json is no policy,
    was changed, lacks what building the network needs or has another cost model, if the weights
    have another SHA-256, or if the network does not fit: with other bits, layers or shapes, or with
    other outputs in float mode, as another activation function, padding or epsilon would give them.
    """
    path = Path(path)
    stored = _read(path)
    if weights is None:
        staged = _staged(path.parent, stored["checkpoint_sha256"])
        weights = staged if staged.is_file() else path.with_name(WEIGHTS)
    weights = Path(weights)
    _check_weights(weights, stored["checkpoint_sha256"], path)
    config = BitConfig.of(stored["layers"])
    try:
        supernet = model if isinstance(model, Supernet) else _convert(stored, path, model)
        _check_options(supernet, stored)
        load_weights(weights, supernet)
        policy = Policy(supernet, config, stored)
        check_steps(supernet)
        check_outputs(supernet, stored["input_shape"], stored["float_outputs"])
    except (RuntimeError, ValueError) as error:
        hint = "; pass model=<your float network> if it is another one" if model is None else ""
        raise ValueError(f"the network does not fit {path}: {error}{hint}") from error
    cost = bitops(supernet.table, config) / 1e9
    if abs(cost - stored["bitops_g"]) > 1e-9 * cost:
        raise ValueError(
            f"the network does not fit {path}: it takes {cost} G BitOPs, not {stored['bitops_g']} G"
        )
    # In the layout of `evaluate`: another one adds in another order, which moves roundings.
    return move_channels_last(policy, select_device(device)).eval()
