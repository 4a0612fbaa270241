"""What a run did and reached in, a model card in Hugging Face's format out; its text is in `model_card_template.md`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_COMPARED = "## The family compared"
_FIGURES = ("loss", "acceptance", "accepted_length", "agreement")

# Where the documents of each source of a data directory come from, and under which licence they are.
_ORIGINS = {
    "standard_library": ("Python standard library of the training interpreter, without tests", "PSF-2.0"),
    "mbpp": ("MBPP, ids outside its test split (google-research)", "CC BY 4.0"),
    "peps": ("Python Enhancement Proposals (python/peps)", "public domain or CC0"),
    "tldr": ("tldr-pages", "CC BY 4.0"),
    "taskmaster": ("Taskmaster-4 (google-research-datasets/Taskmaster)", "CC BY 4.0"),
    "oasst": ("Open Assistant conversation sample (LAION-AI/Open-Assistant)", "Apache-2.0"),
    "oasst_prompts": ("Open Assistant prompt sample (LAION-AI/Open-Assistant)", "Apache-2.0"),
    "chatterbot": ("ChatterBot corpus, English (gunthercox/chatterbot-corpus)", "BSD-3-Clause"),
    "self_instruct": ("Self-Instruct seed tasks (yizhongw/self-instruct)", "Apache-2.0"),
    "gsm8k": ("GSM8K, training split (openai/grade-school-math)", "MIT"),
    "aqua_rat": ("AQuA-RAT, development split (google-deepmind/AQuA)", "Apache-2.0"),
    "mathqa": ("MathQA-Python", "CC BY 4.0"),
}


def model_card(
    name: str,
    run: dict[str, Any],
    *,
    licence: str | None = None,
    about: str = "",
    recipe: str | None = None,
    comparison: str = "",
) -> str:
    """The card of a model.

    Args:
        name: the model's.
        run: what run.json says of its training, see `provenance.write_run`.
        licence: of the weights, as Hugging Face's metadata name it.
        about: a paragraph more.
        recipe: the command that trained it.
        comparison: what it was compared with, as Markdown.
    """
    config = run["config"]
    metadata = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=_public(config.get("model", {}).get("draft_model")),
        datasets=_public(config["data"]["dataset_name"]),
        tags=["speculative-decoding"],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        name=name,
        introduction=_introduction(config),
        about=about,
        recipe=_recipe(config, recipe),
        result=run["result"],
        training=config["training"],
        versions=", ".join(f"{package} {version}" for package, version in run["versions"].items()),
        validation=_validation(run["result"]["validation"]),
        data=_data(config["data"]),
    )
    text: str = card.content.rstrip() + "\n"
    return with_comparison(text, comparison) if comparison else text


def with_comparison(card: str, comparison: str) -> str:
    """A card with another comparison, Markdown, in place of its own one, which comes last in it."""
    return f"{card.partition(_COMPARED)[0].rstrip()}\n\n{_COMPARED}\n\n{comparison.rstrip()}\n"


def _public(name: str | None) -> str | None:
    """A name that others can look up: none of a local file."""
    return None if name is None or name.startswith(("tiny/", "checkpoints/", "/", ".")) or Path(name).exists() else name


def _introduction(config: dict[str, Any]) -> str:
    if "architecture" in config:
        shape = config["architecture"]
        return (
            f"A Llama model with {shape['num_layers']} layers of width {shape['hidden_size']}, trained from scratch. It is a "
            "target: the model whose output speculative decoding keeps."
        )
    domain, target = config["data"]["domain"], config["model"]["target_model"]
    return (
        f"A draft for {f'`{target}`' if target else 'larger models with its tokenizer'}"
        f"{'' if domain == 'generic' else f', for the domain `{domain}`'}: it guesses the next few tokens, and the target "
        "checks them in one forward pass. What is said, and how likely, stays the target's; good guesses make it come sooner."
    )


def _recipe(config: dict[str, Any], command: str | None) -> str:
    how = f"`{command}`" if command else "`run.json` in this folder holds the whole configuration."
    if "architecture" in config:
        return f"{how}\n\nIt learned all of its texts, every turn of the conversations among them."
    model, distillation = config["model"], config["distillation"]
    start = f"`{model['draft_model']}`"
    if model["num_layers"]:
        start = f"the first {model['num_layers']} layer(s) of {start}"
    if model.get("new_layers"):  # no field of older runs
        start += f", with {model['new_layers']} new layer(s) on top that changed nothing at first,"
    if not distillation["enabled"]:
        return f"{how}\n\nIt began as {start} and was fine-tuned on the data's own text."
    answers = distillation["completions"]
    target, sampled, own = (
        f"{share:.0%}" for share in (distillation["target_share"], answers["sampled_share"], distillation["student_share"])
    )
    return (
        f"{how}\n\nIt began as {start} and learned what its target says of each next token ({_loss(distillation['loss'])}). "
        f"Of the blocks, {target} were the target's own answers to {answers['num_prompts']:,} prompts of the data, {sampled} "
        f"of them sampled at temperature {answers['temperature']:g} and the others greedy; the others were the data's own "
        f"text. In {own} of the steps it learned from what it said itself."
    )


def _loss(loss: dict[str, Any]) -> str:
    parts = [
        f"{loss['divergence_weight']:g} x {loss['divergence'].replace('_', ' ')}",
        f"{loss['greedy_weight']:g} x the surprise at its first choice" if loss["greedy_weight"] else "",
        f"{loss['cross_entropy_weight']:g} x that at the text" if loss["cross_entropy_weight"] else "",
    ]
    likeliest = f", of its {loss['top_k']} likeliest tokens" if loss["top_k"] else ""
    return f"{' + '.join(filter(None, parts))}, at temperature {loss['temperature']:g}{likeliest}"


def _validation(figures: dict[str, float]) -> str:
    """A row for all blocks and for each group of them: figures are called GROUP_FIGURE, or FIGURE of all."""
    names = [name for name in _FIGURES if name in figures]
    groups = ["", *(key.removesuffix("loss") for key in figures if key.endswith("_loss"))]
    rows = [[group.rstrip("_") or "all", *(f"{figures[group + name]:.3f}" for name in names)] for group in groups]
    return _table(["", *names], rows)


def _data(data: dict[str, Any]) -> str:
    if data["dataset_name"] is not None:
        return f"`{data['dataset_name']}`, its split `{data['dataset_split']}`."
    total = sum(data["sources"].values())
    rows = [[_ORIGINS[source][0], f"{weight / total:.0%}", _ORIGINS[source][1]] for source, weight in data["sources"].items()]
    return _table(["source", "share", "licence"], rows)


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
