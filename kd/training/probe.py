"""Score an embedding on a labelled set: k nearest neighbours, and a linear classifier on frozen features.

    python -m kd.training.probe RUN --data DATA              a finished run, or its export
    python -m kd.training.probe RUN --data DATA --random     the same network with fresh weights, to compare with
    python -m kd.training.probe USER/NAME --data photos      a network on the Hub; DATA is any value of --data

The embedding is what enters a network's classifier, or the output of a network without one. Images are normalised and
sized as the network was trained on them. Both scores learn from the labels of the training split and are measured on
the test split. A set without a validation split leaves a tenth of its training images out.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from kd.config import DataConfig
from kd.data import Data
from kd.data.dataset import load_probe
from kd.data.loader import Pixels
from kd.data.rows import Rows, place_on
from kd.data.storage import gigabytes
from kd.errors import exit_code, require
from kd.models import build_model, probe, stages
from kd.models.adapt import resize_input
from kd.models.features import Tap
from kd.runs.results import identity_of
from kd.training.probe_scores import Told, knn_accuracy, linear_probe_accuracy, probe_bytes, silent
from kd.training.progress import work_bar
from kd.utils.console import print_once
from kd.utils.processes import all_do, broadcast_buffers, nothing
from kd.utils.rng import seed_everything
from kd.utils.system import memory_limit, processes_here

SHARE = 0.5  # of the memory that the features of all processes may take

REDUCED = 2**24  # numbers that processes add up at a time


class Probe:
    """A labelled set on which the embedding of `network` is scored; all processes do so together.

    `name`: the network's, by which its layers are known. `seen`: the run's data, whose size and normalisation the
    network expects; its `probe` is the labelled set. Raises UserError if the features do not fit the memory.
    """

    def __init__(
        self, network: nn.Module, name: str, seen: Data, source: str, accelerator: Accelerator, batch_size: int
    ):
        self.network, self.source, self.accelerator, self.batch_size = network, source, accelerator, batch_size
        self.size, self.splits = tuple(seen.size), seen.probe
        self.data = dataclasses.replace(seen.probe, mean=seen.mean, std=seen.std)
        self.layers = stages(name, network, len(seen.classes)).embedding
        if seen.classes and not self.layers:
            print_once(f"probe: {name} ends in no linear layer over its classes: its output is scored as embedding")
        self.width = pooled(probe(network, self.size, name, self.layers), self.layers).shape[1]
        self._check_memory()

    def _check_memory(self) -> None:
        splits = {"training": self.data.train, "validation": self.data.val, "test": self.data.test}
        rows = {name: len(split.labels) for name, split in splits.items() if split is not None}
        scored = max(count for name, count in rows.items() if name != "training")
        size, limit, here = probe_bytes(rows["training"], scored, self.width), memory_limit(), processes_here()
        counts = ", ".join(f"{count} {name}" for name, count in rows.items())
        ours, theirs = (f"{wide} x {high}" for high, wide in (tuple(self.data.size), self.size))
        resized = "" if ours == theirs else f", resized from {ours} to {theirs}"
        unscored = "" if self.data.val is not None else "; without a validation split it is scored at the end alone"
        print_once(
            f"probe {self.source}: {counts} images of {len(self.data.classes)} classes{resized}; {self.width} features"
            f" of each, which take {gigabytes(size)}{unscored}"
        )
        require(
            here * size <= SHARE * limit,
            f"--probe {self.source}: its features would take {gigabytes(size)} in each of {here} processes, and half of"
            f" the memory is {gigabytes(int(SHARE * limit))}; name a smaller set",
        )

    def score(self, split: Rows, told: Told = silent) -> dict[str, float]:
        """Percent of the split's rows that both probes classify correctly by the training split's labels.

        Raises UserError if a feature is not finite.
        """
        train, rows = self.data.train, split
        features = [self.features(part, told) for part in (train, rows)]
        require(
            all(bool(part.isfinite().all()) for part in features),
            f"--probe {self.source}: the network's features are not finite; start another run with a lower --lr",
        )
        features = [place_on(part, self.accelerator.device) for part in features]
        device = features[0].device
        labels = [part.labels.to(device) for part in (train, rows)]
        ours, theirs = zip((features[0], features[1].to(device)), labels, strict=True)
        with full_precision():
            return {
                "knn": knn_accuracy(*ours, *theirs, told=told),
                "linear": linear_probe_accuracy(*ours, *theirs, told=told),
            }

    @torch.no_grad()
    def features(self, split: Rows, told: Told = silent) -> Float[Tensor, "n d"]:
        """The embedding of every row, in eval mode, in the CPU's memory; each process computes its share.

        One process writes each row and the others leave it zero, so that the sum over processes has every row once.
        """
        accelerator, rows = self.accelerator, len(split.labels)
        training = self.network.training
        self.network.eval()
        broadcast_buffers(self.network)
        pixels, tap = Pixels(split, self.data, accelerator.device), Tap(self.network, self.layers)
        features = torch.zeros(rows, self.width)
        share = max(self.batch_size // accelerator.num_processes, 1)
        starts = range(accelerator.process_index * share, rows, accelerator.num_processes * share)
        place = pixels.split.labels.device
        indices = [torch.arange(start, min(start + share, rows), device=place) for start in starts]
        try:
            for start, images in zip(starts, pixels.centre_crops(indices)):
                if tuple(images.shape[2:]) != self.size:
                    images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
                with accelerator.autocast():
                    features[start : start + share] = pooled(tap(images), self.layers).float().cpu()
                told("probe features", min(start + accelerator.num_processes * share, rows), rows)
        finally:
            tap.remove()
            self.network.train(training)
        if accelerator.num_processes > 1:
            all_do(nothing)  # another process may read its images for minutes longer
            for part in features.split(max(REDUCED // self.width, 1)):
                part.copy_(accelerator.reduce(part.to(accelerator.device), "sum").cpu())
        return features


def pooled(outputs, layers: tuple[str, ...]) -> Float[Tensor, "b d"]:
    """The embedding in a Tap's outputs: of several positions, as a classifier of tokens sees them, their mean."""
    value = outputs.features[layers[0]] if layers else outputs.logits
    return value.reshape(len(value), -1, value.shape[-1]).mean(dim=1) if layers else value.flatten(1)


def open_probe(source: str | None, network: nn.Module, name: str, seen: Data, *options) -> Probe | None:
    """The Probe of a run whose data was loaded with one; else None."""
    return Probe(network, name, seen, source, *options) if source and seen.probe is not None else None


def due(every: int, epoch: int, epochs: int) -> bool:
    """Whether --probe-every asks for a score after this epoch (from 0); after the last one always."""
    return epoch + 1 == epochs or (every > 0 and (epoch + 1) % every == 0)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print both scores of a network, and return them."""
    from kd.runs.load import load_network
    from kd.utils.hub import local_folder

    args = _parse(argv)
    folder = local_folder(args.run)
    trained = load_network(folder, args.trust_code, args.weights)
    info, network = trained.info, trained.network
    if args.random:
        network = fresh_network(info, args.seed)
    flags = DataConfig(args.data, label=args.label, image=args.image, classes=args.classes)
    flags = dataclasses.replace(flags, stored_size=info.get("stored_size"), image_size=info["image_size"][0])
    flags.check()
    size = tuple(info["image_size"])
    labelled = _as_held_out(load_probe(args.data, flags, size, option="--data"), folder, flags, size)
    seen = dataclasses.replace(labelled, classes=tuple(info["classes"]), size=size, probe=labelled)
    seen = dataclasses.replace(seen, mean=tuple(info["mean"]), std=tuple(info["std"]))
    accelerator = Accelerator()
    network.to(accelerator.device)
    scored = Probe(network, info["model"], seen, args.data, accelerator, args.batch_size)
    with work_bar(accelerator.is_main_process) as told:
        scores = scored.score(scored.data.test, told)
    whose = f"{info['model']} with fresh weights" if args.random else args.run
    print_once(f"{whose}: kNN {scores['knn']:.2f}, linear probe {scores['linear']:.2f} percent of the test images")
    return scores


def _as_held_out(labelled: Data, folder: Path, flags: DataConfig, size: tuple[int, int]) -> Data:
    """The labelled set with the splits of the run in `folder`, if it was trained on this very set with labels."""
    trained = identity_of(folder)
    names = ("val_fraction", "split_seed", "test_fraction")
    theirs = dataclasses.replace(flags, **{name: trained[name] for name in names if name in trained})
    if trained.get("data") != labelled.fingerprint or trained.get("no_labels") or theirs == flags:
        return labelled
    return load_probe(flags.source, theirs, size, option="--data")


@contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32 inside, which a training on a GPU uses: its products have three digits, too few for ranks."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fresh_network(info: dict, seed: int) -> nn.Module:
    """The network of a model.json, with fresh weights and without what compression and its method added."""
    from kd.config.model_args import parse_model_args

    seed_everything(seed, "network")
    size = tuple(info.get("resized") or info["image_size"])
    arguments = parse_model_args(info.get("model_args"))
    network = build_model(info["model"], info["num_classes"], size, quiet=True, arguments=arguments)
    if size != tuple(info["image_size"]):
        resize_input(network, size)
    return network.eval()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m kd.training.probe", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN", help="a run folder, its export, or a Hub id")
    parser.add_argument("--data", required=True, help="the labelled set")
    parser.add_argument("--label", metavar="COLUMN", help="label column, if there are several")
    parser.add_argument("--image", metavar="COLUMN", help="image column, if there are several")
    parser.add_argument("--classes", type=int, metavar="N", help="use the first N classes only")
    parser.add_argument("--random", action="store_true", help="score the network with fresh weights instead")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh weights (default: 0)")
    parser.add_argument("--weights", default="last", help="last, best or ema (default: last)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    parser.add_argument("--trust-code", action="store_true", help="allow building a network given as module:function")
    args = parser.parse_args(argv)
    require(args.batch_size >= 1, f"--batch-size {args.batch_size}: give 1 or more")
    require(args.seed >= 0, f"--seed {args.seed}: give 0 or more")
    require(args.random or args.seed == 0, f"--seed {args.seed}: is for fresh weights; add --random, or leave it out")
    return args


if __name__ == "__main__":
    sys.exit(exit_code(main, "the same command starts over"))
