"""Contract tests: one suite over every implementation of a protocol, the fake included."""
