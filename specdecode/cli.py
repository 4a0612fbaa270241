"""The command line: arguments in, one call out. The only place that prints for people."""

import argparse
import json
import sys
import time
from collections.abc import Sequence as Arguments
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import Field

from specdecode.config import StrictModel, check_config, load_config, read_yaml
from specdecode.errors import UserError


class GenerateConfig(StrictModel):
    """What `specdecode generate` does; a file given with --config holds these keys, and options override it."""

    model: str = Field(description="the target: a Hugging Face name, a checkpoint folder, or an embedded model")
    draft: str | None = Field(default=None, description="the draft model; plain decoding if unset")
    prompt: str = Field(description="the text to continue, or the message to answer with --chat")
    chat: bool = Field(default=False, description="treat the prompt as a user's message")
    max_tokens: int = 128
    K: int = 5
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    verifier: Literal["rejection", "block"] = "rejection"
    dtype: str = "auto"
    device: str = "auto"


def main(arguments: Arguments[str] | None = None) -> int:
    """Runs one command and returns the exit status: 2 for what the user can fix, said in one line."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"specdecode: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="specdecode", description="Lossless speculative decoding with several drafts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt, and print what it took")
    generate.set_defaults(run=_generate)
    generate.add_argument("--config", help="a YAML file with these options as keys")
    generate.add_argument("--model", help="the target: a Hugging Face name, a checkpoint folder, or tiny/target")
    generate.add_argument("--draft", help="the draft model; plain decoding without it")
    generate.add_argument("--prompt", help="the text to continue")
    generate.add_argument("--chat", action="store_true", default=None, help="treat the prompt as a user's message")
    generate.add_argument("--max-tokens", type=int, help="generate at the most so many tokens (default 128)")
    generate.add_argument("--K", type=int, help="how many tokens to draft in a round (default 5)")
    generate.add_argument("--temperature", type=float, help="0 takes the most likely token (default 0)")
    generate.add_argument("--top-p", type=float, help="keep the most likely tokens up to this probability (default 1)")
    generate.add_argument("--top-k", type=int, help="keep so many most likely tokens; 0 keeps all (default 0)")
    generate.add_argument("--seed", type=int, help="makes sampling repeatable")
    generate.add_argument("--verifier", help="how drafted tokens are accepted: rejection or block (default rejection)")
    generate.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default auto)")
    generate.add_argument("--device", help="auto, cpu, cuda or cuda:N (default auto)")

    benchmark = commands.add_parser("benchmark", help="compare drafts with plain decoding, prompt by prompt in turns")
    benchmark.set_defaults(run=_benchmark)
    benchmark.add_argument("--config", required=True, help="such as configs/tiny/benchmark.yaml")
    benchmark.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    benchmark.add_argument("--output", help="write one JSON line per generation to this file")

    serve = commands.add_parser("serve", help="deploy on Ray Serve, and stay up until Ctrl-C")
    serve.set_defaults(run=_serve)
    serve.add_argument("--config", required=True, help="a Serve config file, such as configs/tiny/serve.yaml")
    serve.add_argument("--port", type=int, help="the HTTP port, instead of the file's")

    demo = commands.add_parser("demo", help="deploy, stream three prompts, and compare with plain decoding")
    demo.set_defaults(run=_demo)
    demo.add_argument("--config", default="configs/tiny/serve.yaml", help="a Serve config file")
    demo.add_argument("--port", type=int, help="the HTTP port, instead of the file's")
    demo.add_argument("--once", action="store_true", help="end after the table instead of staying up")
    return parser


def _generate(parsed: argparse.Namespace) -> None:
    from specdecode.backends.backend import create_backend  # torch and transformers take seconds to import
    from specdecode.decoding.engine import Engine, EngineConfig
    from specdecode.decoding.loop import as_drafter
    from specdecode.decoding.metrics import DecodingMetrics
    from specdecode.decoding.sequence import Route, SamplingParams, Sequence
    from specdecode.text import Tokenizer

    config = _generate_config(parsed)
    params = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_tokens,
        seed=config.seed,
    )
    route = Route("draft", config.K)
    tokenizer = Tokenizer(config.model)
    message = [{"role": "user", "content": config.prompt}]
    sequence = Sequence(tokenizer.encode_chat(message) if config.chat else tokenizer.encode(config.prompt), params, route)
    target = create_backend(config.model, config.dtype, config.device)
    draft = create_backend(config.draft, config.dtype, config.device) if config.draft else None
    engine = Engine(target, as_drafter(draft, target), EngineConfig(verifier=config.verifier))
    engine.submit(sequence)
    detokenizer, metrics, started = tokenizer.detokenizer(), DecodingMetrics(), time.perf_counter()
    for _, round in engine.run():
        metrics.add(round, time.perf_counter() - started)
        print(detokenizer.decode(round.tokens), end="", flush=True)
    print(detokenizer.flush())
    print(
        f"[{metrics.num_generated} tokens in {metrics.total_time_s:.2f} s, {metrics.tokens_per_second:.1f} tok/s, "
        f"first after {metrics.time_to_first_token_s:.3f} s; {metrics.num_target_passes} target passes, "
        f"{metrics.tokens_per_target_pass:.2f} tokens each; acceptance {metrics.acceptance_rate:.2f} "
        f"({metrics.num_accepted} of {metrics.num_drafted} drafted)]",
        file=sys.stderr,
    )


def _generate_config(parsed: argparse.Namespace) -> GenerateConfig:
    """The options, over the file's keys if there is one."""
    values = read_yaml(parsed.config) if parsed.config else {}
    given = {name: getattr(parsed, name) for name in GenerateConfig.model_fields}
    values.update({name: value for name, value in given.items() if value is not None})
    return check_config(values, GenerateConfig, where=parsed.config or "generate")


def _benchmark(parsed: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from specdecode.evaluation.speed import SpeedConfig, measure_speed, summarise

    records = []
    with Path(parsed.output).open("w", encoding="utf-8") if parsed.output else nullcontext() as file:
        for record in measure_speed(load_config(parsed.config, SpeedConfig, parsed.set)):
            records.append(record)
            if file:
                print(json.dumps(asdict(record)), file=file, flush=True)
    table = Table(box=None)
    for heading in ("domain", "draft", "acceptance", "tokens/pass", "tok/s", "speed-up", "draft ms", "verify ms", "different"):
        table.add_column(heading, justify="left" if heading in ("domain", "draft") else "right", no_wrap=True)
    for row in summarise(records):
        table.add_row(
            row.domain,
            row.draft,
            f"{row.acceptance_rate:.3f}",
            f"{row.tokens_per_target_pass:.2f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.speed_up:.2f}x",
            f"{row.draft_ms:.2f}",
            f"{row.verify_ms:.2f}",
            str(row.num_different),
        )
    Console(width=120 if not sys.stdout.isatty() else None).print(table)


def _serve(parsed: argparse.Namespace) -> None:
    from serve.local import deployed, load_deployment, wait_for_signal

    deployment = load_deployment(parsed.config, parsed.port)
    with deployed(deployment) as dashboard:
        print(f"endpoint   {deployment.url}/v1  (model {deployment.config.model_name})")
        print(f"dashboard  {dashboard}", flush=True)
        wait_for_signal()


def _demo(parsed: argparse.Namespace) -> None:
    from serve.demo import run_demo

    run_demo(parsed.config, parsed.port, stay=not parsed.once)


if __name__ == "__main__":
    sys.exit(main())
