"""Accuracy, recalibrated norms and batch statistics against naive counts."""

import copy

import pytest
import torch
from conftest import TinyNet, images
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from mpqlib.data import InMemory, draw
from mpqlib.network.bits import largest
from mpqlib.network.supernet import Supernet
from mpqlib.search.error import batch_error
from mpqlib.training.evaluation import (
    batch_norms,
    batch_statistics,
    check_dataset,
    decoded,
    evaluate,
    recalibrate,
    select_device,
)
from mpqlib.training.loop import TrainConfig, train


class PreNorm(nn.Module):
    """A batch norm before each layer, so that no layer owns one but the first."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.norm = nn.BatchNorm2d(8)  # after an addition: it belongs to no layer
        self.conv, self.last = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        x = x + self.conv(x)
        return self.last(self.norm(x).relu().mean((2, 3)))


@pytest.fixture
def pre_norm() -> Supernet:
    torch.manual_seed(0)
    return Supernet(PreNorm(), images(16, seed=1).tensors[0], (2, 3, 4))


def statistics(supernet):
    """All buffers of all batch norms, by name."""
    keys = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v.clone() for k, v in supernet.state_dict().items() if k.endswith(keys)}


def modes(model):
    """Of every module: its mode and, for a batch norm, its momentum."""
    return [(m.training, getattr(m, "momentum", None)) for m in model.modules()]


def one_shot(supernet, dataset):
    """The supernet after two epochs of one-shot training."""
    config = TrainConfig(epochs=2, batch_size=16, lr=0.1, step_travel=0.01, ema_decay=0)
    return train(supernet, dataset, config)[0]


def test_a_model_that_was_evaluated_can_be_trained(supernet, dataset):
    evaluate(supernet, dataset, supernet.uniform(2))
    x, y = dataset.tensors
    torch.nn.functional.cross_entropy(supernet(x, supernet.uniform(2)), y).backward()
    assert supernet.layers["pointwise"].op.weight.grad is not None


def test_a_model_that_was_evaluated_in_inference_mode_can_be_trained(supernet, dataset):
    network, config, x = TinyNet(), supernet.uniform(3), dataset.tensors[0]
    with torch.inference_mode():
        evaluate(network, dataset)
        recalibrate(supernet, dataset, config)
    found = evaluate(copy.deepcopy(supernet), dataset, config)
    assert found.loss == evaluate(supernet, dataset, config, calibration=dataset).loss
    for y in (network(x), supernet.train()(x, config)):
        y.sum().backward()
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
    supernet.eval()
    logits = torch.cat([supernet(x[i : i + 1], config) for i in range(len(x))])
    assert found.correct.tolist() == (logits.argmax(1) == y).tolist()
    expected = -logits.log_softmax(1)[torch.arange(len(y)), y].mean()
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    assert found.top1 == pytest.approx(sum(found.correct.tolist()) / len(y))


def test_evaluating_and_recalibrating_keep_the_mode_of_every_module(supernet, dataset):
    supernet.train()
    supernet.model.norm = supernet.model.norm.eval()
    supernet.layers["depthwise"].eval()  # as a user freezes one part
    before = modes(supernet)
    evaluate(supernet, dataset, supernet.uniform(3), calibration=dataset)
    assert modes(supernet) == before


class Deep(TinyNet):
    """TinyNet behind a convolution with 5-D weights."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Conv3d(3, 3, 1)

    def forward(self, x):
        return super().forward(self.deep(x[:, :, None])[:, :, 0])


def test_5d_weights_are_trained_and_evaluated(dataset):
    with pytest.warns(UserWarning, match="stay in float"):
        supernet = Supernet(Deep(), dataset[:16][0], (2, 4))
    trained = one_shot(supernet, dataset)
    assert evaluate(trained, dataset, supernet.uniform(4), calibration=dataset).loss < 10


LABELS = {
    "float": (lambda y: y.float(), "labels are torch.float32"),
    "int32": (lambda y: y.int(), "labels are torch.int32"),
    "column": (lambda y: y[:, None], r"of shape \(16, 1\)"),
    "one-hot": (lambda y: torch.eye(3)[y], r"of shape \(16, 3\)"),
    "too large": (lambda y: y + 1, "labels 1 to 3: the model has classes 0 to 2"),
    "negative": (lambda y: y - 1, "labels -1 to 1: the model has classes 0 to 2"),
}


@pytest.mark.parametrize("change, message", LABELS.values(), ids=LABELS)
def test_labels_that_are_no_classes_are_named(supernet, change, message):
    x, y = images(16).tensors
    y = torch.cat([torch.tensor([0, 1, 2]), y[3:]])
    dataset = TensorDataset(x, change(y))
    for model in (TinyNet(), supernet):
        with pytest.raises(ValueError, match=message):
            evaluate(model, dataset, batch_size=16)
        with pytest.raises(ValueError, match=message):
            train(model, dataset, TrainConfig(epochs=1, batch_size=16))
    with pytest.raises(ValueError, match=message):
        batch_error(supernet, *dataset.tensors)(supernet.uniform(4))


class Maps(TinyNet):
    """TinyNet without its classifier: returns feature maps."""

    def forward(self, x):
        return self.pointwise(self.stem(x))


def test_outputs_that_are_no_logits_are_named(dataset):
    message = r"the model returns \(16, 12, 4, 4\): a tensor of logits \(N, classes\) is needed"
    for model in (Maps(), Supernet(Maps(), dataset[:4][0], (2, 4))):
        with pytest.raises(ValueError, match=message):
            evaluate(model, dataset, batch_size=16)
        with pytest.raises(ValueError, match=message):
            train(model, dataset, TrainConfig(epochs=1, batch_size=16))


def test_evaluate_refuses_what_it_cannot_count(supernet, dataset):
    x, y = dataset.tensors
    network = TinyNet()
    for call in (
        lambda: evaluate(network, x),
        lambda: recalibrate(supernet, x, None),
        lambda: train(network, x, TrainConfig(epochs=1, batch_size=16)),
    ):
        with pytest.raises(ValueError, match="dataset is a Tensor: pass a dataset of items"):
            call()
    for other in ((x, y), x.numpy(), DataLoader(dataset)):
        with pytest.raises(ValueError, match=f"dataset is a {type(other).__name__}: pass"):
            evaluate(network, other)
    with pytest.raises(ValueError, match="dataset is empty"):
        evaluate(network, Subset(dataset, []))
    with pytest.raises(ValueError, match="dataset is empty"):
        decoded(Subset(dataset, []))
    for wrong in (3, -100):  # cross_entropy ignores -100
        labels = torch.cat([y[:-1], torch.tensor([wrong])])
        with pytest.raises(ValueError, match=f"{wrong}.* the model has classes 0 to 2"):
            evaluate(network, TensorDataset(x, labels))
    with pytest.raises(ValueError, match="device='gpu' is not available here: one of"):
        evaluate(network, dataset, device="gpu")
    with pytest.raises(ValueError, match=r"need a Supernet; this is a float model \(TinyNet\)"):
        evaluate(network, dataset, supernet.uniform(2))
    with pytest.raises(ValueError, match="supernet is a TinyNet: a Supernet is needed"):
        recalibrate(network, dataset, None)
    with pytest.raises(ValueError, match="need a Supernet"):
        evaluate(network, dataset, calibration=dataset)
    assert network.training


class Items(Dataset):
    """Forty-eight items made of the pair (image, label)."""

    def __init__(self, change):
        self.pairs, self.change = images(48), change

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.change(*self.pairs[index])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(images(48))


UNFIT = {
    "dict": (Items(lambda x, y: {"image": x, "label": y}), "has items that are a dict: pass a"),
    "three": (Items(lambda x, y: (x, y, 0)), "has items that are a tuple of 3: pass a dataset of"),
    "image": (Items(lambda x, y: x), "has items that are a Tensor: pass a dataset of items"),
    "tuple of one": (TensorDataset(images(48).tensors[0]), "a tuple of 1: pass a dataset"),
    "PIL": (Items(lambda x, y: (Image.new("RGB", (8, 8)), y)), "images that are a Image: a tensor"),
    "flat": (Items(lambda x, y: (x.flatten(), y)), r"a Tensor of shape \(192,\): a tensor \(C, H"),
    "named": (Items(lambda x, y: (x, "cat")), "has labels that are a str: a class is needed"),
    "stream": (Stream(), "is a Stream: pass a dataset of items"),
    "mapping": ({"train": images(48)}, "is a dict: pass a dataset of items"),
    "float64": (Items(lambda x, y: (x.double(), y)), "images in torch.float64: the model reads t"),
    "uint8": (
        Items(lambda x, y: (x.byte(), y)),
        "images in torch.uint8: the model reads torch.float32",
    ),
}


@pytest.mark.parametrize(("unfit", "message"), UNFIT.values(), ids=UNFIT)
def test_items_that_are_no_images_with_labels_are_named_before_any_work(
    supernet, dataset, unfit, message, tmp_path
):
    config, short = supernet.uniform(2), TrainConfig(epochs=1, batch_size=16)
    for call in (
        lambda: train(TinyNet(), unfit, short, checkpoint=tmp_path / "c.safetensors"),
        lambda: train(supernet, unfit, short),
        lambda: evaluate(TinyNet(), unfit),
        lambda: evaluate(supernet, unfit, config),
        lambda: recalibrate(supernet, unfit, config),
    ):
        with pytest.raises(ValueError, match=f"^dataset .*{message}"):
            call()
    with pytest.raises(ValueError, match=f"^calibration .*{message}"):
        evaluate(supernet, dataset, config, calibration=unfit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.numpy])
def test_images_of_the_type_of_the_network_are_read(dataset, change):
    network = TinyNet().double() if change is torch.Tensor.double else TinyNet()
    data = Items(lambda x, y: (change(x), y))
    network, history = train(network, data, TrainConfig(epochs=1, batch_size=16))
    assert len(history) == 1 and len(evaluate(network, data).correct) == 48


class Bytes(nn.Module):
    """Converts its images itself."""

    def __init__(self):
        super().__init__()
        self.net = TinyNet()

    def forward(self, x):
        return self.net(x.float() / 255)


def test_a_network_may_convert_its_images_itself(dataset):
    data = Items(lambda x, y: ((50 * x + 128).clamp(0, 255).byte(), y))
    network, _ = train(Bytes(), data, TrainConfig(epochs=1, batch_size=16))
    assert len(evaluate(network, data).correct) == 48


def test_checking_a_data_set_draws_no_random_number(supernet):
    data = Items(lambda x, y: (x + torch.rand(()), y))
    before = torch.get_rng_state()
    check_dataset("dataset", data, supernet)
    assert torch.equal(torch.get_rng_state(), before)


def test_recalibration_draws_the_same_augmentation_at_each_call(supernet):
    stored = torch.randint(256, (48, 3, 12, 12), dtype=torch.uint8)
    split = InMemory(stored, images(48).tensors[1], (0.5,) * 3, (0.2,) * 3, padding=4)
    config, found = supernet.uniform(3), []
    for dataset in (split, split, split.without_augmentation()):
        before = torch.get_rng_state()
        recalibrate(supernet, dataset, config)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(evaluate(supernet, split.without_augmentation(), config).loss)
        torch.rand(3)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "8", None])
def test_numbers_of_images_are_whole_numbers(supernet, dataset, wrong):
    config = supernet.uniform(2)
    for call in (recalibrate, evaluate):
        with pytest.raises(
            ValueError, match=f"batch_size={wrong!r} is not allowed: a whole number"
        ):
            call(supernet, dataset, config, batch_size=wrong)
        with pytest.raises(ValueError, match=f"images={wrong!r} is not allowed: a whole number"):
            call(supernet, dataset, config, images=wrong)


def naive_statistics(layer, x, bits, sizes):
    """Mean and unbiased variance of a convolution's outputs, averaged over batches, in float64."""
    # 8-bit weights differ from the float ones: quantize by the step's grid
    step = layer.weight_quantizer.step(bits).double()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = step * (layer.op.weight.double() / step).round().clamp(low, high)
    outputs = [torch.conv2d(b, weight, stride=2, padding=1) for b in x.double().split(sizes)]
    channels = [y.transpose(0, 1).flatten(1) for y in outputs]
    means = [sum(c.mean(1) for c in channels) / len(channels)]
    squares = [((c - c.mean(1, keepdim=True)) ** 2).sum(1) / (c.shape[1] - 1) for c in channels]
    return means[0], sum(squares) / len(squares)


@pytest.mark.parametrize(("n", "size", "sizes"), [(32, 16, [16, 16]), (17, 16, [9, 8])])
def test_recalibration_measures_the_norms_of_one_configuration_only(supernet, n, size, sizes):
    config, data, before = supernet.uniform(3), images(n), statistics(supernet)
    supernet.eval()
    recalibrate(supernet, data, config, images=n, batch_size=size)
    after = statistics(supernet)
    changed = {key.rsplit(".", 1)[0] for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"model.stem.0.bank", "model.depthwise.bank"}
    key = "model.depthwise.bank.running_mean"
    own = supernet.layers["depthwise"].row(config["depthwise"])
    rows = range(len(after[key]))
    assert [row for row in rows if not torch.equal(after[key][row], before[key][row])] == [own]

    stem = supernet.layers["stem.0"]  # its input is float
    mean, var = naive_statistics(stem, data.tensors[0][draw(data, n)], 8, sizes)
    bank = stem.bank
    torch.testing.assert_close(bank.running_mean[0].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bank.running_var[0].double(), var, rtol=1e-4, atol=1e-5)
    assert stem.norm.momentum == 0.1 and not stem.norm.training


@pytest.mark.parametrize(("n", "size"), [(2, 1), (3, 1), (5, 2), (9, 8), (129, 128)])
def test_no_batch_of_a_single_image_at_1x1_resolution(n, size):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(n, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    supernet = Supernet(network, x, (2, 4))
    data = TensorDataset(x, torch.zeros(n, dtype=torch.long))
    recalibrate(supernet, data, supernet.uniform(2), batch_size=size)
    assert supernet.layers["0"].bank.running_var.min() > 0


class Recorded(Dataset):
    """Items that remember which of them were read in batches."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def __getitems__(self, indices):
        self.read += indices
        return [self.items[i] for i in indices]


def test_recalibration_reads_as_many_images_as_asked_always_the_same(supernet):
    read = []
    for data in Recorded(images(32)), Recorded(images(32)):
        evaluate(supernet, images(4), supernet.uniform(2), calibration=data, images=8)
        read.append(data.read)
    assert read[0] == read[1] and len(set(read[0])) == 8


def sorted_by_class(per_class):
    """Images of eight classes, one class after the other, each of its own brightness."""
    y = torch.arange(8).repeat_interleave(per_class)
    x = torch.randn(len(y), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x + 3 * y[:, None, None, None], y)


@pytest.mark.parametrize("per_class", [32, 200])  # all images, or some of them
@pytest.mark.parametrize("order", ["sorted", "cyclic"])
def test_recalibration_does_not_depend_on_the_order_of_classes(supernet, per_class, order):
    x, y = sorted_by_class(per_class).tensors
    if order == "cyclic":
        x, y = (t.unflatten(0, (8, -1)).transpose(0, 1).flatten(0, 1) for t in (x, y))
    recalibrate(supernet, TensorDataset(x, y), supernet.uniform(3), images=256, batch_size=32)
    stem = supernet.layers["stem.0"]
    mean, var = naive_statistics(stem, x, 8, [len(x)])
    # A batch of one class alone has about a twentieth of the variance.
    torch.testing.assert_close(stem.bank.running_var[0].double(), var, rtol=0.25, atol=0)
    torch.testing.assert_close(stem.bank.running_mean[0].double(), mean, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("wrong", [0, -5, 1, True, "many", 20.0, None])
def test_recalibration_refuses_an_unfit_number_of_images(supernet, dataset, wrong):
    before = statistics(supernet)
    with pytest.raises(ValueError, match=f"images={wrong!r} is not allowed: a whole number"):
        recalibrate(supernet, dataset, supernet.uniform(2), images=wrong)
    with pytest.raises(ValueError, match="batch_size=0 is not allowed"):
        recalibrate(supernet, dataset, supernet.uniform(2), batch_size=0)
    for few in (0, 1):
        with pytest.raises(ValueError, match=f"dataset holds {few} images"):
            recalibrate(supernet, Subset(dataset, range(few)), supernet.uniform(2))
    assert all(torch.equal(before[k], v) for k, v in statistics(supernet).items())


class Broken(Dataset):
    """Images of which the last cannot be read, or is not finite."""

    def __init__(self, error):
        self.items, self.error = images(20), error

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        x, y = self.items[index]
        if index < len(self) - 1:
            return x, y
        if self.error:
            raise self.error
        return x * torch.nan, y


@pytest.mark.parametrize(
    ("error", "kind", "match"),
    [(OSError("truncated"), OSError, "truncated"), (None, ValueError, "are not finite")],
)
def test_recalibration_that_fails_changes_nothing(supernet, error, kind, match):
    supernet.train()
    before, mode = statistics(supernet), modes(supernet)
    with pytest.raises(kind, match=match):
        recalibrate(supernet, Broken(error), supernet.uniform(2), batch_size=4)
    assert all(torch.equal(before[k], v) for k, v in statistics(supernet).items())
    assert modes(supernet) == mode


def test_recalibration_refuses_a_foreign_configuration(supernet, pre_norm, dataset):
    before = statistics(supernet)
    with pytest.raises(ValueError, match="layers unknown to this supernet"):
        recalibrate(supernet, dataset, pre_norm.uniform(2))
    assert all(torch.equal(before[k], v) for k, v in statistics(supernet).items())


class Skipping(nn.Module):
    """A network whose last batch norm does not run in eval mode."""

    def __init__(self):
        super().__init__()
        self.body, self.auxiliary = TinyNet(), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.body(x)


def test_a_norm_that_does_not_run_keeps_its_statistics(dataset):
    supernet = Supernet(Skipping(), dataset.tensors[0], (2, 4))
    supernet.model.auxiliary.running_mean.fill_(3)
    recalibrate(supernet, dataset, supernet.uniform(2))
    assert supernet.model.auxiliary.running_mean.tolist() == [3, 3, 3]


def shared_bank():
    torch.manual_seed(0)
    return Supernet(TinyNet(), images(16, seed=1).tensors[0], (2, 3, 4), pair_norms=False)


@pytest.mark.parametrize("kind", ["outside", "shared"])
def test_statistics_of_another_configuration_are_refused(pre_norm, dataset, kind):
    supernet = pre_norm if kind == "outside" else shared_bank()
    supernet = one_shot(supernet, dataset)
    a, b = supernet.uniform(4), supernet.uniform(2)
    unknown = evaluate(supernet, dataset, a)  # statistics of training: allowed
    recalibrate(supernet, dataset, a)
    right = evaluate(supernet, dataset, a)
    recalibrate(supernet, dataset, b)
    with pytest.raises(ValueError, match="hold statistics of another configuration, or"):
        evaluate(supernet, dataset, a)
    evaluate(supernet, dataset, b)
    assert evaluate(supernet, dataset, a, calibration=dataset).loss == right.loss != unknown.loss


def test_statistics_that_two_configurations_share_are_used_for_both(supernet, dataset):
    low, high = supernet.uniform(2), supernet.uniform(4)
    recalibrate(supernet, dataset, low)
    first = evaluate(supernet, dataset, low)
    recalibrate(supernet, dataset, high)  # own norms but for the stem, which both run alike
    assert evaluate(supernet, dataset, low).loss == first.loss


def test_a_norm_behind_other_bits_is_refused_too(dataset):
    torch.manual_seed(0)
    example = images(16, seed=1).tensors[0]
    supernet = Supernet(TinyNet(), example, (2, 3, 4), edge_bits=None)
    low = supernet.uniform(3)
    stem_at_2 = low.replace("stem.0", supernet.uniform(2)["stem.0"])
    recalibrate(supernet, dataset, low)
    recalibrate(supernet, dataset, stem_at_2)  # "depthwise" runs at 3 bits in both
    with pytest.raises(
        ValueError, match=r"1 of 2 batch norms, such as 'model.depthwise.bank \(w3a3\)'"
    ):
        evaluate(supernet, dataset, low)


def test_the_record_ends_where_statistics_change(pre_norm, dataset):
    a, b = pre_norm.uniform(4), pre_norm.uniform(2)
    before = copy.deepcopy(pre_norm.state_dict())
    recalibrate(pre_norm, dataset, a)
    copied = copy.deepcopy(pre_norm)
    with pytest.raises(ValueError, match="another configuration"):
        evaluate(copied, dataset, b)
    copied.load_state_dict(before)
    evaluate(copied, dataset, b)  # loaded: unknown
    pre_norm.train()(dataset.tensors[0], a)
    evaluate(pre_norm, dataset, b)  # trained: unknown
    assert before.keys() == pre_norm.state_dict().keys()


def test_the_order_of_layers_in_a_configuration_does_not_matter(pre_norm, dataset):
    config = pre_norm.uniform(4)
    recalibrate(pre_norm, dataset, config)
    backwards = type(config)(config.layers[::-1])
    assert evaluate(pre_norm, dataset, backwards).loss == evaluate(pre_norm, dataset, config).loss


@pytest.mark.parametrize("kind", ["tiny", "outside", "shared"])
def test_float_mode_needs_recalibration_after_one_shot_training(kind, supernet, pre_norm, dataset):
    supernet = {"tiny": supernet, "outside": pre_norm, "shared": shared_bank()}[kind]
    evaluate(supernet, dataset)  # converted only: the statistics are the float network's
    recalibrate(supernet, dataset, supernet.uniform(2))
    if kind == "tiny":
        evaluate(supernet, dataset)  # recalibration is no training
    supernet = one_shot(supernet, dataset)
    with pytest.raises(ValueError, match="float mode after one-shot training"):
        evaluate(supernet, dataset)
    found = evaluate(supernet, dataset, calibration=dataset)
    recalibrate(supernet, dataset, None)
    assert evaluate(supernet, dataset).loss == found.loss
    x, y = dataset.tensors
    for norm in batch_norms(supernet):
        norm.train().momentum = None
        norm.reset_running_stats()
    with torch.no_grad():  # the reference: one batch of all images
        supernet(x)
        expected = nn.functional.cross_entropy(supernet.eval()(x), y)
    assert found.loss == pytest.approx(float(expected), rel=1e-5)


def test_float_mode_from_a_file_needs_recalibration_too(supernet, dataset):
    trained = one_shot(supernet, dataset)
    torch.manual_seed(0)
    loaded = Supernet(TinyNet(), images(16, seed=1).tensors[0], (2, 3, 4))
    loaded.load_state_dict(trained.state_dict())
    with pytest.raises(ValueError, match="float mode after one-shot training"):
        evaluate(loaded, dataset)


def test_recalibration_improves_float_mode_after_one_shot_training(supernet):
    data = images(256)
    supernet = one_shot(supernet, data)
    with torch.no_grad():
        stale = float(nn.functional.cross_entropy(supernet(data.tensors[0]), data.tensors[1]))
    assert evaluate(supernet, data, calibration=data).loss < stale


def test_batch_statistics_are_used_and_leave_no_trace(supernet, dataset):
    x, config = dataset.tensors[0], supernet.uniform(4)
    supernet.eval()
    before, running = statistics(supernet), supernet(x, config)
    norms = batch_norms(supernet)
    with batch_statistics(norms):
        own = supernet(x, config)
    assert torch.equal(supernet(x, config), running) and not torch.equal(own, running)
    assert all(torch.equal(before[k], v) for k, v in statistics(supernet).items())
    # Normalised by its own batch, the network does not see a change of scale behind a norm.
    with torch.no_grad():
        supernet.layers["stem.0"].bank.running_mean += 5
    with batch_statistics(norms):
        assert torch.equal(supernet(x, config), own)


def test_an_unknown_device_is_refused():
    assert select_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device='tpu' is not available here: one of"):
        select_device("tpu")


@pytest.mark.parametrize("device", ["cpu:x", "cuda:99", "meta", ""])
def test_a_device_that_is_not_here_is_refused(device):
    with pytest.raises(ValueError, match="is not available here: one of"):
        select_device(device)
    assert select_device(torch.device("cpu")) == torch.device("cpu")


def test_evaluate_recalibrates_on_as_many_images_as_asked(supernet, dataset):
    config = supernet.uniform(2)
    found = evaluate(supernet, dataset, config, calibration=images(64), images=8, batch_size=4)
    recalibrate(supernet, images(64), config, images=8, batch_size=4)
    assert evaluate(supernet, dataset, config, batch_size=4).loss == found.loss


@pytest.mark.parametrize("part", ["weight_quantizer", "act_quantizer"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_step_size_that_is_zero_or_not_finite_is_named(supernet, dataset, part, value):
    name, layer = list(supernet.layers.items())[1]
    getattr(layer, part).steps.data[0] = value
    bits = getattr(layer, part).bits[0]
    message = rf"step size of {name}.{part} at {bits} bits is {value}"
    with pytest.raises(ValueError, match=message):
        evaluate(supernet, dataset, largest(supernet.candidates), calibration=dataset)
    with pytest.raises(FloatingPointError, match=message):
        train(supernet, dataset, TrainConfig(epochs=1, batch_size=16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_a_16_bit_network_does_not_depend_on_the_batch_size(dtype):
    torch.manual_seed(0)
    x, y = images(48).tensors
    dataset, model = TensorDataset(x.to(dtype), y), TinyNet().to(dtype).eval()
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(model(x.to(dtype)).double(), y))
    for batch_size in (1, 7, 48):
        assert evaluate(model, dataset, batch_size=batch_size).loss == pytest.approx(expected, 1e-3)
