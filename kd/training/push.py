"""--push-to: a run on the Hub, when it is finished and, with --push-every, while it is trained.

A failed upload is one printed line: it never stops a training.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from kd.compress import plain_weights
from kd.config import Job
from kd.runs.folder import RunFolder
from kd.runs.public import without_paths
from kd.training.summary import model_info
from kd.training.trainer import Trainer
from kd.utils.console import one_line
from kd.utils.files import read_json, write_json, write_text, write_weights
from kd.utils.hub import upload

FILES = (
    "model.safetensors",
    "best.safetensors",
    "ema.safetensors",
    "model.json",
    "config.json",
    "summary.json",
    "metrics.jsonl",
)

ABOUT = ("summary.json", "config.json")  # name folders of this machine

GOES_ON = "; the training goes on"

_uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
_running: dict[str, Future] = {}  # by repository: the newest upload


def push_epoch(trainer: Trainer, epoch: int) -> None:
    """Every --push-every epochs, upload the weights as they are now, while the training goes on.

    Does nothing while the last upload still runs.
    """
    job, run = trainer.job, trainer.run
    due = job.run.push_every and (epoch + 1) % job.run.push_every == 0 and epoch + 1 < job.fit.epochs
    if not due or not trainer.accelerator.is_main_process:
        return
    name = job.run.push_to
    if name in _running and not _running[name].done():
        print(f"--push-to {name}: epoch {epoch + 1} is left out, the last upload still runs", flush=True)
        return
    what = f"epoch {epoch + 1}"
    with _said(name, what, GOES_ON):
        folder = _gather(
            run.path,
            ("config.json", "metrics.jsonl"),
            _card(job, f"Epoch {epoch + 1} of {job.fit.epochs}; kd.load takes the finished run."),
            trainer,
        )
        _running[name] = _uploads.submit(_upload, folder, name, what, GOES_ON)


def push_run(job: Job, run: RunFolder) -> None:
    """Upload the finished run. The main process calls it; prints where the run is, or why it is not there."""
    name = job.run.push_to
    if name is None:
        return
    if name in _running:
        _running.pop(name).result()
    summary = read_json(run.path / "summary.json")
    split = "Validation" if summary.get("test_split") == "validation" else "Test"
    result = f"{split} top-1 {summary['test_top1']:.2f}%." if summary.get("test_top1") is not None else ""
    what, remedy = "the finished run", "; the same command tries again"
    with _said(name, what, remedy):
        _upload(_gather(run.path, FILES, _card(job, result, name)), name, what, remedy)


@contextmanager
def _said(name: str, what: str, remedy: str) -> Iterator[None]:
    """Print in one line what fails inside: the HTTP client's own errors differ between versions of the library."""
    try:
        yield
    except Exception as error:
        print(f"--push-to {name}: {what} was not uploaded ({one_line(error)}){remedy}", flush=True)


def _gather(source: Path, files: Sequence[str], card: str, trainer: Trainer | None = None) -> Path:
    """A new folder with the files that `source` has, the card, and with a trainer its weights as they are now.

    Summary and configuration lose the paths of this machine.
    """
    folder = Path(tempfile.mkdtemp(prefix="kd-push-"))
    try:
        for file in files:
            if (source / file).exists():
                shutil.copy(source / file, folder)
        about = [read_json(folder / name) if (folder / name).exists() else {} for name in ABOUT]
        for name, content in zip(ABOUT, without_paths(*about), strict=True):
            if content:
                write_json(folder / name, content)
        if trainer is not None:
            write_weights(folder / "model.safetensors", plain_weights(trainer.distiller.deployed))
            write_json(folder / "model.json", model_info(trainer))
        write_text(folder / "README.md", card)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _upload(folder: Path, name: str, what: str, remedy: str) -> None:
    """Upload the folder and remove it."""
    try:
        with _said(name, what, remedy):
            print(f"pushed {what}: {upload(folder, name, f'kd: {what}')}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _card(job: Job, result: str, name: str = "") -> str:
    """A model card: what the network is and, given the `name` of its repository, how to load it."""
    made = {"teacher": "trained", "none": "trained alone"}.get(job.role, f"distilled ({job.role})")
    task = "image-feature-extraction" if job.method.embeds else "image-classification"
    holds = "the embedding's width" if job.method.embeds else "class names"
    trust = ", trust_code=True" if ":" in job.model else ""
    load = f"    import kd\n    network = kd.load({name!r}{trust})\n\n" if name else ""
    return (
        f"---\nlibrary_name: kd\npipeline_tag: {task}\n---\n\n"
        f"# {job.model}\n\n{made} on {Path(job.data.source).name} with the recipe `{job.preset}`, seed {job.fit.seed}."
        f" {result}\n\n{load}"
        f"`model.json` has image size, mean, std and {holds}; `config.json` every flag.\n"
    )
