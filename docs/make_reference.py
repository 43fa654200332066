"""Writes `public-api.md` and the pages of `reference/` from what each subpackage exports and from its docstrings.

    python docs/make_reference.py

`reference/index.md` and `reference/integrations.md` are written by hand.
"""

import inspect
from importlib import import_module
from pathlib import Path

import gradroute

DOCS = Path(__file__).parent
COMMAND = "python docs/make_reference.py"
PAGES = {
    "adapters": ("Adapters", ["gradroute.adapters", "gradroute.adapters.init"]),
    "directions": ("Directions", ["gradroute.directions", "gradroute.directions.estimators"]),
    "gates": ("Gates, schemes and advantages", ["gradroute.gates", "gradroute.schemes", "gradroute.advantages"]),
    "refresh": ("Refreshing", ["gradroute.refresh"]),
    "filters": ("Filters", ["gradroute.filters"]),
    "optim": ("Optimizers", ["gradroute.optim"]),
    "evaluation": ("Evaluation", ["gradroute.evaluation"]),
    "errors": ("Errors", ["gradroute.errors"]),
}
"""Page -> its title, and the modules on it."""


def exported(module: str) -> list[str]:
    """`__all__`, or the public functions and classes that a module without it defines."""
    found = vars(import_module(module))
    own = [name for name, value in found.items() if getattr(value, "__module__", "") == module and name[0] != "_"]
    return list(found.get("__all__", sorted(own)))


def lives_in(name: str) -> str:
    """The module of `PAGES` that exports a name of the top level."""
    return next(module for _, modules in PAGES.values() for module in modules if name in exported(module))


def head(module: str, name: str) -> str:
    """The first line of its docstring; for an alias of a type, the type."""
    thing = getattr(import_module(module), name)
    if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing):
        return (inspect.getdoc(thing) or "").partition("\n")[0].replace("|", "\\|")
    return f"`{thing}`".replace("|", "\\|")


def reference(page: str) -> str:
    """A page of the reference: each module's docstring, and an entry for each name."""
    title, modules = PAGES[page]
    lines = [f"# {title}"]
    for module in modules:
        lines += ["", f"## `{module}`", "", inspect.getdoc(import_module(module)) or ""]
        for name in exported(module):
            lines += ["", f"::: gradroute.{name}" if name in gradroute.__all__ else f"::: {module}.{name}"]
    return "\n".join(lines) + "\n"


def public_api() -> str:
    """Every public name, with the first line of its docstring."""
    lines = ["# Every public name", "", f"Written by `{COMMAND}`: the first line of each docstring.", ""]
    lines += [
        f"`import gradroute as gr` gives {len(gradroute.__all__)} names:",
        "",
        "| name | exported by | what it is |",
    ]
    lines += ["|---|---|---|"]
    for name in gradroute.__all__:
        module = lives_in(name)
        lines.append(f"| `{name}` | `{module}` | {head(module, name)} |")
    lines += ["", "The subpackages export these and more: what is subclassed, returned, or seldom needed."]
    for module in (module for _, modules in PAGES.values() for module in modules):
        more = [name for name in exported(module) if name not in gradroute.__all__]
        if more:
            lines += ["", f"## `{module}`", "", "| name | what it is |", "|---|---|"]
            lines += [f"| `{name}` | {head(module, name)} |" for name in more]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Every page that this script writes."""
    return {
        DOCS / "public-api.md": public_api(),
        **{DOCS / "reference" / f"{page}.md": reference(page) for page in PAGES},
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
