"""Every rule against independent implementations. Needs the dependency group `oracles`."""

import pytest

from jaxopt_rules.conformance import PAIRS, Pair, run

pytestmark = [pytest.mark.oracle, pytest.mark.x64]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.name} - {pair.oracle}")
def test_conforms(pair: Pair):
    assert pair.installed, f"{pair.oracle} is not installed; see the dependency groups oracles and oracles-no-deps"
    outcome = run(pair)
    assert outcome.passed, f"{outcome.difference:.1e} exceeds {pair.bound:.1e}"
