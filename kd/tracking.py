"""Where a run's numbers go: metrics.jsonl always, Weights & Biases beside it. Neither can stop the training."""

import dataclasses
import json
import netrc
import os

from accelerate import Accelerator
from accelerate.tracking import WandBTracker

from kd.config import Job
from kd.files import write_atomically
from kd.run_folder import RunFolder


class Tracker:
    """One run's metrics.jsonl and W&B run. Only the main process writes."""

    def __init__(self, job: Job, run: RunFolder, accelerator: Accelerator):
        self.path = run.path / "metrics.jsonl"
        self.main = accelerator.is_main_process
        self._wandb = None
        if self.main and (mode := wandb_mode(job.run.wandb)) != "disabled":
            self._guard("start", lambda: self._start(job, run, mode))

    def _start(self, job: Job, run: RunFolder, mode: str) -> None:
        import wandb

        config = dataclasses.asdict(job)
        options = {
            "name": run.path.name,
            "group": job.run.wandb_group or job.preset,
            "job_type": job.role,
            "config": {**config.pop("data"), **config.pop("views"), **config.pop("fit"), **config.pop("run"), **config},
            "dir": str(run.path),
            "id": run.wandb_id,
            "resume": "allow",
            "settings": wandb.Settings(silent=True, init_timeout=30),
        }
        # Where the service cannot be reached the run is kept on disk; `wandb sync` sends it later.
        for attempt in dict.fromkeys((mode, "offline")):
            tracker = WandBTracker(job.run.wandb_project, mode=attempt, **options)
            try:
                tracker.start()
                break
            except Exception as error:
                if attempt == "offline":
                    raise
                print(f"W&B: {_line(error)}; keeping the run offline", flush=True)
        self._wandb = tracker
        self._wandb.run.define_metric("epoch")
        self._wandb.run.define_metric("*", step_metric="epoch")
        where = self._wandb.run.dir if self._wandb.run.offline else self._wandb.run.url
        print(f"W&B: {where}", flush=True)

    def rewrite(self, history: list[dict]) -> None:
        """Bring metrics.jsonl to what a checkpoint knows: no gap, no epoch twice."""
        if self.main:
            text = "".join(json.dumps(line) + "\n" for line in history)
            write_atomically(self.path, lambda partial: partial.write_text(text))

    def log(self, line: dict) -> None:
        """One epoch's numbers."""
        if self.main:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            self._guard("log", lambda: self._wandb.log(line))

    def finish(self, summary: dict) -> None:
        """The run's last word, under the same keys as summary.json."""

        def close() -> None:
            self._wandb.run.summary.update(summary)
            self._wandb.finish()

        self._guard("finish", close)

    def _guard(self, what: str, work) -> None:
        """Do it if W&B is on; whatever it raises is said once, and the run goes on without it."""
        if what != "start" and self._wandb is None:
            return
        try:
            work()
        except Exception as error:  # theirs to raise, ours to survive
            self._wandb = None
            print(f"W&B failed to {what} ({_line(error)}); the run goes on without it", flush=True)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def wandb_mode(asked: str) -> str:
    """online, offline or disabled; never one that would prompt for a key."""
    if asked == "auto":
        asked = os.environ.get("WANDB_MODE", "auto")
    if asked in ("offline", "disabled", "dryrun"):
        return "offline" if asked == "dryrun" else asked
    if has_wandb_key():
        return "online"
    print("W&B: no API key found (WANDB_API_KEY, or `wandb login`), so the run is kept offline", flush=True)
    return "offline"


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
