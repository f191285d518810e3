"""Train the same network in fp32 and in bf16 over several seeds, and compare their test accuracies.

    python -m tests.precision_pairs OUT --preset digits --model resnet8
    python -m tests.precision_pairs OUT --data ../shared/cifar100 --preset quick --model resnet20
    python -m tests.precision_pairs OUT --seeds 0 1 2 3 4 --preset digits

All other flags are train_teacher.py's. Not a test: no accuracy is asserted. Started again, it continues.
The interval covers the noise of seeds, paired, and of the test images (kd/runs/comparison.py).
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from kd.runs.comparison import Answers, Result, compare
from kd.utils.files import read_json
from tests.conftest import ROOT


def train(out: Path, seed: int, precision: str, flags: list[str]) -> Result:
    folder = out / f"{precision}-{seed}"
    flags = [*flags, "--seed", str(seed), "--mixed-precision", precision, "--out", str(folder), "--wandb", "disabled"]
    subprocess.run([sys.executable, str(ROOT / "train_teacher.py"), *flags, "--auto-resume"], check=True)
    return Result(folder, read_json(folder / "summary.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked, flags = parser.parse_known_args()
    results = {name: [train(asked.out, seed, name, flags) for seed in asked.seeds] for name in ("no", "bf16")}
    for name, runs in results.items():
        top1 = [run.summary["test_top1"] for run in runs]
        deviation = statistics.stdev(top1) if len(top1) > 1 else float("nan")
        print(f"{name}: {statistics.mean(top1):.2f} ± {deviation:.2f} ({', '.join(f'{value:.2f}' for value in top1)})")
    difference = compare(results["bf16"], results["no"], Answers())
    print(f"bf16 - fp32: {difference.mean:+.2f} ({difference.interval}), p = {difference.p:.2f}")


if __name__ == "__main__":
    main()
