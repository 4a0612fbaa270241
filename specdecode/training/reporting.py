"""Figures of a training run in, log lines and, on request, Weights & Biases curves out."""

import importlib
import logging
from collections.abc import Callable
from typing import Any

from specdecode.config import StrictModel
from specdecode.errors import ConfigError

logger = logging.getLogger(__name__)

Report = Callable[[int, dict[str, float]], None]  # step, figures by name


class LoggingConfig(StrictModel):
    """Where the figures of a run go besides the log."""

    use_wandb: bool = False
    project: str = "specdecode"
    run_name: str | None = None


def create_report(config: LoggingConfig, run_config: dict[str, Any]) -> Report:
    """Opens what `config` asks for and returns the function that reports to it.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """
    if not config.use_wandb:
        return log
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            "logging.use_wandb: expected wandb to be installed (pip install 'specdecode[wandb]'), got true without it"
        ) from error
    run = wandb.init(project=config.project, name=config.run_name, config=run_config)

    def report(step: int, figures: dict[str, float]) -> None:
        log(step, figures)
        run.log(figures, step=step)

    return report


def log(step: int, figures: dict[str, float]) -> None:
    """One log line."""
    logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
