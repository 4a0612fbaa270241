"""Reports on a router that is there: `python -m jobs.report_router --config configs/tiny/router_report.yaml`."""

import sys

from jobs.command import run_job
from jobs.train_router import as_tables
from specdecode.routing.report import RouterReportConfig, report_on


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("report_router", "Report on a trained router.", RouterReportConfig, _run, arguments)


def _run(config: RouterReportConfig) -> str:
    return as_tables(report_on(config))


if __name__ == "__main__":
    sys.exit(main())
