"""Trains a router on records: `python -m jobs.train_router --config configs/router_train.yaml [--set key=value ...]`."""

import sys

from rich.table import Table

from jobs.command import as_text, run_job
from specdecode.routing.report import Report
from specdecode.routing.trainer import RouterTrainingConfig, train_router


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("train_router", "Train a router on records.", RouterTrainingConfig, _run, arguments)


def _run(config: RouterTrainingConfig) -> str:
    return as_tables(train_router(config))


def as_tables(found: Report) -> str:
    """The report for a terminal."""
    domains = sorted(next(iter(found.speeds.values())))
    speeds = Table(title=f"tokens/s on {found.num_prompts} prompts that were not learned from")
    for name in ("arm", *domains):
        speeds.add_column(name, justify="left" if name == "arm" else "right")
    for arm, by_domain in found.speeds.items():
        speeds.add_row(arm, *(f"{by_domain[domain]:.1f}" for domain in domains))
    errors = Table(title="forecasts of acceptance")
    for name in ("draft", "mean acceptance", "mean absolute error", "mean error"):
        errors.add_column(name, justify="left" if name == "draft" else "right")
    for row in found.errors:
        errors.add_row(row.arm, f"{row.mean_acceptance:.3f}", f"{row.absolute:.3f}", f"{row.bias:+.3f}")
    choices = Table(title="who chooses, with 95 % intervals over prompts; right: the fastest arm, or at most 2 % slower")
    for name in ("chooser", "tokens/s", "of the oracle's", "of plain decoding's", "right", "as the domain"):
        choices.add_column(name, justify="left" if name == "chooser" else "right")
    for policy in found.policies:
        (low, high), oracle, plain = policy.interval, policy.to_oracle_interval, policy.to_plain_interval
        choices.add_row(
            policy.name,
            f"{policy.tokens_per_second:.1f} [{low:.1f}, {high:.1f}]",
            f"{policy.to_oracle:.3f} [{oracle[0]:.3f}, {oracle[1]:.3f}]",
            f"{policy.to_plain:.3f} [{plain[0]:.3f}, {plain[1]:.3f}]",
            f"{policy.accuracy:.3f}",
            "" if policy.domain_accuracy is None else f"{policy.domain_accuracy:.3f}",
        )
    return as_text(speeds, errors, choices)


if __name__ == "__main__":
    sys.exit(main())
