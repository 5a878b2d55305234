# @title Setup: finds the accelerator, installs gatedjax where it is missing
# The same in every notebook: notebooks/update.py writes it from notebooks/first_cell.py.
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/gatedjax/gatedjax"
EXTRAS = "plots"


def accelerator():
    """The extra for what this machine has: tpu, cuda13 or cuda12; "" for CPUs."""
    if "aot" in EXTRAS:
        return ""  # everything here is compiled on a CPU
    vendors = [path.read_text().strip() for path in Path("/sys/bus/pci/devices").glob("*/vendor")]
    if "0x1ae0" in vendors or Path("/dev/accel0").exists() or "COLAB_TPU_ADDR" in os.environ:
        return "tpu"
    if shutil.which("nvidia-smi") is None:
        return ""
    said = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    cuda = re.search(r"CUDA (?:UMD )?Version: *(\d+)", said)
    if cuda is None:
        return ""
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(ask, capture_output=True, text=True).stdout
    # CUDA 13 has no P100 and no V100.
    is_old = any(float(capability) < 7.5 for capability in re.findall(r"\d+\.\d+", answer))
    return "cuda12" if int(cuda[1]) < 13 or is_old else "cuda13"


extra = accelerator()
if "aot" in EXTRAS:
    os.environ["JAX_PLATFORMS"] = "cpu"
if importlib.util.find_spec("gatedjax") is None:
    if sys.version_info < (3, 12):
        raise SystemExit(f"gatedjax needs Python 3.12 or newer, this is {sys.version.split()[0]}")
    is_clone = Path("../gatedjax/__init__.py").exists()
    source = Path("..").resolve().as_uri() if is_clone else f"git+{REPOSITORY}"
    extras = ",".join(filter(None, [EXTRAS, extra]))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # Plugins of another CUDA than the one that is installed now would be loaded beside it.
    plugins = [f"jax-cuda{n}-{kind}" for n in (12, 13) for kind in ("plugin", "pjrt")]
    subprocess.run([*pip, "uninstall", "-y", *plugins], capture_output=True)
    subprocess.run([*pip, "install", f"gatedjax[{extras}] @ {source}"], check=True)
    importlib.invalidate_caches()
    old = [
        name
        for name in ("numpy", "scipy", "jax", "flax")
        if name in sys.modules and sys.modules[name].__version__ != importlib.metadata.version(name)
    ]
    if old:
        raise SystemExit(f"restart the runtime, then run this cell again: old {', '.join(old)}")

import jax

import gatedjax

backend = jax.default_backend()
device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
print(f"gatedjax {gatedjax.__version__}, jax {jax.__version__}, runs on {backend}: {device}")
if extra and backend == "cpu":
    print(f"there is an accelerator: pip install 'jax[{extra}]', then restart the runtime")
