"""A data set's own solutions in, how many of them are judged right out, and how many wrong answers made of them.

No model has a part in it: what is put to the test is the scorer.
"""

import ast
import os
import re
import warnings
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from specdecode.errors import ConfigError
from specdecode.evaluation.datasets import Item
from specdecode.evaluation.quality import code_in, is_right
from specdecode.evaluation.sandbox import SandboxConfig

OWN, IN_WORDS, EMPTIED, ONE_MORE = "its own solution", "its number in a sentence", "functions emptied", "its number and 1"


@dataclass(frozen=True)
class Judged:
    """How one kind of answer was judged.

    Attributes:
        dataset: its name.
        answers: which kind.
        is_good: whether they are right.
        num_answers, num_right: how many there are, and how many are judged right.
        surprises: the names of the questions whose answer was judged otherwise.
    """

    dataset: str
    answers: str
    is_good: bool
    num_answers: int
    num_right: int
    surprises: list[str]


@dataclass(frozen=True)
class _Told:
    dataset: str
    item: Item
    answers: str
    is_good: bool
    answer: str


def check_references(
    items: Several[tuple[str, Item]], sandbox: SandboxConfig, tell: Callable[[int, int], None] | None = None
) -> list[Judged]:
    """Judges every solution of the data sets, and wrong answers made of them, with what judges answers of models.

    Args:
        items: questions with their data sets' names.
        sandbox: where programs are run.
        tell: hears how many answers are judged, and of how many.

    Raises:
        ConfigError: no question has a solution that can be judged, or programs cannot be run here.
    """
    told = [one for name, item in items for one in _answers(name, item)]
    if not told:
        raise ConfigError("expected a data set with solutions that are judged, such as humaneval, mbpp, gsm8k or svamp")
    verdicts = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for verdict in pool.map(lambda one: bool(is_right(one.item, one.answer, sandbox)), told):
            verdicts.append(verdict)
            if tell is not None:
                tell(len(verdicts), len(told))
    kinds = dict.fromkeys((one.dataset, one.answers, one.is_good) for one in told)
    return [_judged(*kind, [pair for pair in zip(told, verdicts, strict=True) if _kind(pair[0]) == kind]) for kind in kinds]


def _kind(told: _Told) -> tuple[str, str, bool]:
    return told.dataset, told.answers, told.is_good


def _judged(dataset: str, answers: str, is_good: bool, pairs: list[tuple[_Told, bool]]) -> Judged:
    surprises = [told.item.id for told, verdict in pairs if verdict != is_good]
    return Judged(dataset, answers, is_good, len(pairs), sum(verdict for _, verdict in pairs), surprises)


def _answers(dataset: str, item: Item) -> Iterable[_Told]:
    """Right and wrong answers to a question; none if nobody can judge it or it has no solution."""
    if item.judge == "none" or not item.solution:
        return
    yield _Told(dataset, item, OWN, True, item.solution)
    if item.judge == "program":
        yield _Told(dataset, item, EMPTIED, False, _emptied(item))
        return
    said = item.solution.rpartition("####")[2].strip()  # as it is written, such as 1,250
    yield _Told(dataset, item, IN_WORDS, True, f"So the answer is {said}.")
    yield _Told(dataset, item, ONE_MORE, False, f"#### {float(item.reference) + 1:g}")


def _emptied(item: Item) -> str:
    """The solution with nothing but `pass` in its functions; of a function to be completed, that alone."""
    if item.format == "raw" and item.prefix:
        return "    pass\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes such as \d
        tree = ast.parse(re.sub(r"\r\n?", "\n", code_in(item, item.solution)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    code = ast.unparse(tree)
    return code if item.format == "raw" else f"```python\n{code}\n```"
