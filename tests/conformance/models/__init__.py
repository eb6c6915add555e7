"""All cases, collected from the modules of this folder."""

import importlib
import pkgutil

from tests.conformance.case import Case

CASES: list[Case] = [
    case
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__))
    for case in importlib.import_module(f"{__name__}.{module}").CASES
]
assert len({case.name for case in CASES}) == len(CASES), "two cases have one name"
