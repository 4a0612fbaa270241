"""The losses equal slow and obvious references."""

import math

import pytest
import torch

from specdecode.training.losses import agreement, distillation_loss, next_token_loss, predicting_positions


def test_next_token_loss_equals_a_loop_over_scored_positions() -> None:
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    is_scored = torch.rand(2, 5) < 0.6
    is_scored[:, 0] = False
    is_scored[0, 1] = True

    terms = [
        -logits[row, position - 1].softmax(dim=-1)[ids[row, position]].log()
        for row in range(2)
        for position in range(5)
        if is_scored[row, position]
    ]

    assert next_token_loss(logits, ids, is_scored).item() == pytest.approx(sum(terms).item() / len(terms), rel=1e-5)


def test_distillation_loss_equals_the_sum_of_p_log_p_over_q() -> None:
    p_logits, q_logits = torch.randn(3, 6), torch.randn(3, 6)

    expected = 0.0
    for p_row, q_row in zip(p_logits.softmax(-1).tolist(), q_logits.softmax(-1).tolist(), strict=True):
        expected += sum(p * math.log(p / q) for p, q in zip(p_row, q_row, strict=True)) / 3

    assert distillation_loss(p_logits, q_logits).item() == pytest.approx(expected, rel=1e-4)


def test_the_greedy_term_is_the_surprise_at_the_targets_first_choice() -> None:
    p_logits, q_logits = torch.randn(4, 6), torch.randn(4, 6)
    first_choices = p_logits.argmax(dim=-1).tolist()
    surprise = -sum(q_logits.softmax(-1)[row, token].log().item() for row, token in enumerate(first_choices)) / 4

    extra = distillation_loss(p_logits, q_logits, greedy_weight=0.5) - distillation_loss(p_logits, q_logits)

    assert extra.item() == pytest.approx(0.5 * surprise, rel=1e-4)


def test_equal_models_have_no_distance_even_with_padded_vocabularies() -> None:
    logits = torch.randn(4, 6)
    padded = torch.cat([logits, torch.full((4, 2), 5.0)], dim=-1)

    assert distillation_loss(logits, padded).item() == pytest.approx(0, abs=1e-6)
    assert agreement(logits, padded) == 1


def test_a_position_is_predicted_by_the_logits_before_it() -> None:
    logits = torch.arange(4).view(1, 4, 1).float()
    is_scored = torch.tensor([[False, False, True, True]])

    assert predicting_positions(logits, is_scored).flatten().tolist() == [1, 2]
