"""Trying things before anything expensive starts."""

from pathlib import Path

from accelerate import Accelerator
from torch import nn

from kd.batches import check_batch
from kd.config import Job
from kd.data import Data
from kd.errors import UserError
from kd.models import build_model, probe
from kd.outputs import Outputs, Pair
from kd.teacher import Frozen


def probe_pair(student: nn.Module, teacher: Frozen | None, data: Data) -> Pair:
    """Both networks' outputs on two grey images of the data's size; neither is changed."""
    theirs = Outputs(probe(teacher.network, data.size, str(teacher.folder))) if teacher else None
    return Pair(Outputs(probe(student, data.size, "student")), theirs)


def try_out(job: Job, data: Data, accelerator: Accelerator) -> None:
    """Raises UserError where the job could not start later: its network, its batch, its folder. Trains nothing."""
    build_model(job.model, len(data.classes), data.size)
    check_batch(job.fit.batch_size, len(data.train.labels), accelerator.num_processes)
    if job.run.out:
        try:
            Path(job.run.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {job.run.out} ({error}); choose another --out") from error
