"""The rank search against a literal loss, and properties of what `cora` returns."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from conftest import Normalised, TinyNet, images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.ops import StochasticDepth

import mpqlib
from mpqlib.studies import ranks
from mpqlib.studies.adapters import Adapted, butterworth, quantize_weight
from mpqlib.studies.ranks import cora

QUICK = dict(iterations=3, batch_size=16)


def network() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet()


def literal_loss(logits, targets, spent, budget, gamma, teacher):
    """The loss with Python's numbers alone: lists of rows."""

    def shares(row):
        total = math.fsum(math.exp(v) for v in row)
        return [math.exp(v) / total for v in row]

    losses = []
    for row, target in zip(logits, targets, strict=True):
        q = shares(row)
        if teacher:
            p = shares(target)
            losses.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        else:
            losses.append(-math.log(q[target]))
    over = spent - budget if spent > budget else 0.0
    return math.fsum(losses) / len(losses) + gamma * math.exp(over)


@given(st.integers(0, 10**6), st.booleans(), st.floats(0, 2), st.floats(0, 2), st.floats(0, 3))
def test_loss_agrees_with_its_literal_twin(seed, teacher, spent, budget, gamma):
    generator = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) * 3
    targets = other if teacher else torch.randint(4, (5,), generator=generator)
    found = ranks.rank_loss(
        logits, targets, torch.tensor(spent, dtype=torch.float64), budget, gamma
    )
    expected = literal_loss(logits.tolist(), targets.tolist(), spent, budget, gamma, teacher)
    assert float(found) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 12))
def test_batches_show_every_image_once_an_epoch(count, size, batches):
    size = min(size, count)
    drawn = list(ranks.draw_batches(count, size, batches, seed=1))
    assert [len(batch) for batch in drawn] == [size] * batches
    order = [i for batch in drawn for i in batch.tolist()]
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))


LAYER = st.tuples(st.floats(0.01, 1), st.integers(1, 60), st.integers(1, 500))


@settings(deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=6), st.floats(0, 1.2))
def test_ranks_fit_their_budget_and_use_it(layers, generosity):
    shares, full, component = map(list, zip(*layers, strict=True))
    wanted = [share * most for share, most in zip(shares, full, strict=True)]
    least, most = sum(component), sum(f * c for f, c in zip(full, component, strict=True))
    limit = least + generosity * (most - least)
    found = ranks.fit_ranks(wanted, full, component, limit)
    assert all(1 <= rank <= top for rank, top in zip(found, full, strict=True))
    held = sum(rank * c for rank, c in zip(found, component, strict=True))
    assert held <= limit
    growing = [c for rank, top, c in zip(found, full, component, strict=True) if rank < top]
    assert limit - held < max(growing, default=math.inf)
    with pytest.raises(ValueError, match="cannot be met"):
        ranks.fit_ranks(wanted, full, component, least - 1)


def test_ranks_keep_their_proportions():
    assert ranks.fit_ranks([1.0, 2.0, 4.0], [100] * 3, [1] * 3, 70) == [10, 20, 40]
    assert ranks.fit_ranks([3.0, 3.0, 3.0], [100] * 3, [1] * 3, 10) in ([4, 3, 3], [3, 4, 3])
    assert ranks.fit_ranks([1e-9, 5.0], [8, 8], [1, 1], 9) == [1, 8]


def test_ranks_are_rounded_up_and_the_rest_goes_to_the_nearest():
    # At the factor 1: 2 and 5. Rounded down, 1 and 6 would fit as well.
    assert ranks.fit_ranks([1.5, 5.0], [100] * 2, [1, 1], 7) == [2, 5]
    # At the factor 1: 2, 2 and 2, of 2, 2 and 1.5 wanted. One weight is left: the first one needs
    # five, and the second one is nearest to its next rank.
    assert ranks.fit_ranks([2.0, 2.0, 1.5], [100] * 3, [5, 1, 1], 15) == [2, 3, 2]
    assert ranks.fit_ranks([2.0, 1.5, 2.0], [100] * 3, [5, 1, 1], 15) == [2, 2, 3]
    # Two are left: once each, and none beyond the full rank
    assert ranks.fit_ranks([2.0, 2.0, 1.5], [100] * 3, [5, 1, 1], 16) == [2, 3, 3]
    assert ranks.fit_ranks([2.0, 2.0, 1.5], [2] * 3, [5, 1, 1], 13) == [2, 2, 1]


def test_the_smallest_budget_that_an_error_names_is_allowed():
    with pytest.raises(ValueError, match="at least") as found:
        cora(network(), images(16), budget=0.01, iterations=0)
    least = float(re.search(r"at least ([\d.]+)", str(found.value))[1])
    assert set(cora(network(), images(16), budget=least, iterations=0).ranks.values()) == {1}


def test_the_penalty_counts_the_weights_of_all_adapters(monkeypatch):
    seen = []

    def kept(logits, targets, spent, *others):
        seen.append((spent.item(), sum(conv.share.item() * full[n] for n, conv in convs.items())))
        return loss(logits, targets, spent, *others)

    loss = ranks.rank_loss
    monkeypatch.setattr(ranks, "rank_loss", kept)
    adapted = Adapted(network(), torch.randn(1, 3, 8, 8), 3)
    # Numbers that an adapter of full rank stores, over those of all convolutions
    full = {n: c.left.numel() + c.right.numel() for n, c in adapted.convs.items()}
    full = {n: count / (8 * 27 + 8 * 9 + 12 * 8) for n, count in full.items()}
    convs = {name: adapted.convs[name] for name in ("stem.0", "pointwise")}
    for conv in convs.values():
        conv.cut_softly(0.5, order=4)
    x, y = images(16).tensors
    ranks.search_ranks(adapted, convs, x, y, 0.1, iterations=4, batch_size=16)
    for spent, expected in seen:
        assert spent == pytest.approx(expected)
    assert len({spent for spent, _ in seen}) == 4


def literal_search(adapted, convs, x, y, budget, iterations, lr, clip, gamma):
    """The shares after `iterations` of Adam by its formulas, a number at a time, on all images."""
    shares = {name: conv.share.item() for name, conv in convs.items()}
    m, v = dict.fromkeys(shares, 0.0), dict.fromkeys(shares, 0.0)
    for t in range(1, iterations + 1):
        spent = sum(c.share * c.rank * c.component for c in convs.values()) / adapted.weights
        over = torch.clamp(spent - budget, min=0)
        loss = nn.functional.cross_entropy(adapted(x), y) + gamma * over.exp()
        found = torch.autograd.grad(loss, [conv.share for conv in convs.values()])
        for (name, conv), gradient in zip(convs.items(), found, strict=True):
            g = min(max(gradient.item(), -clip), clip)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            step = m[name] / (1 - 0.9**t) / (math.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
            shares[name] = min(max(shares[name] - lr * step, 1 / conv.rank), 1.0)
            conv.share.data.fill_(shares[name])
    return shares


@pytest.mark.parametrize("lr, clip", [(0.02, 0.2), (0.02, 0.01), (0.3, 0.2)])
def test_search_agrees_with_its_literal_twin(lr, clip):
    x, y = images(16).tensors
    found = []
    for search in (ranks.search_ranks, literal_search):
        adapted = Adapted(network(), x, 2)
        for conv in adapted.convs.values():
            conv.cut_softly(0.5, order=4)
        how = dict(iterations=8, lr=lr, clip=clip, gamma=2.0)
        how |= dict(batch_size=16) if search is ranks.search_ranks else {}
        found.append(search(adapted, adapted.convs, x, y, 0.4, **how))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("teacher", [True, False])
def test_the_search_gets_the_options(monkeypatch, teacher):
    seen = {}

    def keep(adapted, convs, x, targets, budget, **how):
        found = {name: (conv.share.item(), conv.order) for name, conv in convs.items()}
        seen.update(how, convs=found, targets=targets, budget=budget)
        return {name: share for name, (share, _) in found.items()}

    monkeypatch.setattr(ranks, "search_ranks", keep)
    subject, dataset = network(), images(16)
    how = dict(iterations=7, batch_size=5, lr=0.3, clip=0.4, gamma=0.6, seed=9)
    cora(subject, dataset, 3, 0.5, start=0.7, order=2, teacher=teacher, **how)
    assert {name: seen[name] for name in how} == how and seen["budget"] == 0.5
    assert list(seen["convs"].values()) == [(pytest.approx(0.7), 2)] * 3
    x, y = dataset.tensors
    expected = subject.eval()(x).detach() if teacher else y  # the teacher is the float network
    assert torch.equal(seen["targets"], expected)
    cora(subject, dataset, 3, 0.5, **how)
    shares = [share for share, _ in seen["convs"].values()]
    adapted = Adapted(copy.deepcopy(subject), x[:1], 3)
    full = sum(conv.rank * conv.component for conv in adapted.convs.values())
    assert shares == pytest.approx([0.5 * adapted.weights / full] * 3)  # meets the budget


def test_the_result_has_hard_ranks():
    adapted = cora(network(), images(32), bits=3, budget=0.5, **QUICK)
    for conv in adapted.convs.values():
        whole = conv.conv.weight + (conv.left @ conv.right).view_as(conv.conv.weight)
        assert torch.equal(conv.weight, whole) and conv.order is None


def test_gradients_reach_the_shares_alone():
    adapted = Adapted(network(), torch.randn(1, 3, 8, 8), 3)
    for conv in adapted.convs.values():
        conv.cut_softly(0.5, order=4)
    x, y = images(16).tensors
    loss = ranks.rank_loss(adapted(x), y, torch.tensor(0.1), 0.05, 1.0)
    loss.backward()
    reached = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert reached == {f"network.{name}.share" for name in adapted.convs}
    assert all(float(conv.share.grad) != 0 for conv in adapted.convs.values())


def test_share_gradient_is_its_formula():
    share = torch.tensor(0.43, dtype=torch.float64, requires_grad=True)
    full, order = 7, 3
    kernel = butterworth(share, full, order)
    for i in range(full):
        (found,) = torch.autograd.grad(kernel[i], share, retain_graph=True)
        ratio = (i / full / 0.43) ** (2 * order)  # components are counted from 0
        expected = order * ratio / 0.43 * (1 + ratio) ** -1.5
        assert float(found) == pytest.approx(expected)


class Weighed(nn.Module):
    """Two convolutions beside one another, of which only the first one counts."""

    def __init__(self):
        super().__init__()
        self.heard, self.unheard = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        x = self.heard(x) + 0 * self.unheard(x)
        return self.last(x.relu().mean((2, 3)))


def test_search_gives_ranks_to_the_layer_that_counts():
    torch.manual_seed(0)
    subject, dataset = Weighed(), images(64)
    subject.last.weight.data.mul_(10)  # else the task is too small beside the penalty
    how = dict(bits=2, budget=0.7, iterations=150, batch_size=64, teacher=True)
    found = cora(subject, dataset, **how).ranks
    assert found["heard"] > 2 * found["unheard"] >= 2
    uniform = cora(subject, dataset, **how | dict(iterations=0)).ranks
    assert abs(uniform["heard"] - uniform["unheard"]) <= 1


def test_cora_leaves_the_network_as_it_is():
    subject, dataset = network().train(), images(32)
    subject.depthwise.eval()
    before, modes = copy.deepcopy(subject.state_dict()), [m.training for m in subject.modules()]
    adapted = mpqlib.cora(subject, dataset, bits=3, budget=0.5, recalibrate=True, **QUICK)
    assert all(torch.equal(before[name], value) for name, value in subject.state_dict().items())
    assert [m.training for m in subject.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in subject.parameters())
    assert not any(module.training for module in adapted.modules())


@pytest.mark.parametrize("budget", [0.2, 0.5, 1.0])
def test_budget_holds_after_rounding(budget):
    adapted = cora(network(), images(32), bits=3, budget=budget, **QUICK)
    held = sum(conv.rank * conv.component for conv in adapted.convs.values())
    assert held <= budget * adapted.weights and min(adapted.ranks.values()) >= 1
    assert adapted.cost()["added_percent"] == pytest.approx(100 * held / adapted.weights)


def test_weights_and_adapters_have_their_bits():
    adapted = cora(network(), images(32), bits=3, budget=0.5, adapter_bits=5, **QUICK)
    for conv in adapted.convs.values():
        assert all(len(row.unique()) <= 2**3 for row in conv.conv.weight.flatten(1))
        assert len(conv.left.unique()) <= 2**5 and len(conv.right.unique()) <= 2**5


def test_no_budget_and_float_bits_compute_as_the_float_network():
    subject, dataset = network(), images(32)
    x = dataset.tensors[0]
    adapted = cora(subject, dataset, bits=32, budget=0.5)
    assert torch.equal(adapted(x), subject.eval()(x)) and not any(adapted.ranks.values())
    assert adapted.cost()["equivalent_bits"] == 32
    quantized = cora(subject, dataset, bits=4, budget=0)
    assert quantized.cost()["equivalent_bits"] == 4 and not any(quantized.ranks.values())
    assert not torch.allclose(quantized(x), subject(x))


def test_all_components_reproduce_the_float_network():
    subject, dataset = network().eval(), images(32)
    x = dataset.tensors[0]
    adapted = Adapted(copy.deepcopy(subject), x[:1], bits=3)
    for conv in adapted.convs.values():
        conv.set_rank(conv.rank, bits=16)
    assert torch.allclose(adapted(x), subject(x), atol=1e-3)


def test_exempt_and_float_convolutions_have_no_adapter():
    bits = {"stem.0": 4, "depthwise": 32, "pointwise": 4}
    adapted = cora(network(), images(32), bits, 0.5, exempt=["stem.0"], **QUICK)
    assert adapted.ranks["stem.0"] == adapted.ranks["depthwise"] == 0 < adapted.ranks["pointwise"]


def test_norms_are_recalibrated_on_the_calibration_images():
    subject, dataset = network(), images(32)
    for budget in (0, 0.5):  # with adapters: of the ranks that the search found
        adapted = cora(subject, dataset, bits=2, budget=budget, recalibrate=True, **QUICK)
        seen = adapted.network.stem[0](dataset.tensors[0])
        mean = adapted.network.stem[1].running_mean
        assert torch.allclose(mean, seen.mean((0, 2, 3)), atol=1e-5)
    kept = cora(subject, dataset, bits=2, budget=0)
    assert torch.equal(kept.network.stem[1].running_mean, subject.stem[1].running_mean)


def test_recalibrated_norms_do_not_depend_on_the_stored_statistics(monkeypatch):
    # As after training: PyTorch's cumulative average would go on counting the batches
    trained = network()
    for norm in (trained.stem[1], trained.norm):
        norm.running_mean.add_(2)
        norm.running_var.mul_(9)
        norm.num_batches_tracked.fill_(1000)
    found, adapted = searched_shares(monkeypatch, trained, recalibrate=True)
    expected, fresh = searched_shares(monkeypatch, network(), recalibrate=True)
    assert found == expected  # the search sees norms that are measured again
    assert found != searched_shares(monkeypatch, trained)[0]
    for norm, other in zip(*(m.network.modules() for m in (adapted, fresh)), strict=True):
        if isinstance(norm, nn.BatchNorm2d):
            assert torch.equal(norm.running_mean, other.running_mean)
            assert torch.equal(norm.running_var, other.running_var)
            assert (norm.momentum, norm.training) == (0.1, False)


def test_norms_are_recalibrated_in_batches_of_about_128():
    for count, batches in ((100, 1), (129, 2), (300, 3)):
        adapted = cora(network(), images(count), bits=2, budget=0, recalibrate=True)
        assert int(adapted.network.norm.num_batches_tracked) == batches


def test_norms_are_recalibrated_on_images_that_are_sorted_by_class():
    y = torch.arange(8).repeat_interleave(32)  # 256 images: two batches
    x = torch.randn(len(y), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x += 3 * y[:, None, None, None]
    adapted = cora(network(), TensorDataset(x, y % 3), bits=8, budget=0, recalibrate=True)
    seen = adapted.network.stem[0](x)
    # Two batches of four classes each would have about a quarter of the variance.
    torch.testing.assert_close(
        adapted.network.stem[1].running_var, seen.var((0, 2, 3)), rtol=0.1, atol=0
    )


def test_each_iteration_of_the_search_reads_one_batch():
    adapted, read = Adapted(network(), torch.randn(1, 3, 8, 8), 2), []
    for conv in adapted.convs.values():
        conv.cut_softly(0.5, order=4)
    adapted.register_forward_pre_hook(lambda module, args: read.append(len(args[0])))
    for size, expected in ((7, [7] * 3), (99, [24] * 3)):
        how = dict(iterations=3, batch_size=size)
        ranks.search_ranks(adapted, adapted.convs, *images(24).tensors, 0.5, **how)
        assert read == expected
        read.clear()


def test_ranges_of_the_weights_are_cut_as_asked():
    subject = network()
    for deviations in (0.5, 1000):
        how = dict(budget=0, granularity="tensor", deviations=deviations)
        adapted = cora(subject, images(16), 3, **how)
        weight = subject.pointwise.weight.detach()
        expected = quantize_weight(weight, 3, "tensor", deviations)
        assert torch.equal(adapted.convs["pointwise"].conv.weight, expected)


def test_a_seed_gives_the_same_ranks():
    def shares(seed):
        adapted = Adapted(network(), torch.randn(1, 3, 8, 8), 2)
        for conv in adapted.convs.values():
            conv.cut_softly(0.5, order=4)
        x, y = images(48).tensors
        how = dict(iterations=8, batch_size=8, seed=seed)
        return ranks.search_ranks(adapted, adapted.convs, x, y, 10.0, **how)

    assert shares(0) == shares(0) != shares(1)
    assert all(0 < share <= 1 for share in shares(0).values())


def searched_shares(monkeypatch, subject: nn.Module, **options) -> tuple[dict, Adapted]:
    """The shares that the search of `cora` finds, and its result."""
    found = []

    def kept(*arguments, **how):
        found.append(search(*arguments, **how))
        return found[-1]

    search = ranks.search_ranks
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "search_ranks", kept)
        adapted = cora(subject, images(32), 2, 0.5, **QUICK | options)
    return found[0], adapted


def test_norms_per_batch_search_without_the_stored_statistics(monkeypatch):
    shifted = network()
    shifted.stem[1].running_mean.add_(2)
    plain, _ = searched_shares(monkeypatch, network())
    assert searched_shares(monkeypatch, shifted)[0] != plain
    found, adapted = searched_shares(monkeypatch, shifted, norms_per_batch=True)
    assert found == searched_shares(monkeypatch, network(), norms_per_batch=True)[0] != plain
    norm = adapted.network.stem[1]
    assert torch.equal(norm.running_mean, shifted.stem[1].running_mean)
    assert not norm.training and norm.track_running_stats


class Half(TinyNet):
    """Returns its logits in bfloat16, or the same numbers in float32."""

    def __init__(self, dtype: torch.dtype):
        torch.manual_seed(0)
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return super().forward(x).bfloat16().to(self.dtype)


@pytest.mark.parametrize("teacher", [False, True])
def test_losses_of_logits_in_bfloat16_are_computed_in_float32(monkeypatch, teacher):
    subjects = Half(torch.bfloat16), Half(torch.float32)
    half, single = (searched_shares(monkeypatch, s, teacher=teacher)[0] for s in subjects)
    assert half == single


def test_a_loss_that_is_not_finite_stops_the_search():
    with pytest.raises(FloatingPointError, match="the loss of the rank search"):
        cora(network(), images(16), bits=3, budget=0.5, gamma=1e300, **QUICK)


class Listed(nn.Module):
    """Calls its second convolution through a Python list, which no replacement reaches."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3)
        self.later = [self.b]

    def forward(self, x):
        return self.later[0](self.a(x)).mean((2, 3))


def test_a_convolution_past_its_adapter_is_named():
    with pytest.raises(ValueError, match="'b' runs 0 times with its adapter, but 1 times in"):
        cora(Listed(), images(16), budget=1)


def test_small_whole_numbers_of_numpy_are_whole_numbers():
    how = dict(budget=0.5, iterations=0)
    plain = cora(network(), images(16), 8, adapter_bits=8, **how)
    small = cora(network(), images(16), np.int8(8), adapter_bits=np.int8(8), **how)
    assert torch.equal(small(images(4).tensors[0]), plain(images(4).tensors[0]))
    assert small.cost() == plain.cost()


@pytest.mark.parametrize("part", [nn.Dropout(), StochasticDepth(0.5, "row")])
def test_only_batch_norms_are_recalibrated_in_training_mode(part):
    dataset = images(32)
    how = dict(bits=3, budget=0, recalibrate=True)
    with_part = cora(nn.Sequential(part, network()), dataset, **how)
    assert torch.equal(
        with_part(dataset.tensors[0]), cora(network(), dataset, **how)(dataset.tensors[0])
    )


@pytest.mark.parametrize("options", [dict(teacher=True), dict(recalibrate=True)])
def test_a_network_that_normalises_in_place_is_adapted_like_its_twin(options):
    dataset, outputs = images(32), []
    for in_place in (True, False):
        adapted = cora(Normalised(in_place), dataset, 3, 0.5, **QUICK, **options)
        outputs.append((adapted.ranks, adapted(dataset.tensors[0])))
    assert outputs[0][0] == outputs[1][0]
    assert torch.allclose(outputs[0][1], outputs[1][1], atol=1e-4)
    assert torch.equal(dataset.tensors[0], images(32).tensors[0])


class Tuples(TinyNet):
    """Returns its logits in a tuple."""

    def forward(self, x):
        return (super().forward(x),)


def test_calibration_that_does_not_fit_the_network_is_named():
    x, y = images(8).tensors
    with pytest.raises(
        ValueError, match=r"images in torch.float32; the network is in torch.float64"
    ):
        cora(network().double(), images(8), budget=0)
    with pytest.raises(ValueError, match="calibration holds 1 image: recalibrate needs at least 2"):
        cora(network(), TensorDataset(x[:1], y[:1]), budget=0, recalibrate=True)
    with pytest.raises(ValueError, match="tuple"):
        cora(Tuples(), images(8), budget=0)


def test_a_search_runs_in_inference_mode():
    float_network, calibration = network(), images(16)
    with torch.inference_mode():
        assert cora(float_network, calibration, 3, 0.5, **QUICK).ranks


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(budget=-0.1), "budget=-0.1"),
        (dict(budget=0.01), "budget=0.01 is not allowed: 0, or at least"),
        (dict(budget="much"), "budget='much'"),
        (dict(budget=math.nan), "budget=nan"),
        (
            dict(budget=5),
            "budget=5 is not allowed: a number from 0 to 1; it is a share of the weig",
        ),
        (dict(budget=1.01), "0.05 means 5%"),
        (dict(deviations=0), "deviations=0"),
        (dict(start=0), "start=0"),
        (dict(start=1.5), "start=1.5"),
        (dict(granularity="layer"), "granularity='layer'"),
        (dict(adapter_bits=1), "adapter_bits=1"),
        (dict(iterations=-1), "iterations=-1"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(order=0), "order=0"),
        (dict(lr=-1), "lr=-1"),
        (dict(gamma=math.inf), "gamma=inf"),
        (dict(exempt=["nothing"]), "exempt names no convolution"),
        (dict(exempt="stem"), "exempt='stem' is not allowed: a list"),
        (dict(exempt=None), "exempt=None is not allowed: a list"),
        (dict(seed=0.5), "seed=0.5"),
        (dict(seed=2**63), f"seed={2**63} is not allowed: at most"),
        (dict(teacher="no"), "teacher='no' is not allowed: True or False"),
        (dict(norms_per_batch=1), "norms_per_batch=1 is not allowed: True or False"),
        (dict(device="abacus"), "abacus"),
    ],
)
def test_odd_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cora(network(), images(16), **dict(budget=0.5) | options)


def test_odd_calibration_is_refused():
    x, y = images(16).tensors
    with pytest.raises(ValueError, match="empty"):
        cora(network(), TensorDataset(x[:0], y[:0]), budget=0.5)
    with pytest.raises(ValueError, match="the model has classes 0 to 2"):
        cora(network(), TensorDataset(x, y + 3), budget=0.5)
    with pytest.raises(ValueError, match="calibration is a Tensor: pass a Dataset"):
        cora(network(), x, budget=0.5)
    with pytest.raises(ValueError, match=r"calibration holds tensors of shape \[\(16, "):
        cora(network(), TensorDataset(x), budget=0.5)
    for value in (math.inf, math.nan):
        x[3] = value
        with pytest.raises(ValueError, match="values that are not finite"):
            cora(network(), TensorDataset(x, y), budget=0.5)
    with pytest.raises(TypeError, match="unknown"):
        cora(network(), images(16), budget=0.5, unknown=1)
