"""fla's GLA, RetNet, HGRN2, Gated DeltaNet and DeltaProduct, RWKV-6 and -7: its files, and values
by its formulas.
"""

import json
from pathlib import Path

import fla_oracle
import jax
import numpy as np
import pytest

from gatedjax.config import DataConfig
from gatedjax.interop import checkpoint, incoming, on_mesh, safetensors
from gatedjax.layers.tree import unflatten_dict
from gatedjax.model import LanguageModel, head_weights
from gatedjax.model import logits as logits_of
from gatedjax.training import given_weights

pytestmark = pytest.mark.slow

CASES = json.loads((Path(__file__).parent / "fixtures" / "families.json").read_text())
TOKENS = 37


def random_tensors(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in shapes.items():
        values = 0.3 * rng.standard_normal(shape).astype(np.float32)
        found[name] = 1 + values if "norm" in name else values
    return found


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    plan = [safetensors.Planned(name, x.dtype, x.shape) for name, x in tensors.items()]
    with safetensors.FileWriter(folder / safetensors.FILE, plan) as writer:
        for tensor in tensors.values():
            writer.write(tensor)


@pytest.mark.parametrize("case", fla_oracle.FAMILIES)
def test_logits_equals_fla(tmp_path, case):
    config = CASES[case]["config"]
    tensors = random_tensors(CASES[case]["tensors"])
    write(tmp_path, config, tensors)
    described = checkpoint.described(tmp_path)
    data = DataConfig(seq_len=64)
    run = incoming.run_of(described, data, "float32", None, jax.devices()[:1])
    wanted = given_weights.parameters(run)
    on_disk = safetensors.tensors_of_folder(tmp_path)
    found = checkpoint.found(described.family, described.model, on_disk, wanted)
    params = unflatten_dict(on_mesh.read_parameters(found.parts, wanted))
    rows = np.random.default_rng(1).integers(0, config["vocab_size"], (2, TOKENS))

    @jax.jit
    def logits(params, tokens, segment_ids):
        hidden, _, _ = LanguageModel(run.config.model).apply(
            {"params": params},
            tokens,
            segment_ids=segment_ids,
        )
        return logits_of(hidden, head_weights(params))

    # Two documents in a row.
    segment_ids = np.repeat([1, 2], TOKENS)[None]
    ours = np.asarray(logits(params, rows.reshape(1, -1), segment_ids))
    right = np.concatenate([fla_oracle.logits(tensors, config, row) for row in rows])
    error = np.sqrt(np.sum((ours[0] - right) ** 2) / np.sum(right**2))
    assert error < 1e-4
