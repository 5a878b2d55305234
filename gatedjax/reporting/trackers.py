"""Experiment trackers that a run also writes to, if `train.py --trackers` names them.

Each is the package's own client, imported only where it is asked for. Accounts, servers and offline
modes are the client's: WANDB_MODE=offline, MLFLOW_TRACKING_URI=sqlite:///runs.db and the like.
A run that goes on continues its record; the steps after its checkpoint are written again.
"""

import hashlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gatedjax.errors import InputError
from gatedjax.paths import Place, is_bucket
from gatedjax.reporting.console import Scalars

PROJECT = "gatedjax"
# MLflow refuses longer values of parameters.
_LONGEST_VALUE = 500


class Wandb:
    """Weights & Biases."""

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        run_id: str,
    ):
        wandb = _client("wandb")
        self._run = wandb.init(
            project=PROJECT,
            name=run_dir.name,
            dir=str(run_dir),
            id=run_id,
            resume="allow",
            config=dict(config),
        )

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        self._run.log(_numbers(scalars, split), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Hugging Face's trackio."""

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        run_id: str,
    ):
        self._trackio = _client("trackio")
        self._trackio.init(
            project=PROJECT,
            name=run_id,
            resume="allow",
            config=_flat(config),
        )

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        self._trackio.log(_numbers(scalars, split), step=step)

    def close(self) -> None:
        self._trackio.finish()


class Mlflow:
    """MLflow."""

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        run_id: str,
    ):
        self._mlflow = _client("mlflow")
        self._mlflow.set_experiment(PROJECT)
        # The run of this directory, if it has one already.
        found = self._mlflow.search_runs(
            experiment_names=[PROJECT],
            filter_string=f"attributes.run_name = '{run_id}'",
            output_format="list",
        )
        self._mlflow.start_run(
            run_id=found[0].info.run_id if found else None,
            run_name=run_id,
        )
        if not found:
            values = {key: str(value)[:_LONGEST_VALUE] for key, value in _flat(config).items()}
            self._mlflow.log_params(values)

    def write(self, step: int, scalars: Scalars, split: str = "train") -> None:
        self._mlflow.log_metrics(_numbers(scalars, split), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], str], Wandb | Trackio | Mlflow]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}


def _client(name: str) -> ModuleType:
    """The tracker's package.

    Raises:
      InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = "pip install 'gatedjax[trackers]' brings it"
        raise InputError(f"--trackers: {name} cannot be imported ({error}); {hint}") from None


def run_id_of(run_dir: Place) -> str:
    """A name that is the run directory's own: runs/tiny and other/tiny are two runs."""
    whole = run_dir if is_bucket(run_dir) else run_dir.resolve()
    digest = hashlib.sha256(str(whole).encode()).hexdigest()
    return f"{whole.name}-{digest[:8]}"


def _numbers(scalars: Scalars, split: str) -> dict[str, float]:
    """Numbers by "split/name", as TensorBoard has them; arrays go to the JSON lines only."""
    return {f"{split}/{name}": float(x) for name, x in scalars.items() if np.ndim(x) == 0}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = value
    return flat
