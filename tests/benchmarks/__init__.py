"""Benchmarks: everything that is measured in seconds. Never part of the test suite."""
