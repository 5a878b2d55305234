"""VQ-Logits: a model is trained, its output matrix becomes codes, and it goes on."""

import dataclasses
from typing import Literal

from gatedjax.config import Config, ModelConfig, OutputConfig
from gatedjax.layers.tree import flatten_dict
from gatedjax.study.cell import seeded, train
from gatedjax.study.grid import Cell
from gatedjax.study.measures import bits_per_byte
from gatedjax.training.vq_head import from_trained, loss_memory

# For the memory of the loss: a vocabulary and a batch as models have them.
VOCAB = 32_000
ROWS, LENGTH = 1, 1024


@dataclasses.dataclass(frozen=True)
class Quantization:
    """A run whose output matrix becomes so many codes, and goes on.

    Called with a seed: bits per byte with the whole matrix, and after as many steps again; with
    codes at once, and after as many steps again; the memory of the loss (`memory`).
    """

    config: Config
    codes: int

    def __call__(self, seed: int) -> dict[str, float]:
        return quantize(seeded(Cell({}, self.config), seed), self.codes, seed)


def quantize(cell: Cell, codes: int, seed: int) -> dict[str, float]:
    """The values of a `Quantization`.

    Args:
      cell: of the model, with its seed.
      codes: how many.
      seed: of k-means.
    """
    whole = train(cell)
    model, given = from_trained(whole.run.config.model, whole.params, codes, seed)
    config = dataclasses.replace(cell.config, model=model)
    with_codes = dataclasses.replace(cell, config=config)
    # A measure is taken at the end of a run: this one's only step has next to no length.
    at_once = train(_of_steps(with_codes, 1, lr=1e-12), given=given)
    tuned = train(with_codes, given=given)
    # As many steps, from the same parameters, without codes.
    longer = train(cell, given=flatten_dict(whole.params))
    return {
        "whole": bits_per_byte(whole),
        "whole_longer": bits_per_byte(longer),
        "at_once": bits_per_byte(at_once),
        "tuned": bits_per_byte(tuned),
        **memory(codes, whole.run.config.model.vocab_size),
    }


def memory(codes: int, vocab: int) -> dict[str, float]:
    """MiB of the loss of 1,024 tokens, with a vocabulary of 32,000 and as large a part as codes."""
    part = VOCAB * codes // vocab
    mebibyte = 2.0**20
    values = {}
    kinds: tuple[Literal["softmax", "vq"], ...] = ("softmax", "vq")
    for kind in kinds:
        model = _large(kind, part)
        values[f"{kind}_MiB"] = loss_memory(model, ROWS, LENGTH) / mebibyte
    return values


def _large(kind: Literal["softmax", "vq"], codes: int) -> ModelConfig:
    output = OutputConfig(kind=kind, codes=codes)
    return ModelConfig(vocab_size=VOCAB, width=256, tie_embeddings=False, output=output)


def _of_steps(cell: Cell, steps: int, lr: float) -> Cell:
    train = dataclasses.replace(cell.config.train, steps=steps)
    optim = dataclasses.replace(cell.config.optim, lr=lr, warmup_steps=0)
    return dataclasses.replace(
        cell,
        config=dataclasses.replace(cell.config, train=train, optim=optim),
    )
