"""The TPU model agrees with published times of a real v5e (`benchmarks/tpu_model.py` tells where
they are from).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gatedjax.aot import libtpu

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(not libtpu.installed(), reason="libtpu is not installed (pip install '.[aot]')")
def test_model_is_within_5_percent_of_published_times(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu"
    }
    command = [sys.executable, "benchmarks/tpu_model.py", f"--json={tmp_path / 'model.json'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert len(rows) == 8
    for row in rows:
        assert row["ratio"] == pytest.approx(1.0, abs=0.05), row
