"""Whether gradroute is imported under jaxtyping's import hook, which checks every function."""

import os

import pytest

HOOKED = os.environ.get("GRADROUTE_TEST_IMPORT_HOOK", "0") == "1"

compiles = pytest.mark.skipif(
    HOOKED, reason="beartype, which the import hook wraps around every function, cannot be compiled in one graph"
)
