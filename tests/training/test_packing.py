"""Blocks hold every token of every example once, and no token sees another example's."""

from itertools import islice

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from specdecode.training.examples import Example
from specdecode.training.packing import UNSCORED, Block, cycle, interleave, pack


def example(rng: np.random.Generator, length: int) -> Example:
    return Example.of(rng.integers(10, 280, length).tolist(), (rng.random(length) < 0.7).tolist())


def pieces(block: Block) -> list[slice]:
    starts = np.flatnonzero(block.position_ids == 0).tolist()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(block.input_ids)], strict=True)]


@pytest.mark.parametrize("length", [4, 16, 64])
@pytest.mark.parametrize("longest", [3, 20, 100])
def test_every_token_is_packed_once_and_in_order(length: int, longest: int) -> None:
    rng = np.random.default_rng(length * longest)
    examples = [example(rng, int(rng.integers(1, longest))) for _ in range(30)]
    blocks = list(pack(examples, length, pad_id=7))
    assert {len(block.input_ids) for block in blocks} == {length}
    ids = np.concatenate([block.input_ids for block in blocks])
    expected = np.concatenate([one.ids for one in examples])
    assert ids[: len(expected)].tolist() == expected.tolist()
    assert (ids[len(expected) :] == 7).all()
    assert len(ids) - len(expected) < length


def test_a_label_is_the_tokens_own_id_where_it_is_learned_and_its_context_is_there() -> None:
    rng = np.random.default_rng(0)
    examples = [example(rng, 11) for _ in range(5)]
    scored = {(n, place) for n, one in enumerate(examples) for place in np.flatnonzero(one.is_scored)}
    places = [(n, place) for n, one in enumerate(examples) for place in range(len(one.ids))]
    for number, block in enumerate(pack(examples, 8, pad_id=7)):
        for offset in range(8):
            index = number * 8 + offset
            is_learned = index < len(places) and places[index] in scored and block.position_ids[offset] > 0
            assert block.labels[offset] == (block.input_ids[offset] if is_learned else UNSCORED)


def test_a_model_sees_each_piece_alone(model: LlamaForCausalLM) -> None:
    rng = np.random.default_rng(1)
    blocks = list(pack([example(rng, int(n)) for n in rng.integers(2, 30, 12)], 32, pad_id=0))
    model.eval()
    ids, positions = (
        torch.from_numpy(np.stack([getattr(b, name) for b in blocks])).long() for name in ("input_ids", "position_ids")
    )
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for number, block in enumerate(blocks):
            for piece in pieces(block):
                alone = model(input_ids=ids[number : number + 1, piece], use_cache=False).logits[0]
                torch.testing.assert_close(packed[number, piece], alone, atol=1e-5, rtol=1e-5)


def test_sources_are_read_by_their_weights_and_a_short_one_again() -> None:
    rng = np.random.default_rng(2)
    few, many = [example(rng, 5)], [example(rng, 5) for _ in range(50)]
    streams = {"few": pack(cycle(few, rng), 8, 0), "many": pack(cycle(many, rng), 8, 0)}
    own = set(few[0].ids.tolist())
    drawn = [set(block.input_ids.tolist()) <= own for block in islice(interleave(streams, {"few": 3.0, "many": 1.0}, rng), 800)]
    assert 0.7 < np.mean(drawn) < 0.8


def test_the_order_is_a_function_of_the_seed() -> None:
    examples = [Example.of([n, n], [False, True]) for n in range(20)]
    first, second, other = ([e.ids[0] for e in islice(cycle(examples, np.random.default_rng(s)), 40)] for s in (1, 1, 2))
    assert first == second != other
    assert sorted(first[:20]) == sorted(first[20:]) == list(range(20))
