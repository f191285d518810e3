"""Measure import time, time to the end of the first step, and peak memory in a process of its own.

python -m kd.bench.startup FLAGS        FLAGS: those of kd.bench as JSON; prints the numbers as one line of JSON
"""

import json
import resource
import sys
import time


def main(flags: dict) -> dict[str, float]:
    begin = time.perf_counter()
    from kd.bench.__main__ import BenchConfig
    from kd.bench.measure import Workloads, wait  # imports torch

    imported = time.perf_counter()
    import torch

    from kd.data import load_data
    from kd.training.launch import make_accelerator

    config = BenchConfig(**flags)
    job = config.job(config.mixed_precision or "no")
    accelerator = make_accelerator(job.fit, job.run)
    data = load_data(job.data)
    Workloads(job, config.teacher_model, 1, data, accelerator).bare().work()
    wait(accelerator.device)
    first = time.perf_counter()
    workloads = Workloads(job, config.teacher_model, 30, data, accelerator)
    workloads.bare().run()
    workloads.evaluation().run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    numbers = {"import_seconds": imported - begin, "first_step_seconds": first - imported, "peak_gib": peak}
    if accelerator.device.type == "cuda":
        numbers["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return numbers


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
