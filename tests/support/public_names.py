"""Every public function and class of the package, by name; the integrations, which need other packages, excepted."""

import inspect
import runpy
from importlib import import_module

from support.doc_pages import ROOT

MAKER = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
MODULES = MAKER["MODULES"]
EXPORTED = {name: getattr(import_module(module), name) for module in MODULES for name in MAKER["exported"](module)}
# Aliases of types have neither a docstring nor arguments.
PUBLIC = {name: thing for name, thing in EXPORTED.items() if inspect.isclass(thing) or inspect.isroutine(thing)}
# What only the library makes.
RETURNED = {
    "AttachedFilter", "BlockUpdate", "Capture", "DecayTowardStart", "DirectionsSummary", "FilterStats",
    "Finding",
    "GroupAdvantages", "IdleBlockSkip", "OnOffReport", "OneBlock", "ParameterSummary", "Provenance", "Records",
    "RefreshReport", "RolloutRecord", "ScoreFigures", "SlowStart", "UpdateAudit", "UpdateAudits", "UpdateProjection",
    "Validation", "Verdict", "ViewRates", "Watch",
}  # fmt: skip
