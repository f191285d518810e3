"""Share what a teacher said: its cached logits, for everybody who has the same images.

    python -m kd.teachers check runs/cache/NAME                what it is, and whether it is whole
    python -m kd.teachers push runs/cache/NAME USER/NAME       upload it as a data set with a card
    python -m kd.teachers pack runs/cache/NAME FOLDER          the same files in a folder, to be copied
    python -m kd.teachers check hub:USER/NAME                  what somebody shares

CACHE is a folder that --cache-teacher built, one that `pack` wrote, or hub:USER/NAME[@REVISION]. A student takes it by
`distill_student.py --cache-teacher CACHE`, without the teacher. A cache that is incomplete or changed is never sent.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from kd.errors import UserError, exit_code, require
from kd.utils.hub import check_id, push_dataset
from kd.utils.system import Lock, expand_user, sigterm_as_interrupt


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with sigterm_as_interrupt():
        {"check": check, "pack": pack_into, "push": push}[args.command](args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The checked command line. Raises UserError."""
    parser = argparse.ArgumentParser("python -m kd.teachers", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    each = {
        "check": commands.add_parser("check", help="say what a cache is, and whether it is whole"),
        "push": commands.add_parser("push", help="upload it to the Hub"),
        "pack": commands.add_parser("pack", help="write what push uploads into a folder"),
    }
    for command in each.values():
        command.add_argument("cache", metavar="CACHE", help="a cache's folder, or hub:USER/NAME[@REVISION]")
    each["push"].add_argument("name", metavar="USER/NAME", help="the data set repository on the Hub")
    each["push"].add_argument("--private", action="store_true", help="create the repository as private")
    each["pack"].add_argument("folder", type=Path, metavar="FOLDER", help="a new folder")
    for command in (each["push"], each["pack"]):
        command.add_argument("--license", default="unknown", help="license id of the card, as on the Hub (e.g. mit)")
    args = parser.parse_args(argv)
    if args.command == "push":
        check_id(args.name, "push")
    return args


def check(args: argparse.Namespace) -> None:
    """Print what the cache is. Raises UserError if it is not whole."""
    from kd.teachers.card import facts
    from kd.teachers.shared import fetch_logits, open_cache

    cache = open_cache(args.cache)
    print(f"{cache.name}: {len(cache.blocks)} of {cache.store.views} views")
    for subject, words in facts(cache).items():
        print(f"  {subject + ':':<15}{words}", flush=True)
    fetch_logits(cache)
    cache.check()
    print("complete; every view has the hash that it was stored with", flush=True)


def pack_into(args: argparse.Namespace) -> None:
    """Write the packed cache into a new folder, completely or not at all."""
    require(not args.folder.exists(), f"{args.folder}: is there already; name a new folder")
    alone = args.folder == Path(args.folder.name)  # without a slash it would be taken for a method
    _pack(args.cache, args.folder, f"./{args.folder}" if alone else str(args.folder), args)
    print(f"packed: {args.folder}", flush=True)


def push(args: argparse.Namespace) -> None:
    """Pack the cache beside itself, upload that in one commit, and remove it again."""
    from kd.teachers.shared import FILES, MANIFEST

    beside = expand_user(args.cache)
    disk = beside.parent if beside.is_dir() else None  # its own disk has room for such a thing
    with tempfile.TemporaryDirectory(prefix=".kd-push-", dir=disk) as parent:
        folder = Path(parent, "packed")
        _pack(args.cache, folder, f"hub:{args.name}", args)
        url = push_dataset(folder, args.name, args.private, (FILES, MANIFEST))
    print(f"pushed: {url}\nto train on it: --cache-teacher hub:{args.name}", flush=True)


def _pack(source: str, folder: Path, name: str, args: argparse.Namespace) -> None:
    """Write the packed cache and its card; `name` is what --cache-teacher will take.

    Raises UserError if the cache is incomplete, changed or in use, or the folder cannot be written.
    """
    from kd.teachers.card import write_card
    from kd.teachers.shared import fetch_logits, open_cache, pack
    from kd.utils.files import write_folder

    cache = open_cache(source)
    fetch_logits(cache)
    lock = Lock(cache.folder / "lock") if cache.shards is None and os.access(cache.folder, os.W_OK) else None

    def write(partial: Path) -> None:
        pack(cache, partial)
        write_card(cache, partial / "README.md", name, args.license)

    try:
        require(lock is None or lock.acquire(), f"{source}: is in use by another process; wait until that ends")
        cache.check()
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, write)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); check its permissions and the free space") from error
    finally:
        if lock is not None:
            lock.close()


if __name__ == "__main__":
    sys.exit(exit_code(main, "nothing half-written is left; the same command starts over"))
