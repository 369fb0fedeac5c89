"""Runtimes: how a workload of a kind is found, dumped, restored and forgotten, each behind ``base.Runtime``."""
