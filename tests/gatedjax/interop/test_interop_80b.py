"""Qwen3-Next 80B onto eight devices, by shapes: nothing of its size is allocated, and files that
hold nothing but their headers stand for its 160 GB.
"""

import json
import math
from pathlib import Path

import jax
import pytest

from gatedjax.config import DataConfig, MeshConfig
from gatedjax.interop import checkpoint, incoming, on_mesh, safetensors
from gatedjax.interop.links import bounds
from gatedjax.training import given_weights

# The released file, without what no model reads.
CONFIG = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
PARAMETERS = 79_674_391_296
DEVICES = 8
MOST_BYTES_OF_A_FILE = 4 * 10**9


def described(folder: Path, layers: int = 48) -> checkpoint.Described:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return checkpoint.described(folder)


def placed(model: checkpoint.Described, mesh: MeshConfig) -> dict:
    """The parameters' shapes and places, whatever this machine could hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incoming, "require_memory", lambda run: None)
        run = incoming.run_of(model, DataConfig(seq_len=64), None, mesh, jax.devices()[:DEVICES])
    return given_weights.parameters(run)


def test_every_device_holds_an_eighth(tmp_path):
    wanted = placed(described(tmp_path), MeshConfig(fsdp=DEVICES))
    assert sum(x.size for x in wanted.values()) == PARAMETERS
    of_device = 0
    for path, x in wanted.items():
        shard = x.sharding.shard_shape(x.shape)
        of_device += 4 * math.prod(shard)
        # Only vectors, and the narrow convolutions, are whole everywhere.
        is_whole = shard == x.shape
        assert is_whole == (path[-1] in ("scale", "a_log", "dt_bias", "conv")), path
        assert is_whole or DEVICES * math.prod(shard) == x.size, path
    assert 1 < DEVICES * of_device / (4 * PARAMETERS) < 1.0002


def write_headers(folder: Path, model: checkpoint.Described) -> None:
    """Files of the right size, all of it holes but their headers."""
    shapes = {link.tensor: link.shape for link in model.family.links(model.model)}
    dtype = safetensors.DTYPES["BF16"]
    plan = [safetensors.Planned(name, dtype, shape) for name, shape in shapes.items()]
    shards = safetensors.in_shards(plan, MOST_BYTES_OF_A_FILE)
    files = dict(zip(safetensors.file_names(len(shards)), shards))
    for name, here in files.items():
        header = safetensors.header_of(here)
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(planned.size for planned in here))
    (folder / safetensors.INDEX).write_text(json.dumps(safetensors.index_of(files)))


def bytes_of_files_in_memory() -> int:
    """Pages of mapped files that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssFile:")]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is in memory")
@pytest.mark.parametrize("layers", [8, pytest.param(48, marks=pytest.mark.slow)])
def test_a_device_reads_its_experts_and_no_others(tmp_path, layers):
    model = described(tmp_path, layers)
    write_headers(tmp_path, model)
    tensors = safetensors.tensors_of_folder(tmp_path)
    assert sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512 < 10**8
    wanted = placed(model, MeshConfig(expert=DEVICES))
    # Every tensor is found, and has the shape that config.json says.
    found = checkpoint.found(model.family, model.model, tensors, wanted)
    assert found.names.keys() == tensors.keys()

    path = ("periods", "layer_1", "ffn", "gate")
    gates = wanted[path]
    index = gates.sharding.devices_indices_map(gates.shape)[jax.devices()[3]]
    _, experts, *others = bounds(index, gates.shape)
    assert experts == (192, 256)
    # Of one period, and in as few bytes as on disk: the numbers are copied all the same.
    gates = jax.ShapeDtypeStruct(gates.shape, safetensors.DTYPES["BF16"])
    region = ((0, 1), experts, *others)
    read = []

    class Noting(safetensors.MappedFiles):
        def view(self, tensor):
            read.append(tensor)
            return super().view(tensor)

    before = bytes_of_files_in_memory()
    files = Noting()
    values = on_mesh.region_of(gates, found.parts[path], region, files)
    assert values.nbytes <= bytes_of_files_in_memory() - before < 1.1 * values.nbytes
    files.forget_pages()
    assert bytes_of_files_in_memory() - before < 0.1 * values.nbytes
    names = {tensor: name for name, tensor in tensors.items()}
    expected = [f"model.layers.1.mlp.experts.{i}.gate_proj.weight" for i in range(*experts)]
    assert [names[tensor] for tensor in read] == expected
