"""The training loop and its step, against what they say they do, step by step."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, images

from mpqlib.network.bits import largest, sample
from mpqlib.network.supernet import Supernet
from mpqlib.training.distortion import grid_loss
from mpqlib.training.loop import TrainConfig, train
from mpqlib.training.optimization import MovingAverage, decay_outside_region, learning_rate
from mpqlib.training.step import one_shot_gradients

SMALL = TrainConfig(
    epochs=3, batch_size=16, warmup_epochs=1, freeze_start=1, freeze_every=1, grid_start=0.3
)


def numbers(history):
    """A history without what the clock says."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def same(a, b):
    """Whether two models hold the same tensors, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_same_seed_same_numbers_and_another_seed_others(supernet, dataset):
    runs = [
        train(copy.deepcopy(supernet), dataset, TrainConfig(**SMALL.__dict__ | {"seed": seed}))
        for seed in (0, 0, 1)
    ]
    assert same(runs[0][0], runs[1][0]) and numbers(runs[0][1]) == numbers(runs[1][1])
    assert not same(runs[0][0], runs[2][0])


def test_training_does_not_touch_the_global_generator(supernet, dataset):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(supernet, dataset, SMALL)
    assert torch.equal(before, torch.get_rng_state())


class Interrupted(images(1).__class__):
    """A data set that breaks after so many items."""

    left = math.inf

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.parametrize("epochs_done", [0, 1, 2])
@pytest.mark.parametrize("one_shot", [True, False])
def test_an_interrupted_run_goes_on_to_the_same_numbers(supernet, tmp_path, epochs_done, one_shot):
    def fresh():
        torch.manual_seed(1)
        return copy.deepcopy(supernet) if one_shot else TinyNet()

    straight, history = train(fresh(), images(48), SMALL)
    breaking = Interrupted(*images(48).tensors)
    breaking.left = 48 * epochs_done + 20
    file = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), breaking, SMALL, checkpoint=file)
    resumed, again = train(fresh(), images(48), SMALL, checkpoint=file)
    assert same(straight, resumed) and numbers(history) == numbers(again)
    finished, _ = train(fresh(), breaking, SMALL, checkpoint=file)  # reads no image any more
    assert same(straight, finished)


def test_a_checkpoint_of_other_settings_is_refused(supernet, dataset, tmp_path):
    file, other = tmp_path / "run.pt", TrainConfig(**SMALL.__dict__ | {"lr": 0.5})
    train(copy.deepcopy(supernet), dataset, SMALL, checkpoint=file, about={"model": "tiny"})
    with pytest.raises(ValueError, match=r"\{'lr': 0.04\}"):
        train(supernet, dataset, other, checkpoint=file, about={"model": "tiny"})
    with pytest.raises(ValueError, match=r"\{'model': 'tiny'\}"):
        train(supernet, dataset, SMALL, checkpoint=file, about={"model": "large"})


@pytest.mark.parametrize(
    "wrong", [{"epochs": -1}, {"batch_size": 0}, {"lr": -0.1}, {"random_paths": 1.5}]
)
def test_settings_that_are_not_allowed_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        TrainConfig(**wrong)


def test_fewer_images_than_a_batch_are_refused(supernet):
    with pytest.raises(ValueError, match="batch_size=16: at most the 10 images"):
        train(supernet, images(10), SMALL)


def reference_gradients(supernet, x, y, configs, idm_weight, smoothing):
    """The one-shot step by the book: every loss by itself, its gradient by autograd, then a sum."""
    outputs = {}
    for name, layer in supernet.layers.items():
        layer.register_forward_hook(
            lambda m, i, y, name=name: outputs.__setitem__(name, y.clone()) or y.clone()
        )

    def run(config):
        outputs.clear()
        return supernet(x, config), dict(outputs)

    def cross_entropy(logits):
        p = logits.log_softmax(1)
        hit = -p[torch.arange(len(y)), y].mean()
        return (1 - smoothing) * hit - smoothing * p.mean()

    parameters = dict(supernet.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def add(loss):
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            total[name] += 0 if gradient is None else gradient

    high, target = run(largest(supernet.candidates))
    add(cross_entropy(high))
    p = high.detach().softmax(1)
    for config in configs:
        low, ours = run(config)
        divergence = (p * (p.log() - low.log_softmax(1))).sum(1).mean()
        loss = 0.5 * cross_entropy(low) + 0.5 * divergence
        for name, (weight_bits, _) in config.items():
            offered = supernet.candidates[name].weight
            if len(offered) > 1 and weight_bits == min(offered):
                loss = loss + idm_weight * (ours[name] - target[name].detach()).square().mean()
        add(loss)
    return total


@pytest.mark.parametrize("idm_weight", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_shot_gradients_are_those_of_the_paper(supernet, idm_weight, smoothing):
    supernet = supernet.double().train()
    x, y = images(16).tensors
    x = x.double()
    generator = torch.Generator().manual_seed(3)
    configs = [sample(supernet.candidates, generator) for _ in range(3)]
    expected = reference_gradients(copy.deepcopy(supernet), x, y, configs, idm_weight, smoothing)
    options = dict(idm_weight=idm_weight, smoothing=smoothing)
    one_shot_gradients(supernet, x, y, supernet.candidates, configs, **options)
    for name, p in supernet.named_parameters():
        ours = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(ours, expected[name], rtol=1e-9, atol=1e-12)


def test_grid_loss_counts_weights_whose_grid_point_is_not_on_the_smallest_grid(supernet):
    config = largest(supernet.candidates)
    expected = 0.0
    for name, layer in supernet.layers.items():
        quantize, bits = layer.weight_quantizer, config[name].weight
        fine, coarse = (quantize.step(b).item() for b in (bits, min(quantize.bits)))
        top = {b: (-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in quantize.bits}

        def nearest(w, step, b, top=top):
            low, high = top[b]
            return step * min(max(round(w / step), low), high)

        for w in layer.op.weight.flatten().tolist():
            point = nearest(w, fine, bits)
            detour = nearest(nearest(point, coarse, min(quantize.bits)), fine, bits)
            expected += (w - point) ** 2 if abs(detour - point) > fine / 2 else 0
    assert grid_loss(supernet.layers, config).item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def test_scheduler_freezes_only_when_it_is_on(supernet, dataset):
    full = {name: list(c.weight) for name, c in supernet.candidates.items()}
    for on in (True, False):
        config = TrainConfig(**SMALL.__dict__ | {"scheduler": on})
        _, history = train(copy.deepcopy(supernet), dataset, config)
        assert history[0]["candidates"] == full  # freeze_start is 1
        assert (history[1]["candidates"] == full) != on
        assert history[0]["turbulence"].keys() == full.keys()


def test_idm_only_when_it_is_on(supernet, dataset):
    for on in (True, False):
        config = TrainConfig(**SMALL.__dict__ | {"idm": on})
        _, history = train(copy.deepcopy(supernet), dataset, config)
        assert (history[0]["idm"] > 0) == on


def test_bfloat16_gradients_point_where_those_of_float32_do(supernet, dataset):
    found, (x, y) = {}, dataset.tensors
    for dtype in (torch.float32, torch.bfloat16):
        supernet.zero_grad()
        configs = [supernet.uniform(3)]
        one_shot_gradients(supernet, x, y, supernet.candidates, configs, dtype=dtype)
        weights = [layer.op.weight.grad.flatten() for layer in supernet.layers.values()]
        assert all(grad.dtype == torch.float32 for grad in weights)
        found[dtype] = weights
    assert not all(map(torch.equal, *found.values()))  # it is another arithmetic
    for exact, half in zip(*found.values(), strict=True):
        assert torch.cosine_similarity(exact, half, dim=0) > 0.9


def test_one_norm_for_all_pairs_trains_too(dataset):
    supernet = Supernet(TinyNet(), dataset.tensors[0], (2, 4), pair_norms=False)
    _, history = train(supernet, dataset, SMALL)
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_learns(supernet, dataset, dtype):
    config = TrainConfig(**SMALL.__dict__ | {"epochs": 12, "dtype": dtype})
    _, history = train(supernet, dataset, config)
    assert history[-1]["accuracy"] > 0.8 > history[0]["accuracy"]
    assert history[-1]["accuracy_random"] > history[0]["accuracy_random"]


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    shares = [learning_rate(epoch, epochs=10, warmup=2) for epoch in (0, 1, 2, 6, 10)]
    assert shares == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_region_decay_spares_what_the_smallest_bits_do_not_clip(supernet):
    for layer in supernet.layers.values():
        layer.op.weight.grad = torch.zeros_like(layer.op.weight)
        layer.op.weight.data[::2] *= 4  # out of the region for some
    decay_outside_region(supernet, 0.1)
    counts = [0, 0]
    for layer in supernet.layers.values():
        bits = min(layer.weight_quantizer.bits)
        step = layer.weight_quantizer.step(bits).item()
        pairs = zip(layer.op.weight.flatten().tolist(), layer.op.weight.grad.flatten(), strict=True)
        for w, gradient in pairs:
            outside = not -(2 ** (bits - 1)) * step <= w <= (2 ** (bits - 1) - 1) * step
            counts[outside] += 1
            assert float(gradient) == pytest.approx(0.1 * w if outside else 0.0)
    assert min(counts) > 0


def test_average_follows_the_weights_with_a_warmed_up_decay():
    model = torch.nn.Linear(1, 1, bias=False)
    average, expected = MovingAverage(model, decay=0.5), model.weight.item()
    for n in range(20):
        with torch.no_grad():
            model.weight.fill_(float(n**2))
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n**2
        assert average.module.weight.item() == pytest.approx(expected)


def test_every_step_is_watched_and_changes_nothing(dataset):
    seen, results = [], []
    config = TrainConfig(epochs=2, batch_size=16, warmup_epochs=0)
    for watch in (None, lambda run: seen.append((len(run.history), run.config.epochs))):
        torch.manual_seed(0)
        model, _ = train(TinyNet(), dataset, config, watch=watch)
        results.append(model.state_dict())
    assert seen == [(0, 2)] * 3 + [(1, 2)] * 3
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_average_takes_over_running_statistics():
    model = torch.nn.BatchNorm1d(3)
    average = MovingAverage(model, decay=0.5)
    model(torch.randn(8, 3))
    average.copy_buffers(model)
    for mine, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, theirs) and mine is not theirs


def test_float_training_is_plain_sgd(dataset):
    torch.manual_seed(0)
    model = TinyNet()
    twin = copy.deepcopy(model).train()
    config = TrainConfig(epochs=1, batch_size=48, warmup_epochs=0, ema_decay=0.0, lr=0.1)
    trained, _ = train(model, dataset, config)
    generator = torch.Generator().manual_seed(0)
    torch.randint(2**31, (), generator=generator)
    order = torch.randperm(48, generator=generator)
    x, y = (t[order] for t in dataset.tensors)
    F.cross_entropy(twin(x), y).backward()
    share = learning_rate(0.5, 1, 0)  # the middle of the only step
    for (name, p), q in zip(trained.named_parameters(), twin.parameters(), strict=True):
        gradient = q.grad.clamp(-1, 1) + 2.5e-5 * q * (q.dim() > 1)
        # Nesterov's first step moves by 1 + momentum times the gradient
        torch.testing.assert_close(p, q - 0.1 * share * 1.9 * gradient, msg=name)
