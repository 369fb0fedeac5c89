"""The workload's files: which directories it has, whether they are on both hosts, and how they get there."""
