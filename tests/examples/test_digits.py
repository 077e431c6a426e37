"""`examples/digits.py`, in a quick form: the facts that its table shows, at sizes that take seconds."""

from __future__ import annotations

import pytest

from examples import digits

pytestmark = pytest.mark.slow

LIMIT = 30.0
"""Percent. Of ten classes chance is 10; the most that two hundred thefts gave was 20.1 (docs/models.md)."""


@pytest.mark.parametrize("name", digits.MODELS)
def test_the_protected_model_answers_as_the_original_and_the_edge_part_knows_nothing(name: str) -> None:
    result = digits.measure(name, seed=0, epochs=5, splits=3)
    assert result.original > 90  # so that there is something to steal
    assert result.differ == 0 and result.protected == result.original
    assert max(result.best + result.lying) < LIMIT
    assert 0 < result.share < 100
