"""The fixture `record` fills a cell of the exactness matrix; `--write-exactness PATH` writes the matrix."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matrix
import pytest
from ranks import Ranks


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cell(name): the cells of the exactness matrix that a test fills")


def _cell(item: Any) -> matrix.Cell | None:
    mark = item.get_closest_marker("cell")
    return None if mark is None else matrix.cell_of(mark.args[0], item.callspec.params)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> matrix.Record:
    cell = _cell(request.node)
    assert cell is not None, "only a test with cells can record"
    return matrix.Record(cell)


@pytest.fixture(scope="session", autouse=True)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """The processes of the distributed cells, started before the first test so that they run beside the others."""
    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    try:
        if any(item.path.stem == "test_exact_distributed" for item in request.session.items):
            processes.start()
        yield processes
    finally:
        processes.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    cell = _cell(item)
    if cell is not None:
        if hasattr(report, "wasxfail"):
            matrix.RESULTS[cell] = matrix.Result(f"NOT REFUSED: {report.wasxfail}")
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            matrix.RESULTS[cell] = matrix.Result(f"not run here: {reason}")
        elif report.failed:
            matrix.RESULTS[cell] = matrix.Result(f"FAILED: {call.excinfo.exconly().splitlines()[0]}")
        elif report.when == "call" and cell not in matrix.RESULTS:
            report.outcome, report.longrepr = "failed", f"the test left its cell empty: {cell}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--write-exactness")
    if path is not None:
        try:
            matrix.write(Path(path))
        except ValueError as error:
            pytest.exit(str(error), returncode=1)
