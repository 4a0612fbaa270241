"""Whatever the cache remembers, logits are those of the sequence computed afresh; and no more is computed than must be."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig

from specdecode.backends import grouped, kv_cache
from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.kv_cache import RowCache, RowMemo, Span, common_prefix_length, split_rows
from tests.backends.recomputing import assert_equals_recomputed, random_tokens

RNG = random.Random


@pytest.fixture
def backend(target_folder: str) -> HuggingFaceBackend:
    return HuggingFaceBackend(target_folder, max_rows=4, prefill_chunk=32)


@contextmanager
def computed_tokens(backend: HuggingFaceBackend) -> Iterator[list[int]]:
    """Collects the shape, rows times tokens, of everything that the model computes."""
    shapes: list[tuple[int, ...]] = []
    hook = backend.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("max_rows", "prefill_chunk"), [(3, 4), (4, 32), (16, 512)])
@pytest.mark.parametrize("call_tokens", [0, 10, 10_000])  # each row attends alone, neighbours together, and all
def test_any_interleaving_of_calls_equals_recomputing(target_folder, max_rows, prefill_chunk, seed, call_tokens, monkeypatch):
    """Sequences grow, shrink, are rolled back, rewritten, replaced and evicted, in batches of any order."""
    monkeypatch.setattr(kv_cache, "_CALL_TOKENS", call_tokens)
    backend, rng = HuggingFaceBackend(target_folder, max_rows=max_rows, prefill_chunk=prefill_chunk), RNG(seed)
    texts = {name: random_tokens(rng, rng.randint(1, 20)) for name in "abcdefg"}
    for _ in range(20):
        names = rng.sample(sorted(texts), rng.randint(1, min(5, max_rows)))
        for name in names:
            source = rng.choice([name, name, name, rng.choice("abcdefg")])  # now and then another one's prefix
            kept = texts[source][: rng.choice([0, 1, 2, 1000, 1000, len(texts[source]) - rng.randint(0, 5)])]
            texts[name] = kept + random_tokens(rng, rng.choice([1, 1, 2, 5, 20]))
        assert_equals_recomputed(backend, [Row(name, texts[name], rng.randint(0, min(6, len(texts[name])))) for name in names])


def test_rolling_back_computes_only_what_changed(backend):
    tokens = random_tokens(RNG(0), 30)
    assert_equals_recomputed(backend, [Row("a", tokens, 1)])
    changed = [*tokens[:24], (tokens[24] + 1) % 61, 7, 8]
    with computed_tokens(backend) as shapes:
        backend.logits([Row("a", changed, 1)])
    assert shapes == [(1, 3)]
    assert_equals_recomputed(backend, [Row("a", changed, 5)])


def test_what_is_scored_is_computed_again_and_no_more(backend):
    tokens = random_tokens(RNG(1), 30)
    backend.logits([Row("a", tokens, 1)])
    with computed_tokens(backend) as shapes:
        assert_equals_recomputed(backend, [Row("a", tokens, 6)])
        assert_equals_recomputed(backend, [Row("a", tokens[:20], 2)])
    assert shapes == [(1, 6), (1, 2)]


def test_a_known_prefix_is_not_computed_for_a_new_sequence(backend):
    prefix = random_tokens(RNG(2), 30)
    backend.logits([Row("a", [*prefix, 1, 2, 3], 1)])
    with computed_tokens(backend) as shapes:
        assert_equals_recomputed(backend, [Row("b", [*prefix, 4, 5], 1)])
        assert_equals_recomputed(backend, [Row("a", [*prefix, 1, 2, 3, 9], 1)])
    assert shapes == [(1, 2), (1, 1)]


def test_a_row_that_is_taken_over_still_gives_its_prefix(backend):
    prefix = random_tokens(RNG(3), 20)
    for name in "abcd":
        backend.logits([Row(name, prefix if name == "a" else random_tokens(RNG(name), 9), 1)])
    with computed_tokens(backend) as shapes:
        assert_equals_recomputed(backend, [Row("e", [*prefix, 4], 1)])
    assert shapes == [(1, 1)]


def test_the_longest_unused_row_is_evicted(backend):
    texts = {name: random_tokens(RNG(name), 10) for name in "abcde"}
    for name in "abcdae":
        backend.logits([Row(name, texts[name], 1)])
    with computed_tokens(backend) as shapes:
        for name in "acdeb":
            assert_equals_recomputed(backend, [Row(name, [*texts[name], 3], 1)])
    assert shapes == [(1, 1)] * 4 + [(1, 11)]


def test_warming_computes_everything_and_returns_nothing(backend):
    tokens = random_tokens(RNG(4), 20)
    assert backend.logits([Row("a", tokens, 0)]).shape == (0, 61)
    with computed_tokens(backend) as shapes:
        assert backend.logits([Row("a", tokens, 0)]).shape == (0, 61)
        assert_equals_recomputed(backend, [Row("a", [*tokens, 5], 1)])
    assert shapes == [(1, 1)]


def test_a_batch_may_score_different_numbers_of_positions(backend):
    rng = RNG(5)
    for counts in [(0, 3, 1, 0), (2, 2, 2, 2), (0, 0, 0, 7), (1, 0, 5, 2)]:
        rows = [Row(name, random_tokens(rng, 12), count) for name, count in zip("abcd", counts, strict=True)]
        assert_equals_recomputed(backend, rows)


def test_the_order_of_a_batch_is_the_callers(backend):
    rng = RNG(6)
    texts = {name: random_tokens(rng, rng.randint(3, 20)) for name in "abcd"}
    for order in ("abcd", "dcba", "cadb", "bd", "ca", "dab"):
        for name in order:
            texts[name] = texts[name] + random_tokens(rng, rng.randint(1, 3))
        assert_equals_recomputed(backend, [Row(name, texts[name], 2) for name in order])


def test_a_prompt_is_computed_in_chunks(backend):
    tokens = random_tokens(RNG(7), 100)
    with computed_tokens(backend) as shapes:
        assert_equals_recomputed(backend, [Row("a", tokens, 1)])
    assert shapes == [(1, 32), (1, 32), (1, 32), (1, 4)]


def test_a_long_prompt_does_not_pad_the_others_to_its_length(backend):
    short, long = random_tokens(RNG(8), 9), random_tokens(RNG(9), 100)
    backend.logits([Row("a", short, 1)])
    with computed_tokens(backend) as shapes:
        assert_equals_recomputed(backend, [Row("a", [*short, 1], 1), Row("b", long, 3)])
    assert max(rows * tokens for rows, tokens in shapes) <= 2 * (32 + 3)


def test_room_grows_and_keeps_what_is_remembered(backend):
    texts = {name: random_tokens(RNG(name), 200) for name in "ab"}
    assert_equals_recomputed(backend, [Row(name, text, 1) for name, text in texts.items()])
    num_bytes = backend.cache.num_bytes()
    texts["a"] += random_tokens(RNG(10), 100)
    assert_equals_recomputed(backend, [Row("a", texts["a"], 1)])
    assert backend.cache.num_bytes() > num_bytes
    with computed_tokens(backend) as shapes:
        assert_equals_recomputed(backend, [Row(name, [*text, 1], 1) for name, text in texts.items()])
    assert shapes == [(2, 1)]


def test_a_sequence_may_fill_the_context(backend):
    tokens = random_tokens(RNG(11), backend.max_length)
    assert_equals_recomputed(backend, [Row("a", tokens, 3)])
    assert_equals_recomputed(backend, [Row("a", tokens[:-1], 1), Row("b", tokens[:5], 1)])


def test_clearing_gives_the_memory_back_and_changes_nothing(backend):
    rows = [Row(name, random_tokens(RNG(name), 20), 2) for name in "abc"]
    before = backend.logits(rows)
    assert backend.cache.num_bytes() > 10_000
    backend.cache.clear()
    assert backend.cache.num_bytes() < 10_000
    torch.testing.assert_close(backend.logits(rows), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_sits_in_adjacent_rows_and_nobody_loses_tokens(seed):
    cache, rng, remembered = RowCache(num_layers=1, max_rows=6, max_length=64), RNG(seed), {}
    for _ in range(40):
        ids = rng.sample("abcdef", rng.randint(1, 6))
        texts = [random_tokens(rng, rng.randint(1, 8)) for _ in ids]
        numbers = cache.seat(ids, texts)
        assert sorted(numbers) == list(range(min(numbers), min(numbers) + len(ids)))
        for id, number, tokens in zip(ids, numbers, texts, strict=True):
            assert cache.rows[number].id == id
            cache.remember(number, tokens)
            remembered[id] = tokens
        assert {row.id: row.tokens for row in cache.rows} == remembered


def test_the_common_prefix_is_where_two_lists_first_differ():
    rng = RNG(0)
    for _ in range(300):
        one, other = ([rng.randrange(2) for _ in range(rng.randint(0, 6))] for _ in range(2))
        length = common_prefix_length(one, other)
        assert one[:length] == other[:length]
        assert length == min(len(one), len(other)) or one[length] != other[length]


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_split_where_reading_in_vain_costs_more_than_a_call(seed):
    rng = RNG(seed)
    lengths = [rng.choice([rng.randint(1, 50), rng.randint(1, 2000)]) for _ in range(rng.randint(1, 64))]
    spans = split_rows(lengths)
    assert [row for span in spans for row in range(span.first, span.last)] == list(range(len(lengths)))
    for span in spans:
        assert span.length == max(lengths[span.first : span.last])
    for one, other in pairwise(spans):
        shorter, longer = sorted([one, other], key=lambda span: span.length)
        assert (longer.length - shorter.length) * (shorter.last - shorter.first) > kv_cache._CALL_TOKENS


def test_a_long_row_among_short_ones_is_read_alone():
    assert split_rows([60] * 7 + [800] + [61] * 8) == (Span(0, 7, 60), Span(7, 8, 800), Span(8, 16, 61))
    assert split_rows([100, 110, 105, 99]) == (Span(0, 4, 110),)
    assert split_rows([5]) == (Span(0, 1, 5),)


def test_attention_reads_each_span_as_long_as_it_is(backend, monkeypatch):
    monkeypatch.setattr(kv_cache, "_CALL_TOKENS", 10)
    seen, attend = [], grouped.scaled_dot_product_attention

    def watched(queries, key, value, mask, **options):
        seen.append((len(queries), key.shape[2], value.shape[2], mask.shape[-1]))
        return attend(queries, key, value, mask, **options)

    monkeypatch.setattr(grouped, "scaled_dot_product_attention", watched)
    rows = [Row("a", list(range(30)), 1), Row("b", [1, 2, 3, 4], 1), Row("c", [5, 6, 7], 2)]
    backend.logits([Row(row.id, row.tokens[:-2], 1) for row in rows])
    seen.clear()
    backend.logits(rows)
    assert set(seen) == {(1, 30, 30, 30), (2, 4, 4, 4)}


def test_a_batch_larger_than_the_cache_takes_several_passes(target_folder):
    rng = RNG(3)
    rows = [Row(f"seq-{n}", [rng.randrange(61) for _ in range(rng.randint(2, 9))], rng.randint(0, 2)) for n in range(7)]
    large, small = HuggingFaceBackend(target_folder), HuggingFaceBackend(target_folder, max_rows=3)
    for _ in range(2):
        assert torch.allclose(small.logits(rows), large.logits(rows), atol=2e-5)


def test_a_shared_prefix_is_computed_once(save_model, llama_config):
    backend = HuggingFaceBackend(save_model(LlamaConfig(**llama_config.to_dict() | {"max_position_embeddings": 2048}), 0))
    prefix = random_tokens(RNG(12), 1000)
    backend.logits([Row("first", [*prefix, 1, 2, 3], 1)])
    assert backend.num_computed_tokens == 1003
    backend.logits([Row("second", [*prefix, 4, 5, 6, 7, 8], 1)])
    assert backend.num_computed_tokens == 1003 + 5


def test_padding_is_not_counted_as_computed(backend):
    backend.logits([Row("a", [1, 2, 3, 4, 5, 6, 7], 1), Row("b", [8, 9], 2)])
    assert backend.num_computed_tokens == 7 + 2
    backend.logits([Row("a", [1, 2, 3, 4, 5, 6, 7], 1), Row("b", [8, 9, 10, 11], 1)])
    assert backend.num_computed_tokens == 7 + 2 + 1 + 2


def _name_twice(cache: RowCache) -> None:
    cache.rows[1].id = cache.rows[0].id


def _remember_too_many_rows(cache: RowCache) -> None:
    cache.rows += [RowMemo(str(number)) for number in range(9)]


def _remember_too_many_tokens(cache: RowCache) -> None:
    cache.rows[0].tokens = [0] * 1000


def _remember_rows_without_room(cache: RowCache) -> None:
    for layer in cache.layers:
        layer.resize(1, layer.length)


def _lengthen_one_layer(cache: RowCache) -> None:
    cache.layers[1].resize(cache.layers[1].num_rows, 300)


def _shorten_the_room_of_one_layer(cache: RowCache) -> None:
    cache.layers[1].resize(3, cache.layers[1].length)


def _lose_some_values(cache: RowCache) -> None:
    cache.layers[0].values = cache.layers[0].values[:, :-1]


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_name_twice, "two rows are of one sequence: .*a.*a"),
        (_remember_too_many_rows, "11 rows are remembered, more than max_rows 4"),
        (_remember_too_many_tokens, "a row remembers 1000 tokens in a cache of length 256"),
        (_remember_rows_without_room, "layer 0 has 1 rows for 2 memos"),
        (_lengthen_one_layer, "layer 1 has length 300, the cache 256"),
        (_shorten_the_room_of_one_layer, "unequal numbers of rows"),
        (_lose_some_values, "room for .4, 256., the layer for .4, 257."),
    ],
)
def test_the_check_finds_what_is_wrong(corrupt, message, backend):
    backend.logits([Row("a", [1, 2, 3], 1), Row("b", [4, 5], 1)])
    backend.cache.check()
    corrupt(backend.cache)
    with pytest.raises(AssertionError, match=message):
        backend.cache.check()
