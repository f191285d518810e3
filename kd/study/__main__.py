"""Does distillation help here? A teacher, the controls and methods over several seeds, with equal budgets.

    python -m kd.study --preset digits --seeds 0 1 2
    python -m kd.study --methods kd dkd --seeds 0 1 2 --teacher-model resnet20 --student resnet8 --epochs 30
    python -m kd.study --preset digits --grid temperature=2,5,10 alpha=0.5,0.7,0.9
    python -m kd.study --preset digits --label-shares 0.1 1 --pretrain 'mimic --label-weight 0'

Every run is `accelerate launch distill_student.py` with its own run folder. The first student trains the teacher. The
same command started again continues: it reuses finished runs and resumes killed ones. All flags of distill_student.py
except a method's may follow. --grid tries all settings on the first seed and picks one on validation; only that setting
reads the test set. --label-shares repeats every run with these shares of the training labels; with --pretrain a student
distilled on all images is fine-tuned with them too. At the end the study writes the report (python -m kd.report).
"""

import hashlib
import sys
from pathlib import Path

from kd.config import DistillConfig, RunConfig, named_method
from kd.config.cli import parse
from kd.config.defaults import distill_defaults
from kd.config.methods import methods_without_labels
from kd.errors import UserError, exit_code, require, reworded
from kd.report.document import Block, Figure, Heading, Table
from kd.study.few_labels import run_few_labels
from kd.study.plan import Study, read_command_line
from kd.study.runner import Runner, Task
from kd.utils.console import one_line


def pick_setting(tasks: list[Task]) -> int:
    """The number of the setting with the best validation accuracy after its last epoch; of equals, the lower loss.

    Raises UserError if none has a validation score.
    """
    from kd.utils.files import is_number, read_json, read_json_lines  # imports torch

    scores = {}
    for number, task in enumerate(tasks):
        if task.folder is not None:
            try:
                top1 = read_json(task.folder / "summary.json").get("val_top1_last")
                last = read_json_lines(task.folder / "metrics.jsonl")[-1:]
            except UserError:
                continue  # changed since it was written: cannot be picked
            loss = last[0].get("val/loss") if last else None
            if is_number(top1) and is_number(loss):
                scores[number] = (-top1, loss, number)
    require(bool(scores), "no setting of the grid has a validation score to pick by")
    return min(scores, key=scores.get)


def run_study(study: Study) -> list[Task]:
    """Run all tasks, and return them with how each has ended. Raises UserError before any has started."""
    if study.shares:
        return run_few_labels(study)
    controls = study.controls()
    settings = {method: study.settings(method) for method in study.methods}
    trials = {
        method: [study.student(method, study.seeds[0], *flags, "--no-test") for flags in settings[method]]
        for method in study.methods
        if len(settings[method]) > 1
    }
    plain = {method: study.students(method, settings[method][0]) for method in study.methods if method not in trials}
    grid = [task for tasks in trials.values() for task in tasks]
    # The first student that needs a teacher trains it, beside the controls: started together, the others would wait.
    students = [task for method in study.methods for task in trials.get(method) or plain[method]]
    first = [task for task in students if task.needs_teacher][:1]
    total = len(controls) + len(grid) + len(study.methods) * len(study.seeds)
    with Runner(study.jobs, study.launch, study.out / "logs", total) as runner:
        for method in study.methods:
            if lacking := study.lacks(method):
                runner.say(f"{method}: not swept; it has no {', '.join(lacking)}")
        runner.run([*first, *controls])
        runner.run([task for task in grid if task not in first])
        for method in study.methods:
            if method in plain:
                runner.run([task for task in plain[method] if task not in first])
                continue
            try:
                picked = settings[method][pick_setting(trials[method])]
            except UserError as error:
                runner.skip(study.students(method, settings[method][0]), f"not started: {error}")
                continue
            runner.say(f"{method}: picked {' '.join(picked)} on validation")
            # The first seed of the picked setting is a trial that has finished: it only reads the test set.
            runner.run(study.students(method, picked))
        return runner.done


def check_unlabelled(study: Study, config: DistillConfig) -> None:
    """Raise UserError for what a study of images without labels cannot do; it has no controls, which need them."""
    for method in study.methods:
        task = study.students(method, study.settings(method)[0])[0]
        flags = parse(distill_defaults, "", task.args).method
        require(
            not flags.uses_labels,
            f"--methods {method}: is trained by labels, and --no-labels leaves them out; methods that need none:"
            f" {methods_without_labels()}; flags of a method are given by --grid (--grid alpha=1)",
        )
    require(
        bool(config.teachers or config.cache.cache_from),
        "--no-labels: there are no labels to train a teacher by; name a trained one with --teacher",
    )


def check_networks(config: DistillConfig) -> None:
    """Check that student and teachers exist and can be built, before any time goes into the controls.

    Raises UserError as the runs themselves would.
    """
    from kd.models import pretrained  # imports torch
    from kd.runs.load import load_network
    from kd.training import start
    from kd.utils.hub import local_folder
    from kd.utils.users_own import is_module_function

    start.check_networks(config)
    needed = config.method.needs_teacher and not config.cache.cache_from
    for name in config.teachers if needed else ():
        if config.method.embeds and is_module_function(name):
            continue  # built for the size of the images, which are not read yet
        if not pretrained.is_pretrained(name):
            load_network(local_folder(name), config.trust_code or not config.is_taught_by_named)
        elif pretrained.is_of_library(name):  # else it has been built
            network = pretrained.load_pretrained(name, config.teacher_model)
            if config.method.embeds:
                pretrained.build_embedder(network, name)
            elif not config.fine_tune_teacher:
                pretrained.build_pretrained(network, name)


def check_all_networks(study: Study) -> None:
    """`check_networks` for the methods, once for those that use a teacher alike, and for the first training."""
    kinds = {(named_method(method).embeds, named_method(method).needs_teacher): method for method in study.methods}
    for method in kinds.values():
        check_networks(parse(distill_defaults, "", [method, "--preset", study.preset, *study.rest]).for_method())
    if study.pretrain:
        first = parse(distill_defaults, "", study.pretraining(study.seeds[0]).args).for_method()
        with reworded(lambda text: f"--pretrain {' '.join(study.pretrain)}: {text}"):
            check_networks(first)


def check_batches(study: Study) -> None:
    """Check that a batch fits the images that the smallest share of the labels leaves, before anything is trained.

    Raises UserError as the runs themselves would.
    """
    if not study.shares:
        return
    from kd.config.defaults import settle
    from kd.data import load_data  # imports torch
    from kd.data.loader import check_batch

    share, seed, left = study.shares[0], study.seeds[0], {}
    tasks = [study.student("none", seed, "--label-share", share)]
    tasks += [study.fine_tuning(seed, share, "RUN")] if study.pretrain else []
    for task in tasks:
        config = parse(distill_defaults, "", task.args)
        if config.data not in left:
            left[config.data] = len(load_data(config.data).train.labels)
        with reworded(lambda text: f"--label-shares {share}: {text}"):
            check_batch(settle(config.fit, left[config.data], 1), left[config.data], 1)


def teacher_folders(runs: list[Path]) -> list[str]:
    """The folders of these finished runs' teachers, those fetched from the Hub included."""
    from kd.models.pretrained import is_pretrained  # imports torch
    from kd.runs.results import checked_summary, teachers_of

    names: list[str] = []
    for folder in runs:
        try:
            names += teachers_of(checked_summary(folder / "summary.json"))
        except UserError:
            continue  # the report says what is wrong with it
    return [name for name in dict.fromkeys(names) if Path(name).is_dir() and not is_pretrained(name)]


def main(args: list[str] | None = None) -> list[Task]:
    """Run the study and write its report; returns the tasks that failed."""
    study = read_command_line(args, __doc__)
    config = parse(distill_defaults, "", ["--preset", study.preset, *study.rest])
    require(
        config.data.val_fraction > 0 or not any(len(study.settings(method)) > 1 for method in study.methods),
        "--grid: picks on validation, which --val-fraction 0 leaves without images; give a larger fraction",
    )
    for method in study.methods:
        swept = len(study.settings(method)) > 1
        unlabelled = parse(distill_defaults, "", study.student(method, 0).args).for_method().data.no_labels
        require(
            not (swept and unlabelled),
            f"--grid: picks by accuracy on validation, which {method} without labels has none of; give one value of"
            " each flag",
        )
    if config.data.no_labels:
        check_unlabelled(study, config)
    check_all_networks(study)
    check_batches(study)
    from kd.models.pretrained import is_pretrained  # imports torch, which --help need not wait for
    from kd.report.build import command_line, show, write_report
    from kd.runs.results import Other

    tasks = run_study(study)
    failed = [task for task in tasks if task.failure]
    trained = list(dict.fromkeys(folder for task in tasks for folder in (*task.teachers, task.folder) if folder))
    named = [name for name in config.teachers if Path(name).is_dir() and not is_pretrained(name)]
    failures = tuple(Other(task.label, "failed", task.failure) for task in failed)
    folders = [*map(str, trained), *teacher_folders(trained), *named]
    command = command_line("kd.study", args)
    blocks = write_report(folders, study.out, failures, config.trust_code, trained=trained, command=command)
    show(blocks, study.out)
    track_report(blocks, study.out, config.run)
    return failed


def track_report(blocks: list[Block], out: Path, config: RunConfig) -> None:
    """Log the report's tables, figures and page as one more run of the study's group, of job type `study`."""
    from kd.training.tracking import start_wandb, wandb_mode  # imports torch

    if "wandb" not in config.track or (mode := wandb_mode(config.wandb)) == "disabled":
        return
    # The same study written again is the same run.
    run_id = hashlib.sha256(f"{out.resolve()} {config.wandb_group}".encode()).hexdigest()[:8]
    options = {"name": config.wandb_group, "group": config.wandb_group, "job_type": "study"}
    try:
        run = start_wandb(config.wandb_project, mode, options | {"dir": str(out), "id": run_id})
        run.log(_wandb_media(blocks, out))
        run.finish()
    except Exception as error:  # whatever W&B raises, the study goes on
        print(f"W&B failed to keep the report ({one_line(error)}); it is in {out}", flush=True)


def _wandb_media(blocks: list[Block], out: Path) -> dict:
    """The page, and every table and figure under its title."""
    import wandb

    media, part, title = {"report": wandb.Html(str(out / "report.html"), inject=False)}, "", ""
    for block in blocks:
        if isinstance(block, Heading):
            # Every data set has its own tables. W&B takes a slash for a level of its own.
            part = block.text.replace("/", ".") if block.level == 2 else part
            title = part if block.level == 2 else f"{part}/{block.text}"
        elif isinstance(block, Table):
            media[title] = wandb.Table(columns=list(block.head), data=[list(row) for row in block.rows])
        elif isinstance(block, Figure):
            media[Path(block.file).stem] = wandb.Image(str(out / block.file), caption=block.caption)
    return media


if __name__ == "__main__":
    failed = []
    code = exit_code(lambda: failed.extend(main()), "finished runs are kept; the same command goes on")
    sys.exit(code or int(bool(failed)))
