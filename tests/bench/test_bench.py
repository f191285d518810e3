"""kd.bench runs and writes its keys, and its ratios are consistent. No timing is asserted."""

import json
from pathlib import Path

import pytest

from kd.bench import __main__ as bench

KEYS = {
    "bare_images_per_second", "live_images_per_second", "cached_images_per_second", "teacher_images_per_second",
    "evaluation_images_per_second", "epoch_over_bare", "cached_over_ideal",
}  # fmt: skip


@pytest.mark.slow
def test_it_measures_and_writes_its_keys(capsys):
    flags = {"data": "synthetic", "model": "tests.networks:plain", "teacher_model": "tests.networks:normalised"}
    bench.main(bench.BenchConfig(**flags, steps=3, rounds=2, json=Path("numbers.json")))
    numbers = json.loads(Path("numbers.json").read_text())
    assert numbers.keys() >= KEYS | {"cold_first_step_seconds", "warm_first_step_seconds", "warm_peak_gib"}
    assert all(numbers[key] > 0 for key in KEYS)
    assert numbers["warm_first_step_seconds"] > 0
    assert "epoch over bare" in capsys.readouterr().out


def test_the_ratios():
    times = {"bare": [1.0], "live": [3.1], "cached": [1.05], "teacher": [2.0], "evaluation": [0.5]}
    numbers = bench.summarise(times, dict.fromkeys(times, 640))
    assert numbers["bare_images_per_second"] == 640
    assert numbers["epoch_over_bare"] == pytest.approx(1 / 1.05)
    assert numbers["cached_over_ideal"] == pytest.approx(3.1 / 1.05 / 3)
