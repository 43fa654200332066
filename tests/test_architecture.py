"""Imports point one way, optional packages stay out, files have one subject, and the public API is what it says."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradroute

PACKAGE = Path(gradroute.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import from the rest of the package.
BASE = {"typing", "errors", "protocol", "preserve", "logs", "progress", "figure"}
ALLOWED = {
    "adapters": BASE | {"adapters"},
    "directions": BASE | {"directions"},
    "routing": BASE | {"adapters", "directions", "routing"},
    "evaluation": BASE | {"adapters", "directions", "routing", "evaluation"},
    "integrations": BASE | {"adapters", "directions", "routing", "evaluation", "integrations"},
    **dict.fromkeys(BASE, BASE),
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    inner = [name.split(".")[1] for name in names if name.startswith("gradroute.")]
    return {part for part in inner if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()}


@pytest.mark.parametrize(
    "path", [p for p in FILES if part_of(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_one_way(path: Path) -> None:
    assert imported_parts(path) <= ALLOWED[part_of(path)]


def test_peft_is_imported_in_one_place_only() -> None:
    importing = {path.relative_to(PACKAGE).parent.as_posix() for path in FILES if imports_peft(path)}
    assert importing == {"adapters/peft"}


def imports_peft(path: Path) -> bool:
    return bool(re.search(r"^\s*(from|import) peft\b", path.read_text(), re.MULTILINE))


def test_lazy_names_are_listed_and_exist() -> None:
    assert set(gradroute.__all__) <= set(dir(gradroute))
    with pytest.raises(AttributeError, match="no_such_name"):
        gradroute.no_such_name  # noqa: B018


def test_the_reading_of_imports_sees_imports() -> None:
    assert imported_parts(PACKAGE / "routing" / "refresh.py") >= {"adapters", "directions", "errors"}


def test_importing_gradroute_imports_no_optional_package() -> None:
    code = "import sys, gradroute; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"trl", "transformers", "matplotlib", "peft", "scipy"} & set(loaded)


def test_every_public_name_exists_and_has_a_docstring() -> None:
    assert sorted(gradroute.__all__) == gradroute.__all__
    for name in gradroute.__all__:
        assert (getattr(gradroute, name).__doc__ or "").strip(), name


def test_files_are_short_and_annotations_are_not_postponed() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 300, path
        assert "from __future__ import annotations" not in text, path


def test_examples_and_benchmarks_are_read_in_one_sitting() -> None:
    root = PACKAGE.parent
    files = [*(root / "examples").rglob("*.py"), *(root / "benchmarks").glob("*.py")]
    assert len(files) > 40
    assert [path.name for path in files if path.read_text().count("\n") > 200] == []
