"""kd.bench: what happens rarely counts as often as it happens, whatever the window. No timing is asserted."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from kd.bench import __main__ as bench
from kd.bench import measure, startup
from kd.bench.measure import Loop, Shape, Workload, Workloads, shape_of, summarise, time_in_turns
from kd.config import DataConfig
from kd.data import Split, load_data, loader
from kd.data.loader import Pixels
from kd.errors import UserError
from kd.losses.base import Distiller
from kd.training import trainer as training
from kd.training.meter import Meter
from kd.types import Batch, Outputs

KEYS = {
    "bare_images_per_second", "live_images_per_second", "cached_images_per_second", "teacher_images_per_second",
    "evaluation_images_per_second", "epoch_over_bare", "live_over_ideal", "cached_over_ideal", "validation_share",
}  # fmt: skip

PLAIN = "tests.networks:plain"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"batch_size": 0}, "--batch-size 0: give 1 or more"),
        ({"threads": -1}, "--threads -1: give 1 to 1024"),
        ({"json": Path("no/such/numbers.json")}, "--json no/such/numbers.json: its folder does not exist"),
        ({"steps": 0}, "--steps 0: give 1 or more"),
        ({"image_size": 2}, "--image-size 2: give 4 or more"),
    ],
)
def test_wrong_flags_are_refused_before_any_data_is_read(flags, words):
    with pytest.raises(UserError, match=words):
        bench.main(bench.BenchConfig(data="no such data", **flags))


def test_the_time_to_the_first_step_is_that_of_one(monkeypatch):
    steps = []
    monkeypatch.setattr(measure.Workloads, "evaluation", lambda self: Workload(lambda: None))
    monkeypatch.setattr(measure.Workloads, "_distiller", counted(measure.Workloads._distiller, steps))
    clock = iter(map(float, range(100)))
    monkeypatch.setattr(startup.time, "perf_counter", lambda: (steps.append("clock"), next(clock))[1])
    startup.main({"data": "synthetic", "model": PLAIN, "teacher_model": PLAIN, "threads": 1})
    first = [number for number, what in enumerate(steps) if what == "clock"][1:3]
    assert steps[first[0] : first[1]].count("step") == 1


def counted(build, steps: list):
    def built(self):
        distiller = build(self)
        distiller.register_forward_hook(lambda *_: steps.append("step"))
        return distiller

    return built


def test_images_of_several_sizes_are_brought_to_one():
    for split, size in (("train", 12), ("train", 14), ("test", 16)):
        for name in "ab":
            folder = Path("photos", split, name)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(20):
                Image.new("RGB", (size, size)).save(folder / f"{size}-{number}.png")
    flags = {"model": PLAIN, "teacher_model": PLAIN, "batch_size": 8, "steps": 2, "rounds": 1, "threads": 1}
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "show", said.append)
        bench.main(bench.BenchConfig("photos", image_size=8, **flags))
    assert said[0]["image_size"] == [8, 8]
    assert said[0]["warm_first_step_seconds"] > 0


@pytest.mark.slow
def test_it_measures_both_precisions_and_writes_its_keys(capsys):
    flags = {"data": "synthetic", "model": "tests.networks:plain", "teacher_model": "tests.networks:normalised"}
    bench.main(bench.BenchConfig(**flags, steps=3, rounds=2, json=Path("numbers.json")))
    numbers = json.loads(Path("numbers.json").read_text())
    assert numbers["precisions"].keys() == {"fp32", "bf16"}
    for measured in numbers["precisions"].values():
        assert measured.keys() >= KEYS
        assert all(measured[key] > 0 for key in KEYS)
    assert numbers["bf16_over_fp32_cached"] > 0
    assert numbers["warm_first_step_seconds"] > 0
    assert numbers["warm_peak_gib"] > 0
    said = capsys.readouterr().out
    assert "cached epoch over bare" in said
    assert any(words in said for words in ("bf16 pays", "bf16 does not pay", "bf16: undecided"))


class Clock:
    """Time that passes only in what a training spends it on; so much for each, in any order."""

    STEP, TEACHER, BATCH, BEGIN, COMPARISON, READ, ROW, SAVE, SCORE = 1.0, 0.5, 0.1, 11.0, 37.0, 5.0, 0.01, 20.0, 40.0

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now, self.patch = 0.0, patch
        self.charge(Distiller, "forward", lambda *_: self.STEP)
        self.charge(Pixels, "labels", lambda *_: self.BATCH)
        self.charge(loader, "epoch_order", lambda *_: self.BEGIN)
        self.charge(training, "gradient_norms", lambda *_: self.COMPARISON)
        self.charge(Meter, "read", lambda meter, *_: self.READ + self.ROW * len(meter._samples))
        self.charge(training.checkpoint, "save", lambda *_: self.SAVE)
        self.charge(measure, "predict_logits", lambda *_: self.SCORE)
        patch.setattr(measure, "live_logits", lambda *_, **__: self.teacher)
        patch.setattr(measure, "perf_counter", lambda: self.now)

    def charge(self, owner, name: str, cost) -> None:
        real = getattr(owner, name)

        def charged(*args, **flags):
            self.now += cost(*args)
            return real(*args, **flags)

        self.patch.setattr(owner, name, charged)

    def teacher(self, batch: Batch) -> Outputs:
        self.now += self.TEACHER
        return Outputs(torch.zeros(len(batch.label), 10))


def workloads(steps: int) -> Workloads:
    """Of batches so small that an epoch has 400 steps: two comparisons and eight readings of the log."""
    config = bench.BenchConfig("synthetic", PLAIN, PLAIN, batch_size=2, steps=steps, threads=1)
    accelerator, data = bench.start_in("no", config), load_data(DataConfig("synthetic"))
    few = torch.arange(800)
    (images,) = data.train.batches([few], accelerator.device)
    data = dataclasses.replace(data, train=Split(images, data.train.labels[few]))
    return Workloads(config.job("no"), PLAIN, steps, data, accelerator)


def whole_epoch(clock: Clock, parts: Workloads, loop: Loop) -> float:
    """The time that the real loop takes for an epoch, its validation left out."""
    trainer = loop.trainer
    trainer.job = parts.job
    trainer.state.step = 0
    begin = clock.now
    for batch in trainer.batches(0):
        trainer.step(batch)
    assert trainer.state.step == 400
    trainer.read_means()
    trainer.save()
    trainer.read_means()
    return clock.now - begin


def test_no_figure_depends_on_the_windows_length_and_all_are_those_of_a_whole_epoch(monkeypatch, tmp_path):
    """It read 0.83 to 0.91 of bare arithmetic: each window began with what a run does once in 200 steps."""
    clock, figures = Clock(monkeypatch), []
    for steps in (15, 60, 200):
        parts = workloads(steps)
        sides = {"no": (parts.accelerator, parts.all(tmp_path / str(steps)))}
        numbers = summarise(time_in_turns(sides, rounds=2)["no"], shape_of(parts))
        figures.append(numbers)
    for numbers in figures[1:]:
        for key, value in numbers.items():
            assert value == pytest.approx(figures[0][key]), key
    fresh = tmp_path / "whole"
    fresh.mkdir()
    bare = 400 * clock.STEP
    for name, loop in (("cached", parts.cached(fresh)), ("live", parts.live(fresh))):
        seconds = whole_epoch(clock, parts, loop)
        assert numbers[f"{name}_images_per_second"] == pytest.approx(800 / seconds)
        if name == "cached":
            assert numbers["epoch_over_bare"] == pytest.approx(bare / seconds)
            validation = clock.SCORE * 100 / 40  # 100 images; the evaluation has 20 batches of 2
            assert numbers["validation_share"] == pytest.approx(validation / (seconds + validation))
    assert numbers["step_ms"]["comparison"] == pytest.approx(1000 * (clock.COMPARISON + clock.STEP) / 200)
    assert numbers["step_ms"]["log"] == pytest.approx(1000 * (clock.READ / 50 + clock.ROW))


def test_the_ratios():
    """What happens rarely takes 0.05 of each step here; the first of 100 steps' batches is the beginning's too."""
    shape = Shape(batch=64, steps=10, scored=640, steps_an_epoch=100, validated=1000, diagnose_every=200, log_every=50)
    seconds = {"bare": 10.0, "live": 30.5, "cached": 10.5, "teacher": 20.0, "views": 0.2, "evaluation": 0.64}
    seconds |= {"comparison": 4.0, "log": 0.5, "begin": 1.02, "end": 1.0}
    numbers = summarise({name: [value] for name, value in seconds.items()}, shape)
    assert numbers["bare_images_per_second"] == pytest.approx(64)
    assert numbers["cached_images_per_second"] == pytest.approx(64 / 1.1)
    assert numbers["epoch_over_bare"] == pytest.approx(1 / 1.1)
    assert numbers["live_over_ideal"] == pytest.approx(3 / 3.1)
    assert numbers["cached_over_ideal"] == pytest.approx(3.1 / 1.1 / 3)
    assert numbers["validation_share"] == pytest.approx(1 / (1 + 110))
    assert numbers["evaluation_images_per_second"] == pytest.approx(1000)


def test_every_other_round_runs_the_other_way_and_the_first_one_does_not_count(monkeypatch):
    """A machine that slows down steadily, by one each time, favours none in two rounds."""
    accelerator = bench.start_in("no", bench.BenchConfig())
    said, now = [], [0.0]

    def noted(name: str) -> Workload:
        def work() -> None:
            said.append((name, accelerator.state.mixed_precision))
            now[0] += len(said)

        return Workload(work, lambda: now.__setitem__(0, now[0] + 1000))

    monkeypatch.setattr(measure, "perf_counter", lambda: now[0])
    sides = {side: (accelerator, {"a": noted("a"), "b": noted("b")}) for side in ("no", "bf16")}
    times = time_in_turns(sides, rounds=2)
    there = [(name, side) for side in ("no", "bf16") for name in "ab"]
    assert said == [*there[::-1], *there, *there[::-1]], "each in its own precision"
    sums = {sum(seconds) for side in times.values() for seconds in side.values()}
    assert sums == {5 + 12}


@pytest.mark.parametrize(("steps", "fits"), [(12, True), (13, False)])
def test_a_window_that_does_not_fit_the_epoch_is_refused(steps, fits, tmp_path):
    """900 images make 15 steps of 60, of which 3 run in."""
    config = bench.BenchConfig("synthetic", PLAIN, PLAIN, batch_size=60, steps=steps, rounds=1, threads=1)
    data = load_data(DataConfig("synthetic"))
    if fits:
        assert bench.measure(config, data, tmp_path)["steps"] == 12
    else:
        with pytest.raises(UserError, match=r"--steps 13: an epoch has 15, 3 of which run in"):
            bench.measure(config, data, tmp_path)


@pytest.mark.parametrize(
    ("cached", "live", "said"),
    [(1.6, 1.9, "bf16 pays: 1.60 times"), (0.4, 0.5, "bf16 does not pay"), (0.9, 1.3, "bf16 pays in part")],
)
def test_the_verdict_names_the_precision_that_pays(cached, live, said):
    full = {"cached_seconds": [cached] * 3, "live_seconds": [live] * 3}
    half = {"cached_seconds": [1.0] * 3, "live_seconds": [1.0] * 3}
    numbers = bench.compare({"fp32": full, "bf16": half})
    assert bench.verdict(numbers).startswith(said)
    assert ("Add --mixed-precision bf16" in bench.verdict(numbers)) == (said == "bf16 pays: 1.60 times")


def test_rounds_that_do_not_agree_decide_nothing():
    full = {"cached_seconds": [0.8, 1.6, 1.6, 0.7], "live_seconds": [2.0] * 4}
    half = {"cached_seconds": [1.0] * 4, "live_seconds": [1.0] * 4}
    assert bench.verdict(bench.compare({"fp32": full, "bf16": half})).startswith("bf16: undecided, 1.20 times")


def test_graphs_are_told_where_a_bare_step_begins(monkeypatch):
    """Else each step was recorded anew, a second or so each, once the comparison of gradients had begun one."""
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    parts = workloads(steps=4)
    parts.bare().work()
    assert begun == []
    monkeypatch.setattr(measure, "uses_graphs", lambda accelerator: True)
    parts.bare().work()
    assert len(begun) == 4


def test_the_mode_of_compilation_reaches_the_job():
    assert bench.BenchConfig(compile_mode="reduce-overhead").job().fit.compile_mode == "reduce-overhead"
