"""Eight simulated devices for every test, and the switch that refreshes goldens."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption("--refresh-goldens", action="store_true", help="write the goldens instead of comparing with them")
