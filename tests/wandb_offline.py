"""Read W&B's file of an offline run, which `wandb sync` would upload; wandb has no public reader.

The file is a LevelDB log of protobuf records: a header of seven bytes, then blocks of 32 KiB. Each record starts with
(checksum, length, kind) and is split at the end of a block.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7  # bytes
FULL, LAST = 1, 4  # kinds of records that end a message; others continue in the next block


class Offline(NamedTuple):
    run: object  # group, job type, tags, project, id, name
    config: dict
    history: list[dict]
    summary: dict
    folder: Path  # the files logged with the run


def read_offline(folder: Path) -> Offline:
    """Read the run in an offline-run-* folder. Raises ValueError if a record's checksum is wrong."""
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
    position, message = FILE_HEADER, b""
    while position + RECORD_HEADER <= len(content):
        if BLOCK - position % BLOCK < RECORD_HEADER:  # no room for another header: the rest of the block is padding
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", content[position : position + RECORD_HEADER])
        if kind == 0:
            return
        start = position + RECORD_HEADER
        data = content[start : start + length]
        if zlib.crc32(bytes([kind]) + data) != checksum:
            raise ValueError(f"record at {position}: wrong checksum")
        position, message = start + length, message + data
        if kind in (FULL, LAST):
            yield message
            message = b""
