"""lm-evaluation-harness asks a run of ours: `gatedjax-lm-eval --model gatedjax`.

What the model sees is what the harness' `hf` backend shows an imported model, token for token. A
run that was trained here has documents that begin with the end-of-document token (docs/tokens.md):
it stands before every context.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from gatedjax.data import load_tokenizer
from gatedjax.data.chat_template import IMPORTED
from gatedjax.errors import InputError, require
from gatedjax.evaluation import packed_scoring
from gatedjax.evaluation.chat import Chat, chat_of_run
from gatedjax.evaluation.completions import Prompt, Stops, completions
from gatedjax.evaluation.packed_scoring import Request
from gatedjax.evaluation.prompt_text import start_of_text
from gatedjax.evaluation.restore import fitting_mesh, require_language_model, restore_params
from gatedjax.evaluation.sampling import Decoder, checked_sampling
from gatedjax.files import read_plain
from gatedjax.paths import expand

NAME = "gatedjax"
# What the harness' tasks expect of a model that has nothing to say about it.
_MOST_NEW_TOKENS = 256
_BATCH_SIZE = 8
_LARGEST_CONFIG = 1 << 24


class GatedjaxLM(TemplateLM):
    """A run directory as a model of the harness."""

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = _BATCH_SIZE,
        step: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = _MOST_NEW_TOKENS,
        chat_template: str = "",
        trust_paths: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """Restores a checkpoint.

        Args:
          checkpoint: the run directory.
          batch_size: rows that are computed together; "auto" for 8.
          step: which checkpoint; None for the newest intact one.
          max_length: tokens that the model reads at most; None for an imported model's
            max_position_embeddings, and the rows that a run of ours was trained on.
          max_gen_toks: of an answer, where a task does not say.
          chat_template: a file or folder; "" for the run's own.
          trust_paths: use the tokenizer's path in a checkpoint that somebody else wrote.
          device: None, or what the harness' default is: jax chooses.
          max_batch_size: of the harness' search for a batch size, which is not made.

        Raises:
          InputError: no such checkpoint; an argument that is none.
        """
        super().__init__()
        is_automatic = str(batch_size).startswith("auto")
        self._batch_size = _number("batch_size", _BATCH_SIZE if is_automatic else batch_size)
        self._max_gen_toks = _number("max_gen_toks", max_gen_toks)
        self._checkpoint = expand(checkpoint, "checkpoint")
        is_flag = isinstance(trust_paths, bool)
        require(is_flag, "trust_paths", trust_paths, "True or False")
        run, params, _ = restore_params(
            self._checkpoint,
            step=step,
            trust_paths=trust_paths,
            mesh=fitting_mesh(self._checkpoint),
        )
        require_language_model(run)
        data = run.config.data
        self._run = run
        self.tokenizer: Any = load_tokenizer(data.tokenizer, data.end_of_document)
        self._is_imported = (self._checkpoint / IMPORTED).is_dir()
        self._start = start_of_text(self._checkpoint, self.tokenizer)
        self._given_template = chat_template
        self._known_chat: Chat | None = None
        self._decoder = Decoder(run.config.model, params, self.tokenizer.vocab_size)
        self._forward = packed_scoring.forward_of(run.config.model, params)
        longest = max_length
        if longest is None:
            longest = _longest(self._checkpoint, data.seq_len)
        self.max_length = _number("max_length", longest, least=2)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context: the start of a text if it has one."""
        return self._start[0] if self._start else self.eot_token_id

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The tokens of a text, behind those that stand before every one.

        Args:
          string: the text; special tokens that a chat template wrote into it are such tokens.
          add_special_tokens: False for the text alone.
          kwargs: of other models.
        """
        (marked,) = self.tokenizer.encode_marked([string])
        ids = marked.ids.tolist()
        # A chat template may have written them.
        has_start = add_special_tokens is None and ids[: len(self._start)] == self._start
        if add_special_tokens is False or has_start:
            return ids
        return [*self._start, *ids]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found = self._scores([Request(context, after) for _, context, after in requests])
        return [(score.log_likelihood, score.is_greedy) for score in found]

    def loglikelihood_rolling(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,
    ) -> list[float]:
        """The log-likelihood of each text, however long.

        Args:
          requests: of the harness, with the text as their only argument.
          disable_tqdm: nothing is shown in any case.
        """
        of_windows = []
        owners = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            # The harness' own backend asks about the start of an imported model's text, too.
            ids = self.tok_encode(text, None if self._is_imported else False)
            cut = packed_scoring.windows(ids, self.prefix_token_id, self.max_length)
            of_windows.extend(cut)
            owners.extend([owner] * len(cut))
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._scores(of_windows)):
            sums[owner] += score.log_likelihood
        for request, total in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,
    ) -> list[str]:
        """What follows each context, up to a string that ends it.

        Args:
          requests: of the harness: a context, and how to go on.
          disable_tqdm: nothing is shown in any case.

        Raises:
          InputError: an option of sampling that this has not.
        """
        by_options: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for indices in by_options.values():
            contexts = [requests[i].args[0] for i in indices]
            answers = self._answers(contexts, indices, requests[indices[0]].args[1])
            for i, text in zip(indices, answers):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as one text.

        Args:
          chat_history: the messages.
          add_generation_prompt: an answer is to follow; without it the last message is begun, and
            goes on.
        """
        chat = self._chat()
        if add_generation_prompt:
            return chat.template.render(chat_history, add_generation_prompt=True)
        return chat.unfinished(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template, which the harness writes down."""
        return self._chat().template.source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What the harness' cache of tokenized requests goes by."""
        return self.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes down of the model."""
        return {"checkpoint": str(self._checkpoint), "dtype": self._run.config.model.dtype}

    def _chat(self) -> Chat:
        if self._known_chat is None:
            self._known_chat = chat_of_run(
                self._checkpoint,
                self._run.config.data.tokenizer,
                self.tokenizer,
                self._given_template or self._run.config.data.chat_template,
            )
        return self._known_chat

    def _scores(self, requests: Sequence[Request]) -> list[packed_scoring.Score]:
        return packed_scoring.scores(
            self._forward,
            requests,
            most_tokens=self.max_length,
            batch_size=self._batch_size,
        )

    def _answers(
        self,
        contexts: Sequence[str],
        numbers: Sequence[int],
        options: Mapping[str, Any],
    ) -> list[str]:
        """What follows the contexts, which share their options."""
        plain: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), self._max_gen_toks))
        most = plain.pop("max_gen_toks")
        is_sampled = plain.pop("do_sample", False)
        room = self.max_length - most
        require(room > 0, "max_gen_toks", most, f"below the model's {self.max_length} tokens")
        # The harness' name of the end is for text; here it is a token.
        until = handle_stop_sequences(plain.pop("until", None), eos="")
        temperature = plain.pop("temperature", 0.0) if is_sampled else 0.0
        plain.pop("temperature", None)
        sampling = checked_sampling(
            temperature,
            int(plain.pop("top_k", 0) or 0),
            float(plain.pop("top_p", 1.0) or 1.0),
        )
        require(not plain, "generation_kwargs", sorted(plain), "until, temperature, top_k, top_p")
        prompts = []
        for number, context in zip(numbers, contexts):
            ids = self.tok_encode(context)[-room:] or [self.eot_token_id]
            prompts.append(Prompt(number, ids))
        found = completions(
            self._decoder,
            self.tokenizer,
            prompts,
            most,
            stops=Stops((self.eot_token_id,), tuple(text for text in until if text)),
            sampling=sampling,
            batch_size=self._batch_size,
        )
        return [completion.text for completion in found]


def register() -> None:
    """`--model gatedjax` is this."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=f"{__name__}:{GatedjaxLM.__name__}")


def _longest(run_dir: Path, seq_len: int) -> int:
    """The tokens that a model reads at most."""
    path = run_dir / IMPORTED / "config.json"
    if not path.is_file() or path.is_symlink():
        return seq_len
    try:
        values = json.loads(read_plain(path, _LARGEST_CONFIG))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path}: got no JSON, expected the configuration of a model") from None
    if not isinstance(values, dict):
        return seq_len
    inner = values.get("text_config")
    values = inner if isinstance(inner, dict) else values
    return values.get("max_position_embeddings", seq_len)


def _number(name: str, value: Any, least: int = 1) -> int:
    """An argument that is a number; the harness hands on what was written as text."""
    number = value
    if isinstance(value, str) and value.isdigit():
        number = int(value)
    is_number = isinstance(number, int) and not isinstance(number, bool) and number >= least
    require(is_number, name, value, f"a number from {least} on")
    return number
