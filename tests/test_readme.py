"""The example of README.md runs as it is printed."""

import re
from pathlib import Path

import torch

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_example_runs_and_keeps_its_budget(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(example, "README.md", "exec"), {})
    shape, cost = re.search(r"(torch.Size.*) ([\d.]+) G BitOPs", capsys.readouterr().out).groups()
    assert shape == "torch.Size([64, 10])" and 0 < float(cost) <= 0.5
    assert (tmp_path / "my_policy" / "policy.json").is_file()
