"""The crash harness: real exports, killed at every place that they come to and at random moments. See soak.sh.

Each kill is checked as in tests/support/distributed/crash.py: no manifest or a package that verifies; the rerun completes,
verifies, equals an undisturbed export byte for byte, and leaves whole shards as they are.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support import ROOT, tiny_model
from tests.support.distributed import crash
from tests.support.recis_writer import make_tables, write_checkpoint

VICTIMS = ("rank", "all", "launcher", "everything")


def make_setups(folder: Path) -> dict[str, crash.Setup]:
    """Return what is exported: tables alone, a package that replaces another, and one with a dense arch."""
    write_checkpoint(folder / "ckpt", make_tables({"t": 5000, "u": 300, "v": 1}, 4))
    tiny_model.write_tiny_checkpoint(folder / "tiny")
    tables = ("--ckpt_dir", str(folder / "ckpt"), "--filter_sparse_opt", "true", "--num_shards", "4", "--threads", "1")
    dense = (
        *("--ckpt_dir", str(folder / "tiny"), "--filter_sparse_opt", "true", "--num_shards", "3", "--threads", "1"),
        *("--model", tiny_model.MODEL, "--dataset", tiny_model.DATASET),
    )
    export("old", folder, ("--ckpt_dir", str(folder / "tiny"), "--filter_sparse_opt", "true"))
    export("tables", folder, tables)
    export("dense", folder, dense)
    return {
        "tables": crash.Setup(folder / "ckpt", tables, folder / "tables"),
        "replace": crash.Setup(
            folder / "ckpt", (*tables, "--overwrite", "true"), folder / "tables", old=folder / "old"
        ),
        "dense": crash.Setup(folder / "tiny", dense, folder / "dense"),
    }


def export(name: str, folder: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "dist_export", *arguments, "--export_dir", str(folder / name)]
    subprocess.run(command, cwd=ROOT, env=crash.environment(), check=True, capture_output=True)


def list_kills(setups: dict[str, crash.Setup], folder: Path) -> list[tuple[str, crash.Kill]]:
    """Return a kill at every place of every rank, for each setup and one and two ranks."""
    kills = []
    for name, setup in setups.items():
        for world_size, rank in ((1, 0), (2, 0), (2, 1)):
            for number, _ in enumerate(crash.list_places(setup, world_size, rank, folder / "places")):
                victims = "rank" if world_size == 1 else VICTIMS[number % 4]
                kills.append((name, crash.Kill(world_size, f"number:{number}", rank, victims)))
    return kills


def main() -> int:
    """Run the kills; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="scripts/soak.sh", description=__doc__)
    parser.add_argument("--kills", type=int, default=120, help="how many; 0 takes every place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kills whose description holds this text")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    broken, outcomes = [], []
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = Path(temporary)
        setups = make_setups(folder)
        places = [(name, kill) for name, kill in list_kills(setups, folder) if options.only in f"{name}: {kill}"]
        chance.shuffle(places)
        count = options.kills or len(places)
        at_places = places[: max(1, 3 * count // 4)]
        moments = [
            (name, crash.Kill(2, f"after:{chance.uniform(2.5, 5.5):.2f}", 0, chance.choice(VICTIMS)))
            for name in chance.choices(list(setups), k=count - min(count, len(at_places)))
        ]
        kills = [*at_places, *moments]
        begun = time.monotonic()
        for number, (name, kill) in enumerate(kills):
            try:
                outcome = crash.run_kill(setups[name], kill, folder / "kill")
            except AssertionError as error:
                broken.append(f"{name}: {kill}: {error}")
                print(f"BROKEN {broken[-1]}", flush=True)
                continue
            outcomes.append(outcome)
            print(
                f"{number + 1}/{len(kills)} {name}: {kill}: "
                f"{'committed' if outcome.was_committed else 'no manifest' if name != 'replace' else 'the old package'}, "
                f"{outcome.kept} shards kept, ranks gone after {outcome.seconds:.2f} s",
                flush=True,
            )
        minutes = (time.monotonic() - begun) / 60
    hit = [outcome for outcome in outcomes if outcome.was_reached]
    print(
        f"{len(kills)} kills in {minutes:.1f} min, {len(hit)} of them before the export had ended: "
        f"{sum(o.was_committed for o in hit)} left a committed package, {sum(o.kept for o in hit)} shards were kept, "
        f"ranks gone after {statistics.median(o.seconds for o in hit):.2f} s (median), {max(o.seconds for o in hit):.2f} s "
        f"(worst); {len(broken)} broken promises"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
