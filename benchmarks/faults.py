"""A run of two processes, killed again and again; a checkpoint, one bit of it wrong. What is lost?

    python benchmarks/faults.py [--kills=30] [--flips=100]

One process of two is killed with -9 at random moments, every third time in the middle of a save;
the other one must stop by itself, and both are started again. A kill counts as survived if the
other one ended with one line and no success, and all losses up to the next kill are, to the bit,
those of a run that nobody disturbed. Then single bits of the newest checkpoint are flipped: each
must be found (the step is refused), or change nothing that is read. Prints a table, writes
results/faults.json, and exits with 1 if anything was lost.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax
from report import table, write_json

from gatedjax.config import from_config_dict
from gatedjax.training.checkpoint import Checkpointer, read_config
from gatedjax.training.digests import digests_of, named_leaves
from gatedjax.training.run import prepare

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "distributed"))
import processes  # noqa: E402 (what starts processes for the tests starts them here)

STEPS = 60
EVERY = 5  # steps between saves
LIFE = 7  # steps of the longest life
HEARTBEAT = 10
FLAGS = [
    f"--config.train.steps={STEPS}",
    f"--config.train.checkpoint_every={EVERY}",
    f"--heartbeat_seconds={HEARTBEAT}",
    "--config.mesh.fsdp=2",
]


def undisturbed(place: Path) -> dict[int, float]:
    """Losses by step."""
    for process in processes.run(place, "undisturbed", *FLAGS, processes=2, devices=1):
        assert process.popen.returncode == 0, process.log()
    return processes.losses(place, "undisturbed")


def life(place: Path, rng: random.Random, in_save: bool) -> dict:
    """Starts the run where it was, kills one process, waits for the other."""
    directory = place / "killed" / "checkpoints"
    saved = 0
    if directory.exists():
        saved = max(processes.steps_on_disk(place, "killed"), default=0)
    until = min(saved + rng.randint(1, LIFE), STEPS - 1)
    victim = rng.randrange(2)
    with processes.started(place, "killed", *FLAGS, processes=2, devices=1) as running:
        if in_save:
            while not is_saving(directory):
                assert running[0].popen.poll() is None, running[0].log()
                time.sleep(0.0005)
            time.sleep(rng.random() * 0.1)
        else:
            running[0].wait_for(processes.is_step(until))
            time.sleep(rng.random() * 0.05)
        was_saving = is_saving(directory)
        running[victim].popen.kill()
        start = time.monotonic()
        other = running[1 - victim]
        code = other.wait()
        seconds = time.monotonic() - start
        said = [line for line in other.err if line.strip()]
        is_one_line = len(said) == 1 and said[0].startswith("error: ")
        is_clean = code not in (0, 2) and is_one_line
        return {
            "victim": victim,
            "in_save": was_saving,
            "resumed_after": saved,
            "reached": max(processes.losses(place, "killed"), default=0),
            "seconds_to_stop": round(seconds, 1),
            "exit_code": code,
            "clean": is_clean,
            "said": said[0][:200] if is_clean else said,
        }


def is_saving(directory: Path) -> bool:
    """Whether a checkpoint is being written: until it is whole it has a name of its own."""
    return directory.exists() and any(directory.glob("*-tmp"))


def kills(place: Path, number: int, rng: random.Random, reference: dict[int, float]) -> list[dict]:
    """That many lives, and a last one to the end. A life's losses are judged when the next one has
    begun over it.
    """
    lives = []
    for i in range(number):
        one = life(place, rng, in_save=i % 3 == 2)
        losses = processes.losses(place, "killed")
        one["same_losses"] = all(reference[step] == loss for step, loss in losses.items())
        lives.append(one)
        print(f"kill {i + 1}/{number}: {json.dumps(one)}", flush=True)
    for process in processes.run(place, "killed", *FLAGS, processes=2, devices=1):
        assert process.popen.returncode == 0, process.log()
    return lives


def digests(place: Path, workdir: str) -> dict[str, str]:
    """Of every array of the newest checkpoint, as its manifest has them."""
    step = place / workdir / "checkpoints" / str(STEPS)
    manifest = json.loads((step / "manifest" / "metadata").read_text())
    return {name: leaf["digest"] for name, leaf in manifest["body"]["leaves"].items()}


def flips(place: Path, number: int, rng: random.Random) -> dict[str, int]:
    """Single bits of the newest step flipped until `number` of them were found or gave a wrong
    value.
    """
    good = place / "undisturbed"
    run = prepare(from_config_dict({**read_config(good), "mesh": {}}))
    step = good / "checkpoints" / str(STEPS)
    files = [path for path in step.rglob("*") if path.is_file() and path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    with Checkpointer(good, read_only=True) as checkpointer:
        restored = checkpointer.restore(STEPS, run.abstract)
        right = digests_of(named_leaves(restored.state))
    outcome = {"found": 0, "changed nothing that is read": 0, "wrong values, silently": 0}
    while outcome["found"] + outcome["wrong values, silently"] < number:
        path = rng.choices(files, sizes)[0]
        before = path.read_bytes()
        content = bytearray(before)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        said: list[str] = []
        with Checkpointer(good, read_only=True, report=said.append) as checkpointer:
            restored = checkpointer.restore_latest(run.abstract)
        path.write_bytes(before)
        if restored.step != STEPS:
            outcome["found"] += 1
        elif digests_of(named_leaves(restored.state)) == right:
            outcome["changed nothing that is read"] += 1
        else:
            outcome["wrong values, silently"] += 1
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "faults.json"))
    args = parser.parse_args()
    processes.PATIENCE = 1200.0
    rng = random.Random(args.seed)
    place = Path(tempfile.mkdtemp(prefix="gatedjax-faults-"))
    try:
        processes.write_text(place)
        reference = undisturbed(place)
        print(f"undisturbed: {len(reference)} steps", flush=True)
        lives = kills(place, args.kills, rng, reference)
        is_same_end = processes.losses(place, "killed") == reference
        is_same_state = digests(place, "killed") == digests(place, "undisturbed")
        flipped = flips(place, args.flips, rng)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    survived = 0
    if is_same_end and is_same_state:
        survived = sum(life["same_losses"] for life in lives)
    figures = {
        "kills": len(lives),
        "survived": survived,
        "in_save": sum(life["in_save"] for life in lives),
        "stopped_cleanly": sum(life["clean"] for life in lives),
        "longest_stop_seconds": max((life["seconds_to_stop"] for life in lives), default=0.0),
        "heartbeat_seconds": HEARTBEAT,
        "flips": flipped,
        "lives": lives,
    }
    print(table(["fault", "result"], rows(figures)))
    write_json(args.output, figures, {})
    all_survived = survived == figures["stopped_cleanly"] == len(lives)
    is_lossless = all_survived and not flipped["wrong values, silently"]
    sys.exit(0 if is_lossless else 1)


def rows(figures: dict) -> list[list[object]]:
    """Of the table."""
    kills = figures["kills"]
    flipped = figures["flips"]
    counted = flipped["found"] + flipped["wrong values, silently"]
    return [
        [
            "kills survived: losses and final state to the bit",
            f"{figures['survived']} of {kills}",
        ],
        [
            "  of them while a checkpoint was being written",
            figures["in_save"],
        ],
        [
            "  the other process stopped with one line, not 0",
            f"{figures['stopped_cleanly']} of {kills}",
        ],
        [
            f"  and at most so long after (heartbeat {HEARTBEAT} s)",
            f"{figures['longest_stop_seconds']} s",
        ],
        [
            "bit flips found",
            f"{flipped['found']} of {counted}",
        ],
        [
            "  others changed nothing that is read",
            flipped["changed nothing that is read"],
        ],
    ]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    main()
