"""labs/bench: what clients notice of a migration, measured beside a plain one on the same hosts in the same run."""
