"""A study over shares of the labels: from scratch, taught with labels, and distilled on all images, then fine-tuned."""

from pathlib import Path

from kd.study.plan import Study, needs_own_teacher, pretrains_own_teacher
from kd.study.runner import Runner, Task

UNTAUGHT = "not started: no teacher was trained with all labels"


def run_few_labels(study: Study) -> list[Task]:
    """Run the controls, the methods and the fine-tuning with every share; return all tasks with how each has ended.

    All students of the recipe's own teacher share the one that was trained with all labels. Raises UserError before any
    task has started.
    """
    pretraining = [study.pretraining(seed) for seed in study.seeds] if study.pretrain else []
    controls = [task for share in study.shares for task in study.controls(share)]
    untaught = [method for method in study.methods if needs_own_teacher(study, method)]
    others = [] if pretrains_own_teacher(study) else pretraining  # whose teacher, if any, is not the methods'
    total = len(pretraining) + len(controls) + len(study.seeds) * len(study.shares) * len(study.methods)
    total += len(study.seeds) * len(study.shares) if study.pretrain else 0
    with Runner(study.jobs, study.launch, study.out / "logs", total) as runner:
        # The first student that needs a teacher trains it, beside the controls: started together, others would wait.
        runner.run([*pretraining[:1], *controls])
        runner.run(pretraining[1:])
        for method in study.methods:
            for share in reversed(study.shares):  # all labels first, for the teacher
                found = (folder for task in runner.done if task not in others for folder in task.teachers)
                _run_method(runner, study, method, share, method in untaught, next(found, None))
        for share in study.shares if study.pretrain else ():
            _run_fine_tuning(runner, study, share, pretraining)
        return runner.done


def _run_method(runner: Runner, study: Study, method: str, share: str, untaught: bool, teacher: Path | None) -> None:
    """A method's runs with a share; `untaught`: its teacher is the recipe's own, which is in `teacher` if trained."""
    tasks = study.with_share(method, share, teacher if untaught else None)
    if not untaught or teacher:
        runner.run(tasks)
    elif float(share) == 1:  # the first of them trains it
        runner.run(tasks[:1])
        runner.run(tasks[1:])
    else:
        runner.skip(tasks, UNTAUGHT)


def _run_fine_tuning(runner: Runner, study: Study, share: str, pretraining: list[Task]) -> None:
    """Fine-tune, with a share, what the same seed has distilled."""
    folders = {seed: task.folder for seed, task in zip(study.seeds, pretraining, strict=True)}
    ready = [study.fine_tuning(seed, share, str(folder)) for seed, folder in folders.items() if folder]
    lost = [study.fine_tuning(seed, share, "RUN") for seed, folder in folders.items() if not folder]
    runner.run(ready)
    runner.skip(lost, "not started: the run to start from failed")
