"""The sources of a configuration, opened: files tokenized, streams opened, images listed."""

import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path

from absl import logging

from gatedjax.config import IMAGE_KINDS, DataConfig
from gatedjax.data import bucket_cache, chat
from gatedjax.data.chat_template import load_chat_template
from gatedjax.data.corpus import Corpus
from gatedjax.data.document_stream import KIND as STREAMING
from gatedjax.data.encoders import Encoder, TextEncoder
from gatedjax.data.images import ImageCorpus, open_images
from gatedjax.data.sources import Source, open_source
from gatedjax.data.splits import side_of
from gatedjax.data.streaming import StreamedCorpus, streamed_corpus
from gatedjax.data.token_cache import cache_name, tokenize
from gatedjax.data.tokenizer import Tokenizer, load_tokenizer
from gatedjax.errors import InputError
from gatedjax.paths import Place, expand, expand_place, is_bucket

AnyCorpus = Corpus | StreamedCorpus | ImageCorpus


def corpora(cfg: DataConfig) -> dict[str, AnyCorpus]:
    """The sources by name: files tokenized, now if they are not in the cache, streams opened,
    images listed.

    Raises:
      InputError: one line naming the source and what is wrong with it.
    """
    # By name: a configuration that went through JSON may list them in another order, and the
    # mixture must not change.
    configs = dict(sorted(cfg.sources.items()))
    for name, source in configs.items():
        if not 0 < source.weight < math.inf:
            raise InputError(f"sources.{name}.weight: got {source.weight!r}, expected above 0")
    if any(source.kind in IMAGE_KINDS for source in configs.values()):
        return dict(image_corpora(cfg))
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.end_of_document)
    encoders = _encoders(cfg, tokenizer)
    cache_dir = _cache_dir(cfg)
    # A bad source is found before the first one is tokenized, which takes time.
    streams = {}
    sources = {}
    for name, source in configs.items():
        if source.kind == STREAMING:
            streams[name] = streamed_corpus(name, source, tokenizer)
        else:
            sources[name] = open_source(name, source)
    tokenized = {}
    for name, source in sources.items():
        tokenized[name] = _tokenized(
            source,
            encoders.get(source.kind, encoders["text"]),
            cfg.validation_fraction,
            cache_dir,
        )
    _require_disjoint(tokenized, cfg.validation_fraction)
    together = tokenized | streams
    return {name: together[name] for name in configs}


def image_corpora(cfg: DataConfig) -> dict[str, ImageCorpus]:
    """The sources of images by name.

    Raises:
      InputError: a source that is none of images, or has other classes than another.
    """
    opened = {}
    for name, source in sorted(cfg.sources.items()):
        if source.kind not in IMAGE_KINDS:
            raise InputError(
                f"sources.{name}.kind: got {source.kind!r}, expected one of "
                f"{', '.join(IMAGE_KINDS)}, as another source has"
            )
        opened[name] = open_images(name, source, cfg.validation_fraction)
    first, *others = opened.values()
    for other in others:
        if other.classes != first.classes:
            raise InputError(
                f"sources.{other.name}: got other classes than sources.{first.name}, expected the "
                "same"
            )
    return opened


def _encoders(cfg: DataConfig, tokenizer: Tokenizer) -> dict[str, Encoder]:
    """What makes tokens of the documents: of texts, and of conversations if there are some."""
    encoders: dict[str, Encoder] = {"text": TextEncoder(tokenizer)}
    if has_chat(cfg):
        template = load_chat_template(cfg.tokenizer, cfg.chat_template)
        encoders[chat.KIND] = chat.ChatEncoder(tokenizer, template, cfg.chat_answers)
    return encoders


def has_chat(cfg: DataConfig) -> bool:
    """Whether there are conversations among the sources."""
    return any(source.kind == chat.KIND for source in cfg.sources.values())


def _tokenized(
    source: Source,
    encoder: Encoder,
    validation_fraction: float,
    cache_dir: Place,
) -> Corpus:
    """`tokenize`, where the cache may be in a bucket: then it is on this machine as well."""
    if not is_bucket(cache_dir):
        return tokenize(
            source,
            encoder,
            validation_fraction,
            Path(cache_dir),
        )
    here = bucket_cache.local_folder(_user_cache(), cache_dir)
    name = cache_name(source, encoder, validation_fraction)
    bucket_cache.fetch(here / name, cache_dir / name, logging.info)
    corpus = tokenize(
        source,
        encoder,
        validation_fraction,
        here,
    )
    bucket_cache.store(here / name, cache_dir / name)
    return corpus


def _cache_dir(cfg: DataConfig) -> Place:
    if not cfg.cache_dir:
        return _user_cache()
    place = expand_place(cfg.cache_dir, "config.data.cache_dir")
    return place if is_bucket(place) else place.absolute()


def _user_cache() -> Path:
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand(user_cache, "config.data.cache_dir, XDG_CACHE_HOME") / "gatedjax"


def _require_disjoint(corpora: Mapping[str, Corpus], validation_fraction: float) -> None:
    """InputError if one source trains on a document that another one holds out.

    The hash of its text puts a document on one side in all sources; only the exceptions of small
    sources can contradict that.
    """
    for exceptional, other in itertools.permutations(corpora.values(), 2):
        exception = exceptional.exception
        if exception is None or exception.document not in other.document_hashes():
            continue
        there = side_of(exception.document, validation_fraction, other.exception)
        if there != exception.side:
            raise InputError(
                f"sources.{exceptional.name}: is so small that a document of it had to change "
                f"sides, and sources.{other.name} holds the same document: it would be trained on "
                "and held out; leave it out of one of them, or give a larger source"
            )


def validation_text(cfg: DataConfig) -> bytes:
    """The validation documents of all sources one after another, UTF-8.

    This is the text whose bits per byte are reported.
    """
    texts = []
    for corpus in corpora(cfg).values():
        if isinstance(corpus, ImageCorpus):
            raise InputError(f"sources.{corpus.name}: holds images, expected text")
        texts.append(corpus.validation_text())
    return b"".join(texts)
