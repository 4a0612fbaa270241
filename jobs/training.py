"""A run of Ray Train: processes that train, started again where they are lost, and a folder that is one run's alone."""

from serve.cluster import connected  # isort: skip  # before all else that imports Ray

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from datasets import disable_progress_bars
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from specdecode.config import StrictModel
from specdecode.errors import ConfigError, TrainingError
from specdecode.training.provenance import write_run
from specdecode.training.trainer import TrainingConfig, TrainingResult, trainer_folder

_CONFIG, _RESULT = "config.json", "result.json"
_RUN_NAME = "ray"  # the folder of Ray Train's checkpoints, in the storage path
# What may be another the next time that a run goes on.
_MAY_CHANGE: dict[str, Any] = {"training": {"max_failures", "log_every"}, "logging": True}


class Run:
    """One training, in a folder of its own.

    Args:
        config: everything about it.
        training: how long and on what.
        resume: whether to go on with what the folder holds.

    Raises:
        ConfigError: the folder holds a run that is not to be resumed, or none that is to be.
    """

    def __init__(self, config: StrictModel, training: TrainingConfig, *, resume: bool) -> None:
        self._config = config
        self._training = training
        self._resume = resume
        self._folder = Path(training.output_dir).absolute()
        self._identity: dict[str, Any] = json.loads(config.model_dump_json(exclude=_MAY_CHANGE))
        self._claim(resume)

    def _claim(self, resume: bool) -> None:
        path = self._folder / _CONFIG
        if not is_begun(self._folder):
            if resume:
                raise ConfigError(f"--resume: {self._folder} holds no run: expected one that this configuration has begun")
            return
        if not resume:
            raise ConfigError(
                f"training.output_dir: {self._folder} holds a run: expected another folder, or --resume to go on with it"
            )
        if json.loads(path.read_text(encoding="utf-8")) != self._identity:
            raise ConfigError(f"--resume: the run in {self._folder} has another configuration: expected that of {path}")

    def train(self, prepare: Callable[[], Path], work: Callable[[dict[str, Any]], None]) -> TrainingResult:
        """Prepares blocks and has processes do `work` on them; starts a local Ray unless this process is connected to one.

        Args:
            prepare: makes the blocks and says where they are.
            work: is told the configuration as `config` and the blocks' folder as `blocks`.

        Raises:
            ConfigError: the cluster has not what the processes ask for.
            TrainingError: it failed, and as often again as it may.
        """
        with connected(quiet=False, dashboard=True):  # without one Ray Train asks that of another Ray about its processes
            self._check_devices()
            result = self._fit(work, prepare())
        write_run(self._folder, self._config, result)
        return result

    def _check_devices(self) -> None:
        """Raises a `ConfigError` if the cluster has not what the processes ask for."""
        if self._training.parallelism == "fsdp" and not self._uses_gpu():
            raise ConfigError(
                "training.parallelism: expected ddp on CPUs, got fsdp: accelerate shares models out on GPUs alone"
            )
        there, count = ray.cluster_resources(), max(1, self._training.num_workers)
        for name, amount in self._resources().items():
            if there.get(name, 0) < amount * count:
                raise ConfigError(
                    f"training: {count} workers on {self._training.device} ask for {amount * count:g} {name}, the cluster has "
                    f"{there.get(name, 0):g}: expected fewer of them, or another device"
                )

    def _fit(self, work: Callable[[dict[str, Any]], None], blocks: Path) -> TrainingResult:
        training = self._training
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # for the dashboard's page on training
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / _CONFIG).write_text(json.dumps(self._identity, indent=2) + "\n", encoding="utf-8")
        storage = training.storage_path or str(self._folder)
        trainer = TorchTrainer(
            work,
            train_loop_config={
                "config": self._config.model_dump(),
                "blocks": str(blocks.absolute()),
                "resume": self._resume,
                "folder": str(Path.cwd()),
            },
            torch_config=TorchConfig(backend="nccl" if self._uses_gpu() else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=training.num_workers,
                use_gpu=self._uses_gpu(),
                resources_per_worker=self._resources() if training.num_workers else None,
            ),
            run_config=RunConfig(
                name=_RUN_NAME,
                storage_path=storage if "://" in storage else str(Path(storage).absolute()),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                failure_config=FailureConfig(max_failures=training.max_failures),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise TrainingError(
                f"training failed: {_cause(error)}; what {self._folder} holds stays: --resume goes on from its last checkpoint"
            ) from error
        return TrainingResult(**json.loads((self._folder / _RESULT).read_text(encoding="utf-8")))

    def _resources(self) -> dict[str, float]:
        """Of one process."""
        return {"CPU": 1.0, **({"GPU": 1.0} if self._uses_gpu() else {}), **self._training.resources_per_worker}

    def _uses_gpu(self) -> bool:
        device = self._training.device
        return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / _CONFIG).exists()


def _cause(error: BaseException) -> str:
    """The last line of what went wrong in a worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


def report(told: dict[str, Any], training: TrainingConfig, learn: Callable[..., TrainingResult]) -> None:
    """Has `learn` train, in one of a run's processes, from the run's last checkpoint if there is one; keeps its result."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    disable_progress_bar()  # a worker's output is a log
    disable_progress_bars()
    if Path(told["folder"]).is_dir():  # where the configuration's paths begin; on other nodes it is Ray's working directory
        os.chdir(told["folder"])
    callbacks = [Reporter()]
    last = ray.train.get_checkpoint()
    if last is not None:
        with last.as_directory() as folder:
            result = learn(checkpoint=Path(folder), callbacks=callbacks)
    else:  # a training in the job's own process has no other checkpoints than its own
        own = get_last_checkpoint(trainer_folder(training)) if told["resume"] and training.num_workers == 0 else None
        result = learn(checkpoint=own and Path(own), callbacks=callbacks)
    if ray.train.get_context().get_world_rank() == 0:
        (Path(training.output_dir) / _RESULT).write_text(json.dumps(asdict(result)), encoding="utf-8")


class Reporter(TrainerCallback):
    """Tells Ray Train of each checkpoint, and of the figures.

    All processes write to one folder, and the first one alone hands it over, once all have written: Ray Train's own callback
    has each of them copy what is there, while another one may still be writing it.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:  # noqa: ARG002
        """See `TrainerCallback.on_save`."""
        figures = {name: value for entry in state.log_history for name, value in entry.items()}
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        folder = get_last_checkpoint(args.output_dir) if state.is_world_process_zero else None
        ray.train.report(figures, checkpoint=folder and Checkpoint.from_directory(folder))
