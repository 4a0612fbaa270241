"""How a training is logged, and where its figures go."""

import importlib.util

from pydantic import Field

from specdecode.config import StrictModel
from specdecode.errors import ConfigError
from specdecode.log import LogFormat


class WandbConfig(StrictModel):
    """How lines are written, and whether the figures of a run go to Weights & Biases."""

    format: LogFormat = Field(default="text", description="of the log: for people; or json, an object on each line")
    use_wandb: bool = False
    project: str = "specdecode"
    run_name: str | None = None

    def check(self) -> None:
        """Raises a `ConfigError` if Weights & Biases is asked for and not installed."""
        if self.use_wandb and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "logging.use_wandb: expected wandb to be installed (pip install 'specdecode[wandb]'), got true without it"
            )


class LoggingConfig(WandbConfig):
    """Where the figures of a training go besides the log."""

    use_tensorboard: bool = False
