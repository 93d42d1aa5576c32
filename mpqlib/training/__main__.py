"""The command `python -m mpqlib.training`; see `command`."""

from .command import main

if __name__ == "__main__":
    main()
