"""The packages; all else is in pyproject.toml. `configs/` installs as `gatedjax.configs`."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["gatedjax*", "kernels_pallas*"]),
        "gatedjax.configs",
        "gatedjax.configs.studies",
    ],
    package_dir={"gatedjax.configs": "configs"},
)
