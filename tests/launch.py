"""Starts processes in the way of the command torchrun."""

import uuid

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def torchrun(world, task, *arguments, restarts=0, interval=0.05):
    """Calls `task` in `world` processes. They are forked, because importing takes seconds.

    `interval`: seconds between two looks at the processes.
    """
    config = LaunchConfig(
        *(1, 1, world),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=interval,
        start_method="fork",
    )
    return elastic_launch(config, task)(*arguments)
