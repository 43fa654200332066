"""What the kernel under the tests offers: asked of it directly, so that a sandbox that fails is not taken for one."""

import ctypes
import os
import sys

import pytest


def offers_landlock() -> bool:
    """Whether Landlock is there: a version of 1 or more."""
    if sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"):
        return False
    query = (ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return ctypes.CDLL(None).syscall(*query) > 0


needs_sandbox = pytest.mark.skipif(not offers_landlock(), reason="no submission is run without Landlock")
