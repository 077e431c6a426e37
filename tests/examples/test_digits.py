"""`examples/digits.py`, in a quick form: the facts that its table shows, at sizes that take seconds."""

from __future__ import annotations

import pytest

from examples import digits


@pytest.mark.parametrize("name", digits.MODELS)
def test_the_protected_model_answers_as_the_original_and_the_edge_part_knows_nothing(name: str) -> None:
    result = digits.measure(name, seed=0, epochs=5, splits=3)
    assert result.original > 90  # so that there is something to steal
    assert result.differ == 0 and result.protected == result.original
    # Ten classes: chance is 10 %. LIMIT has the margin that many thefts showed.
    assert max(result.best + result.lying) < LIMIT


LIMIT = 40.0
