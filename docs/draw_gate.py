"""Draws docs/pictures/gates.png: what the gates of a trained model do, character by character.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python docs/draw_gate.py runs/tiny

The run has a tokenizer of bytes, and layers of gated attention and of gated linear attention.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import gatedjax  # noqa: E402 (found through the line above)
from gatedjax.evaluation.restore import restore_params  # noqa: E402
from gatedjax.reporting.figure import empty_figure  # noqa: E402

TEXT = '    def __init__(self, name="main"):\n        self.name = name\n        return None\n'
VISIBLE = {"\n": "⏎", " ": "·"}


def main(checkpoint: str) -> None:
    run, params, _ = restore_params(checkpoint)
    config = run.config.model
    token_ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
    tokens = jnp.asarray(token_ids)[None]
    with jax.set_mesh(run.mesh):
        values = gatedjax.gate_values(gatedjax.LanguageModel(config), params, tokens)

    gates = {}
    kept = {}
    for layer in range(config.num_layers):
        block = next(block for block in config.repeated_blocks if layer in block.layers)
        recorded = "/".join((*block.path, "mixer"))
        period = block.layers.index(layer)
        # Recorded arrays are [periods, batch, T, H, channels]; the mean over channels is drawn.
        if block.mixer.kind == "gated_attention":
            gates[layer] = np.mean(values[f"{recorded}/gates"][period, 0], axis=-1)
        else:
            decay = np.exp(values[f"{recorded}/log_decay"][period, 0])
            kept[layer] = np.mean(decay, axis=-1)

    figure = empty_figure((9.0, 3.9))
    top, bottom = figure.subplots(2, 1)
    draw(
        figure,
        top,
        gates,
        title="attention's gate: what a head's output is multiplied by",
        unit="fraction let through",
    )
    draw(
        figure,
        bottom,
        kept,
        title="linear attention's decay: what a head keeps of its state at a character",
        unit="fraction kept",
    )
    figure.savefig(ROOT / "docs" / "pictures" / "gates.png")


def draw(
    figure: Any,
    axes: Any,
    layers: Mapping[int, np.ndarray],
    title: str,
    unit: str,
) -> None:
    """A row per head of each layer, a column per character.

    Args:
      figure: the matplotlib figure.
      axes: its axes.
      layers: layer -> values [T, H].
      title: of the axes.
      unit: of the values.
    """
    rows = np.concatenate([by_head.T for by_head in layers.values()])
    names = [
        f"layer {layer}, head {head}"
        for layer, by_head in layers.items()
        for head in range(by_head.shape[1])
    ]
    image = axes.imshow(rows, aspect="auto", cmap="cividis", interpolation="nearest")
    # White lines between layers.
    heads = 0
    for by_head in list(layers.values())[:-1]:
        heads += by_head.shape[1]
        axes.axhline(heads - 0.5, color="white", lw=1.5)
    characters = [VISIBLE.get(character, character) for character in TEXT]
    axes.set_xticks(range(len(characters)), characters, family="monospace", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=9, loc="left")
    colorbar = figure.colorbar(image, aspect=12, pad=0.01)
    colorbar.ax.tick_params(labelsize=7)
    colorbar.set_label(unit, fontsize=8)


if __name__ == "__main__":
    main(sys.argv[1])
