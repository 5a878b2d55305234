"""What a model reads of a conversation, where its answers end, and files of prompts."""

import json

import pytest
from tokenizer_file import train_json_tokenizer

from gatedjax.data import ByteTokenizer, JsonTokenizer
from gatedjax.errors import InputError
from gatedjax.evaluation.prompt_files import completed_line, read_prompts
from gatedjax.evaluation.prompt_text import start_of_text

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|eot|>")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A folder with the files of an imported model, without the model."""
    run_dir = tmp_path_factory.mktemp("chat")
    path = run_dir / "tokenizer.json"
    train_json_tokenizer(path, SPECIAL)
    values = json.loads(path.read_text())
    # As Llama's: <s> before every text.
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(values))
    folder = run_dir / "hf"
    folder.mkdir()
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "<|eot|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return run_dir


def test_a_conversation_and_its_ends(run_dir):
    pytest.importorskip("jinja2")
    from gatedjax.evaluation.chat import chat_of_run

    path = str(run_dir / "tokenizer.json")
    tokenizer = JsonTokenizer(path)
    ids = {name: tokenizer.token_id(name) for name in SPECIAL}
    chat = chat_of_run(run_dir, path, tokenizer)
    messages = [{"role": "user", "content": "wörds"}]
    assert chat.encode(messages) == [
        ids["<s>"],
        ids["<|user|>"],
        *tokenizer.encode("wörds"),
        ids["<|end|>"],
        *tokenizer.encode("\n"),
        ids["<|assistant|>"],
    ]
    # The end of a document, eos_token of the file, what the template writes after an answer.
    assert set(chat.stop_ids) == {ids["<|endoftext|>"], ids["<|eot|>"], ids["<|end|>"]}
    generation = run_dir / "hf" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [ids["<|user|>"], 10**6, True]}))
    more = chat_of_run(run_dir, path, tokenizer).stop_ids
    generation.unlink()
    assert set(more) - set(chat.stop_ids) == {ids["<|user|>"]}
    begun = chat.unfinished([*messages, {"role": "assistant", "content": "it is"}])
    assert begun.endswith("<|assistant|>it is")
    with pytest.raises(InputError, match="--chat_template"):
        chat_of_run(run_dir, "bytes", ByteTokenizer())


def test_what_stands_before_a_text(run_dir, tmp_path):
    tokenizer = JsonTokenizer(str(run_dir / "tokenizer.json"))
    assert start_of_text(run_dir, tokenizer) == [tokenizer.token_id("<s>")]
    assert start_of_text(tmp_path, tokenizer) == [tokenizer.eos_id], "a run of our own"
    assert start_of_text(tmp_path, ByteTokenizer()) == [256]


def test_prompts_of_files(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\n two\u2028lines \r\nnaïve\n")
    assert [line.prompt for line in read_prompts(text)] == ["one", " two\u2028lines ", "naïve"]
    messages = [{"role": "user", "content": "hi"}]
    jsonl = tmp_path / "prompts.jsonl"
    rows = [{"id": 7, "prompt": "a\nb"}, {"messages": messages}]
    jsonl.write_text("\n".join(map(json.dumps, rows)))
    one, other = read_prompts(jsonl)
    assert one.prompt == "a\nb" and one.messages is None
    assert other.prompt is None and other.messages == messages
    written = json.loads(completed_line(one, {"completion": "ü"}))
    assert written == {"id": 7, "prompt": "a\nb", "completion": "ü"}


@pytest.mark.parametrize(
    "line, named",
    [
        ("{", "got no JSON"),
        ("[]", "expected an object"),
        ('{"prompt": "a", "messages": []}', "one of them"),
        ('{"text": "a"}', "one of them"),
        ('{"prompt": 3}', "prompt: got 3"),
        ('{"messages": []}', "messages: got"),
        ('{"messages": [{"role": "user"}]}', "messages: got"),
        ('{"messages": ["hi"]}', "messages: got 'hi'"),
    ],
)
def test_lines_that_are_no_prompt_are_named(tmp_path, line, named):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match=r"p\.jsonl:2") as error:
        read_prompts(path)
    assert named in str(error.value)


def test_files_that_are_no_prompts_are_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "none")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(InputError, match="no prompt"):
        read_prompts(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        read_prompts(tmp_path / "latin")
