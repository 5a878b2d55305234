"""Commands that run others one after the other: each stage is a process of its own.

Nothing here asks jax, which would take the devices that a stage needs.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatedjax.errors import InputError, printable
from gatedjax.reporting.writers import METRICS_FILE, read_records
from gatedjax.runtime import cli
from gatedjax.training.run_directory import plain_errors
from gatedjax.training.run_record import CONFIG_FILE


def of_stages(flag: str, values: list[str], count: int) -> list[str]:
    """The values of a flag, one for each stage; none where it was not given.

    Raises:
      InputError: another number of values.
    """
    if values and len(values) != count:
        raise InputError(f"{flag}: got {len(values)} values, expected {count}, one for each stage")
    return values


def require_pairs(flag: str, values: Sequence[str]) -> None:
    """InputError unless every value is KEY=VALUE."""
    for value in values:
        if "=" not in value:
            raise InputError(f"{flag}: got {value!r}, expected KEY=VALUE")


def run_stage(name: str, module: str, *arguments: str) -> None:
    """`python -m module arguments` to its end.

    What stops this process stops the stage too; the stage's failure is this one's.

    Args:
      name: for people.
      module: of the command.
      arguments: of the command.
    """
    print(printable(name), flush=True)
    process = subprocess.Popen([sys.executable, "-m", module, *arguments])

    def pass_on(number: int, _: Any) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reaches both.
        status = process.wait() or cli.EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        sys.exit(status)


def last_validation(place: Path) -> dict[str, Any]:
    """The last validation of a finished training stage, and what it took: loss, steps, rows.

    A stage that was stopped ends without error, and without its last validation: so does this one.
    """
    records = read_records(place / METRICS_FILE)
    validations = [record for record in records if record["split"] == "validation"]
    with plain_errors(f"could not read {place / CONFIG_FILE}"):
        training = json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))["train"]
    if not validations or validations[-1]["step"] < training["steps"]:
        sys.exit(cli.EXIT_INTERRUPTED)
    return {
        "loss": validations[-1]["loss"],
        "steps": validations[-1]["step"],
        "rows": training["batch_size"] * validations[-1]["step"],
    }


def write_tables(workdir: Path, text: str, record: dict[str, Any]) -> None:
    """WORKDIR/table.md, and table.json for programs."""
    with plain_errors(f"could not write {workdir / 'table.md'}"):
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "table.md").write_text(text)
        (workdir / "table.json").write_text(json.dumps(record, indent=2) + "\n")
