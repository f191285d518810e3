"""Measurements kept in a repository: small files of finished runs, and the page of tables that is made from them.

    python -m kd.report --keep docs/measurements/quick --command "..." runs/*     keep runs as one measurement
    python -m kd.report --from docs/measurements                                  write README.md there anew

A measurement is a folder with measurement.json (title, commands, machine, date) and of each run config.json,
metrics.jsonl, summary.json and test_correct.json: no weights, and no paths of the machine.
"""

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median

from kd.errors import UserError, require
from kd.report.document import Block, Heading, Lines, Paragraph, Table, markdown
from kd.report.groups import ALONE, Comparison, Group, by_data, compare_groups
from kd.report.opening import trained_on
from kd.report.tables import said_of_smoothing
from kd.runs.comparison import Answers, format_p
from kd.runs.public import without_paths
from kd.runs.results import Run, collect_runs, identity_of, read_config, read_correct, write_correct
from kd.runs.table import METRICS
from kd.utils.files import read_json, write_folder, write_json, write_text
from kd.utils.system import cpu_name

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")  # of a measurement: its heading's anchor as well
FACTS = ("title", "machine", "date", "note")  # texts of measurement.json, beside its commands
SCORES = (
    *("val_top1_last", "val_loss_last", "test_top1", "test_nll", "test_ece", "agreement"),
    *("probe_knn", "probe_linear"),
)
COLUMNS = [METRICS[key] for key in SCORES]
INTRODUCTION = (
    "Made from the files beside this page by `python -m kd.report --from docs/measurements`. Percent, NLL in nats; mean"
    " ± standard deviation over seeds, of the last epoch's weights. Gain: points of test accuracy against the student"
    " alone (one that smooths labels if there is no other), paired by seed, with the 95% interval of seeds and test"
    " images; p corrected (Holm) for all comparisons of the methods with their controls, those with label smoothing"
    " too. Time: the median of the runs."
)


def keep(patterns: list[str], folder: Path, commands: Sequence[str]) -> list[Path]:
    """Keep the finished runs that `patterns` name in `folder`, and return their folders there.

    What is no finished run is printed. measurement.json gets the commands that it lacks, and with any of them the
    runs' processors (this machine's, of older runs) and the day of the last one.
    Raises UserError if a name does not serve or is another run's, no run is finished, one lacks a file, or no command
    is given for a new measurement.
    """
    fits = NAME.fullmatch(folder.name)
    require(bool(fits), f"--keep {folder}: name the folder in small letters, digits and single hyphens")
    runs, others = collect_runs(patterns)
    for other in others:
        print(f"left out: {other.path}, {other.state}: {other.why}", flush=True)
    require(bool(runs), f"{' '.join(patterns)}: no finished run to keep")
    about = folder / "measurement.json"
    known = _read_about(about) if about.exists() else {"title": folder.name.replace("-", " ").capitalize(), "note": ""}
    require(bool(commands) or about.exists(), f"--keep {folder}: add --command with what trained these runs")
    names = _names([run.path.resolve() for run in runs])
    kept_as = {path.parent.name: identity_of(path.parent) for path in folder.glob("*/summary.json")}
    for run in runs:
        names |= {run.path.resolve(): name for name, identity in kept_as.items() if identity == _kept_identity(run)}
    for run in runs:
        _check_keepable(run, folder / names[run.path.resolve()])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = [_keep_run(run, names, folder) for run in runs]
    except OSError as error:
        raise UserError(f"--keep {folder}: cannot be written ({error.strerror}); name another folder") from error
    if new := [command for command in commands if command not in known.get("commands", [])]:
        last = max((run.path / "summary.json").stat().st_mtime for run in runs)
        configs = [read_config(run.path) for run in runs]
        machines = dict.fromkeys(str(config.get("gpu") or config.get("cpu") or cpu_name()) for config in configs)
        facts = {"machine": ", ".join(machines), "date": date.fromtimestamp(last).isoformat()}
        write_json(about, known | {"commands": [*known.get("commands", []), *new]} | facts)
    return kept


def _check_keepable(run: Run, target: Path) -> None:
    """Raise UserError unless the run has what is kept of it, and `target` holds nothing else than this run."""
    history = run.path / "metrics.jsonl"
    require(history.is_file(), f"{run.path}: has no metrics.jsonl, as an export; name the run itself")
    if run.tested:
        read_correct(run.path, run.summary)
    if (target / "summary.json").exists():
        same = identity_of(target) in ({}, _kept_identity(run))  # a damaged one is kept anew
        require(same, f"{target} is kept of another run; rename the folder of {run.path}")


def _names(paths: list[Path]) -> dict[Path, str]:
    """What each run's folder is called where it is kept: its name; if others have that too, its parent's before it."""
    several = Counter(path.name for path in paths)
    names = {path: path.name if several[path.name] == 1 else f"{path.parent.name}-{path.name}" for path in paths}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    require(not twice, f"two runs are called {twice and twice[0]}; rename the folder of one of them")
    return names


def _keep_run(run: Run, names: dict[Path, str], parent: Path) -> Path:
    folder = parent / names[run.path.resolve()]
    summary, config = without_paths(run.summary, read_config(run.path))
    for key in ("teacher", "control"):
        if isinstance(name := run.summary.get(key), str):
            summary[key] = names.get(Path(name).resolve(), summary[key])

    def write(partial: Path) -> None:
        write_json(partial / "summary.json", summary)
        write_json(partial / "config.json", config)
        shutil.copyfile(run.path / "metrics.jsonl", partial / "metrics.jsonl")
        if run.tested:
            write_correct(run.path, run.summary, partial)

    write_folder(folder, write)
    return folder


def write_page(root: Path) -> str:
    """Write README.md with every measurement below `root`, and return its text. Raises UserError as `page` does."""
    text = page(root)
    write_text(root / "README.md", text)
    return text


def page(root: Path) -> str:
    """The page of all measurements below `root`. Raises UserError if there is none, or for a damaged file."""
    folders = sorted(path.parent for path in root.glob("*/measurement.json"))
    require(bool(folders), f"--from {root}: has no measurements; keep one with --keep {root}/NAME --command C RUN...")
    blocks: list[Block] = [Heading(1, "Measurements"), Markdown(INTRODUCTION)]
    for folder in folders:
        blocks += section(folder)
    return markdown(blocks)


class Markdown(Paragraph):
    """Text that is Markdown already."""

    def markdown(self) -> str:
        return self.text


def section(folder: Path) -> list[Block]:
    """Heading, commands, machine and tables of one measurement."""
    about = _read_about(folder / "measurement.json")
    runs, others = collect_runs([str(folder)])
    require(bool(runs) or bool(others), f"{folder}: has no run; keep its runs again")
    if others:
        raise UserError(f"{others[0].path}: {others[0].why}; remove that folder, or keep its run again")
    runs = [_beside(run) for run in runs]
    machines = ", ".join(dict.fromkeys(trained_on(read_config(run.path)) for run in runs))
    blocks: list[Block] = [Markdown(f'<a id="{folder.name}"></a>'), Heading(2, about["title"])]
    blocks.append(Markdown("\n".join(f"    {command}" for command in about["commands"])))
    blocks.append(Paragraph(f"{about['machine']}; {machines}; {_versions(runs)}; {about['date']}."))
    for groups in by_data(runs).values():
        blocks += _tables(groups)
    return blocks + ([Markdown(about["note"])] if about["note"] else [])


def _read_about(path: Path) -> dict:
    about = read_json(path)
    commands = about.get("commands")
    valid = all(isinstance(about.get(key), str) for key in FACTS) and isinstance(commands, list) and bool(commands)
    valid = valid and all(isinstance(command, str) for command in commands)
    require(valid, f"{path}: needs the texts {', '.join(FACTS)} and a list of commands")
    return about


def _beside(run: Run) -> Run:
    """The run with its teacher and control, which are kept by name, as the paths of the folders beside it."""
    run.summary.update(
        {key: _resolved(run.summary.get(key), run.path.parent) for key in ("teacher", "control") if key in run.summary}
    )
    return run


def _kept_identity(run: Run) -> dict:
    """The run's identity as it is kept: without the paths among the flags of a method of one's own."""
    return without_paths(run.summary, read_config(run.path))[1]["identity"]


def _resolved(names: str | list | None, folder: Path) -> str | list | None:
    if isinstance(names, list):
        return [_resolved(name, folder) for name in names]
    return str(folder / names) if names and (folder / names).is_dir() else names


def _versions(runs: list[Run]) -> str:
    torches = dict.fromkeys(str(read_config(run.path).get("versions", {}).get("torch")) for run in runs)
    precisions = dict.fromkeys({"no": "fp32"}.get(p := str(run.identity.get("mixed_precision")), p) for run in runs)
    return f"torch {', '.join(torches)}; {', '.join(precisions)}"


def _tables(groups: list[Group]) -> list[Block]:
    """Accuracies of all groups with their gains, and the sentences that must stand below them."""
    _name_by_preset(groups)
    answers = Answers()
    every = compare_groups(groups, answers)
    plain = {id(one.group) for one in every if one.control.kind == ALONE}
    # Beside a student alone, one with label smoothing is no control; where there is no other, it is.
    found = [one for one in every if one.control.kind == ALONE or id(one.group) not in plain]
    comparisons = {id(one.group): one for one in found}
    require(not answers.notes, "; ".join(answers.notes))
    twice = [one.group.title for one in found if comparisons[id(one.group)] is not one]
    require(not twice, f"{', '.join(twice)}: has several students alone to compare with; keep one recipe's")
    columns = [metric for metric in COLUMNS if any(group.values(metric.key) for group in groups)]
    head = ("network", "model", "seeds", *(metric.report or metric.title for metric in columns), "time")
    head += ("gain (95% interval)", "p", "corrected") if comparisons else ()
    rows = [_row(group, columns, comparisons.get(id(group)))[: len(head)] for group in groups]
    blocks: list[Block] = [Table(head, rows, words=2)]
    words = []
    if any(one.difference and one.difference.of_seeds is None for one in comparisons.values()):
        words.append("Without an interval the seeds' noise is unknown, and p holds that of the test images alone.")
    words += said_of_smoothing(found)
    if any(group.distilled and group.shared_teachers == 1 for group in groups):
        words.append("All seeds of a student share one teacher: this says nothing about other teachers.")
    return [*blocks, Lines(tuple(words))] if words else blocks


def _name_by_preset(groups: list[Group]) -> None:
    """Call groups that were trained by several presets after these, in place of all the flags that differ."""
    presets = [str(read_config(group.runs[0].path)["flags"].get("preset")) for group in groups]
    kinds = [(group.name, group.model) for group in groups]
    for group, preset, kind in zip(groups, presets, kinds, strict=True):
        alike = [other for other, its in zip(presets, kinds, strict=True) if its == kind]
        if len(set(alike)) == len(alike) > 1:
            group.setting = f"preset {preset}"


def _row(group: Group, columns: list, comparison: Comparison | None) -> tuple[str, ...]:
    seconds = median(group.values("seconds") or [0.0])  # a run that was paused counts its pause
    spent = f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s"
    cells = (group.label, group.model, group.count, *(group.cell(metric) for metric in columns), spent)
    found = comparison and comparison.difference
    if not found:
        return (*cells, "", "", "")
    gain = f"{found.mean:+.2f} ({found.interval})" if found.interval else f"{found.mean:+.2f}"
    return (*cells, gain, format_p(found.p), format_p(comparison.corrected))
