"""What the documentation tells: its commands exist and run, its links and files are there, its examples work.

A command in a ```bash block runs here, if it is quick and needs nothing; every other one of ours must parse, and its
configuration file must be right. A block that a test cannot run stands after a comment, `<!-- not run: why -->`; outside such
blocks there are only commands of ours and of `make`.
"""

import ast
import importlib
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest
import yaml

from serve.config import ServeConfig
from specdecode.cli import main, parser
from specdecode.commands.config import check_file, find_kind, read_file
from specdecode.config import check_config

ROOT = Path(__file__).parents[1]
DOCS = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if path.name != "model_card_template.md")
QUICK = {"generate", "models", "config", "completion"}
OF_THE_READER = {"my.yaml", "improve.yaml"}  # files that a text describes and its reader writes


@dataclass(frozen=True)
class Command:
    """A command of a document, and why its block is not run, if it is not."""

    document: str
    text: str
    reason: str | None


def commands(path: Path) -> Iterator[Command]:
    """The commands of all bash blocks."""
    text = path.read_text(encoding="utf-8")
    blocks = re.finditer(r"(?:<!-- not run: ([^>]+) -->\n)?^ *```bash\n(.*?)^ *```$", text, re.M | re.S)
    for block in blocks:
        lines = re.sub(r"<<'EOF'.*?^ *EOF$", "", block[2], flags=re.M | re.S).replace("\\\n", " ").splitlines()
        for line in lines:
            for part in re.split(r" && | \|$", line.strip().removesuffix(" |")):
                yield Command(path.name, part.strip(), block[1])


def words_of(command: Command) -> list[str]:
    """Its words, from the program on; none if it is no command of ours."""
    try:
        words = shlex.split(command.text.partition("  #")[0].partition(" > ")[0], comments=True)
    except ValueError:
        return []  # part of a text of several lines
    if "$" in command.text.replace("$'", ""):
        return []  # a shell's variable
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]  # a variable of the command's environment
    starts = (
        [0] if words and Path(words[0]).name in ("specdecode", "make") else [n for n, word in enumerate(words) if word == "-m"]
    )
    return [Path(words[starts[0]]).name, *words[starts[0] + 1 :]] if starts else []


ALL = [command for path in DOCS for command in commands(path)]
OURS = [(command, words) for command in ALL if (words := words_of(command))]


def test_there_are_commands_to_look_at() -> None:
    assert len(OURS) > 30
    assert {words[1] for _, words in OURS if words[0] == "specdecode"} >= {"generate", "serve", "config", "report", "models"}


@pytest.mark.parametrize("words", [words for _, words in OURS], ids=" ".join)
def test_a_command_exists_and_what_it_reads_is_right(words: list[str]) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "specdecode":
        parsed = parser().parse_args(words[1:])
        check_config_option(getattr(parsed, "config", None), getattr(parsed, "set", []), None)
    elif words[1].startswith("jobs."):
        job = importlib.import_module(words[1])
        assert callable(job.main)
        overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
        check_config_option(words[words.index("--config") + 1], overrides, words[1].removeprefix("jobs."))


def check_config_option(file: str | None, overrides: list[str], kind: str | None) -> None:
    """The file is there and right, with these overrides, as what the command reads."""
    if file is None or file in OF_THE_READER or "..." in file:
        return
    found = find_kind(read_file(file), file)
    if kind not in (None, "cache_teacher"):  # which reads what trains
        assert found == kind
    check_file(file, found, overrides)


@pytest.mark.parametrize("command", [c for c in ALL if c.reason is None], ids=lambda command: command.text)
def test_a_block_that_is_not_marked_has_commands_of_ours_alone(command: Command) -> None:
    words = words_of(command)
    assert not command.text or "pytest" in command.text or words, f"{command.document}: {command.text}: mark the block"


RUN = {
    command.text: words for command, words in OURS if command.reason is None and words[0] == "specdecode" and words[1] in QUICK
}


@pytest.mark.parametrize("words", RUN.values(), ids=RUN)
def test_a_quick_command_runs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_and_files_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "@@" not in text  # what was to be filled in
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "mailto")):
            file, _, heading = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), target
            assert not heading or heading in headings(linked), target
    for name in re.findall(r"`((?:specdecode|serve|jobs|configs|tests|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`jobs\.(\w+)`", text):
        assert (ROOT / "jobs" / f"{name}.py").exists(), name


def headings(path: Path) -> set[str]:
    """The anchors of a document's headings."""
    found = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_what_the_life_of_a_request_names_is_in_the_files_that_it_names() -> None:
    text = (ROOT / "docs/life_of_a_request.md").read_text(encoding="utf-8")
    assert re.findall(r"^(\d)\. ", text, re.M) == list("12345678")
    files = {ROOT / file for file in re.findall(r"\]\(\.\./([\w/]+\.py)\)", text)}
    known = {name for file in files for name in defined(ast.parse(file.read_text(encoding="utf-8")))}
    named = set(re.findall(r"`([A-Z]\w+(?:\.\w+)?|step|accept|constrain)`", text)) - {"OverloadedError"}
    assert len(named) > 20
    assert named <= known


def defined(tree: ast.Module) -> Iterator[str]:
    """The names of classes, of their methods, and of functions."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
            yield from (f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name"))  # type: ignore[attr-defined]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_example_of_the_library_says_what_plain_decoding_says(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "docs/examples/decode.py"), run_name="__main__")
    assert "the same as without a draft: True" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "docs/examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_one_file_that_says_what_it_does(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert "main" in set(defined(tree))


def test_the_readmes_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [source] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    exec(compile(source, "README.md", "exec"), {})
    assert "def read_lines" in capsys.readouterr().out


def test_the_citation_has_the_fields_of_its_format() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation.keys() >= {"message", "title", "authors"}
    fields = {"type", "version", "license", "keywords", "references", "date-released", "url", "repository-code", "abstract"}
    assert citation.keys() <= fields | {"cff-version", "message", "title", "authors"}
    assert all(author.keys() & {"name", "family-names"} for author in citation["authors"])
    assert isinstance(citation.get("date-released", date.min), date)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in pyproject
    assert f'license = "{citation["license"]}"' in pyproject
    assert f"## {citation['version']}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_rayservice_has_what_kuberay_asks_for() -> None:
    service = read_file(str(ROOT / "configs/cluster/rayservice.yaml"))
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert service["metadata"]["name"]
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["containers"][0]["image"]
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    check_config(application["args"], ServeConfig, where="rayservice.yaml")
