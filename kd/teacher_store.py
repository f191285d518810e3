"""The files that a teacher's kept answers are in, and looking them up."""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd.arrays import read_array
from kd.errors import UserError, require
from kd.files import read_json, write_json
from kd.images.rows import place
from kd.outputs import Batch, Outputs
from kd.teacher import Teacher


class Store:
    """The files of one cache: `logits.npy` [K, N, W], of W = C columns or k and the rest's; `classes.npy` [K, N, k]."""

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.identity = folder, identity
        self.views, self.rows, self.classes = identity["views"]["count"], identity["rows"], identity["classes"]
        self.top_k = identity["top_k"] if (identity["top_k"] or self.classes) < self.classes else None
        width = self.classes if self.top_k is None else self.top_k + 1
        self.shapes = {"logits": (self.views, self.rows, width)}
        if self.top_k is not None:
            self.shapes["classes"] = (self.views, self.rows, self.top_k)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.int32 if name == "classes" else self.identity["dtype"])

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def open(self, name: str, mode: str) -> np.ndarray:
        """One file as a memory map; raises UserError where its size is not what its shape needs."""
        try:
            array = read_array(self.path(name), mode)
        except UserError as error:
            raise UserError(f"{error}; remove {self.folder} to build it anew") from error
        found, wanted = (array.shape, array.dtype), (self.shapes[name], self.dtype(name))
        require(found == wanted, f"{self.path(name)} holds {found}, wanted is {wanted}; remove {self.folder}")
        return array

    def sealed(self) -> list[dict[str, str]]:
        """The sha256s of the views that are done; raises UserError naming what differs if they are another's."""
        if not (self.folder / "manifest.json").exists():
            return []
        manifest = read_json(self.folder / "manifest.json")
        theirs, blocks = manifest.get("identity"), manifest.get("blocks")
        sound = isinstance(theirs, dict) and isinstance(blocks, list) and len(blocks) <= self.views
        sound = sound and all(isinstance(block, dict) for block in blocks)
        require(
            sound, f"{self.folder / 'manifest.json'} is none that a cache has; remove {self.folder} to build it anew"
        )
        differ = [
            f"{key}: {theirs.get(key)} there, {value} here"
            for key, value in self.identity.items()
            if theirs.get(key) != value
        ]
        require(not differ, f"{self.folder} holds other answers ({'; '.join(differ)}); remove it to build it anew")
        return blocks

    def seal(self, blocks: list[dict[str, str]]) -> None:
        write_json(self.folder / "manifest.json", {"identity": self.identity, "blocks": blocks})

    def block(self, view: int) -> dict[str, str]:
        """sha256 of a view's part of each file."""
        return {name: hashlib.sha256(self.open(name, "r")[view]).hexdigest() for name in self.shapes}

    def check(self) -> None:
        """Raises UserError where the cache is not whole, changed since it was built, or not finite."""
        blocks = self.sealed()
        require(len(blocks) == self.views, f"{self.folder} holds {len(blocks)} of {self.views} views; remove it")
        for view, block in enumerate(blocks):
            changed = block != self.block(view)
            require(not changed, f"{self.folder}: view {view} changed since it was built; remove the folder")
            finite = np.isfinite(self.open("logits", "r")[view]).all()
            require(bool(finite), f"{self.folder}: view {view} holds NaN or infinity; remove the folder")

    def write(self, view: int, rows: slice, logits: Tensor) -> None:
        """Keep full logits (b x C) of one view's rows. Raises UserError where they are not finite once kept."""
        kept = {"logits": logits}
        if self.top_k is not None:
            values, classes = logits.topk(self.top_k, dim=1)
            others = logits.scatter(1, classes, -math.inf).logsumexp(dim=1, keepdim=True)
            # FKD's smoothing: the rest's mass, spread evenly over the classes that were not kept.
            rest = others - math.log(self.classes - self.top_k)
            kept = {"logits": torch.cat([values, rest], dim=1), "classes": classes}
        with np.errstate(over="ignore"):  # an overflow is found and named here
            arrays = {name: tensor.cpu().numpy().astype(self.dtype(name)) for name, tensor in kept.items()}
        require(
            bool(np.isfinite(arrays["logits"]).all()),
            f"the teacher's logits of training rows {rows.start} to {rows.stop - 1} are not finite as"
            f" {self.identity['dtype']}: check the teacher, or keep them with --cache-dtype float32",
        )
        for name, array in arrays.items():
            self.open(name, "r+")[view, rows] = array

    def teacher(self, device: torch.device) -> Teacher:
        """Look rows up by (view, index); from the device's memory if they fit there."""
        parts = {name: torch.from_numpy(self.open(name, "c")).flatten(0, 1) for name in self.shapes}
        placed = {name: place(part, device) for name, part in parts.items()}

        def answer(batch: Batch) -> Outputs:
            # One flat index: a tensor as first of two indices would make the host wait for its value.
            row = batch.view * self.rows + batch.index
            kept = {name: part[row.to(part.device)].to(device, non_blocking=True) for name, part in placed.items()}
            return Outputs(self.full(kept["logits"].float(), kept.get("classes")))

        return answer

    def full(self, kept: Tensor, classes: Tensor | None) -> Tensor:
        """b x C logits from what was kept."""
        if classes is None:
            return kept
        return kept[:, -1:].repeat(1, self.classes).scatter(1, classes.long(), kept[:, :-1])
