"""Reads what W&B keeps of an offline run, which is what `wandb sync` sends.

The file is a LevelDB log of protobuf records: seven bytes of its own, then blocks of 32 KiB with records of
(checksum, length, kind) in front, cut where a block ends. wandb has no public reader.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, START = 32768, 7
FULL, LAST = 1, 4


class Offline(NamedTuple):
    """One offline run."""

    run: object  # group, job type, tags, project, id, name
    config: dict
    history: list[dict]
    summary: dict
    folder: Path  # of the files that were logged with it


def read_offline(folder: Path) -> Offline:
    """The run in an offline-run-* folder. Raises ValueError where a record's checksum is wrong."""
    (file,) = folder.glob("*.wandb")
    run, config, history, summary = None, {}, [], {}
    for data in _records(file.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("run"):
            run = record.run
            config |= _items(record.run.config.update)
        elif record.HasField("config"):
            config |= _items(record.config.update)
        elif record.HasField("history"):
            history.append(_items(record.history.item))
        elif record.HasField("summary"):
            summary |= _items(record.summary.update)
    return Offline(run, config, history, summary, folder / "files")


def _items(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes):
    assert content[:4] == b":W&B", content[:7]
    position, kept = START, b""
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:  # no room for another head: the rest of the block is empty
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if kind == 0:
            return
        data = content[position + 7 : position + 7 + length]
        if zlib.crc32(bytes([kind]) + data) != checksum:
            raise ValueError(f"record at {position}: wrong checksum")
        position, kept = position + 7 + length, kept + data
        if kind in (FULL, LAST):
            yield kept
            kept = b""
