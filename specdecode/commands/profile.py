"""`specdecode profile`: a pair in, where the time of a round goes out."""

import argparse
import sys
from typing import TYPE_CHECKING

from specdecode.commands.options import Commands, add_command, add_config, add_json
from specdecode.commands.tables import make_table, print_json, print_tables
from specdecode.config import load_config

if TYPE_CHECKING:
    from rich.table import Table

    from specdecode.evaluation.growth import Growth
    from specdecode.evaluation.profile import Profile, WayRow


def add_profile(commands: Commands) -> None:
    file = "configs/tiny/benchmark_profile.yaml"
    help = "measure where the time of a round goes, and how far it is from what the device could do"
    profile = add_command(commands, "profile", _profile, help, f"specdecode profile --config {file} --num-samples 5")
    add_config(profile, "K=[1,5], growth={} or pair={preset: llama-3-8b-1b}", file=file)
    profile.add_argument("--num-samples", type=int, metavar="N", help="prompts that are answered in every way")
    profile.add_argument(
        "--simulate-acceptance",
        type=float,
        metavar="RATE",
        help="coin flips in place of verdicts, for weights that never agree",
    )
    add_json(profile)


def _profile(parsed: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from specdecode.evaluation.profile import ProfileConfig, measure_profile

    flags = {"num_samples": parsed.num_samples, "simulate_acceptance": parsed.simulate_acceptance}
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    config = load_config(parsed.config, ProfileConfig, [*parsed.set, *given])
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("answers", total=None)
        found = measure_profile(config, lambda done, count: progress.update(task, completed=done, total=count))
    if parsed.json:
        print_json(found.as_json())
        return
    tables = [_ways(found), _phases(found), *([_growth(found.growth)] if found.growth else [])]
    print_tables(*tables)
    for name, limits in found.limits.items():
        print(
            f"{name}: {limits.bandwidth / 1e9:.1f} GB/s and {limits.operation_rate / 1e9:.0f} Gflop/s measured on this device"
        )
    if found.growth and found.growth.chart:
        print(f"the chart is in {found.growth.chart}")


def _simulated(found: "Profile") -> str:
    """What every title says where verdicts were coin flips."""
    return "" if found.simulated_acceptance is None else f"; SIMULATED ACCEPTANCE, coin flips at {found.simulated_acceptance:g}"


def _ways(found: "Profile") -> "Table":
    right = ("tok/s", "to plain", "to hf_plain", "tokens/pass", "acceptance", "round ms", "its pass to one", "different")
    title = f"{found.target} with {found.draft}, {found.dtype}, on {found.device}{_simulated(found)}"
    table = make_table(("T", "way", *right), title, num_left=2)
    for row in found.ways:
        table.add_row(f"{row.temperature:g}", row.way, f"{row.tokens_per_second:.1f}", *_figures(row))
    return table


def _figures(row: "WayRow") -> list[str]:
    return [
        _ratio(row.to_plain),
        _ratio(row.to_hf_plain),
        f"{row.tokens_per_pass:.2f}",
        _number(row.acceptance, ".3f"),
        _number(row.round_ms, ".2f"),
        _number(row.pass_to_one, ".2f"),
        "" if row.num_different is None else str(row.num_different),
    ]


def _phases(found: "Profile") -> "Table":
    title = f"medians of a round's parts{_simulated(found)}"
    table = make_table(("T", "way", "phase", "ms", "share", "MB to move", "floor ms", "to floor"), title, num_left=3)
    for row in found.phases:
        floor = (f"{row.num_bytes / 1e6:.2f}", f"{row.floor_ms:.3f}", f"{row.to_floor:.1f}x") if row.to_floor else ("", "", "")
        table.add_row(f"{row.temperature:g}", row.way, row.phase, f"{row.ms:.3f}", f"{row.share:.1%}", *floor)
    return table


def _growth(growth: "Growth") -> "Table":
    title = "how a round grows where all drafts are taken for accepted: t ~ size^exponent over the larger sizes"
    table = make_table(("axis", "phase", "sizes", "ms", "exponent", "us for one more", ""), title, num_left=4)
    for curve in growth.curves:
        table.add_row(
            curve.axis,
            curve.phase,
            " ".join(map(str, curve.sizes)),
            " ".join(f"{value:.3g}" for value in curve.ms),
            _number(curve.exponent, ".2f"),
            _number(curve.slope_us, ".3g"),
            "faster than in proportion" if curve.is_too_steep else "",
        )
    for axis, sizes in growth.left_out.items():
        table.add_row(axis, "left out", " ".join(map(str, sizes)), "no room in the models or their caches")
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(value: tuple[float, float, float] | None) -> str:
    return "" if value is None else f"{value[0]:.2f}x [{value[1]:.2f}, {value[2]:.2f}]"
