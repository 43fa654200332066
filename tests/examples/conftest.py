"""The base model of the main job, trained once for all tests and workers."""

from pathlib import Path

import pytest
from filelock import FileLock

from loopholes.base_model import load_base
from loopholes.environment import ENVIRONMENTS


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A home folder whose cache holds it; with several workers, the folder is theirs together."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "home"
    with FileLock(f"{folder}.lock"):
        load_base(ENVIRONMENTS["C"], 0, cache_dir=folder / ".cache" / "gradroute-examples")
    return folder
