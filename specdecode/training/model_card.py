"""What a run did and reached in, the text of a model card out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdecode.training.acceptance import Scores

# Where the documents of each source come from, and under which licence they are.
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


@dataclass(frozen=True)
class AcceptanceTable:
    """What is accepted at `k` drafted tokens a round, by (prompts, draft, domain); tokens of an answer by (prompts, domain)."""

    k: int
    max_new_tokens: int
    scores: dict[tuple[str, str, str], Scores]
    mean_lengths: dict[tuple[str, str], float]

    def as_markdown(self) -> str:
        """One row per prompt set and draft, one column per domain: accepted of drafted tokens, and tokens of a round."""
        domains = list(dict.fromkeys(domain for _, _, domain in self.scores))
        rows = [["prompts", "draft", *domains], ["---"] * (2 + len(domains))]
        for origin, draft in dict.fromkeys((origin, draft) for origin, draft, _ in self.scores):
            found = [self.scores[origin, draft, domain] for domain in domains]
            rows.append([origin, draft, *(f"{scores.greedy.rate:.2f} / {scores.greedy_length:.2f}" for scores in found)])
        for origin in dict.fromkeys(origin for origin, _ in self.mean_lengths):
            lengths = (f"{self.mean_lengths[origin, domain]:.0f}" for domain in domains)
            rows.append([origin, "tokens per answer", *lengths])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def describe(name: str, run: dict[str, Any], table: AcceptanceTable) -> str:
    """The model card of one model of the family, as Markdown with Hugging Face's metadata on top."""
    is_draft = "distillation" in run["config"]
    result = run["result"]
    figures = ", ".join(f"{key} {value:.3f}" for key, value in result["validation"].items())
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
language: en
---

# {name}

{_introduction(run, is_draft)}

It is part of SpecDecode's embedded family: one target and four drafts with one tokenizer (byte-level BPE, 4,096 tokens),
small enough to ship with the package, so that everything can be tried, tested and measured without a GPU or a model hub.
The models produce text that looks like their training data; they know nothing and must not be used to answer questions.

## Training

{_recipe(name, run, is_draft)}

| | |
|---|---|
| steps | {result["num_steps"]:,} (best checkpoint at {result["best_step"]:,}) |
| tokens | {result["num_tokens"]:,} |
| time | {result["time_s"] / 60:.0f} minutes on a two-core CPU machine that had other work too |
| validation (losses in nats per token) | {figures} |
| weights | bfloat16, input and output embeddings tied |
| versions | {", ".join(f"{package} {version}" for package, version in run["versions"].items())} |

## Data

About 2% of the documents are held out by a hash of their content. No evaluation data set was read.

| source | share | licence |
|---|---|---|
{_data_rows(run)}

## Greedy acceptance

Accepted tokens per drafted token, and tokens of a round with the target's own, in rounds of {table.k}, on the target's own
greedy answers of up to {table.max_new_tokens} tokens, for the prompts in `specdecode/evaluation/prompts` and for prompts from
held-out documents. Guesses past an answer's end are not counted. The small target's greedy text often falls into loops, above
all in code and mathematics; loops are easy to guess, so expect less from a larger target.

{table.as_markdown()}

## Licence

The weights are under the MIT licence. The texts stay under the licences of the table above and are not part of this
folder.
"""


def _introduction(run: dict[str, Any], is_draft: bool) -> str:
    if not is_draft:
        shape = run["config"]["architecture"]
        return (
            f"A Llama model with {shape['num_layers']} layers of width {shape['hidden_size']}, trained from scratch on code,\n"
            "chat and grade-school mathematics. It is the target: the model whose output speculative decoding keeps."
        )
    domain = run["config"]["data"]["domain"]
    field = "all domains" if domain == "generic" else f"the domain `{domain}`"
    return (
        f"A Llama model with one layer, distilled from the family's target for {field}. It is a draft: it guesses the next\n"
        "few tokens, and the target checks them."
    )


def _recipe(name: str, run: dict[str, Any], is_draft: bool) -> str:
    if not is_draft:
        return "`python -m jobs.train_target --config configs/tiny/pretrain_target.yaml`"
    distillation = run["config"]["distillation"]
    recipe = f"distill_{name.removeprefix('draft-')}.yaml"
    completions = distillation["completions"]
    sampled, text = f"{completions['sampled_share']:.0%}", f"{1 - distillation['target_share']:.0%}"
    return f"""`python -m jobs.train_draft --config configs/tiny/{recipe}`

{_origin(run)} It learns the target's next-token distribution ({distillation["loss"]["divergence"].replace("_", " ")})
on the target's own answers to {completions["num_prompts"]:,} training prompts, {sampled} of them sampled at temperature
{completions["temperature"]} and the others greedy, and in {text} of the blocks on the domain's text."""


def _origin(run: dict[str, Any]) -> str:
    """What the draft's weights were before: the target's first layers, or what an earlier stage trained."""
    start = run.get("start", {})
    if "distillation" not in start.get("config", {}):
        return f"The draft starts from the first layer of `{run['config']['model']['draft_model']}`."
    result, recipe = start["result"], Path(start["config"]["training"]["output_dir"]).name.removeprefix("draft-")
    return (
        f"The draft starts from what `distill_{recipe.replace('-', '_')}.yaml` made of the target's first layer in\n"
        f"{result['num_steps']:,} steps and {result['num_tokens']:,} tokens, and goes on with the same data."
    )


def _data_rows(run: dict[str, Any]) -> str:
    data = run["config"]["data"]
    weights = data["sources"]
    total = sum(weights.values())
    return "\n".join(
        f"| {_ORIGINS[source][0]} | {weight / total:.0%} | {_ORIGINS[source][1]} |" for source, weight in weights.items()
    )
