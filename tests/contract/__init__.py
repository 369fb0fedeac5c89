"""Contract tests: one suite over every implementation of a protocol, the fake included."""

import pytest

#: What its comparisons find is told as in a test.
pytest.register_assert_rewrite("tests.contract.two_trees")
