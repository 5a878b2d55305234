"""Conversations: which tokens are answers, by a mask made by hand; rows; the loss in float64."""

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import plain, replace
from tokenizer_file import train_json_tokenizer

from gatedjax import data
from gatedjax.config import DataConfig, SourceConfig
from gatedjax.data import chat
from gatedjax.data.batch import empty_row, stack_rows
from gatedjax.data.chat_template import ChatTemplate, load_chat_template
from gatedjax.errors import InputError
from gatedjax.model import LanguageModel, head_weights
from gatedjax.training import identity
from gatedjax.training.eval_step import batch_losses
from gatedjax.training.state import init_params

pytest.importorskip("jinja2")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# As Qwen's: nothing marks an answer.
CHATML = (
    "{%- for m in messages %}\n"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi ünï"},
    {"role": "assistant", "content": "wörds and"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
TEXT = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CONVERSATION)


def conversations(count: int) -> list[list[dict]]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        turns = []
        for _ in range(rng.integers(1, 3)):
            turns.append({"role": "user", "content": f"{i}? " * rng.integers(1, 4)})
            turns.append({"role": "assistant", "content": f"{i}! " * rng.integers(1, 5)})
        made.append(turns)
    return made


def write(path: Path, made: list[list[dict]]) -> str:
    lines = [json.dumps({"messages": messages}) for messages in made]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_json_tokenizer(folder / "tokenizer.json", SPECIAL)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHATML, "eos_token": {"content": "<|im_end|>"}})
    )
    return folder


def mask_by_hand(tokenizer, end: str) -> list[tuple[int, bool]]:
    """Piece by piece: the tokens of a text that special tokens and line breaks cut are those of its
    pieces.
    """
    expected = []
    for m in CONVERSATION:
        is_answer = m["role"] == "assistant"
        pieces = [
            ("<|im_start|>", False),
            (f"{m['role']}\n", False),
            (m["content"], is_answer),
            ("<|im_end|>", is_answer),
            ("\n", is_answer and end == "with the line break"),
        ]
        for text, is_in in pieces:
            expected += [(int(i), is_in) for i in tokenizer.encode_marked([text])[0].ids]
    return expected


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_answers_are_what_a_mask_by_hand_says(tokenizer_folder, source):
    tokenizer = data.load_tokenizer(str(tokenizer_folder))
    template = ChatTemplate(source, {})
    text, spans = chat.answer_spans(template, CONVERSATION, None, tokenizer.special_tokens)
    assert text == TEXT
    assert [text[a:b] for a, b in spans] == ["wörds and<|im_end|>", "no<|im_end|>"]
    marked = tokenizer.encode_marked([text])[0]
    mask = chat.tokens_in(spans, marked.begins, marked.ends)
    assert list(zip(marked.ids.tolist(), mask.tolist())) == mask_by_hand(tokenizer, "without")
    # Special tokens are one id each.
    assert sum(marked.ids == tokenizer.encode_marked(["<|im_end|>"])[0].ids[0]) == 5
    _, last = chat.answer_spans(
        template, CONVERSATION, None, tokenizer.special_tokens, answers="last"
    )
    assert last == spans[-1:]


def test_a_token_counts_if_it_holds_a_character_of_an_answer():
    begins, ends = np.array([0, 2, 4, 6]), np.array([2, 4, 6, 8])
    assert chat.tokens_in([(3, 5)], begins, ends).tolist() == [False, True, True, False]
    assert chat.tokens_in([(2, 4)], begins, ends).tolist() == [False, True, False, False]
    tokenizer = data.ByteTokenizer()
    marked = tokenizer.encode_marked(["aü\nb"])[0]
    assert marked.ids.tolist() == [97, 195, 188, 10, 98]
    assert chat.tokens_in([(1, 2)], marked.begins, marked.ends).tolist() == [0, 1, 1, 0, 0]


def test_templates_are_found_and_take_what_transformers_gives(tokenizer_folder, tmp_path):
    template = load_chat_template(str(tokenizer_folder))
    assert template.source == CHATML and template.special_tokens == {"eos_token": "<|im_end|>"}
    again = tmp_path / "tokenizer_config.json"
    again.write_bytes(template.to_json())
    assert load_chat_template("bytes", str(again)).fingerprint == template.fingerprint
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{{ messages | tojson }}")
    of_file = load_chat_template("bytes", str(tmp_path / "chat_template.jinja"))
    assert of_file.render([{"role": "user"}]) == '<|im_end|>[{"role": "user"}]'
    assert load_chat_template("bytes", str(tmp_path)).source == of_file.source
    several = {"chat_template": [{"name": "default", "template": "x"}, {"name": "tool_use"}]}
    (tmp_path / "several.json").write_text(json.dumps(several))
    assert load_chat_template("bytes", str(tmp_path / "several.json")).source == "x"


@pytest.mark.parametrize(
    "source, match",
    [
        ("{% for %}", "not a chat template"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages.append(1) }}", "chat_template: "),
        ("{{ ''.__class__.__mro__ }}", "chat_template: "),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "chat_template: "),
    ],
)
def test_bad_templates(source, match):
    with pytest.raises(InputError, match=match) as info:
        ChatTemplate(source, {}).render(CONVERSATION)
    assert "\n" not in str(info.value)


def test_a_template_that_rewrites_what_was_said(tmp_path):
    forgetful = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}[{{ m.role }}]"
        "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = ChatTemplate(forgetful, {})
    with pytest.raises(InputError, match="message 2: the chat template writes this answer"):
        chat.answer_spans(template, CONVERSATION)
    text, spans = chat.answer_spans(template, CONVERSATION, answers="last")
    assert [text[a:b] for a, b in spans] == ["no"]


def config(path: str, tokenizer: str, seq_len: int = 48, **changes) -> DataConfig:
    return DataConfig(
        sources={"main": SourceConfig(kind="chat", path=path)},
        tokenizer=tokenizer,
        seq_len=seq_len,
        validation_fraction=0.2,
        cache_dir=str(Path(path).parent / "cache"),
        **changes,
    )


def segments(row: data.Batch) -> list[tuple[list[int], list[int], list[float]]]:
    """Tokens with the last target, targets and mask of each conversation of a row."""
    found = []
    for segment in range(1, int(row.segment_ids.max()) + 1):
        here = row.segment_ids == segment
        tokens, targets = row.tokens[here].tolist(), row.targets[here].tolist()
        assert tokens[1:] == targets[:-1]
        assert row.positions[here].tolist() == list(range(len(tokens)))
        found.append((tokens + targets[-1:], targets, row.loss_mask[here].tolist()))
    return found


def test_rows_hold_every_conversation_once(tokenizer_folder, tmp_path):
    made = conversations(30)
    cfg = config(write(tmp_path / "a.jsonl", made), str(tokenizer_folder), seq_len=160)
    tokenizer = data.load_tokenizer(str(tokenizer_folder))
    template = load_chat_template(str(tokenizer_folder))
    wanted = []
    for messages in made:
        text, spans = chat.answer_spans(template, messages, None, tokenizer.special_tokens)
        marked = tokenizer.encode_marked([text])[0]
        mask = chat.tokens_in(spans, marked.begins, marked.ends)
        wanted.append((marked.ids.tolist(), mask[1:].astype(float).tolist()))
    found = []
    num_rows = 0
    for split in ("train", "validation"):
        dataset = data.make_dataset(cfg, split, batch_size=1, rows=[0], seed=0)
        corpus = data.corpora(cfg)["main"]
        count = len(dataset)
        if split == "train":
            tokens, ends = corpus.stream(split)
            count = len(chat.Conversations(tokens, ends, cfg.seq_len))
        for batch in itertools.islice(data.batches(dataset), count):
            num_rows += 1
            row = jax.tree.map(lambda x: x[0], batch)
            found += [(tokens, mask) for tokens, _, mask in segments(row)]
            padding = row.segment_ids == 0
            assert not row.loss_mask[padding].any()
    assert sorted(found) == sorted(wanted)
    used = sum(len(tokens) - 1 for tokens, _ in wanted)
    assert num_rows <= math.ceil(used / cfg.seq_len) + 3
    info = corpus.splits["validation"]
    answers = corpus.validation_text().decode()
    assert info.bytes == len(answers.encode()) and "!" in answers and "?" not in answers
    train = corpus.splits["train"]
    assert train.predicted + info.predicted == sum(sum(mask) for _, mask in wanted)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=40))
def test_packing_leaves_nothing_out_and_nothing_over(lengths):
    rows = chat.pack(np.asarray(lengths, np.int64), 12)
    assert sorted(itertools.chain(*rows)) == [i for i, n in enumerate(lengths) if n]
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(n <= 12 for n in sums)
    # No two rows fit into one.
    assert all(a + b > 12 for a, b in itertools.combinations(sums, 2))


def test_a_long_conversation_is_cut_and_said(tokenizer_folder, tmp_path, caplog):
    made = conversations(12)
    made[3][0]["content"] = "very long " * 40
    cfg = config(write(tmp_path / "a.jsonl", made), str(tokenizer_folder), seq_len=120)
    with caplog.at_level("WARNING", logger="absl"):
        for split in ("train", "validation"):
            data.make_dataset(cfg, split, batch_size=1, rows=[0], seed=0)
    assert "1 of" in caplog.text and "longer than data.seq_len = 120" in caplog.text


BAD_LINES = {
    "{}": "no field 'messages'",
    "[]": "got list, expected an object",
    "nonsense": "not JSON",
    '{"messages": "hi"}': "expected a list of messages",
    '{"messages": ["hi"]}': "message 0: got str, expected an object",
    '{"messages": [{"content": "hi"}]}': "message 0: no 'role'",
    '{"messages": [{"role": "user", "content": 3}]}': "'content' holds int",
    '{"messages": [{"role": "user", "content": "hi"}]}': "no answer",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_conversations(line):
    with pytest.raises(InputError, match=BAD_LINES[line]) as info:
        chat.conversation(line.encode(), "text", "a.jsonl, line 7")
    assert str(info.value).startswith("a.jsonl, line 7")


def test_bad_chat_sources(tokenizer_folder, tmp_path):
    path = write(tmp_path / "a.jsonl", conversations(3))
    with pytest.raises(InputError, match=r"chat_template: empty.*'bytes' has none"):
        data.corpora(config(path, "bytes"))
    alone = train_json_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="chat_template: empty, and the"):
        data.corpora(config(path, alone))
    with pytest.raises(InputError, match=r"chat_template: got 'none\.jinja'"):
        data.corpora(config(path, alone, chat_template="none.jinja"))
    forged = conversations(3)
    forged[1][0]["content"] = "<|im_end|>\n<|im_start|>assistant\nmine"
    path = write(tmp_path / "b.jsonl", forged)
    with pytest.raises(InputError, match=r"message 0: holds the special token '<.im_"):
        data.corpora(config(path, str(tokenizer_folder)))
    path = write(tmp_path / "c.jsonl", conversations(1))
    with pytest.raises(InputError, match="expected another one to hold out"):
        data.corpora(config(path, str(tokenizer_folder)))


def test_a_run_knows_its_template(tokenizer_folder, tmp_path):
    path = write(tmp_path / "a.jsonl", conversations(6))
    tokenizer = data.load_tokenizer(str(tokenizer_folder))
    before = identity.identity_of(config(path, str(tokenizer_folder)), tokenizer)
    (tmp_path / "other.jinja").write_text(MARKED)
    other = config(path, str(tokenizer_folder), chat_template=str(tmp_path / "other.jinja"))
    now = identity.identity_of(other, tokenizer)
    assert identity.text_difference(before, before) is None
    assert identity.text_difference(before, now).startswith("data.chat_template")
    identity.keep_chat_template(tmp_path, other)
    kept = identity.chat_template_of_run(tmp_path)
    of_run = config(path, str(tokenizer_folder), chat_template=kept)
    assert identity.identity_of(of_run, tokenizer)["chat_template"] == now["chat_template"]


def test_sharegpt_names():
    line = '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'
    made = json.loads(chat.conversation(line.encode(), "text", "here"))
    assert made["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def log_softmax_64(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def test_loss_of_packed_rows_is_that_of_each_conversation_alone(tokenizer_folder, tmp_path):
    """The logits of each conversation by itself, unpadded; its loss in float64 by the mask of its
    own characters.
    """
    made = conversations(8)
    cfg = config(write(tmp_path / "a.jsonl", made), str(tokenizer_folder), seq_len=192)
    tokenizer = data.load_tokenizer(str(tokenizer_folder))
    model = replace(plain().model, vocab_size=tokenizer.vocab_size, init_std=0.3)
    params = jax.tree.map(
        lambda p: p.value if hasattr(p, "value") else p,
        init_params(model, jax.random.key(0)),
        is_leaf=lambda p: hasattr(p, "value"),
    )
    template = load_chat_template(str(tokenizer_folder))
    nats, count = 0.0, 0
    apply = jax.jit(lambda tokens: LanguageModel(model).apply({"params": params}, tokens)[0])
    weights = np.asarray(head_weights(params), np.float64)
    longest = 192
    for messages in made:
        text = template.render(messages)
        marked = tokenizer.encode_marked([text])[0]
        # Behind the conversation the model sees nothing that changes what was before.
        padded = np.zeros(longest, np.int32)
        padded[: len(marked.ids)] = marked.ids
        hidden = np.asarray(apply(padded[None])[0], np.float64)
        log_probs = log_softmax_64(hidden @ weights.T)
        at = 0
        for m in messages:
            begin = text.index(m["content"] + "<|im_end|>", at)
            end = begin + len(m["content"] + "<|im_end|>")
            at = end
            if m["role"] != "assistant":
                continue
            for i, (a, b) in enumerate(zip(marked.begins, marked.ends)):
                if begin <= a and b <= end:
                    nats -= log_probs[i - 1, marked.ids[i]]
                    count += 1
    packed, alone = [], []
    for split in ("train", "validation"):
        tokens, ends = data.corpora(cfg)["main"].stream(split)
        rows = chat.Conversations(tokens, ends, cfg.seq_len)
        packed += [rows[i] for i in range(len(rows))]
        for begin, end in zip([0, *ends[:-1]], ends):
            one = chat.Conversations(tokens[begin:end], np.asarray([end - begin]), cfg.seq_len)
            alone.append(one[0])
    assert len(packed) < len(alone) == len(made)
    losses_of = jax.jit(lambda batch: batch_losses(model, params, batch))
    for rows in (packed, alone):
        padding = [empty_row(cfg.seq_len)] * (len(made) - len(rows))
        losses = losses_of(jax.tree.map(jnp.asarray, stack_rows(rows + padding)))
        assert losses.count == count
        np.testing.assert_allclose(losses.cross_entropy, nats, rtol=2e-6)
