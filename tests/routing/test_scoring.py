"""Reading an answer says what greedy drafting would have had accepted, and takes no more than its share of the time."""

import pytest
import torch

from specdecode import create_backend, speculative_decode
from specdecode.routing.scoring import MAX_SCORED, Budget, first_choices
from specdecode.text import Tokenizer


def test_first_choices_are_what_greedy_drafting_has_accepted() -> None:
    target, draft = create_backend("tiny/target"), create_backend("tiny/draft-code")
    prompt = Tokenizer("tiny/target").encode("def read_lines(path):\n")
    output, metrics = speculative_decode(target, draft, torch.tensor([prompt]), 41, K=1)
    num_right, num_scored = first_choices(create_backend("tiny/draft-code"), output[0].tolist(), len(prompt))
    assert num_scored == 41
    # In rounds of one, every place is drafted but those after an accepted token, which are the target's own.
    found = metrics.verdicts["draft"]
    assert found.num_accepted <= num_right <= found.num_accepted + (41 - found.num_accepted - found.num_rejected)


def test_a_draft_that_is_the_target_is_always_right() -> None:
    target = create_backend("tiny/target")
    prompt = Tokenizer("tiny/target").encode("def read_lines(path):\n")
    output, _ = speculative_decode(target, None, torch.tensor([prompt]), 20)
    assert first_choices(target, output[0].tolist(), len(prompt)) == (20, 20)


def test_no_more_than_so_many_of_the_last_tokens_are_read() -> None:
    draft = create_backend("tiny/draft-code")
    assert first_choices(draft, [5] * 600, 10)[1] == MAX_SCORED
    assert first_choices(draft, [5] * 10, 10) == (0, 0)
    assert first_choices(draft, [5], 0) == (0, 0)
    assert first_choices(draft, [5] * (draft.max_length + 1), 10) == (0, 0)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_budget_is_a_share_of_the_time(share: float) -> None:
    clock = [100.0]
    budget = Budget(share, lambda: clock[0])
    spent = 0.0
    while clock[0] < 200:
        if budget.is_free:
            clock[0] += 0.03
            spent += 0.03
            budget.spend(0.03)
        else:
            clock[0] += 0.001
    assert spent == pytest.approx(share * 100, rel=0.05)
    assert not Budget(0.0).is_free
