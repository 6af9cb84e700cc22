"""Benchmarks: everything that is measured in seconds. Never part of the test suite."""

import torch

# Read before anything of the tests is imported, which take one thread each.
DEFAULT_THREADS = torch.get_num_threads()
