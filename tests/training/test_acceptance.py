"""Acceptance from agreement respects the structure of rounds."""

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specdecode.training.acceptance import Acceptance, count_rounds, greedy_acceptance
from specdecode.training.blocks import encode_text, end_of_text
from specdecode.training.continuations import continue_prompts


def test_a_round_ends_at_the_first_wrong_guess_and_adds_one_token() -> None:
    # Rounds of two: (yes, no + own), (yes, yes + own), (no + own).
    agrees = [True, False, True, True, False, False]

    assert count_rounds(agrees, k=2) == Acceptance(num_rounds=3, num_drafted=5, num_accepted=3)


def test_all_right_and_all_wrong() -> None:
    assert count_rounds([True] * 10, k=4) == Acceptance(num_rounds=2, num_drafted=8, num_accepted=8)
    assert count_rounds([False] * 3, k=4).num_accepted == 0
    assert count_rounds([], k=4) == Acceptance()


def test_a_model_accepts_all_of_its_own_guesses(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [encode_text(text, tokenizer) for text in ("How many", "There are 3 apples and", "2 + 2 =")]
    model.eval()
    continuations = continue_prompts(model, prompts, 12, temperature=0, batch_size=2, pad_id=end_of_text(tokenizer))

    assert greedy_acceptance(model, continuations, k=4).rate == 1


def test_continuations_do_not_depend_on_their_batch(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [encode_text(text, tokenizer) for text in ("How many", "There are 3 apples and", "2 + 2 =")]
    pad_id = end_of_text(tokenizer)
    model.eval()

    together = continue_prompts(model, prompts, 12, temperature=0, batch_size=3, pad_id=pad_id)
    alone = [continue_prompts(model, [prompt], 12, 0, 1, pad_id)[0] for prompt in prompts]

    assert sorted(together, key=str) == sorted(alone, key=str)


def test_sampled_continuations_vary(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    prompts = [encode_text("How many", tokenizer)] * 2

    one, other = continue_prompts(model.eval(), prompts, 12, temperature=1.0, batch_size=2, pad_id=end_of_text(tokenizer))

    assert one.tokens != other.tokens
