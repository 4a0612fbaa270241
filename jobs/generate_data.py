"""Has a target answer prompts, for a draft to learn from: `python -m jobs.generate_data --config FILE [--set key=value ...]`.

Stopped, and started again with the same configuration, it goes on where it was.
"""

from serve.cluster import connected  # isort: skip  # before all else that imports Ray

import json
import logging
import sys
from typing import Any

import numpy as np
import ray

from jobs.command import run_job
from jobs.reading import read_documents
from specdecode.embedded import resolve_model
from specdecode.parts import Parts
from specdecode.training.checkpoints import load_tokenizer
from specdecode.training.completions import Answerer, Completion, CompletionJobConfig, read_part
from specdecode.training.examples import Formatter
from specdecode.training.prompts import sample_all_prompts

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("generate_data", "Have a target answer prompts.", CompletionJobConfig, _run, arguments)


def _run(config: CompletionJobConfig) -> str:
    with connected():
        completions = generate_completions(config)
    num_tokens = sum(len(completion.tokens) for completion in completions)
    return f"{len(completions)} answers of {num_tokens} tokens are in {config.output_dir}"


def generate_completions(config: CompletionJobConfig, *, held_out: bool = False) -> list[Completion]:
    """Has the target answer prompts from the documents that are held out, or from the others; reads what is there already.

    Raises:
        ConfigError: the data are not there, or the folder holds the answers of another configuration.
        ModelError: a model does not load.
    """
    settings = config.completions
    told: dict[str, Any] = {"completions": {"num_actors", "num_gpus", "batch"}, "output_dir": True}
    answers = Parts(config.output_dir, {**config.model_dump(exclude=told), "held_out": held_out})
    documents = read_documents(config.data)
    formatter = Formatter(load_tokenizer(resolve_model(config.target.model)))
    rng = np.random.default_rng([settings.seed, int(held_out)])
    sampled = sample_all_prompts(
        documents, config.data.weights, formatter, settings.num_prompts, settings.max_prompt_length, rng, held_out=held_out
    )
    prompts = [formatter.prompt(prompt) for prompt in sampled]
    parts = [prompts[start : start + settings.part] for start in range(0, len(prompts), settings.part)]
    missing = answers.missing(len(parts))
    logger.info("%d prompts to answer, %d of %d parts are there", len(prompts), len(parts) - len(missing), len(parts))
    if missing:
        rows = [{"number": number, "prompts": json.dumps(parts[number])} for number in missing]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Answerer,
            fn_constructor_kwargs={"config": config.model_dump()},
            compute=ray.data.ActorPoolStrategy(size=min(settings.num_actors, len(rows))),
            num_gpus=settings.num_gpus or None,
        )
        for row in done.iter_rows():
            logger.info(
                "part %d of %d: %d tokens, %.0f a second", row["number"] + 1, len(parts), row["num_tokens"], row["rate"]
            )
    return [completion for path in answers.paths(len(parts)) for completion in read_part(path)]


if __name__ == "__main__":
    sys.exit(main())
