"""Search by inference alone: the error, moves, greedy search and baselines."""
