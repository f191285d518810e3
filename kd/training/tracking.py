"""Logging of a run's numbers: metrics.jsonl always, Weights & Biases and other trackers beside it.

No tracker can stop the training.
"""

import dataclasses
import json
import netrc
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from kd.config import Job
from kd.runs.folder import RunFolder
from kd.runs.table import plain_table
from kd.utils.console import one_line
from kd.utils.files import write_atomically


class Tracker:
    """One run's metrics.jsonl, and the trackers of --track. Only the main process writes."""

    def __init__(self, job: Job, run: RunFolder, accelerator: Accelerator):
        self.path = run.path / "metrics.jsonl"
        self.main = accelerator.is_main_process
        self._services: dict[str, Service] = {}
        if self.main:
            self._start("W&B", lambda: wandb_service(job, run))
            for name in job.run.track:
                if name != "wandb":
                    self._start(name, lambda name=name: AccelerateService(name, job, run))

    def _start(self, name: str, make: Callable[[], "Service | None"]) -> None:
        try:
            service = make()
        except Exception as error:  # a tracker may raise anything
            print(f"{name} failed to start ({one_line(error)}); the run continues without it", flush=True)
        else:
            if service is not None:
                self._services[name] = service

    def rewrite(self, history: list[dict]) -> None:
        """Write the checkpoint's history to metrics.jsonl, so that no epoch is missing or there twice; and to trackers
        that do not know it."""
        if self.main:
            text = "".join(json.dumps(line) + "\n" for line in history)
            write_atomically(self.path, lambda partial: partial.write_text(text))
            self._tell("log", lambda service: service.catch_up(history))

    def log(self, line: dict) -> None:
        """Log one epoch's numbers."""
        if self.main:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            self._tell("log", lambda service: service.log(line))

    def finish(self, summary: dict) -> None:
        """Log summary.json and close the trackers."""
        self._tell("finish", lambda service: service.finish(summary))

    def _tell(self, what: str, work: Callable[["Service"], None]) -> None:
        """Do some work with each tracker. If one raises, print that once, and continue the run without it."""
        for name, service in list(self._services.items()):
            try:
                work(service)
            except Exception as error:  # a tracker may raise anything
                del self._services[name]
                print(f"{name} failed to {what} ({one_line(error)}); the run continues without it", flush=True)


class Service(ABC):
    """A place that a run's numbers are sent to, beside its own files."""

    @abstractmethod
    def catch_up(self, history: list[dict]) -> None:
        """Log the epochs before this start, unless they are there already."""

    @abstractmethod
    def log(self, line: dict) -> None:
        """Log one epoch's numbers."""

    @abstractmethod
    def finish(self, summary: dict) -> None:
        """Log the run's results and end."""


def flat_flags(job: Job) -> dict:
    """All flags of a job by name, without the parts that hold them."""
    flags = dataclasses.asdict(job) | {"method_name": job.method_name}
    flags |= {f"origin_{key}": value for key, value in (flags.pop("origin") or {}).items()}
    parts = [flags.pop(name) for name in [*flags] if isinstance(flags[name], dict)]
    return {key: value for part in (*parts, flags) for key, value in part.items()}


def wandb_service(job: Job, run: RunFolder) -> "WandbService | None":
    """W&B for this run; None if it is switched off."""
    mode = wandb_mode(job.run.wandb) if "wandb" in job.run.track else "disabled"
    return None if mode == "disabled" else WandbService(job, run, mode)


class WandbService(Service):
    """Weights & Biases: a run with the flags, every epoch's numbers, the curves and the results table."""

    def __init__(self, job: Job, run: RunFolder, mode: str):
        self.folder = run.path
        options = {
            "name": run.path.name,
            "group": job.run.wandb_group or job.preset,
            "job_type": job.role,
            "config": flat_flags(job),
            "tags": [word[:64] for word in (job.preset, job.model, job.method_name, Path(job.data.source).name)],
            "dir": str(run.path),
            "id": run.wandb_id,
        }
        self._run = start_wandb(job.run.wandb_project, mode, options)
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    def catch_up(self, history: list[dict]) -> None:
        """Offline, W&B starts an empty folder at each resumption; the newest one then has the whole run."""
        for line in [] if self._run.resumed else history:
            self._run.log(line)

    def log(self, line: dict) -> None:
        self._run.log(line)

    def finish(self, summary: dict) -> None:
        """Log summary.json under its own keys, the curves, and the results table."""
        import wandb

        head, rows = plain_table(self.folder, summary)
        table = wandb.Table(columns=head, data=rows)
        self._run.log({"curves": wandb.Image(str(self.folder / "curves.png")), "results": table})
        self._run.summary.update(summary)
        self._run.finish()


class AccelerateService(Service):
    """TensorBoard, MLflow or trackio, through Accelerate's trackers. Epochs are the steps.

    A resumed run goes on in MLflow's and trackio's own run; TensorBoard's files, RUN/tensorboard, are written anew.
    """

    def __init__(self, name: str, job: Job, run: RunFolder):
        project, self._new = job.run.wandb_project, True
        if name == "tensorboard":
            shutil.rmtree(run.path / name, ignore_errors=True)
            options = {"run_name": name, "logging_dir": str(run.path)}
        elif name == "mlflow":
            known = run.path / "mlflow_run_id"
            self._new = not known.exists()
            options = {"experiment_name": project, "run_name": run.path.name}
            options |= {} if self._new else {"run_id": known.read_text().strip()}
        else:
            self._new = not run.resuming
            options = {"run_name": project, "name": run.path.name, "resume": "allow"}
        self._tracker = LOGGER_TYPE_TO_CLASS[name](**options)
        self._tracker.start()
        if name == "mlflow" and self._new:
            known.write_text(self._tracker.tracker.info.run_id)
        if self._new:
            simple = (bool, int, float, str)
            flags = flat_flags(job).items()
            self._tracker.store_init_configuration(
                {key: value if isinstance(value, simple) else str(value) for key, value in flags}
            )

    def catch_up(self, history: list[dict]) -> None:
        for line in history if self._new else []:
            self.log(line)

    def log(self, line: dict) -> None:
        self._tracker.log(_numbers(line), step=line["epoch"])

    def finish(self, summary: dict) -> None:
        numbers = {f"summary/{key}": value for key, value in _numbers(summary).items()}
        self._tracker.log(numbers, step=summary["epochs"])
        self._tracker.finish()


def _numbers(values: dict) -> dict[str, int | float]:
    return {key: value for key, value in values.items() if isinstance(value, int | float) and key != "epoch"}


def start_wandb(project: str, mode: str, options: dict):
    """W&B's run; offline if the service cannot be reached, to be sent later by `wandb sync`."""
    import wandb

    settings = wandb.Settings(silent=True, init_timeout=30)
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            run = wandb.init(project=project, mode=attempt, resume="allow", settings=settings, **options)
            break
        except Exception as error:
            if attempt == "offline":
                raise
            print(f"W&B: {one_line(error)}; the run is stored offline", flush=True)
    print(f"W&B: {run.dir if run.offline else run.url}", flush=True)
    return run


def wandb_mode(asked: str) -> str:
    """online, offline or disabled; never a mode that would prompt for a key."""
    if asked == "auto":
        asked = os.environ.get("WANDB_MODE", "auto")
    if asked in ("offline", "disabled", "dryrun"):
        return "offline" if asked == "dryrun" else asked
    if has_wandb_key():
        return "online"
    print("W&B: no API key found (WANDB_API_KEY, or `wandb login`), so the run is stored offline", flush=True)
    return "offline"


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
