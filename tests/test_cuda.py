"""The same numbers on a GPU as on the CPU, eager, compiled and as captured graphs; needs CUDA."""

import copy

import pytest
import torch
from conftest import TinyNet, images

from mpqlib import batch_error, evaluate, greedy
from mpqlib.data import InMemory
from mpqlib.network.cost import bitops_at
from mpqlib.network.supernet import Supernet
from mpqlib.training.loop import Run, TrainConfig, train, update
from mpqlib.training.step import OneShotStep

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

CONFIG = TrainConfig(batch_size=16, epochs=2, lr=0.003, compile="never", idm_weight=1.0)


def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet(TinyNet().double(), images(16)[:][0].double(), (2, 3, 4)).train()


def run_steps(device: str, mode: str | None) -> tuple[list[dict], dict]:
    """Losses and tensors of three training steps in float64. `mode`: of torch.compile, or None."""
    net = supernet().to(device)
    run = Run.start(CONFIG, net, 48)
    if mode:
        run.one_shot = OneShotStep(net, compile=True, mode=mode)
    x, y = (t.to(device) for t in images(48)[:])
    losses = []
    for i in range(3):
        at = slice(16 * i, 16 * i + 16)
        found = update(run, x[at].double(), y[at])
        losses.append({name: float(value) for name, value in found.items()})
    return losses, {name: t.cpu() for name, t in net.state_dict().items()}


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_training_steps_give_the_numbers_of_the_cpu(mode):
    expected, tensors = run_steps("cpu", None)
    losses, found = run_steps("cuda", mode)
    for row, other in zip(losses, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-7, abs=1e-9)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8, msg=name)


def test_images_in_memory_are_augmented_alike():
    x = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8)
    stored = InMemory(x, torch.arange(32) % 3, (0.5,) * 3, (0.2,) * 3, padding=2, flip=True)
    batches = []
    for dataset in (stored, stored.to(torch.device("cuda"))):
        torch.manual_seed(3)
        batches.append(dataset.batch(range(8))[0].cpu())
    torch.testing.assert_close(*batches)


def test_a_search_scores_alike():
    net = supernet().eval()
    x, y = images(32)[:]
    errors = []
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(net).to(device)
        error = batch_error(own, x.double().to(device), y.to(device))
        path = greedy(own, error, bitops_at(own.table, 3))
        errors.append([step.error for step in path])
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_training_resumes_on_the_gpu(tmp_path):
    data, options = images(48), dict(device="cuda", checkpoint_minutes=0)

    def interrupt(run: Run) -> None:
        if run.step == 4:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    net = Supernet(TinyNet(), data[:16][0], (2, 3, 4))
    with pytest.raises(KeyboardInterrupt):
        checkpoint = tmp_path / "run.pt"
        train(copy.deepcopy(net), data, CONFIG, checkpoint=checkpoint, watch=interrupt, **options)
    resumed, _ = train(copy.deepcopy(net), data, CONFIG, checkpoint=checkpoint, **options)
    assert next(resumed.parameters()).is_cuda
    found = evaluate(resumed, data, net.uniform(3), calibration=data, device="cuda")
    assert 0 <= found.top1 <= 1
