"""With `GRADROUTE_TEST_IMPORT_HOOK=1`, as in `.ci/run`, jaxtyping checks shapes and types in every gradroute function.

The checks take a third of the time. Without them the library is imported as users import it.
"""

import pytest
import torch
from support import typechecker  # noqa: F401  (the hook finds it by name, once its package knows it)
from support.import_hook import HOOKED

if HOOKED:
    from jaxtyping import install_import_hook

    install_import_hook("gradroute", "support.typechecker.typechecker")

# Models this small gain nothing from a second OpenMP thread, which spins where another process is busy.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    # Options have to be known before tests/exactness/conftest.py, which writes the table, is found.
    parser.addoption("--write-exactness", metavar="PATH", help="write the exactness matrix of this run as Markdown")


def pytest_collection_finish(session: pytest.Session) -> None:
    wanted = session.config.getoption("--write-exactness") is not None
    if wanted and not any(item.path.parent.name == "exactness" for item in session.items):
        raise pytest.UsageError("--write-exactness needs the tests in tests/exactness. Found none of them in this run.")
