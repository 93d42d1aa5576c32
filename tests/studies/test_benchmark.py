"""What the benchmark derives from times, and what it counts."""

import time

import pandas as pd
import pytest
import torch
from torch import nn

from mpqlib.studies import benchmark
from mpqlib.studies.benchmark import exponent, parts_of_step, ratios, saved_bytes, summary


def test_exponent_is_the_power_of_a_power_law():
    assert exponent([2, 3, 7], [5 * n**1.7 for n in (2, 3, 7)]) == pytest.approx(1.7)


def test_saved_bytes_counts_each_activation_once_and_no_parameter():
    x = torch.randn(10, 4)  # the linear keeps x; the product keeps y, twice the same

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x):
            y = self.linear(x)
            return (y * y).sum()

    assert saved_bytes(Squares(), x) == 4 * (10 * 4 + 10 * 6)


def test_ratios_are_of_repeated_calls_after_a_warm_up():
    calls = []
    found = ratios(lambda: calls.append("task"), lambda: calls.append("base"), 3)
    assert len(found) == 3 and calls.count("task") == calls.count("base") == 5
    assert summary([3, 1, 2]) == {"median": 2, "least": 1, "most": 3, "n": 3}


def test_parts_of_a_step_add_up():
    shares = parts_of_step("test_resnet", size=32, batch=4)
    assert sum(shares.values()) == pytest.approx(100)
    assert all(share > 0 for share in shares.values())


def test_the_command_keeps_what_it_measured_and_goes_on_after_an_error(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("no memory\nat all")

    def hang():
        time.sleep(60)

    def run_out_of_memory():
        raise MemoryError

    tasks = {"ratio": lambda: [1.0, 3.0, 2.0], "error": fail, "seconds": lambda: {"a": 1.0}}
    tasks["error without text"] = run_out_of_memory
    planned = [(name, "net", task) for name, task in [*tasks.items(), ("hang", hang)]]
    monkeypatch.setattr(benchmark, "measurements", lambda *_: planned)
    output = tmp_path / "new" / "metrics.csv"
    with pytest.raises(SystemExit, match=r"0\.02 minutes are over"):
        benchmark.run_command([], torch.device("cpu"), repeats=1, minutes=0.02, output=output)
    table = pd.read_csv(output).set_index("measure")
    assert list(table.index) == ["ratio", "error", "seconds a", "error without text"]
    assert table.loc["ratio", ["median", "least", "most", "n"]].tolist() == [2, 1, 3, 3]
    assert table.loc["error", "error"] == "RuntimeError: no memory"
    assert table.loc["error without text", "error"] == "MemoryError"
    assert table["error"].notna().sum() == 2


def test_the_command_replaces_an_earlier_file_before_it_measures(tmp_path, monkeypatch):
    plan = [("hang", "net", lambda: time.sleep(60))]
    monkeypatch.setattr(benchmark, "measurements", lambda *_: plan)
    how = dict(repeats=1, minutes=0.01)
    (output := tmp_path / "metrics.csv").write_text("measure\nof an earlier run\n")
    with pytest.raises(SystemExit):
        benchmark.run_command([], torch.device("cpu"), **how, output=output)
    assert pd.read_csv(output).empty
    with pytest.raises(ValueError, match="cannot be written: it is a folder"):
        benchmark.run_command([], torch.device("cpu"), **how, output=tmp_path)


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--minutes", "nan"], ["--repeats", "0"]])
def test_the_command_refuses_what_cannot_be(wrong, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark", *wrong])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()


def test_the_command_measures_every_way_to_run_the_passes_on_each_network():
    planned = list(benchmark.measurements(benchmark.NETWORKS["cuda"], torch.device("cuda"), 9))
    found = {(measure, name) for measure, name, _ in planned}
    for name in ("resnet20_cifar", "resnet18", "mobilenet_v2"):
        for mode in ("eager", "compiled", "captured"):
            assert (f"one-shot step, {mode} / 4 plain passes", name) in found
            assert (f"one-shot images/s, {mode}", name) in found
