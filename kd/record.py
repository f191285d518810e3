"""What config.json tells of a run: its flags, versions and machine."""

import dataclasses
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator

from kd.config import Job
from kd.data import Data
from kd.images.builtin_data import BUILT_IN


def record(job: Job, identity: dict, wandb_id: str, data: Data, accelerator: Accelerator) -> dict:
    source = job.data.source
    packages = ("torch", "torchvision", "accelerate", "datasets", "numpy")
    return {
        "identity": identity,
        "flags": dataclasses.asdict(job),
        "data": {"rows": len(data.train.labels), "mean": data.mean, "std": data.std, "classes": len(data.classes)}
        | {"held": data.held}
        | {"images_per_class": torch.bincount(data.train.labels, minlength=len(data.classes)).tolist()}
        # A name alone does not tell a folder from a Hub id, once it is read elsewhere.
        | {"folder": source not in BUILT_IN and Path(source).expanduser().is_dir()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "git_commit": _git_commit(),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": str(accelerator.device),
        "wandb_id": wandb_id,
    }


def _git_commit() -> str | None:
    try:
        command = ["git", "rev-parse", "HEAD"]
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
