"""Two vocabularies in, a translation between them out. Knows no model but its name, and nothing of decoding.

A draft with another tokenizer than its target drafts the tokens that both have: token-level intersection, algorithm 4 of Timor
et al. 2025, "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous Vocabularies"
(arXiv 2502.05202). Two tokens are the same if they stand for the same bytes, however a tokenizer writes them down. No mistake
in a translation could change what a target generates; it could only make the draft's guesses worse.
"""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from specdecode.errors import ModelError
from specdecode.text import HasVocabulary, Tokenizer

Spell = Callable[[int, bool], list[int] | None]


class HasTokens(HasVocabulary, Protocol):
    """A model whose logits are those of a vocabulary's tokens, and perhaps of some ids that mean nothing."""

    @property
    def vocab_size(self) -> int:
        """The width of the logits."""
        ...


class HasTokensAndEnds(HasTokens, Protocol):
    """A model's vocabulary, and the tokens that end a generation."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The model's own end tokens."""
        ...


class Translation(Protocol):
    """How a draft's token ids and a target's stand to each other."""

    def context(self, tokens: list[int]) -> list[int] | None:
        """Turns target ids into draft ids of the same text, one by one: a prefix of the tokens gives a prefix of the result.

        Returns:
            None if a token cannot be said in the draft's vocabulary, or if nothing that is said leaves the draft any token.
        """
        ...

    def draft_id(self, token: int) -> int:
        """Turns a target id that was drafted into the draft's; the context of a token alone would be that of a whole text."""
        ...

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Turns the draft's logits, [n, draft vocab], into logits of the target's ids, [n, target vocab or less].

        The logits of a target token that the draft does not have are -inf.
        """
        ...


@dataclass(frozen=True)
class SameVocabulary:
    """The identity: one tokenizer, but possibly logits that are padded to other sizes."""

    draft_vocab_size: int
    target_vocab_size: int

    def context(self, tokens: list[int]) -> list[int] | None:
        """Returns the tokens themselves; None if the draft has no embedding of one."""
        return tokens if max(tokens, default=0) < self.draft_vocab_size else None

    def draft_id(self, token: int) -> int:
        """Returns the token itself."""
        return token

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Leaves out the columns that only the draft has, without a copy."""
        return logits[:, : min(self.draft_vocab_size, self.target_vocab_size)]


class SharedTokens:
    """A translation between two tokenizers by the tokens that both have.

    Args:
        draft_ids: [shared], the shared tokens' ids in the draft's vocabulary, each once.
        target_ids: [shared], the same tokens' ids in the target's vocabulary, each once.
        target_vocab_size: the width of the target's logits.
        spell: the draft ids of any target token, shared or not, given whether it begins the text; None if there are none.
            It is asked once for each token, and may be slow.
        special: the target's tokens that are no text.
        start: draft ids that stand before every context.
    """

    def __init__(
        self,
        draft_ids: torch.Tensor,
        target_ids: torch.Tensor,
        target_vocab_size: int,
        spell: Spell,
        *,
        special: Iterable[int] = (),
        start: Iterable[int] = (),
    ) -> None:
        self.draft_ids = draft_ids
        self.target_ids = target_ids
        self.target_vocab_size = target_vocab_size
        self._draft_id = dict(zip(target_ids.tolist(), draft_ids.tolist(), strict=True))
        self._spell = functools.cache(spell)
        self._special = frozenset(special)
        self._start = list(start)

    def context(self, tokens: list[int]) -> list[int] | None:
        """Spells the tokens one after the other; see `Translation.context`."""
        context, is_first = list(self._start), True
        for token in tokens:
            spelled = self._spell(token, is_first)
            if spelled is None:
                return None
            context += spelled
            is_first = is_first and token in self._special
        return context or None

    def draft_id(self, token: int) -> int:
        """Returns the draft's id of a shared token; no other can have been drafted."""
        return self._draft_id[token]

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Puts each shared token's logit into the target's column; see `Translation.logits`."""
        if self.draft_ids.device != logits.device:  # once: the logits of a draft are always on its device
            self.draft_ids, self.target_ids = self.draft_ids.to(logits.device), self.target_ids.to(logits.device)
        translated = logits.new_full((logits.shape[0], self.target_vocab_size), -torch.inf)
        return translated.index_copy_(1, self.target_ids, logits.index_select(1, self.draft_ids))


def translate(draft: HasTokens, target: HasTokens, *, min_shared: float = 0.1) -> Translation:
    """Compares the tokenizers of a draft and a target.

    Args:
        draft: the model that guesses.
        target: the model that is guessed for.
        min_shared: the least part of the target's tokens that the draft must have too.

    Raises:
        ModelError: a tokenizer cannot be opened or is of no kind that is known here, or the two share too few tokens.
    """
    if draft.vocabulary_id == target.vocabulary_id:
        return SameVocabulary(draft.vocab_size, target.vocab_size)
    ours = Vocabulary(Tokenizer(target.name), target.vocab_size)
    theirs = Vocabulary(Tokenizer(draft.name), draft.vocab_size)
    draft_ids, target_ids = _shared_ids(theirs, ours)
    num_shared, num_tokens = len(target_ids), len(ours.pieces) + len(ours.special)
    if num_shared < max(1, min_shared * num_tokens):
        raise ModelError(
            f"draft {draft.name!r} shares {num_shared} of the {num_tokens} tokens ({num_shared / max(num_tokens, 1):.1%}) "
            f"of target {target.name!r}: expected at least {100 * min_shared:g}%"
        )
    return SharedTokens(
        torch.tensor(draft_ids),
        torch.tensor(target_ids),
        target.vocab_size,
        functools.partial(_spell, theirs, ours),
        special=ours.special,
        start=theirs.start_ids,
    )


class Vocabulary:
    """What each token id of one model stands for.

    Attributes:
        pieces: the bytes of each id, special tokens left out.
        ids: the id that a tokenizer would rather use for some bytes; several ids may stand for the same ones.
        special: the special tokens' names.
        special_ids: their ids.
        start_ids: special tokens that the tokenizer puts before every text.
        eos_id: the end of a text.
        drops_space: whether a space that begins a text is not shown, and so must be written for one that is.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self._spelling = _spelling(tokenizer)
        names = {id: name for name, id in tokenizer.vocabulary.items() if id < size}
        self.special = {id: names[id] for id in tokenizer.special_ids if id in names}
        self.special_ids = {name: id for id, name in self.special.items()}
        self.pieces = {id: self._spelling.read(name) for id, name in names.items() if id not in self.special}
        self.ids = self._preferred_ids(names)
        self.start_ids = [id for id in tokenizer.start_ids if id in self.special]
        self.eos_id = tokenizer.eos_id if tokenizer.eos_id in self.special else None
        self.drops_space = self._spelling.drops_space
        self._longest = max(map(len, self.ids), default=0)

    def spell(self, piece: bytes) -> list[int] | None:
        """Finds tokens that stand for the bytes: one if possible, else what the tokenizer's model takes, else any.

        Returns:
            None if there are no such tokens.
        """
        if piece in self.ids:
            return [self.ids[piece]]
        return self._spell_as_model(piece) or self._spell_longest_first(piece)

    def _preferred_ids(self, names: dict[int, str]) -> dict[bytes, int]:
        """Picks an added token, which is found before the model sees the text; then "a" before "<0x61>", its byte's token."""
        added = self._tokenizer.added_ids
        order = sorted(self.pieces, key=lambda id: (id not in added, len(names[id]), id), reverse=True)
        ids = {self.pieces[id]: id for id in order}  # the last one stays
        ids.pop(b"", None)
        return ids

    def _spell_as_model(self, piece: bytes) -> list[int] | None:
        written = self._spelling.write(piece)
        ids = [] if written is None else self._tokenizer.split(written)
        return ids if b"".join(self.pieces.get(id, b"") for id in ids) == piece else None

    def _spell_longest_first(self, piece: bytes) -> list[int] | None:
        """Takes any bytes apart, also half a character; the model alone leaves out, or marks as unknown, what it cannot say."""
        ids: list[int] = []
        while piece:
            lengths = range(min(len(piece), self._longest), 0, -1)
            length = next((length for length in lengths if piece[:length] in self.ids), None)
            if length is None:
                return None
            ids.append(self.ids[piece[:length]])
            piece = piece[length:]
        return ids


def _shared_ids(draft: Vocabulary, target: Vocabulary) -> tuple[list[int], list[int]]:
    """Pairs the ids of equal bytes, and the ends of text; in the order of the target's."""
    pairs = [(id, draft.ids[piece]) for piece, id in target.ids.items() if piece in draft.ids]
    if draft.eos_id is not None and target.eos_id is not None:
        pairs.append((target.eos_id, draft.eos_id))
    pairs.sort()
    return [draft_id for _, draft_id in pairs], [target_id for target_id, _ in pairs]


def _spell(draft: Vocabulary, target: Vocabulary, token: int, is_first: bool) -> list[int] | None:
    """Says a target's token in the draft's; `is_first` if no text stands before it. See `Spell`."""
    if token in target.special:
        return _spell_special(draft, target, token)
    piece = target.pieces.get(token)
    if piece is None:
        return None
    if is_first and target.drops_space != draft.drops_space:
        piece = piece.removeprefix(b" ") if target.drops_space else b" " + piece
    return draft.spell(piece)


def _spell_special(draft: Vocabulary, target: Vocabulary, token: int) -> list[int]:
    """Says a special token by the draft's of the same use or name; leaves it out, as decoding does, if there is none."""
    if token == target.eos_id and draft.eos_id is not None:
        return [draft.eos_id]
    same = draft.special_ids.get(target.special[token])
    return [] if same is None or same in draft.start_ids else [same]  # the start is there already


class _Spelling(Protocol):
    """How a kind of tokenizer writes bytes as the characters of its tokens."""

    @property
    def drops_space(self) -> bool:
        """Whether a space that begins a text is not shown."""
        ...

    def read(self, token: str) -> bytes:
        """Turns a token's characters into the bytes that it stands for."""
        ...

    def write(self, piece: bytes) -> str | None:
        """Turns bytes into the characters that the tokenizer's model reads; None if they are no whole characters."""
        ...


class _ByteLevel:
    """Each character stands for a byte: itself if it is printable, else one of those from U+0100 on (GPT-2)."""

    drops_space = False

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(0x100) if byte not in printable]
        table = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}
        self._characters = [table[byte] for byte in range(0x100)]
        self._bytes = {character: byte for byte, character in table.items()}

    def read(self, token: str) -> bytes:
        try:
            return bytes([self._bytes[character] for character in token])
        except KeyError:  # an added token may be plain text
            return token.encode()

    def write(self, piece: bytes) -> str:
        return "".join([self._characters[byte] for byte in piece])


@dataclass(frozen=True)
class _SentencePiece:
    """A mark stands for a space, and, where there are tokens of single bytes, <0xAB> for one."""

    mark: str
    has_bytes: bool
    drops_space: bool

    def read(self, token: str) -> bytes:
        if self.has_bytes and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes.fromhex(token[3:5])
        return token.replace(self.mark, " ").encode()

    def write(self, piece: bytes) -> str | None:
        try:
            return piece.decode().replace(" ", self.mark)
        except UnicodeDecodeError:
            return None


def _spelling(tokenizer: Tokenizer) -> _Spelling:
    """Tells a tokenizer's kind from the steps by which it turns tokens into text."""
    kinds = [step["type"] for step in tokenizer.decoder_steps] + tokenizer.affixes
    steps = dict(zip(kinds, tokenizer.decoder_steps, strict=False))
    is_plain = len(steps) == len(kinds)  # no affixes, and no step twice
    if is_plain and "ByteLevel" in steps and steps.keys() <= {"ByteLevel", "Fuse"}:
        return _ByteLevel()
    mark = _space_mark(steps)
    if is_plain and mark and steps.keys() <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        return _SentencePiece(mark, "ByteFallback" in steps, _drops_space(steps))
    raise ModelError(
        f"tokenizer of {tokenizer.name!r} turns tokens into text by {', '.join(kinds) or 'no steps'}: expected one of bytes "
        "(as GPT-2's) or of SentencePiece (as Llama 2's) where a draft and its target have different tokenizers"
    )


def _space_mark(steps: dict[str, dict[str, Any]]) -> str | None:
    """What stands for a space in a SentencePiece token; None if nothing does."""
    if "Metaspace" in steps:
        return steps["Metaspace"]["replacement"]
    replace = steps.get("Replace", {})
    return replace["pattern"].get("String") if replace.get("content") == " " else None


def _drops_space(steps: dict[str, dict[str, Any]]) -> bool:
    strip, metaspace = steps.get("Strip", {}), steps.get("Metaspace", {})
    return strip.get("start", 0) > 0 or metaspace.get("prepend_scheme", "never") != "never"
