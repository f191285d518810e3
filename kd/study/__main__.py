"""Does distillation help here? A teacher, the controls and methods over several seeds, with equal budgets.

    python -m kd.study --preset digits --seeds 0 1 2
    python -m kd.study --methods kd dkd --seeds 0 1 2 --teacher-model resnet20 --student resnet8 --epochs 30
    python -m kd.study --preset digits --grid temperature=2,5,10 alpha=0.5,0.7,0.9

Every run goes through `accelerate launch` and the two scripts, into their own run folders: finished ones are reused,
killed ones resumed, and the same command started again goes on. All flags of distill_student.py that are no method's
may follow. --grid sweeps a method's flags on the first seed, picks on validation, and only the picked setting reads the
test set. It ends with the report (python -m kd.report).
"""

import hashlib
import sys
from pathlib import Path

from kd.config import METHODS, DistillConfig, RunConfig
from kd.config.cli import parse
from kd.config.presets import distill_defaults
from kd.errors import UserError, exit_code, require
from kd.report.document import Block, Figure, Heading, Table
from kd.study.plan import Study, read_command_line
from kd.study.runner import Runner, Task


def pick_setting(tasks: list[Task]) -> int:
    """The setting that was best on validation after its last epoch; of equals the one with the lower loss.

    Raises UserError where none has finished, or there is no validation split.
    """
    from kd.utils.files import is_number, read_json, read_json_lines  # which imports torch

    scores = {}
    for number, task in enumerate(tasks):
        if task.folder is not None:
            try:
                top1 = read_json(task.folder / "summary.json").get("val_top1_last")
                last = read_json_lines(task.folder / "metrics.jsonl")[-1:]
            except UserError:
                continue  # somebody has touched it since: no setting to pick
            loss = last[0].get("val/loss") if last else None
            if is_number(top1) and is_number(loss):
                scores[number] = (-top1, loss, number)
    require(bool(scores), "no setting of the grid has a validation score to pick by")
    return min(scores, key=scores.get)


def run_study(study: Study) -> list[Task]:
    """Run everything there is to run; each task knows how it ended. Raises UserError before any has started."""
    first, controls = study.teacher(), study.controls()
    sweeps = {method: study.settings(method) for method in study.methods}
    swept = {method: settings for method, settings in sweeps.items() if len(settings) > 1}
    trials = {
        method: [study.student(method, study.seeds[0], *setting, "--no-test") for setting in settings]
        for method, settings in swept.items()
    }
    students = lambda method, flags: [study.student(method, seed, *flags) for seed in study.seeds]  # noqa: E731
    plain = {method: students(method, settings[0]) for method, settings in sweeps.items() if method not in swept}
    grid = [task for tasks in trials.values() for task in tasks]
    total = len(first) + len(controls) + len(grid) + len(study.methods) * len(study.seeds)
    with Runner(study.jobs, study.launch, study.out / "logs", total) as runner:
        for method in study.methods:
            if lacking := study.lacks(method):
                runner.say(f"{method}: not swept; it has no {', '.join(lacking)}")
        runner.run([*first, *controls])
        without = "its teacher failed" if any(task.failure for task in first) else ""
        runner.skip(grid, without) if without else runner.run(grid)
        for method, settings in sweeps.items():
            flags, why = settings[0], without
            if method in swept and not without:
                try:
                    flags = settings[pick_setting(trials[method])]
                    runner.say(f"{method}: picked {' '.join(flags)} on validation")
                except UserError as error:
                    why = str(error)
            # A picked setting's first seed is a trial that has finished: it only reads the test set.
            tasks = plain.get(method) or students(method, flags)
            runner.skip(tasks, why) if why else runner.run(tasks)
        return runner.done


def check_networks(config: DistillConfig, methods: tuple[str, ...]) -> None:
    """See that the student and the teachers are there and can be built, before any time goes into the controls.

    Raises UserError as the runs themselves would.
    """
    from kd.models import (
        check_name,
        pretrained,  # these import torch
    )
    from kd.runs.load import load_network
    from kd.utils.hub import local_folder

    check_name(config.student)
    if not any(METHODS[method].needs_teacher for method in methods):
        return
    if not config.teachers:
        check_name(config.teacher_model)
    for name in config.teachers:
        if not pretrained.is_pretrained(name):
            load_network(local_folder(name), config.trust_code or not config.teacher)  # --init is the user's own
            continue
        found = pretrained.load_pretrained(name, config.teacher_model)
        check_name(found.model)
        if not config.fine_tune_teacher:
            pretrained.build_pretrained(found, name)


def teacher_folders(runs: list[Path]) -> list[str]:
    """The folders of these finished runs' teachers, those fetched from the Hub included."""
    from kd.runs.results import checked_summary, teachers_of  # imports torch

    names: list[str] = []
    for folder in runs:
        try:
            names += teachers_of(checked_summary(folder / "summary.json"))
        except UserError:
            continue  # the report says what is wrong with it
    return [name for name in dict.fromkeys(names) if Path(name).is_dir()]


def main(args: list[str] | None = None) -> list[Task]:
    """The study and its report; returns the runs that failed."""
    study = read_command_line(args, __doc__)
    config = parse(distill_defaults, "", ["--preset", study.preset, *study.rest])
    require(
        config.data.val_fraction > 0 or not any(len(study.settings(method)) > 1 for method in study.methods),
        "--grid: picks on validation, and there is none with --val-fraction 0; give a share",
    )
    check_networks(config, study.methods)
    from kd.report.build import show, write_report  # they import torch, which --help need not wait for
    from kd.runs.results import Other

    tasks = run_study(study)
    failed = [task for task in tasks if task.failure]
    trained = [task.folder for task in tasks if task.folder]
    folders = [*map(str, trained), *teacher_folders(trained), *(name for name in config.teachers if Path(name).is_dir())]
    failures = tuple(Other(task.label, "failed", task.failure) for task in failed)
    blocks = write_report(folders, study.out, failures, config.trust_code, trained=trained)
    show(blocks, study.out)
    track_report(blocks, study.out, config.run)
    return failed


def track_report(blocks: list[Block], out: Path, config: RunConfig) -> None:
    """A study's tables, figures and page as one more run of its group, job type `study`."""
    from kd.training.tracking import _line, start_wandb, wandb_mode  # which imports torch

    if (mode := wandb_mode(config.wandb)) == "disabled":
        return
    # The same study written again is the same run.
    name = hashlib.sha256(f"{out.resolve()} {config.wandb_group}".encode()).hexdigest()[:8]
    options = {
        "name": config.wandb_group,
        "group": config.wandb_group,
        "job_type": "study",
        "dir": str(out),
        "id": name,
    }
    try:
        import wandb

        run = start_wandb(config.wandb_project, mode, options)
        media, part, title = {"report": wandb.Html(str(out / "report.html"), inject=False)}, "", ""
        for block in blocks:
            if isinstance(block, Heading):
                # Every set of images has its tables; a slash would be one of W&B's own levels.
                part = block.text.replace("/", ".") if block.level == 2 else part
                title = part if block.level == 2 else f"{part}/{block.text}"
            elif isinstance(block, Table):
                media[title] = wandb.Table(columns=list(block.head), data=[list(row) for row in block.rows])
            elif isinstance(block, Figure):
                media[Path(block.file).stem] = wandb.Image(str(out / block.file), caption=block.caption)
        run.log(media)
        run.finish()
    except Exception as error:  # theirs to raise, ours to survive
        print(f"W&B failed to keep the report ({_line(error)}); it stands in {out}", flush=True)


if __name__ == "__main__":
    failed = []
    code = exit_code(lambda: failed.extend(main()))
    sys.exit(code or int(bool(failed)))
