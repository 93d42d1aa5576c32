"""How pytest shares the cores: one process for each core, one thread for each process."""

import os
from pathlib import Path

import pytest

# More threads than cores would wait for each other. Notebook kernels inherit the setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Return 0 to run a single file without workers, or None for one worker for each core."""
    paths = [Path(argument.partition("::")[0]) for argument in config.args]
    return 0 if len(paths) == 1 and paths[0].is_file() else None
