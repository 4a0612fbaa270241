"""The built-in prompts: a domain in, prompts out. Written for this project, so that every command works without a hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specdecode.text import Tokenizer

DOMAINS = ("code", "chat", "reasoning")
MIXED = "mixed"  # prompts that are of no domain or of several: hard ones for a router


@dataclass(frozen=True)
class Prompt:
    """One prompt: raw text to continue, or a user's message to answer."""

    id: str
    domain: str
    format: Literal["raw", "chat"]
    prompt: str

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """The prompt's ids, in the form in which it is served."""
        if self.format == "chat":
            return tokenizer.encode_chat([{"role": "user", "content": self.prompt}])
        return tokenizer.encode(self.prompt)


def load_prompts(domain: str) -> list[Prompt]:
    """Reads the built-in prompts of one of `DOMAINS`, or the `MIXED` ones."""
    lines = (Path(__file__).parent / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Prompt(**json.loads(line)) for line in lines]
