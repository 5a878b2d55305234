"""Import and export of a model of 1.2 billion parameters: seconds, and the most memory of each.

    python benchmarks/interop.py [--layers=16] [--devices=1] [--folder=FOLDER] [--json=FILE]

A Llama of random bfloat16 numbers is written tensor by tensor (Llama 3.2 1B's sizes), imported,
exported, and both folders are compared to the bit. Each command is a process of its own; its memory
is the most that was resident at once, pages of mapped files among it. With --devices=8 the
processor plays 8 devices, and every parameter is cut over them. The folder needs 10 GB.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from report import cores, cpu_model, installed_versions, parser, table, write_json

from gatedjax.interop import checkpoint, safetensors

WIDTH = 2048
HEADS = 32
KV_HEADS = 8
HIDDEN = 8192
VOCABULARY = 128_256
HEADER = ("command", "seconds", "most memory GB", "of the float32 parameters")
# Random numbers are drawn for so many values at a time.
BLOCK = 2**24


def config_json(layers: int) -> dict[str, object]:
    """Llama 3.2 1B's, with its plain rotation."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def write_model(folder: Path, layers: int) -> int:
    """Writes the checkpoint; returns its parameters."""
    folder.mkdir(parents=True)
    (folder / checkpoint.CONFIG).write_text(json.dumps(config_json(layers)))
    family, model, _ = checkpoint.described(folder)
    dtype = safetensors.DTYPES["BF16"]
    shapes = {link.tensor: link.shape for link in family.links(model)}
    plan = [safetensors.Planned(name, dtype, shape) for name, shape in shapes.items()]
    rng = np.random.default_rng(0)
    # Numbers of a block serve again and again: drawing a billion takes longer than to import them.
    block = (0.02 * rng.standard_normal(BLOCK, np.float32)).astype(dtype)
    parameters = 0
    with safetensors.FileWriter(folder / safetensors.FILE, plan) as writer:
        for planned in plan:
            count = planned.size // dtype.itemsize
            writer.write(np.resize(block, count).reshape(planned.shape))
            parameters += count
    return parameters


def run(arguments: list[str], devices: int) -> tuple[float, float]:
    """Seconds of a command, and the most memory that it had, in GB.

    Raises:
      SystemExit: it failed.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments[0]} ended with code {process.returncode}")
    return seconds, usage.ru_maxrss * 1024 / 1e9


def require_same(one: Path, other: Path) -> None:
    """Raises AssertionError unless both hold the same tensors, to the bit."""
    files = safetensors.MappedFiles()
    tensors = safetensors.tensors_of_folder(one)
    others = safetensors.tensors_of_folder(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        same = np.array_equal(
            files.view(tensor).view(np.uint16),
            files.view(others[name]).view(np.uint16),
        )
        assert same, name
        files.forget_pages()


def measured(place: Path, layers: int, devices: int) -> dict[str, object]:
    """Seconds and memory of both commands, of a model that is made in the folder."""
    model = place / "model"
    again = place / "again"
    parameters = write_model(model, layers)
    mesh = [f"--mesh=fsdp={devices}"] if devices > 1 else []
    imported = run(
        [
            "gatedjax.interop.import_hf",
            f"--from={model}",
            f"--workdir={place / 'run'}",
            "--tokenizer=bytes",
            *mesh,
        ],
        devices,
    )
    exported = run(
        [
            "gatedjax.interop.export_hf",
            f"--checkpoint={place / 'run'}",
            f"--to={again}",
            *mesh,
        ],
        devices,
    )
    require_same(model, again)
    return {
        "parameters": parameters,
        "devices": devices,
        "import": {"seconds": imported[0], "gigabytes": imported[1]},
        "export": {"seconds": exported[0], "gigabytes": exported[1]},
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=16, help="of the model")
    arguments.add_argument("--devices", type=int, default=1, help="that the processor plays")
    arguments.add_argument("--folder", help="to write to, a new one that stays; default: none does")
    args = arguments.parse_args()
    if args.folder:
        figures = measured(Path(args.folder).absolute(), args.layers, args.devices)
    else:
        with tempfile.TemporaryDirectory() as place:
            figures = measured(Path(place), args.layers, args.devices)
    gigabytes = 4 * figures["parameters"] / 1e9
    rows = []
    for name in ("import", "export"):
        of_name = figures[name]
        memory = of_name["gigabytes"]
        ratio = memory / gigabytes
        rows.append((name, f"{of_name['seconds']:.0f}", f"{memory:.1f}", f"{ratio:.2f}"))
    print(table(HEADER, rows))
    print(
        f"{figures['parameters']:,} parameters, {gigabytes:.1f} GB in float32; {args.devices} "
        f"devices; {cpu_model()}, {cores()} cores"
    )
    if args.json:
        write_json(args.json, figures, installed_versions(["jax", "orbax-checkpoint"]))


if __name__ == "__main__":
    main()
