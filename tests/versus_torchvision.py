"""Compare kd's worker-decoded images with a plain torchvision pipeline: images per second, and kd's memory.

    python -m tests.versus_torchvision FOLDER --images 100000

makes that many JPEGs of 64 to 500 pixels a side in FOLDER (existing ones are reused), then interleaves torchvision
(ImageFolder, RandomResizedCrop, flip, ToTensor, Normalize, a DataLoader) and kd, with the same workers, batches and
images, but not the same work: torchvision decodes each JPEG at full size and crops the original; kd decodes it at a
fraction of its pixels, resizes the central square to the stored size and crops that. Finally measures the peak memory
of reading 1,000 images many times and all images once. Not a test: no timing is asserted.
"""

import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from rich.progress import track

from kd.config import DataConfig, ViewConfig
from kd.data import Data, load_data
from kd.data.loader import TrainingImages
from kd.utils.operators import define_operators
from kd.utils.system import share_of_cores

CLASSES, TEST, FEW = 10, 100, 1000
WARM_BATCHES = 500  # batches after which memory no longer grows


@dataclass(frozen=True)
class Config:
    folder: tyro.conf.Positional[Path]
    """Folder of the images; missing ones are made."""
    images: int = 100_000
    """Number of training images."""
    size: int = 64
    """Side of the network's images, in pixels."""
    batch_size: int = 64
    rounds: int = 5
    """Rounds; each reads an equal share of the images, and the medians over rounds are printed."""
    workers: int | None = None
    """Worker processes of both pipelines; default: all cores."""
    out: Path | None = None
    """Also write the numbers to this JSON file."""
    only_epoch_of: Annotated[int | None, tyro.conf.arg(help="Only read this many images; print peak memory.")] = None


def make_image(place: Path, number: int) -> None:
    """Write a smooth random image with some noise, which compresses about as well as a photograph."""
    path = place / f"class {number % CLASSES}" / f"{number:07}.jpg"
    if path.exists():
        return
    random = np.random.default_rng(number)
    wide, high = random.integers(64, 501, 2).tolist()
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((wide, high))
    noisy = np.asarray(coarse).astype(np.int16) + random.integers(-12, 13, (high, wide, 1), dtype=np.int16)
    partial = path.with_suffix(".partial")
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(partial, "JPEG", quality=85)
    partial.rename(path)


def make_images(folder: Path, count: int) -> Path:
    """Write an image folder with `count` training images, on all cores."""
    source = folder / f"jpegs-{count}"
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for split, many in (("train", count), ("test", TEST)):
            for label in range(CLASSES):
                (source / split / f"class {label}").mkdir(parents=True, exist_ok=True)
            done = pool.map(make_image, [source / split] * many, range(many), chunksize=100)
            list(track(done, f"making {many} images", total=many, disable=not sys.stderr.isatty()))
    return source


def kd_reader(config: Config, data: Data) -> Callable[[torch.Tensor], None]:
    images = TrainingImages(data, ViewConfig(resized_crop=0.08), 0, torch.device("cpu"))

    def read(rows: torch.Tensor) -> None:
        for image, *_ in images.augmented(rows.split(config.batch_size), 0):
            assert image.shape[1:] == (3, config.size, config.size)

    return read


def torchvision_reader(config: Config, source: Path, data: Data, workers: int) -> Callable[[torch.Tensor], None]:
    define_operators()
    from torchvision import datasets, transforms

    crop = [transforms.RandomResizedCrop(config.size), transforms.RandomHorizontalFlip()]
    to_tensor = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    pictures = datasets.ImageFolder(source / "train", transforms.Compose([*crop, *to_tensor]))

    def read(rows: torch.Tensor) -> None:
        part = torch.utils.data.Subset(pictures, rows.tolist())
        for image, _ in torch.utils.data.DataLoader(part, config.batch_size, num_workers=workers):
            assert image.shape[1:] == (3, config.size, config.size)

    return read


def open_data(config: Config, source: Path, workers: int) -> Data:
    flags = {"image_size": config.size, "val_fraction": 0.0, "decode": "workers", "workers": workers}
    return load_data(DataConfig(source=str(source), **flags))


def compare(config: Config, source: Path, workers: int) -> dict:
    """Each pipeline's median images per second per core, and the median over rounds of their ratio."""
    data = open_data(config, source, workers)
    sides = {"torchvision": torchvision_reader(config, source, data, workers), "ours": kd_reader(config, data)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = torch.randperm(config.images, generator=torch.Generator().manual_seed(0))
    for rows in order.chunk(config.rounds):
        for name, read in sides.items():
            before = time.perf_counter()
            read(rows)
            seconds[name].append((time.perf_counter() - before) / len(rows))
    rates = {f"{name}_images_per_second_per_core": 1 / statistics.median(s) / workers for name, s in seconds.items()}
    ratios = [torchvision / kd for torchvision, kd in zip(seconds["torchvision"], seconds["ours"])]
    return rates | {"ours_over_torchvision": statistics.median(ratios), "workers": workers, "images": config.images}


def peak_memory(config: Config, source: Path, workers: int) -> dict[str, float]:
    """Peak memory in MB of a new process that reads the data, and of its largest worker."""
    count = int(source.name.split("-")[1])
    flags = [str(config.folder), "--images", str(count), "--only-epoch-of", str(count), "--workers", str(workers)]
    flags += ["--size", str(config.size), "--batch-size", str(config.batch_size)]
    command = [sys.executable, "-m", "tests.versus_torchvision", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(config: Config) -> None:
    workers = config.workers if config.workers is not None else share_of_cores()
    if config.only_epoch_of is not None:
        data = open_data(config, config.folder / f"jpegs-{config.only_epoch_of}", workers)
        read = kd_reader(config, data)
        # Read a small set repeatedly: allocator caches grow during the first hundreds of batches of any set.
        for epoch in range(max(WARM_BATCHES * config.batch_size // config.only_epoch_of, 1)):
            read(data.train.order(0, epoch))
        # Not RUSAGE_SELF: it inherits the peak of the parent process.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        own, worker = int(status["VmHWM"].split()[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(json.dumps({"main_mb": own / 1000, "largest_worker_mb": worker / 1000}))
        return
    os.environ.setdefault("KD_CACHE", str(config.folder / "cache"))
    source, small = make_images(config.folder, config.images), make_images(config.folder, FEW)
    numbers = compare(config, source, workers)
    numbers["peak_of_1000"], numbers["peak_of_all"] = (peak_memory(config, one, workers) for one in (small, source))
    print(json.dumps(numbers, indent=2))
    if config.out:
        config.out.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
