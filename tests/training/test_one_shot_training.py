"""Whole one-shot training in float64, beside a literal twin of the release, step by step."""

from dataclasses import replace

import pytest
import release
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpqlib.network.bits import Candidates, sample
from mpqlib.network.supernet import Supernet
from mpqlib.training.loop import Run, TrainConfig, update


class Small(nn.Module):
    """Four layers with a choice of bits, one of them depth-wise and in a residual branch."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(6)
        self.a = nn.Conv2d(6, 8, 3, 1, 1, bias=False)
        self.a_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 1)
        self.c = nn.Conv2d(6, 8, 3, 2, 1, bias=False)
        self.c_norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 3)
        # A channel whose weights all round to zero is constant. Without a bias it would lie on the
        # edge of the ReLU, where a rounding error decides about its gradient.
        for norm in (self.first_norm, self.a_norm, self.depthwise_norm, self.c_norm):
            nn.init.uniform_(norm.bias, 0.1, 0.5)

    def forward(self, x):
        x = self.first_norm(self.first(x)).relu()
        x = self.a_norm(self.a(x)).relu()
        x = x + self.depthwise_norm(self.depthwise(x))
        x = self.b(x).relu()
        x = self.c_norm(self.c(x)).relu()
        return self.last(x.mean((2, 3)))


# name -> stride, padding, groups, whether a batch norm follows, whether the input can be negative
CONVS = {
    "first": (2, 1, 1, True, True),
    "a": (1, 1, 1, True, False),
    "depthwise": (1, 1, 8, True, False),
    "b": (1, 0, 1, False, True),
    "c": (2, 1, 1, True, False),
}
SEARCHED = ["a", "depthwise", "b", "c"]
FULL = {"a": [2, 3, 4], "depthwise": [3, 4], "b": [2, 3, 4], "c": [2, 3, 4]}


def fake_quantize(x: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """LSQ by autograd: rounding passes gradients straight through, clipping stops them."""
    low, high = release.grid_range(bits) if signed else (0, 2**bits - 1)
    v = (x / step).clamp(low, high)
    return (v + (v.round() - v).detach()) * step


def scaled(step: Tensor, count: int, bits: int, signed: bool) -> Tensor:
    """The step with its gradient times LSQ's scale."""
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    g = 1 / (count * high) ** 0.5
    return (step - step * g).detach() + step * g


def unstacked(supernet: Supernet, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of parameters, where each step size and each batch norm has a name of its own."""
    found = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        if last == "steps":
            rows = [f"{name}.{b}" for b in supernet.get_submodule(owner).bits]
        elif ".bank." in name:
            layer = supernet.get_submodule(owner.removesuffix(".bank"))
            rows = [f"{owner}.w{w}a{a}.{last}" for w, a in layer.pairs]
        else:
            found[name] = tensor
            continue
        found |= dict(zip(rows, tensor, strict=True))
    return found


def named(supernet: Supernet) -> dict[str, Tensor]:
    return unstacked(supernet, dict(supernet.named_parameters()))


class Twin:
    """The release's training of `Small`, written out."""

    def __init__(self, supernet: Supernet, config: TrainConfig, steps: int, switches: dict):
        self.config, self.steps, self.switches = config, steps, switches
        self.values = {n: p.detach().clone() for n, p in named(supernet).items()}
        self.candidates = {name: list(bits) for name, bits in FULL.items()}
        shares = [self.step_share(s) for s in range(steps)]
        self.peak = config.step_travel / sum(shares)
        self.movers = {
            n: release.Adam() if "steps" in n else release.Momentum() for n in self.values
        }
        self.average = {n: v.clone() for n, v in self.values.items()}
        for name in [*SEARCHED, "first", "last"]:
            for bits in FULL.get(name, [8]):
                weight = self.weight(name).numpy()
                if switches["weight_steps"] == "nested":
                    step = release.initial_step(weight, bits)
                else:
                    step = 2 * abs(weight).mean() / (2 ** (bits - 1) - 1) ** 0.5
                key = f"model.{name}.weight_quantizer.steps.{bits}"
                assert float(self.values[key]) == pytest.approx(step, rel=1e-12)

    def weight(self, name: str) -> Tensor:
        return self.values[f"model.{name}.op.weight"]

    def part(self, step: int) -> int:
        return int(step * 150 / self.steps)

    def step_share(self, step: int) -> float:
        return release.step_learning_rate(self.part(step), peak=1.0)

    def decide(self, step: int) -> None:
        """Freezes layers if a decision comes before `step`."""
        part = release.decision_before(step, self.steps)
        if part is None or not self.config.scheduler:
            return
        turbulences = []
        for name in SEARCHED:
            steps = {
                b: abs(float(self.values[f"model.{name}.weight_quantizer.steps.{b}"]))
                for b in FULL[name]
            }
            weight = self.weight(name).numpy()
            turbulences.append(release.turbulence(weight, steps, self.candidates[name]))
        found = release.freeze(list(FULL.values()), turbulences, release.freeze_share(part))
        self.candidates = dict(zip(SEARCHED, found, strict=True))

    def full_candidates(self) -> dict[str, Candidates]:
        """Weight and activation candidates of all layers."""
        both = self.config.freeze_activations
        found = {"first": Candidates((8,), (8,))}
        for name, bits in self.candidates.items():
            found[name] = Candidates(tuple(bits), tuple(bits if both else FULL[name]))
        return found | {"last": Candidates((8,), (8,))}

    def forward(self, p: dict[str, Tensor], x: Tensor, config) -> tuple[Tensor, dict]:
        """Logits and the outputs of all layers."""
        outputs = {}

        def quantized(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
            weight, (w_bits, a_bits) = p[f"model.{name}.op.weight"], config[name]
            step = p[f"model.{name}.weight_quantizer.steps.{w_bits}"].abs()
            signed = name in CONVS and CONVS[name][4]
            scale = self.switches["scale_step_gradient"]
            if scale:
                step = scaled(step, weight.numel(), w_bits, True)
            weight = fake_quantize(weight, step, w_bits, True)
            if name != "first":
                step = p[f"model.{name}.act_quantizer.steps.{a_bits}"].abs()
                step = scaled(step, x.numel(), a_bits, signed) if scale else step
                x = fake_quantize(x, step, a_bits, signed)
            return x, weight

        def conv(name: str, x: Tensor) -> Tensor:
            stride, padding, groups, norm, _ = CONVS[name]
            x, weight = quantized(name, x)
            bias = None if norm else p[f"model.{name}.op.bias"]
            y = F.conv2d(x, weight, bias, stride, padding, groups=groups)
            if norm:
                key = f"model.{name}.bank.w{config[name][0]}a{config[name][1]}"
                mean = y.mean((0, 2, 3), keepdim=True)
                variance = y.var((0, 2, 3), correction=0, keepdim=True)
                y = (y - mean) / (variance + 1e-5).sqrt()
                y = y * p[f"{key}.weight"].view(-1, 1, 1) + p[f"{key}.bias"].view(-1, 1, 1)
            outputs[name] = y
            return y

        x = conv("first", x).relu()
        x = conv("a", x).relu()
        x = x + conv("depthwise", x)
        x = conv("b", x).relu()
        x = conv("c", x).relu()
        x, weight = quantized("last", x.mean((2, 3)))
        return x @ weight.T + p["model.last.op.bias"], outputs

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        logs, smoothing = logits.log_softmax(1), self.config.label_smoothing
        hit = -logs[torch.arange(len(y)), y].mean()
        return (1 - smoothing) * hit - smoothing * logs.mean()

    def step(self, number: int, x: Tensor, y: Tensor, configs: list) -> dict:
        """One step of training; returns losses, gradients and learning rates."""
        c = self.config
        p = {name: value.clone().requires_grad_() for name, value in self.values.items()}
        gradients = {}

        def add(loss: Tensor) -> None:
            found = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
            for name, gradient in zip(p, found, strict=True):
                if gradient is not None:
                    gradients[name] = gradients.get(name, 0) + gradient

        high, targets = self.forward(p, x, configs[0])
        loss = self.cross_entropy(high, y)
        add(loss)
        losses = {"loss": float(loss.detach()), "loss_random": 0.0, "idm": 0.0}
        grid_weight = 0.0
        if c.grid_weight:
            # In this training, update numbers count hundredths of a part.
            update_number = round(number * 15_000 / self.steps)
            grid_weight = release.grid_term_weight(update_number, per_epoch=100)
        teacher = high.detach().softmax(1)
        for config in configs[1:]:
            low, outputs = self.forward(p, x, config)
            divergence = (teacher * (teacher.log() - low.log_softmax(1))).sum(1).mean()
            random_loss = self.cross_entropy(low, y) / 2 + divergence / 2
            idm = torch.zeros(())
            for name in SEARCHED:
                offered = self.candidates[name]
                if c.idm and config[name][0] == min(offered) and len(offered) > 1:
                    idm = idm + (outputs[name] - targets[name].detach()).square().mean()
            add(random_loss + c.idm_weight * idm)
            losses["loss_random"] += float(random_loss.detach()) / (len(configs) - 1)
            losses["idm"] += float(idm.detach()) / (len(configs) - 1)
            for name in SEARCHED:
                if grid_weight and len(self.candidates[name]) > 1:
                    bits = config[name][0]
                    step = abs(float(self.values[f"model.{name}.weight_quantizer.steps.{bits}"]))
                    smallest = min(self.candidates[name])
                    weight = self.weight(name).numpy()
                    _, gradient = release.grid_term(weight, step, bits, smallest)
                    gradients[f"model.{name}.op.weight"] += grid_weight * torch.tensor(gradient)

        # Without a gradient, momentum moves a step size or a norm on: in the release, gradients are
        # set to zero and not to None, and a quantizer's step sizes are one tensor.
        for name, value in p.items():
            if ".steps." in name or ".bank." in name:
                gradients.setdefault(name, torch.zeros_like(value))
        gradients = {name: g.clamp(-c.clip_value, c.clip_value) for name, g in gradients.items()}
        for name in [*SEARCHED, "first", "last"]:
            key = f"model.{name}.op.weight"
            passes = sum(config[name][0] == 2 for config in configs)
            if not c.region_decay and name != "last":
                gradients[key] = gradients[key] + c.weight_decay * self.values[key]
            elif c.region_decay and name != "last":
                two = self.values.get(f"model.{name}.weight_quantizer.steps.2")
                two = None if two is None else abs(float(two))
                arrays = gradients[key].numpy(), self.weight(name).numpy()
                found = release.decayed_gradient(*arrays, two, passes, c.weight_decay)
                gradients[key] = torch.tensor(found)
        rate = release.learning_rate(self.part(number), peak=c.lr)
        step_rate = self.peak * self.step_share(number)
        for name, gradient in gradients.items():
            own = step_rate if "steps" in name else rate
            moved = self.movers[name].move(self.values[name].numpy(), gradient.numpy(), own)
            self.values[name] = torch.as_tensor(moved)
        decay = min(c.ema_decay, (1 + number) / (10 + number))
        for name, value in self.values.items():
            self.average[name] = decay * self.average[name] + (1 - decay) * value
        return {"losses": losses, "gradients": gradients, "rates": [rate, step_rate]}


OFF = dict(scheduler=False, idm=False, grid_weight=0.0, region_decay=False)
STEPS = dict(weight_steps="nested", scale_step_gradient=False)
CASES = {
    "all": ({}, {}),
    "none": (OFF, {}),
    "scheduler": (OFF | dict(scheduler=True), {}),
    "weights alone are frozen": (OFF | dict(scheduler=True, freeze_activations=False), {}),
    "IDM": (OFF | dict(idm=True, idm_weight=1.0), {}),
    "grid term": (OFF | dict(grid_weight=0.1), {}),
    "region decay": (OFF | dict(region_decay=True), {}),
    "LSQ's initial steps": (OFF, dict(weight_steps="lsq")),
    "LSQ's gradient scale": (OFF, dict(scale_step_gradient=True)),
    "label smoothing": (OFF | dict(label_smoothing=0.1), {}),
    "tight clipping": (dict(clip_value=0.01), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_the_release_step_by_step(case):
    settings, switches = CASES[case]
    switches = STEPS | switches
    torch.manual_seed(0)
    x, y = torch.randn(96, 3, 9, 9, dtype=torch.float64), torch.arange(96) % 3
    x[torch.arange(96), y] += 1
    supernet = Supernet(Small().double(), x, (2, 3, 4), **switches).train()
    config = TrainConfig(epochs=2, batch_size=8, lr=0.003, step_travel=0.005, weight_decay=0.01)
    config = replace(config, **settings)
    run = Run.start(config, supernet, len(x))
    twin = Twin(supernet, config, 24, switches)
    near, frozen = dict(rtol=1e-10, atol=1e-10), set()

    for step in range(24):
        if step % 12 == 0:
            run.start_epoch()
        run.choose_candidates()
        twin.decide(step)
        assert run.candidates == twin.full_candidates()
        frozen |= {name for name in SEARCHED if twin.candidates[name] != FULL[name]}
        generator = torch.Generator()
        generator.set_state(run.generator.get_state())
        top = {name: (max(own.weight), max(own.act)) for name, own in run.candidates.items()}
        configs = [top, *(sample(twin.full_candidates(), generator) for _ in range(3))]
        taken, rates = {}, []

        def take(optimizer, args, kwargs, taken=taken, rates=rates):
            rates.append([group["lr"] for group in optimizer.param_groups])
            groups = [group for group in optimizer.param_groups if not group["weight_decay"]]
            parameters = {p for group in groups for p in group["params"]}
            for name, p in supernet.named_parameters():
                if p in parameters and p.grad is not None:
                    taken[name] = p.grad.clone()

        hooks = [optimizer.register_step_pre_hook(take) for optimizer in run.optimizers]
        start = step * 8 % 96
        losses = update(run, x[start : start + 8], y[start : start + 8])
        for hook in hooks:
            hook.remove()
        expected = twin.step(step, x[start : start + 8], y[start : start + 8], configs)

        for name, loss in expected["losses"].items():
            torch.testing.assert_close(float(losses[name]), loss, **near)
        for name, gradient in unstacked(supernet, taken).items():
            torch.testing.assert_close(gradient, expected["gradients"][name], **near)
        for found, rate in zip(rates, expected["rates"], strict=True):
            assert found == pytest.approx([rate] * len(found), rel=1e-12)
        for name, p in named(supernet).items():
            torch.testing.assert_close(p.detach(), twin.values[name], **near)
        if step % 12 == 11:
            run.epoch.sums = {}
            run.end_epoch()
    names = [name for name, _ in supernet.named_parameters()]
    averages = dict(zip(names, run.average.module.parameters(), strict=True))
    for name, average in unstacked(supernet, averages).items():
        torch.testing.assert_close(average.detach(), twin.average[name], **near)
    assert bool(frozen) == config.scheduler
    if case == "scheduler":
        assert len(frozen) > 1  # freezing goes round among the layers
