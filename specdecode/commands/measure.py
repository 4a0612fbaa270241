"""Commands that measure one part of the system: settings in, a table of figures out."""

import argparse

from specdecode.commands.options import Commands, add_command, add_config, add_json, optional_config
from specdecode.commands.tables import make_table, print_json, print_tables


def add_overhead(commands: Commands) -> None:
    overhead = add_command(
        commands,
        "overhead",
        _overhead,
        "measure what a round costs beside the models' forward passes",
        "specdecode overhead --set vocab_size=32000 --set batch=1",
    )
    add_config(overhead, "vocab_size=32000 or batch=1")
    add_json(overhead)


def add_exchange(commands: Commands) -> None:
    exchange = add_command(
        commands,
        "exchange",
        _exchange,
        "measure what each way to a draft adds to the draft's own work",
        "specdecode exchange --set batches=[1,4]",
    )
    add_config(exchange, "batches=[1,4] or K=3")
    add_json(exchange)


def add_remote(commands: Commands) -> None:
    remote = add_command(
        commands,
        "remote",
        _remote,
        "compare a draft in this process with one in another, and running ahead",
        "specdecode remote --set target_core=0 --set draft_core=1",
    )
    add_config(remote, "target_core=0 or draft_core=1")
    add_json(remote)


def add_http(commands: Commands) -> None:
    http = add_command(
        commands,
        "http",
        _http,
        "compare streams over HTTP with the bare engine",
        "specdecode http --set concurrency=[1,8]",
    )
    add_config(http, "concurrency=[1,8]")
    add_json(http)


def add_routing(commands: Commands) -> None:
    routing = add_command(
        commands,
        "routing",
        _routing,
        "measure what a router adds to each request",
        "specdecode routing --set routing.checkpoint=tiny/router",
    )
    add_config(routing, "routing.checkpoint=FOLDER")
    add_json(routing)


def _overhead(parsed: argparse.Namespace) -> None:
    from specdecode.evaluation.mask_speed import measure_masks
    from specdecode.evaluation.overhead import OverheadConfig, measure_overhead, measure_prefix_reuse, measure_share

    config = optional_config(parsed, OverheadConfig)
    overhead, shares, prefixes = list(measure_overhead(config)), list(measure_share(config)), list(measure_prefix_reuse(config))
    masks = list(measure_masks([4096, config.vocab_size], config.num_rounds))
    if parsed.json:
        print_json({"overhead": overhead, "share": shares, "prefix_reuse": prefixes, "masks": masks})
        return
    title = f"batch {config.batch}, K {config.K}, vocabulary {config.vocab_size}: median ms of a round without forward passes"
    table = make_table(("setting", "round", "drafting", "constraints", "distributions", "acceptance", "tokens kept"), title)
    for row in overhead:
        times = (row.total_ms, row.draft_ms, row.constrain_ms, row.normalise_ms, row.accept_ms)
        table.add_row(row.setting, *(f"{value:.1f}" for value in times), f"{row.kept:.0f}")
    title = f"{config.target} with {config.draft}: median ms of a round"
    share = make_table(("setting", "batch", "round", "not in a forward pass", "share"), title)
    for part in shares:
        percent = f"{part.other_ms / part.round_ms:.1%}"
        share.add_row(part.setting, str(part.batch), f"{part.round_ms:.2f}", f"{part.other_ms:.2f}", percent)
    title = f"{config.target}: time to the first token after a prompt of 1024 tokens"
    prefix = make_table(("shared with a request before", "computed", "ms"), title, num_left=0)
    for reuse in prefixes:
        prefix.add_row(str(reuse.num_shared), str(reuse.num_computed), f"{reuse.ttft_ms:.1f}")
    costs = ("vocabulary ms", "schema ms", "first answer us", "later us", "with the logits us")
    grammar = make_table(
        ("vocabulary", *costs), "a JSON schema: once for a model, once for a schema, and at each place", num_left=0
    )
    for mask in masks:
        means = (mask.prepare_ms, mask.compile_ms, mask.first_us, mask.later_us, mask.constrain_us)
        grammar.add_row(str(mask.vocab_size), *(f"{value:.1f}" for value in means))
    print_tables(table, share, prefix, grammar)


def _exchange(parsed: argparse.Namespace) -> None:
    from serve.ladder import LadderConfig, measure_ladder

    config = optional_config(parsed, LadderConfig)
    rows = list(measure_ladder(config))
    if parsed.json:
        print_json(rows)
        return
    title = f"K {config.K}, q of {config.support} tokens: ms from asking for drafts to having them, less the draft's own work"
    table = make_table(("way", "batch", "p50", "p90", "p99", "draft's work"), title)
    for row in rows:
        times = (row.p50_ms, row.p90_ms, row.p99_ms, row.draft_ms)
        table.add_row(row.rung, str(row.batch), *(f"{value:.2f}" for value in times))
    print_tables(table)


def _remote(parsed: argparse.Namespace) -> None:
    from specdecode.evaluation.remote import RemoteConfig, measure_remote, summarise

    config = optional_config(parsed, RemoteConfig)
    rows = summarise(list(measure_remote(config)), config.temperature)
    if parsed.json:
        print_json(rows)
        return
    title = f"{config.target} with {config.draft}, K {config.K}, temperature {config.temperature:g}"
    right = ("batch", "tok/s", "to local", "acceptance", "wait ms", "verify ms", "exchange ms", "ahead", "different")
    table = make_table(("draft", *right), title)
    for row in rows:
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
    print_tables(table)


def _http(parsed: argparse.Namespace) -> None:
    from serve.http_speed import HttpSpeedConfig, measure_http

    config = optional_config(parsed, HttpSpeedConfig)
    rows = list(measure_http(config))
    if parsed.json:
        print_json(rows)
        return
    title = f"{config.serve}, draft {config.draft}, K {config.K}: medians of {config.num_repeats}"
    table = make_table(("", "streams", "tok/s", "to engine", "first token ms", "over engine ms"), title)
    for row in rows:
        figures = (f"{row.tokens_per_second:.1f}", f"{row.to_engine:.2f}x", f"{row.ttft_ms:.1f}", f"{row.extra_ttft_ms:.1f}")
        table.add_row(row.side, str(row.concurrency), *figures)
    print_tables(table)


def _routing(parsed: argparse.Namespace) -> None:
    from serve.routing_speed import RoutingSpeedConfig, measure_routing

    config = optional_config(parsed, RoutingSpeedConfig)
    rows = list(measure_routing(config))
    if parsed.json:
        print_json(rows)
        return
    title = f"{config.routing.checkpoint}: ms that a request waits for its forecast, and {config.target} takes to a first token"
    table = make_table(("requests at a time", "p50", "p99", "first token p50"), title, num_left=0)
    for row in rows:
        table.add_row(str(row.concurrency), f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.ttft_p50_ms:.2f}")
    print_tables(table)
