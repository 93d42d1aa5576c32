"""Accuracy, recalibrated norms and batch statistics against naive counts."""

import pytest
import torch
from conftest import images

from mpqlib.training.evaluation import (
    batch_statistics,
    decoded,
    evaluate,
    norms_at,
    outside_norms,
    recalibrate,
    select_device,
    select_dtype,
)


def statistics(supernet):
    """Every batch norm's running mean and variance, by name."""
    return {k: v.clone() for k, v in supernet.state_dict().items() if "running" in k}


def test_a_model_that_was_evaluated_can_be_trained(supernet, dataset):
    evaluate(supernet, dataset, supernet.uniform(2))
    x, y = dataset.tensors
    torch.nn.functional.cross_entropy(supernet(x, supernet.uniform(2)), y).backward()
    assert supernet.layers["pointwise"].op.weight.grad is not None


def test_decoded_items_are_the_same_in_order(dataset):
    kept = decoded(dataset)
    assert len(kept) == len(dataset)
    for (x, y), (own_x, own_y) in zip(kept, dataset, strict=True):
        assert torch.equal(x, own_x) and y == own_y


def test_evaluate_counts_correct_images(supernet, dataset):
    config = supernet.uniform(3)
    found = evaluate(supernet, dataset, config, batch_size=7)
    x, y = dataset.tensors
    logits = torch.cat([supernet(x[i : i + 1], config) for i in range(len(x))])
    assert found.correct.tolist() == (logits.argmax(1) == y).tolist()
    expected = -logits.log_softmax(1)[torch.arange(len(y)), y].mean()
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    assert found.top1 == pytest.approx(sum(found.correct.tolist()) / len(y))


def test_recalibration_measures_the_norms_of_one_configuration_only(supernet):
    config, data, before = supernet.uniform(3), images(32), statistics(supernet)
    recalibrate(supernet, data, config, images=32, batch_size=16)
    after = statistics(supernet)
    changed = {key.rsplit(".", 1)[0] for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"model.stem.0.bank.w8a8", "model.depthwise.bank.w3a3"}

    stem = supernet.layers["stem.0"]
    batches = [stem.op(x) for x in data.tensors[0].split(16)]  # its input is float
    # 8-bit weights are not the float ones: quantize by the step's grid
    step = stem.weight_quantizer.step(8)
    weight = step * (stem.op.weight / step).round().clamp(-128, 127)
    batches = [torch.conv2d(x, weight, stride=2, padding=1) for x in data.tensors[0].split(16)]
    means = torch.stack([y.mean((0, 2, 3)) for y in batches]).mean(0)
    variances = torch.stack([y.var((0, 2, 3)) for y in batches]).mean(0)
    norm = stem.bank["w8a8"]
    torch.testing.assert_close(norm.running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, variances, rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1 and not norm.training


def test_recalibration_reads_no_more_images_than_it_may(supernet):
    data, config = images(32), supernet.uniform(2)
    recalibrate(supernet, data, config, images=8)
    few = statistics(supernet)
    recalibrate(supernet, images(8), config)  # the same first eight
    again = statistics(supernet)
    first = torch.utils.data.Subset(data, range(8))
    recalibrate(supernet, first, config)
    assert all(torch.equal(few[k], v) for k, v in statistics(supernet).items())
    assert not all(torch.equal(few[k], v) for k, v in again.items())


def test_batch_statistics_are_used_and_leave_no_trace(supernet, dataset):
    x, config = dataset.tensors[0], supernet.uniform(4)
    supernet.eval()
    before, running = statistics(supernet), supernet(x, config)
    norms = norms_at(supernet, config) + outside_norms(supernet)
    with batch_statistics(norms):
        own = supernet(x, config)
    assert torch.equal(supernet(x, config), running) and not torch.equal(own, running)
    assert all(torch.equal(before[k], v) for k, v in statistics(supernet).items())
    # Normalised by its own batch, the network does not see a change of scale behind a norm.
    with torch.no_grad():
        for norm in supernet.layers["stem.0"].bank.values():
            norm.running_mean += 5
    with batch_statistics(norms):
        assert torch.equal(supernet(x, config), own)


def test_an_unknown_device_is_refused():
    assert select_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device='tpu' is not available here: one of"):
        select_device("tpu")


@pytest.mark.parametrize("capable", [True, False])
def test_dtype_goes_by_what_the_processor_can_do(monkeypatch, capable):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: capable)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: capable)
    for device in ("cpu", "cuda"):
        found = select_dtype("auto", device)
        assert found == (torch.bfloat16 if capable else torch.float32)
    assert select_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='float16' is not allowed: auto, float32 or"):
        select_dtype("float16", "cpu")
