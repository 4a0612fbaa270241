"""The command line: arguments in, one call out. The only place that prints for people."""

import argparse
import json
import sys
import time
from collections.abc import Sequence as Arguments
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from specdecode.config import StrictModel, check_config, load_config, read_yaml, with_overrides
from specdecode.errors import ConfigError, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from specdecode.decoding.metrics import DecodingMetrics
    from specdecode.decoding.sequence import SamplingParams
    from specdecode.evaluation.analysis import Figure
    from specdecode.evaluation.suite import Cell
    from specdecode.text import Tokenizer

VerifierName = Literal["rejection", "block", "coupled"]  # of decoding.sequence, which takes seconds to import
_Config = TypeVar("_Config", bound=StrictModel)
_CELL = ("experiment", "draft", "K", "T", "verifier", "batch", "domain")
_FLAG: dict[str, Any] = {"action": "store_true", "default": None}


class GenerateConfig(StrictModel):
    """What `specdecode generate` does; a file given with --config holds these keys, and options override it."""

    model: str = Field(description="the target: a Hugging Face name, a checkpoint folder, or an embedded model")
    draft: str | None = Field(default=None, description="the draft model; plain decoding if unset")
    lookup: bool = Field(default=False, description="guess by prompt lookup first, by the draft where it finds nothing")
    prompt: str = Field(description="the text to continue, or the message to answer with --chat")
    chat: bool = Field(default=False, description="treat the prompt as a user's message")
    max_tokens: int = 128
    K: int = 5
    adaptive: bool = Field(default=False, description="draft at the most K tokens, as many as pay")
    min_confidence: float = Field(default=0.0, ge=0, le=1, description="a draft ends where its own probability falls below")
    n: int = Field(default=1, ge=1, description="how many answers to generate")
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = Field(default_factory=dict)
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = Field(default_factory=list, description="texts that are never generated")
    stop: list[str] = Field(default_factory=list, description="the answer ends before these texts")
    stop_token_ids: list[int] = Field(default_factory=list)
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: int | None = None
    verifier: VerifierName = "rejection"
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    generate = commands.add_parser("generate", help="continue a prompt, and print what it took")
    generate.set_defaults(run=_generate)
    generate.add_argument("--config", help="a YAML file with these options as keys")
    generate.add_argument("--model", help="the target: a Hugging Face name, a checkpoint folder, or tiny/target")
    generate.add_argument("--draft", help="the draft model; plain decoding without it")
    generate.add_argument("--lookup", **_FLAG, help="guess by prompt lookup first, by the draft where it finds nothing")
    generate.add_argument("--prompt", help="the text to continue")
    generate.add_argument("--chat", **_FLAG, help="treat the prompt as a user's message")
    generate.add_argument("--max-tokens", type=int, help="generate at the most so many tokens (default 128)")
    generate.add_argument("--K", type=int, help="how many tokens to draft in a round (default 5)")
    generate.add_argument("--adaptive", **_FLAG, help="draft at the most K tokens, as many as pay")
    generate.add_argument("--min-confidence", type=float, help="a draft ends where its own probability falls below (default 0)")
    generate.add_argument("--n", type=int, help="how many answers to generate (default 1)")
    generate.add_argument("--temperature", type=float, help="0 takes the most likely token (default 0)")
    generate.add_argument("--top-p", type=float, help="keep the most likely tokens up to this probability (default 1)")
    generate.add_argument("--top-k", type=int, help="keep so many most likely tokens; 0 keeps all (default 0)")
    generate.add_argument("--min-p", type=float, help="keep tokens with this share of the largest probability (default 0)")
    generate.add_argument("--repetition-penalty", type=float, help="above 1, makes tokens that are there rarer (default 1)")
    generate.add_argument("--presence-penalty", type=float, help="makes tokens of the answer rarer (default 0)")
    generate.add_argument("--frequency-penalty", type=float, help="the same, for each time they are there (default 0)")
    generate.add_argument("--bad-words", action="append", metavar="TEXT", help="never generate this text; may be repeated")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    generate.add_argument("--min-tokens", type=int, help="generate at least so many tokens (default 0)")
    generate.add_argument("--ignore-eos", **_FLAG, help="go on after the model's end token")
    generate.add_argument("--seed", type=int, help="makes sampling repeatable")
    generate.add_argument("--verifier", help="how drafted tokens are accepted: rejection, block or coupled (default rejection)")
    generate.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default auto)")
    generate.add_argument("--device", help="auto, cpu, cuda or cuda:N (default auto)")

    config = commands.add_parser("config", help="check a Serve config file, and print it whole with the memory it takes")
    config.set_defaults(run=_config)
    config.add_argument("file", help="such as configs/tiny/serve.yaml")

    overhead = commands.add_parser("overhead", help="measure what a round costs beside the models' forward passes")
    overhead.set_defaults(run=_overhead)
    overhead.add_argument("--config", help="a YAML file")
    overhead.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as vocab_size=32000 or batch=1")

    synthetic = commands.add_parser("synthetic", help="make a target and a draft of any shape that agree as often as you say")
    synthetic.set_defaults(run=_synthetic)
    synthetic.add_argument("--output", required=True, metavar="FOLDER", help="where the folders target and draft are written")
    synthetic.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as num_layers=24 or seed=1")

    benchmark = commands.add_parser("benchmark", help="compare ways to decode, question by question in turns")
    benchmark.set_defaults(run=_benchmark)
    benchmark.add_argument("--config", required=True, help="such as configs/tiny/benchmark.yaml")
    benchmark.add_argument("--experiments", metavar="NAME,...", help="such as baseline,generic_draft, instead of the file's")
    benchmark.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    benchmark.add_argument("--json", action="store_true", help="print the summary as JSON")

    report = commands.add_parser("report", help="summarise the results of a benchmark again, from its records alone")
    report.set_defaults(run=_report)
    report.add_argument("folder", help="the output_dir of a benchmark")
    report.add_argument("--json", action="store_true", help="print the summary as JSON")

    compare = commands.add_parser("compare", help="say what is faster or slower in a second benchmark than in a first")
    compare.set_defaults(run=_compare)
    compare.add_argument("before", help="the output_dir of a benchmark")
    compare.add_argument("after", help="that of another one")
    compare.add_argument("--json", action="store_true", help="print the comparison as JSON")

    exchange = commands.add_parser("exchange", help="measure what each way to a draft adds to the draft's own work")
    exchange.set_defaults(run=_exchange)
    exchange.add_argument("--config", help="a YAML file")
    exchange.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as batches=[1,4] or K=3")

    remote = commands.add_parser("remote", help="compare a draft in this process with one in another, and running ahead")
    remote.set_defaults(run=_remote)
    remote.add_argument("--config", help="a YAML file")
    remote.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as target_core=0 draft_core=1")

    http = commands.add_parser("http", help="compare streams over HTTP with the bare engine")
    http.set_defaults(run=_http)
    http.add_argument("--config", help="a YAML file")
    http.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as concurrency=[1,8]")

    routing = commands.add_parser("routing", help="measure what a router adds to each request")
    routing.set_defaults(run=_routing)
    routing.add_argument("--config", help="a YAML file")
    routing.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as routing.checkpoint=FOLDER")

    push = commands.add_parser("push", help="upload a model's folder to the Hugging Face Hub")
    push.set_defaults(run=_push)
    push.add_argument("folder", help="such as checkpoints/draft-code/best")
    push.add_argument("name", help="the repository, such as me/draft-code; made if there is none")
    push.add_argument("--private", action="store_true", help="make a repository that only its owner sees")
    push.add_argument("--revision", metavar="BRANCH", help="a branch that is there, instead of main")
    push.add_argument("--message", metavar="TEXT", help="of the commit")

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
    from specdecode.decoding.control import AdaptiveLength
    from specdecode.decoding.drafters import ChainDrafter, PromptLookupDrafter
    from specdecode.decoding.loop import as_drafter, generate
    from specdecode.decoding.metrics import DecodingMetrics
    from specdecode.decoding.sequence import Route, Sequence
    from specdecode.text import StopStrings, Tokenizer

    config = _generate_config(parsed)
    tokenizer = Tokenizer(config.model)
    params = _sampling_params(config, tokenizer)
    message = [{"role": "user", "content": config.prompt}]
    prompt = tokenizer.encode_chat(message) if config.chat else tokenizer.encode(config.prompt)
    target = create_backend(config.model, config.dtype, config.device)
    draft = create_backend(config.draft, config.dtype, config.device) if config.draft else None
    drafter = as_drafter(draft, target, min_confidence=config.min_confidence)
    if config.lookup:
        drafter = ChainDrafter([PromptLookupDrafter(), drafter])
    for number, choice in enumerate(params.choices(config.n)):
        sequence = Sequence(prompt, choice, Route("draft", config.K))
        detokenizer, stops = tokenizer.detokenizer(), StopStrings(config.stop)
        metrics, started = DecodingMetrics(), time.perf_counter()
        if config.n > 1:
            print(f"--- {number + 1} of {config.n}")
        for ((_, round),) in generate([sequence], drafter, target, AdaptiveLength() if config.adaptive else None):
            metrics.add(round, time.perf_counter() - started)
            text = detokenizer.decode(round.tokens)
            print(stops.feed(text) if metrics.num_generated > config.min_tokens else text, end="", flush=True)
            if stops.is_stopped:
                break
        print("" if stops.is_stopped else stops.feed(detokenizer.flush()) + stops.flush())
        print(_figures(metrics), file=sys.stderr)


def _sampling_params(config: GenerateConfig, tokenizer: "Tokenizer") -> "SamplingParams":
    from specdecode.decoding.sequence import SamplingParams

    names = GenerateConfig.model_fields.keys() & SamplingParams.__dataclass_fields__.keys()
    options = {name: getattr(config, name) for name in names}
    return SamplingParams(**options, bad_words_ids=tuple(tokenizer.spellings(config.bad_words)))


def _figures(metrics: "DecodingMetrics") -> str:
    return (
        f"[{metrics.num_generated} tokens in {metrics.total_time_s:.2f} s, {metrics.tokens_per_second:.1f} tok/s, "
        f"first after {metrics.time_to_first_token_s:.3f} s; {metrics.num_target_passes} target passes, "
        f"{metrics.tokens_per_target_pass:.2f} tokens each; acceptance {metrics.acceptance_rate:.2f} "
        f"({metrics.num_accepted} of {metrics.num_drafted} drafted)]"
    )


def _generate_config(parsed: argparse.Namespace) -> GenerateConfig:
    """The options, over the file's keys if there is one."""
    values = read_yaml(parsed.config) if parsed.config else {}
    given = {name: getattr(parsed, name, None) for name in GenerateConfig.model_fields}  # some only the file has
    values.update({name: value for name, value in given.items() if value is not None})
    return check_config(values, GenerateConfig, where=parsed.config or "generate")


def _config(parsed: argparse.Namespace) -> None:
    import yaml

    from serve.config import DeployedModel
    from serve.local import load_deployment
    from specdecode.backends.memory import estimate_memory

    config = load_deployment(parsed.file).config
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
    for name, model in {"target": config.target, **config.drafts}.items():
        if isinstance(model, DeployedModel):
            print(f"# {name}: {estimate_memory(model.model_config_only()).describe()}")


def _optional_config(parsed: argparse.Namespace, kind: type[_Config]) -> _Config:
    """The file's keys if there is a file, with those that are set over them."""
    if parsed.config:
        return load_config(parsed.config, kind, parsed.set)
    return check_config(with_overrides({}, parsed.set), kind, where=parsed.command)


def _overhead(parsed: argparse.Namespace) -> None:
    from specdecode.evaluation.overhead import OverheadConfig, measure_overhead, measure_prefix_reuse, measure_share

    config = _optional_config(parsed, OverheadConfig)
    title = f"batch {config.batch}, K {config.K}, vocabulary {config.vocab_size}: median ms of a round without forward passes"
    table = _table(("setting", "round", "drafting", "constraints", "distributions", "acceptance", "tokens kept"), title)
    for row in measure_overhead(config):
        times = (row.total_ms, row.draft_ms, row.constrain_ms, row.normalise_ms, row.accept_ms)
        table.add_row(row.setting, *(f"{value:.1f}" for value in times), f"{row.kept:.0f}")
    title = f"{config.target} with {config.draft}: median ms of a round"
    share = _table(("setting", "batch", "round", "not in a forward pass", "share"), title)
    for part in measure_share(config):
        percent = f"{part.other_ms / part.round_ms:.1%}"
        share.add_row(part.setting, str(part.batch), f"{part.round_ms:.2f}", f"{part.other_ms:.2f}", percent)
    title = f"{config.target}: time to the first token after a prompt of 1024 tokens"
    prefix = _table(("shared with a request before", "computed", "ms"), title, num_left=0)
    for reuse in measure_prefix_reuse(config):
        prefix.add_row(str(reuse.num_shared), str(reuse.num_computed), f"{reuse.ttft_ms:.1f}")
    _print_tables(table, share, prefix)


def _synthetic(parsed: argparse.Namespace) -> None:
    from transformers.utils import logging

    from specdecode.backends.synthetic import SyntheticConfig, save_pair

    logging.disable_progress_bar()
    config = check_config(with_overrides({}, parsed.set), SyntheticConfig, where="synthetic")
    target, draft, figures = save_pair(config, parsed.output)
    print(f"target     {target}  ({figures.num_target_parameters / 1e6:.1f} M parameters)")
    print(f"draft      {draft}  ({figures.num_draft_parameters / 1e6:.1f} M parameters)")
    print(f"agreement  {figures.agreement:.3f}  (likeliest tokens; {config.agreement} was asked for)")
    print(f"overlap    {figures.overlap:.3f}  (of the distributions at temperature 1)")
    print(f"entropy    {figures.entropy:.2f} nats; the later layers are scaled by {figures.residual_scale:.4f}")


def _table(headings: tuple[str, ...], title: str | None = None, num_left: int = 1) -> "Table":
    """A table of which the first columns are text, and the others numbers."""
    from rich.table import Table

    table = Table(title=title, box=None)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < num_left else "right", no_wrap=True)
    return table


def _print_tables(*tables: "Table") -> None:
    from rich.console import Console

    console = Console(width=160 if not sys.stdout.isatty() else None)
    for table in tables:
        console.print(table)


def _push(parsed: argparse.Namespace) -> None:
    from specdecode.training.hub import push

    print(push(parsed.folder, parsed.name, is_private=parsed.private, revision=parsed.revision, message=parsed.message))


def _benchmark(parsed: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from specdecode.evaluation.benchmark import run_benchmark
    from specdecode.evaluation.suite import BenchmarkConfig

    chosen = [f"experiments=[{parsed.experiments}]"] if parsed.experiments else []
    config = load_config(parsed.config, BenchmarkConfig, [*parsed.set, *chosen])
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("parts", total=None)
        run_benchmark(config, tell=lambda done, count: progress.update(task, completed=done, total=count))
    _print_summary(config.output_dir, parsed.json)


def _report(parsed: argparse.Namespace) -> None:
    _print_summary(parsed.folder, parsed.json)


def _print_summary(folder: str, as_json: bool) -> None:
    from specdecode.evaluation.benchmark import write_summary

    summary = write_summary(folder)
    if as_json:
        print(json.dumps(asdict(summary), indent=1))
        return
    right = ("answers", "tok/s", "speed-up", "acceptance", "tokens/pass", "ttft ms", "right", "different")
    table = _table(_CELL + right, num_left=len(_CELL))
    for row in summary.rows:
        table.add_row(
            *_cell(row.cell),
            row.domain,
            f"{row.num_answers}" + (f" ({row.num_errors} failed)" if row.num_errors else ""),
            _figure(row.tokens_per_second, ".1f"),
            _interval(row.speed_up),
            _figure(row.acceptance, ".3f"),
            _figure(row.tokens_per_pass, ".2f"),
            f"{row.ttft_ms[0]:.1f}" if row.ttft_ms else "",
            _figure(row.right, ".1%"),
            "" if row.num_different is None else str(row.num_different),
        )
    _print_tables(table)
    if summary.routing is not None:
        found = summary.routing
        print(f"the router's regret to the fastest draft of each question: {_interval(found.regret, '.1%')}")
        print(f"it is {_interval(found.to_best_single)} as fast as {found.best_single}, the best single one")
    print(f"records and summary.json are in {folder}")


def _compare(parsed: argparse.Namespace) -> None:
    from specdecode.evaluation.analysis import compare_runs
    from specdecode.evaluation.benchmark import read_run

    changes = compare_runs(read_run(parsed.before)[2], read_run(parsed.after)[2])
    if not changes:
        raise ConfigError(f"{parsed.before} and {parsed.after}: expected an experiment that both have, found none")
    if parsed.json:
        print(json.dumps([asdict(change) for change in changes], indent=1))
        return
    table = _table((*_CELL, "speed", "verdict", "different"), f"{parsed.after} to {parsed.before}", num_left=len(_CELL))
    for change in changes:
        different = "" if change.num_different is None else str(change.num_different)
        table.add_row(*_cell(change.cell), change.domain, _interval(change.speed_up), change.verdict, different)
    _print_tables(table)


def _cell(cell: "Cell") -> list[str]:
    """A cell's parts, under all headings of `_CELL` but the last."""
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in astuple(cell)]


def _figure(figure: "Figure | None", form: str) -> str:
    return "" if figure is None else format(figure.value, form)


def _interval(figure: "Figure | None", form: str = ".2f") -> str:
    return "" if figure is None else f"{figure.value:{form}} [{figure.low:{form}}, {figure.high:{form}}]"


def _exchange(parsed: argparse.Namespace) -> None:
    from serve.ladder import LadderConfig, measure_ladder

    config = _optional_config(parsed, LadderConfig)
    title = f"K {config.K}, q of {config.support} tokens: ms from asking for drafts to having them, less the draft's own work"
    table = _table(("way", "batch", "p50", "p90", "p99", "draft's work"), title)
    for row in measure_ladder(config):
        times = (row.p50_ms, row.p90_ms, row.p99_ms, row.draft_ms)
        table.add_row(row.rung, str(row.batch), *(f"{value:.2f}" for value in times))
    _print_tables(table)


def _remote(parsed: argparse.Namespace) -> None:
    from specdecode.evaluation.remote import RemoteConfig, measure_remote, summarise

    config = _optional_config(parsed, RemoteConfig)
    title = f"{config.target} with {config.draft}, K {config.K}, temperature {config.temperature:g}"
    right = ("batch", "tok/s", "to local", "acceptance", "wait ms", "verify ms", "exchange ms", "ahead", "different")
    table = _table(("draft", *right), title)
    for row in summarise(list(measure_remote(config)), config.temperature):
        table.add_row(
            row.arm,
            str(row.batch),
            f"{row.tokens_per_second:.1f}",
            f"{row.to_local:.2f}x",
            f"{row.acceptance_rate:.3f}",
            f"{row.wait_ms:.2f}",
            f"{row.verify_ms:.2f}",
            f"{row.exchange_ms:.2f}",
            f"{row.ahead_rate:.0%}",
            str(row.num_different),
        )
    _print_tables(table)


def _http(parsed: argparse.Namespace) -> None:
    from serve.http_speed import HttpSpeedConfig, measure_http

    config = _optional_config(parsed, HttpSpeedConfig)
    title = f"{config.serve}, draft {config.draft}, K {config.K}: medians of {config.num_repeats}"
    table = _table(("", "streams", "tok/s", "to engine", "first token ms", "over engine ms"), title)
    for row in measure_http(config):
        figures = (f"{row.tokens_per_second:.1f}", f"{row.to_engine:.2f}x", f"{row.ttft_ms:.1f}", f"{row.extra_ttft_ms:.1f}")
        table.add_row(row.side, str(row.concurrency), *figures)
    _print_tables(table)


def _routing(parsed: argparse.Namespace) -> None:
    from serve.routing_speed import RoutingSpeedConfig, measure_routing

    config = _optional_config(parsed, RoutingSpeedConfig)
    title = f"{config.routing.checkpoint}: ms that a request waits for its forecast, and {config.target} takes to a first token"
    table = _table(("requests at a time", "p50", "p99", "first token p50"), title, num_left=0)
    for row in measure_routing(config):
        table.add_row(str(row.concurrency), f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.ttft_p50_ms:.2f}")
    _print_tables(table)


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
