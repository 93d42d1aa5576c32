"""The rules of RFQuant's release: literal twins against recorded values, ours against the twins."""

from pathlib import Path

import numpy as np
import pytest
import release
import torch
from torch import nn

from mpqlib.network.bits import Bits, Candidates
from mpqlib.network.layers import QuantLinear
from mpqlib.network.quantizer import nested_step
from mpqlib.training.distortion import grid_loss
from mpqlib.training.optimization import learning_rate, step_learning_rate
from mpqlib.training.scheduler import freeze, freeze_share, is_decision, turbulence

# What the authors' functions returned for six convolutions, in float64.
RECORDED = np.load(Path(__file__).parents[1] / "data/release-oracle.npz", allow_pickle=False)
LAYERS, DECISIONS, CONFIGS = range(6), range(12), range(8)
FULL = [RECORDED[f"candidates_{i}"].tolist() for i in LAYERS]
STEPS = [dict(zip(FULL[i], RECORDED[f"steps_{i}"].tolist(), strict=True)) for i in LAYERS]
NEAR = dict(rtol=0, atol=1e-8)


def layer(i: int, weight: np.ndarray) -> QuantLinear:
    """Layer i of the recorded ones, with its recorded steps."""
    out, per_group, *kernel = weight.shape
    op = nn.Conv2d(per_group, out, kernel, bias=False).double()
    op.weight.data = torch.tensor(weight)
    own = QuantLinear(op, torch.zeros(1), Candidates(tuple(FULL[i]), (8,)))
    own.weight_quantizer.steps.data = torch.tensor(list(STEPS[i].values()), dtype=torch.float64)
    return own


def test_schedules():
    assert release.decision_epochs() == RECORDED["decision_epochs"].tolist()
    assert [e for e in range(150) if is_decision(e)] == RECORDED["decision_epochs"].tolist()
    made = RECORDED["decision_epochs"][: len(RECORDED["freeze_share"])].tolist()
    for share in (release.freeze_share, freeze_share):
        np.testing.assert_allclose(list(map(share, made)), RECORDED["freeze_share"], **NEAR)
    epochs = range(150)
    twin = [release.learning_rate(e) for e in epochs]
    ours = [learning_rate(e, 150, peak=0.04, warmup=5) for e in epochs]
    for rates in (twin, ours):
        np.testing.assert_allclose(rates, RECORDED["learning_rate"], **NEAR)
    twin = [release.step_learning_rate(e) for e in epochs]
    ours = [1e-5 * step_learning_rate(e, 150) for e in epochs]
    for rates in (twin, ours):
        np.testing.assert_allclose(rates, RECORDED["step_learning_rate"], rtol=0, atol=1e-13)
    updates = range(0, 50 * len(RECORDED["grid_term_weight"]), 50)
    twin = [release.grid_term_weight(update, per_epoch=100) for update in updates]
    np.testing.assert_allclose(twin, RECORDED["grid_term_weight"], **NEAR)


@pytest.mark.parametrize("i", LAYERS)
def test_initial_steps(i):
    weight, recorded = RECORDED[f"weight_{i}"], RECORDED[f"initial_steps_{i}"]
    twin = [release.initial_step(weight, bits) for bits in FULL[i]]
    ours = [nested_step(torch.tensor(weight), bits).item() for bits in FULL[i]]
    np.testing.assert_allclose(twin, recorded, **NEAR)
    np.testing.assert_allclose(ours, recorded, **NEAR)


def test_turbulence_and_twelve_decisions_in_a_row():
    """Each decision starts from the candidates that the one before left."""
    current = FULL
    ours = {str(i): Candidates(tuple(bits), tuple(bits)) for i, bits in enumerate(FULL)}
    full = dict(ours)
    for d in DECISIONS:
        weights = [RECORDED[f"weight_{i}_at_{d}"] for i in LAYERS]
        twin = [release.turbulence(weights[i], STEPS[i], current[i]) for i in LAYERS]
        mine = {str(i): turbulence(layer(i, weights[i]), ours[str(i)].weight) for i in LAYERS}
        np.testing.assert_allclose(twin, RECORDED["turbulence"][d], **NEAR)
        np.testing.assert_allclose(list(mine.values()), RECORDED["turbulence"][d], **NEAR)
        share = float(RECORDED["freeze_share"][d])
        current, ours = release.freeze(FULL, twin, share), freeze(full, mine, share)
        expected = RECORDED["smallest_candidate_after"][d].tolist()
        assert [min(bits) for bits in current] == expected
        assert [min(own.weight) for own in ours.values()] == expected
        assert [min(own.act) for own in ours.values()] == expected


@pytest.mark.parametrize("t", CONFIGS)
def test_grid_term_and_its_gradient(t):
    bits, smallest = RECORDED[f"grid_bits_{t}"].tolist(), RECORDED[f"grid_smallest_{t}"].tolist()
    weights = [RECORDED[f"grid_weight_{i}"] for i in LAYERS]
    twins = [release.grid_term(weights[i], STEPS[i][bits[i]], bits[i], smallest[i]) for i in LAYERS]
    assert sum(loss for loss, _ in twins) == pytest.approx(float(RECORDED[f"grid_loss_{t}"]))
    layers = {str(i): layer(i, weights[i]) for i in LAYERS}
    offered = {
        str(i): Candidates(tuple(b for b in FULL[i] if b >= smallest[i]), (8,)) for i in LAYERS
    }
    loss = grid_loss(layers, {str(i): Bits(bits[i], 8) for i in LAYERS}, offered)
    assert loss.item() == pytest.approx(float(RECORDED[f"grid_loss_{t}"]), rel=1e-8)
    loss.backward()
    for i in LAYERS:
        recorded = RECORDED[f"grid_gradient_{t}_{i}"]
        np.testing.assert_allclose(twins[i][1], recorded, **NEAR)
        np.testing.assert_allclose(layers[str(i)].op.weight.grad.numpy(), recorded, **NEAR)
