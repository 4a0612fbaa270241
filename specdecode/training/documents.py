"""Public text collections in, documents out. Knows nothing of tokens.

A document is either raw text (source code, a page) or a conversation. Which split a document belongs to is a function of
its content alone, so that every run on every machine holds out the same ones.
"""

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from specdecode.errors import ConfigError

VALIDATION_PERCENT = 2


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """A raw text, or a conversation when `messages` is not empty."""

    text: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def is_conversation(self) -> bool:
        return bool(self.messages)

    @property
    def content(self) -> str:
        """Everything that was written or said, as one string."""
        return self.text or "\n".join(message.content for message in self.messages)


def is_held_out(document: Document) -> bool:
    """Whether the document belongs to the validation split; conversations that open with the same turn stay together."""
    key = document.messages[0].content if document.is_conversation else document.text
    return hashlib.sha256(key.encode()).digest()[0] * 100 < VALIDATION_PERCENT * 256


def load_documents(source: str, data_dir: str | Path) -> list[Document]:
    """Reads every document of one source, in a fixed order.

    Raises:
        ConfigError: the source has no known reader, or its files are not below `data_dir`.
    """
    if source not in _READERS:
        raise ConfigError(f"data source {source}: unknown; the known ones are {', '.join(_READERS)}")
    try:
        documents = list(_READERS[source](Path(data_dir)))
    except FileNotFoundError as error:
        raise ConfigError(f"data source {source}: {error.filename} does not exist (is data.data_dir right?)") from error
    return [document for document in documents if document.content.strip()]


def _read_standard_library(data_dir: Path) -> Iterator[Document]:
    """The Python standard library of the running interpreter, without tests and generated tables."""
    del data_dir  # nothing to read there: every interpreter carries its own copy
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "turtledemo", "lib2to3", "ensurepip"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not skipped & set(relative.parts) and not path.name.startswith("_sysconfigdata"):
            yield Document(text=path.read_text(encoding="utf-8", errors="ignore"))


def _read_mbpp(data_dir: Path) -> Iterator[Document]:
    for row in _read_json_lines(data_dir / "code/mbpp/mbpp_train.jsonl"):
        code = row["code"].replace("\r\n", "\n").replace("\t", "    ").strip()
        yield _conversation(("user", row["text"]), ("assistant", f"```python\n{code}\n```"))


def _read_peps(data_dir: Path) -> Iterator[Document]:
    for row in _read_json_lines(data_dir / "code/python_peps/peps_public_domain.jsonl"):
        yield Document(text=row["text"])


def _read_tldr(data_dir: Path) -> Iterator[Document]:
    for row in _read_json_lines(data_dir / "code/tldr_pages/tldr_en.jsonl"):
        yield Document(text=row["text"])


def _read_taskmaster(data_dir: Path) -> Iterator[Document]:
    for row in _read_json_lines(data_dir / "chat/taskmaster4/taskmaster4.jsonl"):
        yield _conversation(*((turn["role"], turn["text"].replace("\\r", "").strip()) for turn in row["turns"]))


def _read_oasst(data_dir: Path) -> Iterator[Document]:
    """Every path from a question to a last answer is a conversation of its own."""
    roles = {"prompter": "user", "assistant": "assistant"}

    def paths(message: dict[str, Any], before: tuple[Message, ...]) -> Iterator[Document]:
        turns = (*before, Message(roles[message["role"]], message["text"].strip()))
        for reply in message["replies"]:
            yield from paths(reply, turns)
        if not message["replies"] and len(turns) > 1:
            yield Document(messages=turns)

    for tree in _read_json_lines(data_dir / "chat/oasst_sample/en_100_tree.jsonl"):
        yield from paths(tree["prompt"], ())


def _read_oasst_prompts(data_dir: Path) -> Iterator[Document]:
    """Questions without answers: good for letting a target answer them."""
    for prompt in _read_json_lines(data_dir / "chat/oasst_sample/prompt_lottery_en_250_text.jsonl"):
        yield _conversation(("user", prompt.strip()))


def _read_chatterbot(data_dir: Path) -> Iterator[Document]:
    for path in sorted((data_dir / "chat/chatterbot_english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            roles = ("user", "assistant") * len(turns)
            yield _conversation(*((role, str(turn)) for role, turn in zip(roles, turns, strict=False)))


def _read_self_instruct(data_dir: Path) -> Iterator[Document]:
    for row in _read_json_lines(data_dir / "chat/self_instruct_seed/seed_tasks.jsonl"):
        for instance in row["instances"]:
            question = "\n\n".join(filter(None, (row["instruction"], instance["input"])))
            yield _conversation(("user", question), ("assistant", instance["output"]))


def _read_gsm8k(data_dir: Path) -> Iterator[Document]:
    for row in _read_json_lines(data_dir / "reasoning/gsm8k/train.jsonl"):
        yield _conversation(("user", row["question"]), ("assistant", _without_calculator(row["answer"])))


def _read_aqua_rat(data_dir: Path) -> Iterator[Document]:
    for row in _read_json_lines(data_dir / "reasoning/aqua_rat/dev.jsonl"):
        question = row["question"] + "\n" + "\n".join(row["options"])
        yield _conversation(("user", question), ("assistant", f"{row['rationale']}\n#### {row['correct']}"))


def _read_mathqa(data_dir: Path) -> Iterator[Document]:
    """The question without its list of numbers; the answer is the program that computes it."""
    for row in _read_json_lines(data_dir / "reasoning/mathqa_python/mathqa-test-python_v1.jsonl"):
        question = row["prompt"].split('"""')[1].split(" n0 = ")[0].strip()
        lines = [line.strip() for line in row["canonical_solution"].splitlines()]
        steps = "\n".join(line for line in lines if line and not line.startswith("return"))
        yield _conversation(("user", question), ("assistant", steps))


_READERS: dict[str, Callable[[Path], Iterable[Document]]] = {
    "standard_library": _read_standard_library,
    "mbpp": _read_mbpp,
    "peps": _read_peps,
    "tldr": _read_tldr,
    "taskmaster": _read_taskmaster,
    "oasst": _read_oasst,
    "oasst_prompts": _read_oasst_prompts,
    "chatterbot": _read_chatterbot,
    "self_instruct": _read_self_instruct,
    "gsm8k": _read_gsm8k,
    "aqua_rat": _read_aqua_rat,
    "mathqa": _read_mathqa,
}


def _conversation(*turns: tuple[str, str]) -> Document:
    return Document(messages=tuple(Message(role, content) for role, content in turns))


def _without_calculator(answer: str) -> str:
    """Removes GSM8K's calculator notes: `48/2 = <<48/2=24>>24` becomes `48/2 = 24`."""
    pieces = answer.split("<<")
    return pieces[0] + "".join(piece.split(">>", 1)[-1] for piece in pieces[1:])


def _read_json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
