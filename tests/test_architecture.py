"""Imports point one way without a circle, private files stay private, and the public names are what they say.

    adapters, directions <- gates, filters <- refresh, optim <- evaluation <- integrations

Imports count wherever they stand: at the top of a module, inside a function, and under `TYPE_CHECKING`.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import gradroute

pytestmark = pytest.mark.touches_peft

PACKAGE = Path(gradroute.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import. `errors` and the files at the root that begin with `_` are for all.
SHARED = {"errors", *(path.stem for path in PACKAGE.glob("_*.py") if path.name != "__init__.py")}
BLOCKS_AND_DIRECTIONS = {"adapters", "directions"}
METHODS = {"advantages", "schemes", "gates", "filters", "refresh", "optim"}
ALLOWED = {
    **dict.fromkeys(SHARED, SHARED),
    "adapters": SHARED | {"adapters"},
    "directions": SHARED | {"directions"},
    "advantages": SHARED,
    "schemes": SHARED | {"adapters"},
    "gates": SHARED | BLOCKS_AND_DIRECTIONS | {"gates"},
    "filters": SHARED | BLOCKS_AND_DIRECTIONS | {"filters"},
    "refresh": SHARED | BLOCKS_AND_DIRECTIONS | {"filters", "gates", "refresh"},
    "optim": SHARED | BLOCKS_AND_DIRECTIONS | {"filters", "optim"},
    "evaluation": SHARED | BLOCKS_AND_DIRECTIONS | METHODS | {"evaluation"},
    "integrations": SHARED | BLOCKS_AND_DIRECTIONS | METHODS | {"evaluation", "integrations"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The first name below `gradroute`; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


MODULES = {module_of(path): path for path in FILES}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Every module of the package that this one imports, wherever in the file."""
    named: list[str] = []
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from package import name` is an import of the module `name` if there is one, else of the package.
            named += [name if name in MODULES else str(node.module) for name in names]
    return frozenset(name for name in named if name in MODULES)


def test_imports_point_one_way() -> None:
    wrong = {
        (module, name)
        for module in MODULES
        for name in imports_of(module)
        if module != "gradroute" and part_of(name) not in ALLOWED[part_of(module)]
    }
    assert wrong == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        TopologicalSorter({module: imports_of(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def folder_of_private(name: str) -> str:
    """The folder from which a private file may be imported; "" where every part of the name is public."""
    parts = name.split(".")
    return next((".".join(parts[:i]) for i, part in enumerate(parts) if part.startswith("_")), "")


def test_a_private_file_is_imported_only_from_the_folder_that_holds_it() -> None:
    assert folder_of_private("gradroute.adapters.peft._factory") == "gradroute.adapters.peft"
    wrong = {
        (module, name)
        for module in MODULES
        for name in imports_of(module)
        if not f"{module}.".startswith(f"{folder_of_private(name) or 'gradroute'}.")
    }
    assert wrong == set()


def test_no_file_name_is_used_twice() -> None:
    counts = Counter(path.name for path in FILES if path.name not in {"__init__.py", "base.py"})
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("module", [module_of(path) for path in FILES if path.name == "__init__.py"])
def test_a_package_says_in_a_few_lines_what_it_answers_and_lists_what_it_exports(module: str) -> None:
    package = import_module(module)
    doc = [line for line in (package.__doc__ or "").splitlines() if line.strip()]
    assert doc[0].endswith((".", ":", "`")), "the docstring opens with one sentence"
    assert len(doc) <= 6
    exported = vars(package).get("__all__", [])
    assert exported or not imports_of(module)
    assert exported == sorted(exported)
    assert [name for name in exported if name.startswith("_") or not hasattr(package, name)] == []


def test_there_are_at_most_45_public_names_and_each_comes_from_a_subpackage_that_exports_it() -> None:
    assert len(gradroute.__all__) <= 45
    assert set(gradroute.__all__) <= set(dir(gradroute))
    exported = {
        name
        for module in MODULES
        if module.count(".") == 1 and not part_of(module).startswith("_") and part_of(module) != "integrations"
        for name in vars(import_module(module)).get("__all__", dir(import_module(module)))
    }
    assert set(gradroute.__all__) - exported == set()


def test_a_name_that_left_the_top_level_says_where_it_lives_now() -> None:
    for module, names in gradroute._ELSEWHERE.items():
        for name in names:
            with pytest.raises(AttributeError, match=rf"Fix: use {re.escape(module)}\.{name}"):
                getattr(gradroute, name)
            assert hasattr(import_module(module), name), f"{module}.{name}"
    with pytest.raises(AttributeError, match="no_such_name"):
        gradroute.no_such_name  # noqa: B018


def test_importing_gradroute_imports_no_optional_package() -> None:
    code = "import sys, gradroute; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"trl", "transformers", "matplotlib", "peft", "scipy"} & set(loaded)


def test_peft_is_imported_in_one_folder_only() -> None:
    importing = {
        path.relative_to(PACKAGE).parent.as_posix()
        for path in FILES
        if re.search(r"^\s*(from|import) peft\b", path.read_text(), re.MULTILINE)
    }
    assert importing == {"adapters/peft"}


def test_annotations_are_not_postponed() -> None:
    # jaxtyping and beartype would have strings to check.
    assert [path for path in FILES if "from __future__ import annotations" in path.read_text()] == []


def test_the_checks_see_imports() -> None:
    assert imports_of("gradroute.refresh") >= {"gradroute.refresh.refresher"}
    assert imports_of("gradroute.refresh.refresher") >= {"gradroute.errors", "gradroute._restore"}
    # Under `TYPE_CHECKING`.
    assert imports_of("gradroute.adapters") >= {"gradroute.adapters.peft"}
