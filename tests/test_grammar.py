"""A matcher is a function of an answer's tokens: those may come next that can be completed to a text of the grammar."""

import json
import random
import re

import pytest

from specdecode.errors import ModelError, RequestError
from specdecode.grammar import Grammar, Grammars
from specdecode.text import Tokenizer

PIECES = [b"a", b"b", b"c", b"ab", b"bc", b"a", b""]
TEXTS = ["abab", "abc", "bc", "ca", "aab", "b", "abcabc"]


@pytest.fixture(scope="module")
def toy() -> Grammars:
    return Grammars(PIECES)


@pytest.fixture(scope="module")
def tiny() -> Grammars:
    return Grammars.of("tiny/target", 4096, frozenset({1}))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer("tiny/target")


def accepts(grammars: Grammars, tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    """Whether the grammar allows the text's tokens, one after the other, and an end after them."""
    matcher, tokens = grammars.matcher(grammar), tokenizer.encode_part(text)
    steps = (matcher.allowed(tokens[:length]).tokens[token] for length, token in enumerate(tokens))
    return all(steps) and matcher.allowed(tokens).may_end


def begins(grammar_texts: list[str], text: str) -> bool:
    return any(whole.startswith(text) for whole in grammar_texts)


def test_allowed_tokens_are_those_that_can_be_completed(toy: Grammars) -> None:
    """However the text is cut into tokens, and in whatever order the places are asked for."""
    matcher, rng = toy.matcher(Grammar.choice(TEXTS)), random.Random(0)
    for _ in range(600):
        tokens = [rng.randrange(len(PIECES) - 1) for _ in range(rng.randrange(4))]
        text = b"".join(PIECES[token] for token in tokens).decode()
        expected = [begins(TEXTS, text) and bool(piece) and begins(TEXTS, text + piece.decode()) for piece in PIECES]
        found = matcher.allowed(tokens)
        assert found.tokens.tolist() == expected
        assert found.may_end == (text in TEXTS)
        assert found.is_over == (not any(expected))


def test_a_matcher_remembers_nothing_that_matters(toy: Grammars) -> None:
    grammar, rng = Grammar("regex", "(ab|bc|ca{1,2})*"), random.Random(1)
    old = toy.matcher(grammar)
    for _ in range(300):
        tokens = [rng.randrange(len(PIECES)) for _ in range(rng.randrange(8))]
        one, other = old.allowed(tokens), toy.matcher(grammar).allowed(tokens)
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.may_end == other.may_end


def test_what_cannot_be_completed_in_the_vocabulary_is_over_and_may_not_end(toy: Grammars) -> None:
    matcher = toy.matcher(Grammar("regex", "ab(c|d+)(z|)"))
    assert not matcher.allowed([3]).is_over
    dead = toy.matcher(Grammar("regex", "abz")).allowed([3])
    assert dead.is_over
    assert not dead.may_end
    assert matcher.allowed([0, 1]).tokens.tolist() == matcher.allowed([3]).tokens.tolist()


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "("),
        Grammar("regex", ""),
        Grammar("regex", "z"),
        Grammar("json_schema", "{"),
        Grammar("json_schema", "3"),
        Grammar("lark", "begin: x"),
        Grammar.json_schema({"type": "bogus"}),
        Grammar.json_schema(False),
        Grammar.json_schema({"type": "string", "pattern": "("}),
        Grammar.json_schema({"not": {"type": "string"}}),
        Grammar.json_schema({"$ref": "#/$defs/missing"}),
        Grammar.json_schema({"$ref": "http://127.0.0.1/schema"}),
    ],
    ids=lambda grammar: f"{grammar.kind} {grammar.text[:40]}",
)
def test_a_grammar_that_cannot_be_used_is_refused_in_one_line(toy: Grammars, grammar: Grammar) -> None:
    with pytest.raises(RequestError, match=r"^grammar: ") as raised:
        toy.matcher(grammar)
    assert raised.value.param == "grammar"
    assert "\n" not in str(raised.value)
    assert "no_forcing" not in str(raised.value)


def test_lenient_schemas_pass_over_what_cannot_be_enforced(tiny: Grammars, tokenizer: Tokenizer) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    with pytest.raises(RequestError, match="uniqueItems"):
        tiny.matcher(Grammar.json_schema(schema))
    assert accepts(tiny, tokenizer, Grammar.json_schema(schema, is_lenient=True), "[1, 1]")


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ('{"name": "Zoë \\"x\\" é", "ages": [1, -2]}', True),
        (json.dumps({"name": "é\n日本", "ages": []}, indent=2, ensure_ascii=False), True),
        ('{"ages": [], "name": ""}', False),  # in the schema's order
        ('{"name": "a"}', False),
        ('{"name": "a", "ages": [1, 2, 3]}', False),
        ('{"name": "a", "ages": [1.5]}', False),
        ('{"name": "a", "ages": [], "more": 1}', False),
        ('{"name": "a\n", "ages": []}', False),
        ('{"name":  "a", "ages": []}', False),
        ('{"name":\n\n"a", "ages": []}', False),
        ('{"name": "a", "ages": []} ', False),
        (' {"name": "a", "ages": []}', False),
    ],
)
def test_json_of_a_schema(tiny: Grammars, tokenizer: Tokenizer, text: str, is_valid: bool) -> None:
    assert accepts(tiny, tokenizer, Grammar.json_schema(SCHEMA), text) == is_valid


def test_regular_expressions_match_the_whole_answer(tiny: Grammars, tokenizer: Tokenizer) -> None:
    pattern = r"[0-9]{2}/[a-f]+( ok)?"
    for text in ("12/abc", "12/abc ok", "1/abc", "12/abcg", "12/", "12/a ok ", "x12/a"):
        assert accepts(tiny, tokenizer, Grammar("regex", pattern), text) == bool(re.fullmatch(pattern, text))


def test_a_choice_is_one_of_its_texts(tiny: Grammars, tokenizer: Tokenizer) -> None:
    texts = ["yes", "yes, but", 'say "no"\\', "日本\n"]
    for text in [*texts, "ye", "no", "yes,"]:
        assert accepts(tiny, tokenizer, Grammar.choice(texts), text) == (text in texts)


def test_special_tokens_are_no_text(tiny: Grammars, tokenizer: Tokenizer) -> None:
    allowed = tiny.matcher(Grammar("regex", "(.|\\n)*")).allowed([])
    assert not any(allowed.tokens[token] for token in tokenizer.special_ids)
    assert allowed.tokens.sum() > 3000


def test_grammars_of_a_model_without_a_tokenizer_are_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        Grammars.of(str(tmp_path), 100, frozenset())
