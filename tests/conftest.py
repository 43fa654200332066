"""Shapes and types of every gradroute function are checked during tests, by jaxtyping's import hook."""

import os

import torch

if os.environ.get("GRADROUTE_TEST_IMPORT_HOOK", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("gradroute", "typechecker.typechecker")

# Models this small gain nothing from a second OpenMP thread, which spins where another process is busy.
torch.set_num_threads(1)
