"""Writes the fixtures of test_interop.py, with torch and transformers.

    python tests/gatedjax/interop/make_fixtures.py

families.json: of a tiny model of every family, config.json and the shapes of its tensors, as its
package saves them. One model is there whole, with its logits: `qwen3_next`.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tiny_models import (
    CONFIGS,
    FLA_CONFIGS,
    saved,
    saved_by_fla,
    tiny_model,
    torch,
    transformers,
)

from gatedjax.interop.safetensors import tensors_of_folder

FIXTURES = Path(__file__).parent / "fixtures"
# Small enough to be committed: every kind of tensor, two layers of each.
WHOLE = "qwen3_next"
SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=4,
    num_experts=3,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=8,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
)
TOKENS = 37


def write_families() -> None:
    """families.json."""
    found = {}
    for family in (*CONFIGS, *FLA_CONFIGS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if family in FLA_CONFIGS:
                saved_by_fla(family, folder)
            else:
                saved(family, folder)
            config = json.loads((folder / "config.json").read_text())
            shapes = {name: list(t.shape) for name, t in tensors_of_folder(folder).items()}
        found[family] = {"config": config, "tensors": shapes}
    lines = [f"{json.dumps(family)}: {json.dumps(entry)}" for family, entry in found.items()]
    (FIXTURES / "families.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_whole() -> None:
    """A model, and its logits of two rows and of two documents."""
    folder = FIXTURES / WHOLE
    shutil.rmtree(folder, ignore_errors=True)
    model = tiny_model(WHOLE, **SIZES)
    model.save_pretrained(folder)
    rows = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, TOKENS))
    with torch.no_grad():
        logits = model(torch.tensor(rows)).logits.numpy()
    np.savez(folder / "logits.npz", tokens=rows, logits=logits)


if __name__ == "__main__":
    # Before `without_kernels` hides the package.
    pytest.importorskip("fla.models")
    transformers.logging.set_verbosity_error()
    FIXTURES.mkdir(exist_ok=True)
    write_families()
    write_whole()
