"""The command `python -m mpqlib.training`; see `command`."""

from torch.distributed.elastic.multiprocessing.errors import record

from .command import main

if __name__ == "__main__":
    record(main)()  # torchrun shows the error of the process that failed first
