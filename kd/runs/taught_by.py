"""What a student's identity says of its teachers, and whether some runs are they."""

import hashlib
import json

from kd.errors import UserError
from kd.runs.results import Run
from kd.utils.files import read_json


def teacher_identity(sha256: str, info: dict) -> str:
    """What a student's identity says of a run as its teacher: its logits depend on normalisation and classes as well.

    `sha256`: of the weights; `info`: model.json."""
    return hashlib.sha256(f"{sha256} {json.dumps(info, sort_keys=True)}".encode()).hexdigest()


def embedder_identity(sha256: str, info: dict) -> str:
    """The same of a teacher of embeddings, which no class names change."""
    expected = json.dumps([info.get(key) for key in ("image_size", "mean", "std", "model_args")])
    return hashlib.sha256(f"embedding {sha256} {expected}".encode()).hexdigest()


def joint_identity(members: list[str]) -> str:
    """The same of several teachers, by their own."""
    return members[0] if len(members) == 1 else hashlib.sha256("".join(members).encode()).hexdigest()


def taught_by(run: Run, teachers: list[Run]) -> bool:
    """Whether the teachers' weights are those that taught the run: a folder's may be other ones since. True if that
    cannot be known: a kept run has no model.json."""
    digests = [teacher.summary.get("weights_sha256") for teacher in teachers]
    try:
        infos = [read_json(teacher.path / "model.json") for teacher in teachers]
    except UserError:
        return True
    if not all(digests):
        return True
    members = [[kind(*its) for its in zip(digests, infos)] for kind in (teacher_identity, embedder_identity)]
    return run.identity.get("teacher") in [joint_identity(names) for names in members]
