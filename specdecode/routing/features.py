"""A prompt's text in, the numbers out by which a router tells it from others: a sentence embedding, and a few hints.

Knows nothing of drafts or targets.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence as Several

import numpy as np

DEFAULT_ENCODER = "sentence-transformers/all-mpnet-base-v2"

# Words and signs that a text of each domain has more of than others; hints, which the learned part weighs.
_HINTS = {
    "code": re.compile(
        r"\b(?:def|class|import|return|function|async|await|print|self|const|var|elif|except|lambda|null|void|public|static"
        r"|struct|python|javascript|rust|java|sql|regex|api)\b|[{}\[\];]|[=!<>]=|->|=>|\(\)|::|```|^\s*(?:#|//)|\w+_\w+|\w\(",
        re.MULTILINE,
    ),
    "chat": re.compile(
        r"\b(?:you|your|please|thanks?|hello|hi|hey|tell me|recommend|suggest|advice|favou?rite|feel|friends?|should i|can i"
        r"|what do you|how are|i(?:'m| am|'d| would)|my)\b|[!?]",
        re.IGNORECASE,
    ),
    "reasoning": re.compile(
        r"\b(?:how (?:many|much|long|far|old)|total|each|every|per|sum|average|percent|twice|half|times|altogether|remaining"
        r"|left|cost|price|hours?|minutes?|miles?|if|then|solve|prove|calculate|equation)\b|\d+|[+*/%=^]|\$\d",
        re.IGNORECASE,
    ),
}
_HINT_CHARACTERS = 4096  # of a text, for the hints; an encoder has a limit of its own, in tokens

# After the embedding, in this order.
HINT_NAMES = (
    "prompt_length",  # log2(1 + tokens) / 16
    "code_score",  # hits of the domain's hints per word, squashed into [0, 1)
    "chat_score",
    "reasoning_score",
    "is_chat",  # whether the prompt is a message and not a text to continue
    "foreign_share",  # of the characters, those outside ASCII
    "newline_share",  # of the characters
    "digit_share",  # of the characters
)


class Features:
    """Turns prompts into vectors.

    Args:
        encoder: by its name, see `load_encoder`.
        device: where it runs, such as cpu or cuda; the best there is if None.
        max_remembered: embeddings that are kept for texts that come again.

    Raises:
        ModelError: the encoder does not load.
    """

    def __init__(self, encoder: str = DEFAULT_ENCODER, *, device: str | None = None, max_remembered: int = 4096) -> None:
        from specdecode.routing.encoder import load_encoder  # sentence-transformers takes seconds to import

        self.encoder = encoder
        self._model = load_encoder(encoder, device)
        self._max_remembered = max_remembered
        self._remembered: OrderedDict[str, np.ndarray] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """What each number is, in order."""
        return [*(f"embedding_{place}" for place in range(self.width)), *HINT_NAMES]

    @property
    def width(self) -> int:
        """How many numbers an embedding has."""
        newer = getattr(self._model, "get_embedding_dimension", None)  # sentence-transformers 6
        return int((newer or self._model.get_sentence_embedding_dimension)())

    def of(self, texts: Several[str], num_tokens: Several[int], is_chat: Several[bool]) -> np.ndarray:
        """A row for each prompt, float32 [n, len(names)]; the same for a prompt alone as among others, to rounding.

        Args:
            texts: the prompts, or last user's messages.
            num_tokens: how long the prompts are, in the target's tokens.
            is_chat: whether they are messages.
        """
        rows = [hints(*row) for row in zip(texts, num_tokens, is_chat, strict=True)]
        return np.concatenate([self.embed(texts), np.array(rows, dtype=np.float32)], axis=1)

    def embed(self, texts: Several[str]) -> np.ndarray:
        """Sentence embeddings of unit length, float32 [n, width]."""
        new = [text for text in dict.fromkeys(texts) if text not in self._remembered]
        found = dict(zip(new, self._encode(new), strict=True)) if new else {}
        rows = [found[text] if text in found else self._remembered[text] for text in texts]
        for text in texts:
            self._remember(text, found)
        return np.stack(rows)

    def _encode(self, texts: list[str]) -> np.ndarray:
        texts = [text.strip() or "." for text in texts]  # an encoder without marks around a text has nothing to do with none
        embeddings = self._model.encode(texts, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(embeddings, dtype=np.float32)

    def _remember(self, text: str, found: dict[str, np.ndarray]) -> None:
        if text in found:
            self._remembered[text] = found[text]
        if text in self._remembered:  # unless so many others have come since that it is forgotten again
            self._remembered.move_to_end(text)
        if len(self._remembered) > self._max_remembered:
            self._remembered.popitem(last=False)


def hints(text: str, num_tokens: int, is_chat: bool) -> list[float]:
    """What `HINT_NAMES` says."""
    text = text[:_HINT_CHARACTERS]
    num_words, num_characters = max(1, len(text.split())), max(1, len(text))
    scores = (len(pattern.findall(text)) / num_words for pattern in _HINTS.values())
    return [
        float(np.log2(1 + num_tokens) / 16),
        *(score / (0.25 + score) for score in scores),
        float(is_chat),
        sum(not character.isascii() for character in text) / num_characters,
        text.count("\n") / num_characters,
        sum(character.isdigit() for character in text) / num_characters,
    ]
