"""Acceptance from agreement, and from chances, respects the structure of rounds."""

import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specdecode.backends.backend import create_backend
from specdecode.decoding.drafters import NoDrafter
from specdecode.decoding.metrics import expected_length
from specdecode.decoding.sequence import SamplingParams
from specdecode.training.acceptance import Rounds, count_rounds, score
from specdecode.training.completions import complete
from specdecode.training.documents import Document
from specdecode.training.examples import Example, Formatter


def test_a_round_ends_at_the_first_wrong_guess_and_adds_one_token() -> None:
    # Rounds of two: (yes, no + own), (yes, yes + own), (no + own).
    agrees = [True, False, True, True, False, False]

    assert count_rounds(agrees, k=2) == Rounds(num_rounds=3, num_drafted=5, num_accepted=3)


def test_all_right_and_all_wrong() -> None:
    assert count_rounds([True] * 10, k=4) == Rounds(num_rounds=2, num_drafted=8, num_accepted=8)
    assert count_rounds([False] * 3, k=4).num_accepted == 0
    assert count_rounds([], k=4) == Rounds()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_expected_length_is_that_of_all_outcomes_added_up(k: int) -> None:
    chances = np.random.default_rng(k).random(7)
    num_rounds = sum(
        np.prod(np.where(outcome, chances, 1 - chances)) * count_rounds(outcome, k).num_rounds
        for outcome in itertools.product([True, False], repeat=7)
    )
    assert expected_length([chances], k) == pytest.approx(7 / num_rounds)


def test_the_expected_length_where_it_is_known() -> None:
    assert expected_length([np.ones(1000)], 4) == 5
    assert expected_length([np.zeros(10)], 4) == 1
    geometric = sum(0.8**n for n in range(5))  # Leviathan et al. 2023, equation 1
    assert expected_length([np.full(100_000, 0.8)], 4) == pytest.approx(geometric, rel=1e-3)
    assert expected_length([], 4) == 0


def test_a_model_accepts_all_of_its_own_guesses(model_folder: str, tokenizer: PreTrainedTokenizerFast) -> None:
    formatter, backend = Formatter(tokenizer), create_backend(model_folder)
    prompts = [formatter.prompt(Document(text)) for text in ("How many", "There are 3 apples and", "2 + 2 =")]
    answers = complete(prompts, backend, NoDrafter(), lambda _: SamplingParams(max_tokens=12), batch=2)
    scores = score(backend.model, backend.model, [answer.example() for answer in answers], k=4, batch_size=2)

    assert scores.greedy.rate == scores.agreement == 1
    assert scores.acceptance == pytest.approx(1)
    assert scores.accepted_length == pytest.approx(scores.greedy_length)


def test_another_model_accepts_as_much_as_its_own_distribution_says(
    model: LlamaForCausalLM, model_folder: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    backend = create_backend(model_folder)
    prompts = [Formatter(tokenizer).prompt(Document("How many"))]
    [answer] = complete(prompts, backend, NoDrafter(), lambda _: SamplingParams(max_tokens=9, ignore_eos=True))
    draft = model.eval()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1.5)
        ids = torch.tensor([answer.prompt + answer.tokens])
        p, q = (m(input_ids=ids).logits[0, len(answer.prompt) - 1 : -1].softmax(-1) for m in (backend.model, draft))
    chances = torch.minimum(p, q).sum(-1)
    scores = score(draft, backend.model, [answer.example()], k=3)

    assert scores.acceptance == pytest.approx(chances.mean().item(), rel=1e-4)
    assert scores.accepted_length == pytest.approx(expected_length([chances.numpy()], 3), rel=1e-4)
    assert scores.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert scores.loss == pytest.approx(-q.log()[range(9), answer.tokens].mean().item(), rel=1e-4)
    assert scores.entropy == pytest.approx(-(q * q.log()).sum(-1).mean().item(), rel=1e-4)


def test_what_is_only_read_between_two_answers_ends_a_round(model: LlamaForCausalLM) -> None:
    draft = model.eval()
    ids = [5, 6, 7, 8, 9, 10, 11, 12]
    split = Example.of(ids, [False, True, True, False, True, True, True, False])
    apart = [Example.of(ids[:3], [False, True, True]), Example.of(ids[:7], [False] * 4 + [True] * 3)]

    assert score(draft, draft, [split], k=2) == score(draft, draft, apart, k=2)
