"""The list of small changes fits the package; what notices them is tried by hand (`tests/mutants.py`)."""

import pytest

from tests import ROOT
from tests.mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_change_can_be_made_and_has_tests(mutant):
    assert (ROOT / "dist_partial" / mutant.file).read_text().count(mutant.before) == 1
    assert mutant.before != mutant.after and mutant.tests
    for test in mutant.tests:
        file, *names = test.split("::")
        text = (ROOT / "tests" / file).read_text()
        assert all(f"def {name.split('[')[0]}(" in text for name in names), test
