"""Eight simulated devices for every test; helpers.py on the path."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import jax

jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption("--refresh-goldens", action="store_true", help="write the goldens instead of comparing with them")
