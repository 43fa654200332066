"""Shapes and types of every gradroute function are checked during tests, by jaxtyping's import hook."""

import os

if os.environ.get("GRADROUTE_TEST_IMPORT_HOOK", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("gradroute", "typechecker.typechecker")
