"""The cost of grammars is measured on text that the grammar allows."""

import json

import jsonschema

from specdecode.evaluation.mask_speed import _TEXT, SCHEMA, made_up_pieces, measure_masks


def test_each_vocabulary_has_a_row() -> None:
    rows = list(measure_masks([400, 700], 2))
    assert [row.vocab_size for row in rows] == [400, 700]
    assert all(min(row.prepare_ms, row.compile_ms, row.first_us, row.later_us, row.constrain_us) > 0 for row in rows)


def test_the_text_is_json_of_the_schema() -> None:
    jsonschema.validate(json.loads(_TEXT), SCHEMA)


def test_made_up_vocabularies_hold_every_byte_and_no_piece_twice() -> None:
    pieces = made_up_pieces(1000)
    assert len(pieces) == len(set(pieces)) == 1000
    assert {bytes([byte]) for byte in range(256)} < set(pieces)
