"""What is expected of a round, from the chance that a token is accepted."""

import numpy as np
import pytest

from specdecode.decoding.metrics import expected_tokens


def test_expected_tokens_are_those_of_every_way_that_a_round_can_end() -> None:
    for k in range(8):
        ends = [(0.7**n * 0.3, n + 1) for n in range(k)] + [(0.7**k, k + 1)]  # rejected at n, or not at all
        assert expected_tokens(0.7, k) == pytest.approx(sum(chance * tokens for chance, tokens in ends))
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.0, 5) == 1


def test_expected_tokens_of_many_are_those_of_each() -> None:
    chances, lengths = np.array([0.0, 0.3, 0.99, 1.0]), np.arange(6)
    found = expected_tokens(chances[:, None], lengths)
    assert found.shape == (4, 6)
    np.testing.assert_allclose(found, [[sum(chance**n for n in range(k + 1)) for k in lengths] for chance in chances])
