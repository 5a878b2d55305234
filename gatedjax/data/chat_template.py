"""A tokenizer's chat template: the Jinja program that makes one text of a list of messages.

As transformers applies it: the same environment, the same variables, and `{% generation %}` blocks,
which mark what the assistant says. A template is a program of somebody else's; it runs in Jinja's
sandbox and sees plain JSON only.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatedjax import buckets
from gatedjax.data.formats import one_line, optional_module
from gatedjax.data.tokenizer import FILE_NAME, HUB_NAME
from gatedjax.errors import InputError
from gatedjax.files import read_plain
from gatedjax.paths import Place, expand_place, is_bucket

CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
# Of a run directory: what came with a model that was imported.
IMPORTED = "hf"
LARGEST_FILE = 1 << 24

# Around a generation block while it is rendered: no text holds these, they are no characters.
_BEGIN = "\ufdd0"
_END = "\ufdd1"
_MARKS = re.compile(f"[{_BEGIN}{_END}]")

Message = Mapping[str, Any]
# Begin and end of a piece of a text, in characters.
Span = tuple[int, int]


class ChatTemplate:
    """A template and the special tokens that it may name.

    source: of the program.
    special_tokens: such as `bos_token`, by the name that the template calls it.
    fingerprint: changes whenever a rendered text could.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], where: str = "chat_template"
    ):
        """Compiles the program.

        Args:
          source: of it.
          special_tokens: see above.
          where: the file, for messages.

        Raises:
          InputError: it is no template; the jinja2 library is missing.
        """
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._where = where
        environment = _environment()
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # the library's own
            raise InputError(f"{where}: not a chat template ({one_line(error)})") from None
        body = json.dumps([source, self.special_tokens], sort_keys=True)
        self.fingerprint = hashlib.sha256(body.encode(errors="replace")).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        tools: Any = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
          messages: each with a `role`, and most with a `content`.
          tools: descriptions of functions, for templates that show them.
          add_generation_prompt: whether the text ends with what stands before an answer.

        Raises:
          InputError: the template does not take these messages.
        """
        return _MARKS.sub("", self._marked(messages, tools, add_generation_prompt))

    def render_with_answers(
        self, messages: Sequence[Message], tools: Any = None
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and what of it is in generation blocks."""
        pieces = _MARKS.split(self._marked(messages, tools, False))
        # Blocks are not nested: outside and inside take turns.
        spans = []
        length = 0
        for i, piece in enumerate(pieces):
            if i % 2:
                spans.append((length, length + len(piece)))
            length += len(piece)
        return "".join(pieces), spans

    @property
    def marks_answers(self) -> bool:
        """Whether it has generation blocks."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def _marked(
        self,
        messages: Sequence[Message],
        tools: Any,
        add_generation_prompt: bool,
    ) -> str:
        # Only plain JSON reaches the template, and no mark of ours.
        plain = json.loads(_MARKS.sub("", json.dumps([messages, tools], ensure_ascii=False)))
        try:
            return self._template.render(
                messages=plain[0],
                tools=plain[1],
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # whatever the program does
            raise InputError(f"{self._where}: {one_line(error)}") from None

    def to_json(self) -> bytes:
        """The file that gives this template back, in the form of a tokenizer_config.json."""
        values = {"chat_template": self.source, **self.special_tokens}
        return json.dumps(values, indent=1).encode()


def _environment() -> Any:
    jinja2 = optional_module("jinja2", "chat")
    sandbox = optional_module("jinja2.sandbox", "chat")
    extensions = optional_module("jinja2.ext", "chat")
    nodes = optional_module("jinja2.nodes", "chat")
    utils = optional_module("jinja2.utils", "chat")

    class GenerationBlock(extensions.Extension):
        """`{% generation %}...{% endgeneration %}`: its text between two marks."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            call = self.call_method("_marked")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    class PlainNamespace(utils.Namespace):
        """Attributes of Python's own are no place for a template to write to."""

        def __init__(*args: Any, **values: Any) -> None:
            this, *rest = args
            utils.Namespace.__init__(this)
            for name, value in dict(*rest, **values).items():
                this[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")
            super().__setitem__(name, value)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, extensions.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals = {
        "range": sandbox.safe_range,
        "dict": lambda *args, **values: dict(*args, **values),
        "namespace": PlainNamespace,
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter writes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise ValueError(message)


def load_chat_template(tokenizer: str, path: str = "") -> ChatTemplate:
    """The chat template of a tokenizer, or the one of a file.

    Args:
      tokenizer: as `load_tokenizer` takes it. Beside its tokenizer.json are looked for
        chat_template.jinja and tokenizer_config.json.
      path: of a template, of a tokenizer_config.json or of a folder with either; "" for the
        tokenizer's own.

    Raises:
      InputError: there is none, or it is no template.
    """
    if path:
        key = "config.data.chat_template"
        found = _from_path(expand_place(path, key))
        expected = "a template (.jinja), a tokenizer_config.json or a folder with one of them"
        if found is None:
            raise InputError(f"{key}: got {path!r}, expected {expected}")
        return found
    if tokenizer == "bytes":
        raise InputError(
            "config.data.chat_template: empty, expected a file: the tokenizer 'bytes' has none"
        )
    place = expand_place(tokenizer, "tokenizer")
    if not is_bucket(place) and not Path(place).exists() and HUB_NAME.fullmatch(tokenizer):
        place = _downloaded(tokenizer)
    folder = place if _is_folder(place) else place.parent
    found = _from_path(folder) or _from_path(folder / IMPORTED)
    if found is None:
        raise InputError(
            f"config.data.chat_template: empty, and the tokenizer {tokenizer!r} has none "
            f"({TEMPLATE_NAME} or {CONFIG_NAME} beside its {FILE_NAME})"
        )
    return found


def _is_folder(path: Place) -> bool:
    """In a bucket there are no folders to ask for: there it is what has no suffix."""
    return path.suffix == "" if is_bucket(path) else path.is_dir()


def _from_path(path: Place) -> ChatTemplate | None:
    """The template of a folder or of a file; None where there is none."""
    if _is_folder(path):
        values = _values(path / CONFIG_NAME)
        source = read_text(path / TEMPLATE_NAME)
        if source is None:
            source = _default_of(values.get("chat_template"))
        where = path / TEMPLATE_NAME
    elif path.suffix == ".json":
        values = _values(path)
        source = _default_of(values.get("chat_template"))
        where = path
    else:
        values = _values(path.parent / CONFIG_NAME)
        source = read_text(path)
        where = path
    if source is None:
        return None
    return ChatTemplate(source, _special_tokens(values), str(where))


def read_text(path: Place) -> str | None:
    """The text of a small file, here or in a bucket; None if there is none."""
    if is_bucket(path):
        with buckets.errors(f"could not read {path}", path):
            return buckets.read(path, LARGEST_FILE).decode() if buckets.exists(path) else None
    if not path.exists():
        return None
    try:
        return read_plain(path, LARGEST_FILE).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None


def _values(path: Place) -> Mapping[str, Any]:
    """A tokenizer_config.json; {} where there is none."""
    text = read_text(path)
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({one_line(error)})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: got {type(values).__name__}, expected an object")
    return values


def _default_of(template: Any) -> str | None:
    """A tokenizer has one template, or several by name."""
    if isinstance(template, list):
        by_name = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name, value in values.items():
        if not name.endswith("_token"):
            continue
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _downloaded(name: str) -> Path:
    """The folder of the user's cache that holds what a repository on the hub has of a template."""
    hub = optional_module("huggingface_hub", "chat")
    place = None
    reason = "no such file"
    for file in (CONFIG_NAME, TEMPLATE_NAME):
        try:
            place = Path(hub.hf_hub_download(name, file))
        except Exception as error:  # the library's own errors, and those of its connections
            reason = one_line(error)
    if place is None:
        raise InputError(
            f"config.data.chat_template: empty, and {name!r} has none on the hub ({reason})"
        )
    return place
