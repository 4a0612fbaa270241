"""Trained models of a family in, its published folders with model cards out."""

from pathlib import Path
from typing import Any

from pydantic import Field

from specdecode.config import StrictModel
from specdecode.embedded import resolve_model
from specdecode.training.checkpoints import load_model, load_tokenizer, save_checkpoint
from specdecode.training.comparison import Comparison, ComparisonConfig, as_markdown, compare
from specdecode.training.model_card import model_card, with_comparison
from specdecode.training.provenance import read_run
from specdecode.training.trainer import replace_folder


class ReleaseConfig(StrictModel):
    """A family: the target and the drafts that are compared, each OUTPUT_DIR/best of a training, or published there before."""

    comparison: ComparisonConfig
    output_dir: str
    licence: str = Field(description="of the weights, as Hugging Face's metadata name it")
    about: str = Field(default="", description="a paragraph for every card")
    recipes: dict[str, str] = Field(default_factory=dict, description="the command that made each model, by its name")


def release(config: ReleaseConfig) -> list[Comparison]:
    """Compares the drafts in every domain and publishes all models; returns what was measured.

    Of a model that had been published before, only the comparison in its card becomes the new one.

    Raises:
        ConfigError: a model of the family has not been trained yet, or the data are not there.
        ModelError: a model does not load.
    """
    published = Path(config.output_dir).absolute()
    models = (config.comparison.target, *config.comparison.drafts.values())
    folders = [Path(resolve_model(model)).absolute() for model in models]
    sources = {folder.parent.name: folder for folder in folders if folder.parent != published}  # the others are there already
    runs = {name: read_run(folder) for name, folder in sources.items()}
    rows = list(compare(config.comparison))
    comparison = _introduction(config.comparison) + as_markdown(rows)
    for folder in (folder for folder in folders if folder.parent == published):
        old = folder / "README.md"
        old.write_text(with_comparison(old.read_text(encoding="utf-8"), comparison), encoding="utf-8")
    for name, source in sources.items():
        model, tokenizer = load_model(str(source)), load_tokenizer(str(source))
        card = model_card(
            name,
            runs[name],
            licence=config.licence,
            about=config.about,
            recipe=config.recipes.get(name),
            comparison=comparison,
        )

        def save(folder: Path, model: Any = model, tokenizer: Any = tokenizer, card: str = card) -> None:
            save_checkpoint(model, tokenizer, folder)
            (folder / "README.md").write_text(card, encoding="utf-8")

        replace_folder(published / name, save)
    return rows


def _introduction(config: ComparisonConfig) -> str:
    return f"""In rounds of {config.K} drafted tokens; "tokens" are those of a round, with the target's own. "text" are held-out
documents, "sampled" and "greedy" what the target answers to {config.num_prompts} held-out prompts of a domain, in
{config.max_new_tokens} tokens at the most. "agreement" says how often first choices are the same, "speed" tokens per second
by those of plain decoding, one stream. A small target's greedy text falls into loops, which are easy to guess: expect less from
a larger one.

"""
