"""Many prompts at once: batches of like lengths, each row until its own end.

What a prompt is given does not depend on the others: not on the batch it is in, nor on its place
there.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gatedjax.data.tokenizer import Tokenizer
from gatedjax.evaluation.filters import Sampling
from gatedjax.evaluation.sampling import Decoder
from gatedjax.evaluation.text_stream import TextUntil


class Stops(NamedTuple):
    """What ends a text.

    ids: tokens.
    strings: of text, none of them empty; they are no part of the text that they end.
    """

    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


class Completion(NamedTuple):
    """What follows a prompt.

    text: up to the stop.
    tokens: how many were sampled for it.
    finish: "stop", or "length" where the text could go on.
    """

    text: str
    tokens: int
    finish: str


class Prompt(NamedTuple):
    """Tokens to continue.

    number: of the prompt, from which with the seed its randomness comes.
    ids: what the model sees, at least one.
    text_ids: behind which the text of the continuation is decoded. None of them for a text that
      stands alone: without the space between it and the prompt that some tokenizers leave out.
    """

    number: int
    ids: Sequence[int]
    text_ids: Sequence[int] = ()


def completions(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    tokens: int,
    *,
    stops: Stops,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 8,
) -> list[Completion]:
    """What follows each of the prompts.

    Args:
      decoder: the model.
      tokenizer: the one that it was trained with.
      prompts: of any lengths.
      tokens: how many to sample at most, for each.
      stops: what ends a text.
      sampling: how tokens are chosen.
      seed: same seed, same texts.
      batch_size: rows that are computed together.

    Raises:
      InputError: as of `Decoder.generate`.
    """
    found: list[Completion | None] = [None] * len(prompts)
    rows = min(batch_size, len(prompts))
    for indices in batches_by_length([len(prompt.ids) for prompt in prompts], batch_size):
        of_batch = [prompts[i] for i in indices]
        given = _completed(decoder, tokenizer, of_batch, tokens, stops, sampling, seed, rows)
        for i, completion in zip(indices, given):
            found[i] = completion
    return [completion for completion in found if completion is not None]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Which prompts are computed together: those of like lengths, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def padded_rows(
    prompts: Sequence[Sequence[int]],
    num_rows: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as rows [num_rows, longest], padded on the right, and their segment ids.

    Rows that no prompt is left for hold one token: a row must have one.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = np.zeros((num_rows, longest), np.int32)
    segment_ids = np.zeros_like(ids)
    segment_ids[:, 0] = 1
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        segment_ids[row, : len(prompt)] = 1
    return ids, segment_ids


def _completed(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    tokens: int,
    stops: Stops,
    sampling: Sampling,
    seed: int,
    num_rows: int,
) -> list[Completion]:
    """The prompts of one batch, continued together."""
    ids, segment_ids = padded_rows([prompt.ids for prompt in prompts], num_rows)
    numbers = [prompt.number for prompt in prompts]
    unused = num_rows - len(prompts)
    steps = decoder.generate(
        ids,
        tokens,
        segment_ids=segment_ids,
        seed=seed,
        numbers=numbers + [0] * unused,
        stop_ids=stops.ids,
        **sampling._asdict(),
    )
    texts = [TextUntil(tokenizer, prompt.text_ids, *stops) for prompt in prompts]
    written = [""] * len(prompts)
    for row in range(len(prompts), num_rows):
        steps.finish(row)
    for of_rows in steps:
        for row, text in enumerate(texts):
            written[row] += text.add(int(of_rows[row]))
            if text.has_stopped:
                steps.finish(row)
    given = []
    for text, before in zip(texts, written):
        whole = before + text.rest()
        finish = "stop" if text.has_stopped else "length"
        given.append(Completion(whole, text.tokens, finish))
    return given
