"""What a run did and reached in, the text of a model card out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Greedy acceptance at `k` drafted tokens a round; `rates` by (prompts, draft, domain)."""

    k: int
    max_new_tokens: int
    rates: dict[tuple[str, str, str], float]
    mean_lengths: dict[tuple[str, str], float]

    def as_markdown(self) -> str:
        """One table row per prompt set and draft, one column per domain."""
        domains = list(dict.fromkeys(domain for _, _, domain in self.rates))
        rows = [["prompts", "draft", *domains], ["---"] * (2 + len(domains))]
        for origin, draft in dict.fromkeys((origin, draft) for origin, draft, _ in self.rates):
            rows.append([origin, draft, *(f"{self.rates[origin, draft, domain]:.2f}" for domain in domains)])
        for origin in dict.fromkeys(origin for origin, _ in self.mean_lengths):
            lengths = (f"{self.mean_lengths[origin, domain]:.0f}" for domain in domains)
            rows.append([origin, "tokens per answer", *lengths])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def describe(name: str, run: dict[str, Any], table: AcceptanceTable) -> str:
    """The model card of one model of the family, as Markdown with Hugging Face's metadata on top."""
    is_draft = "distillation" in run["config"]
    result = run["result"]
    losses = ", ".join(f"{key} {loss:.3f}" for key, loss in result["validation_losses"].items())
    loss = "held-out training loss, in nats" if is_draft else "held-out loss (cross-entropy, in nats per token)"
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
| scored tokens | {result["num_tokens"]:,} |
| time | {result["time_s"] / 60:.0f} minutes on a two-core CPU machine that had other work too |
| {loss} | {losses} |
| weights | bfloat16, input and output embeddings tied |
| versions | {", ".join(f"{package} {version}" for package, version in run["versions"].items())} |

## Data

About 2% of the documents are held out by a hash of their content. No evaluation data set was read.

| source | share | licence |
|---|---|---|
{_data_rows(run)}

## Greedy acceptance

Accepted tokens per drafted token in rounds of {table.k}, on the target's own greedy answers of up to {table.max_new_tokens}
tokens, for the prompts in `specdecode/evaluation/prompts` and for prompts from held-out documents. Guesses past an
answer's end are not counted. The small target's greedy text often falls into loops, above all in code and mathematics;
loops are easy to guess, so expect less from a larger target.

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
    sampled, text = f"{distillation['sampled_share']:.0%}", f"{distillation['text_share']:.0%}"
    return f"""`python -m jobs.train_draft --config configs/tiny/{recipe}`

{_origin(run)} It learns the target's next-token distribution (KL
divergence) on the target's own continuations of {distillation["num_prompts"]:,} training prompts, {sampled} of them sampled at
temperature {distillation["temperature"]} and the others greedy, and in {text} of the batches on the domain's text."""


def _origin(run: dict[str, Any]) -> str:
    """What the draft's weights were before: the target's first layers, or what an earlier stage trained."""
    start = run.get("start", {})
    if "distillation" not in start.get("config", {}):
        return f"The draft starts from the first layer of `{run['config']['model']['draft_model']}`."
    result, recipe = start["result"], Path(start["config"]["training"]["output_dir"]).name.removeprefix("draft-")
    return (
        f"The draft starts from what `distill_{recipe.replace('-', '_')}.yaml` made of the target's first layer in\n"
        f"{result['num_steps']:,} steps and {result['num_tokens']:,} scored tokens, and goes on with the same data."
    )


def _data_rows(run: dict[str, Any]) -> str:
    data = run["config"]["data"]
    weights = data["sources"] if "sources" in data else {k: v for d in data["domains"].values() for k, v in d.items()}
    total = sum(weights.values())
    return "\n".join(
        f"| {_ORIGINS[source][0]} | {weight / total:.0%} | {_ORIGINS[source][1]} |" for source, weight in weights.items()
    )
