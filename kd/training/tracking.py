"""Logging of a run's numbers: metrics.jsonl always, Weights & Biases beside it. Neither can stop the training."""

import dataclasses
import json
import netrc
import os
from pathlib import Path

from accelerate import Accelerator

from kd.config import Job
from kd.runs.folder import RunFolder
from kd.runs.table import plain_table
from kd.utils.console import one_line
from kd.utils.files import write_atomically


class Tracker:
    """One run's metrics.jsonl and W&B run. Only the main process writes."""

    def __init__(self, job: Job, run: RunFolder, accelerator: Accelerator):
        self.path = run.path / "metrics.jsonl"
        self.main = accelerator.is_main_process
        self._wandb = None
        if self.main and (mode := wandb_mode(job.run.wandb)) != "disabled":
            self._guard("start", lambda: self._start(job, run, mode))

    def _start(self, job: Job, run: RunFolder, mode: str) -> None:
        flags = dataclasses.asdict(job) | {"method_name": job.method_name}
        flags |= {f"origin_{key}": value for key, value in (flags.pop("origin") or {}).items()}
        parts = [flags.pop(name) for name in [*flags] if isinstance(flags[name], dict)]
        options = {
            "name": run.path.name,
            "group": job.run.wandb_group or job.preset,
            "job_type": job.role,
            "config": {key: value for part in (*parts, flags) for key, value in part.items()},
            "tags": [word[:64] for word in (job.preset, job.model, job.method_name, Path(job.data.source).name)],
            "dir": str(run.path),
            "id": run.wandb_id,
        }
        self._wandb = start_wandb(job.run.wandb_project, mode, options)
        self._wandb.define_metric("epoch")
        self._wandb.define_metric("*", step_metric="epoch")

    def rewrite(self, history: list[dict]) -> None:
        """Write the checkpoint's history to metrics.jsonl, so that no epoch is missing or there twice; and to W&B.

        Offline, W&B starts an empty folder at each resumption; the newest one then has the whole run.
        """
        if self.main:
            text = "".join(json.dumps(line) + "\n" for line in history)
            write_atomically(self.path, lambda partial: partial.write_text(text))
            self._guard("log", lambda: self._catch_up(history))

    def _catch_up(self, history: list[dict]) -> None:
        for line in [] if self._wandb.resumed else history:
            self._wandb.log(line)

    def log(self, line: dict) -> None:
        """Log one epoch's numbers."""
        if self.main:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            self._guard("log", lambda: self._wandb.log(line))

    def finish(self, summary: dict) -> None:
        """Log summary.json under its own keys, the curves, and the results table, and close the W&B run."""

        def close() -> None:
            import wandb

            head, rows = plain_table(summary)
            table = wandb.Table(columns=head, data=rows)
            self._wandb.log({"curves": wandb.Image(str(self.path.parent / "curves.png")), "results": table})
            self._wandb.summary.update(summary)
            self._wandb.finish()

        self._guard("finish", close)

    def _guard(self, what: str, work) -> None:
        """Do W&B work, if W&B is on. If it raises, print that once, and continue the run without W&B."""
        if what != "start" and self._wandb is None:
            return
        try:
            work()
        except Exception as error:  # W&B may raise anything
            self._wandb = None
            print(f"W&B failed to {what} ({one_line(error)}); the run continues without it", flush=True)


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
