"""Evaluates a trained model on held-out text, an encoder also on images.

    python eval.py --checkpoint=runs/tiny [--batches=64] [--lengths=256,1024] [--step=400] [--json]
        [--text=book.txt] [--source=text:/data/wiki] [--config.train.batch_size=4] [--probes]
        [--activation_bits=8]

Prints loss, perplexity and bits per byte with standard errors, beside what gzip and xz need for the
same text, and how fast the model reads (prefill) and writes (decode). With --probes instead: what
attention, gates, states and experts do on the first batch of validation text
(`gatedjax/evaluation/probes.py`), as JSON and pictures in the run directory. With
--activation_bits also: the loss with activations rounded to so many bits
(`gatedjax/evaluation/rounding.py`).

Of an encoder (`model.task` masked_lm or classify): loss and accuracy, and of images which classes
were taken for which, as lines and as CHECKPOINT/confusion.png.

The text is what the run held out, if its sources are what they were when it was trained; what it
would have held out of the text that --source names; or all of the text that --text names, which the
model should never have seen. The paths in a checkpoint that somebody else wrote are not used unless
--trust_paths says so.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gatedjax.config.checks import LARGEST_SIZE
from gatedjax.data import validation_text
from gatedjax.errors import InputError
from gatedjax.evaluation.cache_bytes import CacheBytes, as_text, cache_bytes
from gatedjax.evaluation.compressors import bits_per_byte_of_compressors
from gatedjax.evaluation.encoder import EncoderEvaluation, EncoderValidation, class_names
from gatedjax.evaluation.restore import (
    fits_one_device,
    fitting_mesh,
    memory_errors,
    require_same_text,
    require_text,
    restore_params,
)
from gatedjax.evaluation.speed import Speed, speed
from gatedjax.evaluation.spent import Spent, is_on_demand, spent
from gatedjax.evaluation.validation import Evaluation, Validation, with_length
from gatedjax.paths import Place, is_bucket
from gatedjax.reporting.confusion import PICTURE, draw_confusion, most_confused
from gatedjax.reporting.console import say
from gatedjax.reporting.probe_pictures import require_no_links, write_report
from gatedjax.runtime import cli, launch
from gatedjax.runtime.host_memory import large_blocks_given_back
from gatedjax.runtime.mirror import Mirror
from gatedjax.sharding import mesh_of_text
from gatedjax.training.run import Run

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, as --workdir of train.py.")
_BATCHES = flags.DEFINE_integer(
    "batches", 64, "Batches of validation text; 0 for all of it.", lower_bound=0
)
_PROBES = flags.DEFINE_bool(
    "probes", False, "Measure what the layers do, into CHECKPOINT/probes, and end."
)
_STEP = flags.DEFINE_integer(
    "step", None, "Which checkpoint; default: the newest intact one.", lower_bound=0
)
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Where the run's text is, KIND or KIND:PATH (text:/data/wiki); default: as then.",
)
_TEXT = flags.DEFINE_string(
    "text", None, "A file or folder of new text, all of which is evaluated."
)
_LENGTHS = flags.DEFINE_list(
    "lengths", None, "Window lengths in tokens, such as 256,1024,4096; default: that of training."
)
_ACTIVATION_BITS = flags.DEFINE_integer(
    "activation_bits",
    None,
    "Evaluate also with activations rounded to so many bits, such as 8.",
    lower_bound=2,
    upper_bound=16,
)
_JSON = flags.DEFINE_bool("json", False, "Print the results as one line of JSON.")
# Keys of the run's configuration that an evaluation may have other values of.
_CHANGES = {
    ("data", "seq_len"): flags.DEFINE_integer(
        "config.data.seq_len", None, "Tokens of a window, in place of the run's."
    ),
    ("data", "validation_fraction"): flags.DEFINE_float(
        "config.data.validation_fraction", None, "How much is held out, in place of the run's."
    ),
    ("data", "cache_dir"): flags.DEFINE_string(
        "config.data.cache_dir", None, "Where tokenized text is kept, in place of the run's."
    ),
    ("train", "batch_size"): flags.DEFINE_integer(
        "config.train.batch_size", None, "Rows of a batch, in place of the run's."
    ),
}
_TRUST = flags.DEFINE_bool(
    "trust_paths", False, "Use the paths in a checkpoint that somebody else wrote."
)
_MESH = flags.DEFINE_string(
    "mesh", None, "Such as fsdp=8,tensor=2; default: the run's, if these devices can form it."
)
_PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 512, "Prompt length of the speed measurement.", lower_bound=1
)
_DECODE_TOKENS = flags.DEFINE_integer(
    "decode_tokens", 128, "Decoded tokens of the speed measurement.", lower_bound=1
)


def main(_) -> None:
    """Restore -> loss over validation batches -> compressors -> speed."""
    checkpoint = cli.given_place(_CHECKPOINT)
    lengths = given_lengths()
    launch.start()
    with large_blocks_given_back():
        run, params, step = restore_params(
            checkpoint,
            step=_STEP.value,
            source=_SOURCE.value,
            text=_TEXT.value,
            trust_paths=_TRUST.value,
            mesh=mesh_of_text(_MESH.value) or fitting_mesh(checkpoint),
            changes=given_changes(),
        )
    require_text(run)
    if _SOURCE.value is None and _TEXT.value is None:
        require_same_text(run, checkpoint)
    is_encoder = run.config.model.task != "lm"
    if is_encoder and (lengths or _ACTIVATION_BITS.value is not None):
        flag = "--lengths" if lengths else "--activation_bits"
        raise InputError(f"{flag}: got one, expected none: the run is of an encoder")
    if _PROBES.value:
        write_probes(run, params, checkpoint)
        return
    if is_encoder:
        evaluate_encoder(run, params, checkpoint, step)
        return
    evaluations = {}
    rounded = {}
    with jax.set_mesh(run.mesh), memory_errors("a batch of the run's size"):
        for length in lengths or [run.config.data.seq_len]:
            evaluate = Validation(*with_length(run, length, _BATCHES.value))
            evaluations[length] = evaluate(params)
            if _ACTIVATION_BITS.value is not None:
                rounded[length] = evaluate(params, _ACTIVATION_BITS.value)
            if not _JSON.value:
                say_losses(evaluations[length], length if lengths else None)
                say_rounded(rounded.get(length))
    text = validation_text(run.config.data)
    report = Report(
        step=step,
        evaluations=evaluations,
        rounded=rounded,
        compressors=bits_per_byte_of_compressors(text),
        speed=speed_on_one_device(run, params),
        cache=cache_bytes(run.config.model, 1, tokens_of_a_row()),
        on_demand=spent_on_demand(run, params),
    )
    if _JSON.value:
        say(as_json(report))
    else:
        say_references(report)


class Report(NamedTuple):
    """What is printed.

    step: of the checkpoint.
    evaluations: by length of the windows, tokens.
    rounded: the same with rounded activations; empty without --activation_bits.
    compressors: bits per byte by name.
    speed: None where the parameters do not fit one device.
    cache: of one row, a prompt and what was decoded after it.
    on_demand: None where tokens have all of every layer.
    """

    step: int
    evaluations: dict[int, Evaluation]
    rounded: dict[int, Evaluation]
    compressors: dict[str, float]
    speed: Speed | None
    cache: CacheBytes
    on_demand: Spent | None


def tokens_of_a_row() -> int:
    """Of the speed measurement: its prompt, and what is decoded after it."""
    return _PROMPT_TOKENS.value + _DECODE_TOKENS.value


def spent_on_demand(run: Run, params: PyTree) -> Spent | None:
    """What tokens have of feed-forwards on demand; None of a model without them."""
    if not is_on_demand(run.config.model):
        return None
    with jax.set_mesh(run.mesh):
        return spent(run, run.config.model, params, _BATCHES.value or LARGEST_SIZE)


def given_lengths() -> list[int]:
    """The windows of --lengths; none if it is not given."""
    lengths = []
    for text in _LENGTHS.value or ():
        if not text.strip().isdigit() or not 2 <= int(text) <= LARGEST_SIZE:
            raise InputError(
                f"--lengths: got {text!r}, expected tokens from 2 on, such as 256,1024"
            )
        lengths.append(int(text))
    return lengths


def given_changes() -> dict[str, dict[str, Any]]:
    """The keys of the configuration that --config... gives, by section."""
    changes: dict[str, dict[str, Any]] = {}
    for (section, key), flag in _CHANGES.items():
        if flag.value is not None:
            changes.setdefault(section, {})[key] = flag.value
    return changes


def write_probes(run: Run, params: PyTree, checkpoint: Place) -> None:
    """The probes of the first validation batch, as JSON and pictures, into CHECKPOINT/probes."""
    if not is_bucket(checkpoint):
        require_no_links(Path(checkpoint, "probes"))
    with jax.set_mesh(run.mesh), memory_errors("a batch of the run's size"):
        kind = Validation if run.config.model.task == "lm" else EncoderValidation
        probes = kind(run, 1).probes(params)
    with Mirror(checkpoint, say) as files:
        paths = write_report(probes, files.folder / "probes")
        files.upload()
        for path in paths:
            say(files.shown(str(path)))


def evaluate_encoder(run: Run, params: PyTree, checkpoint: Place, step: int) -> None:
    """Loss and accuracy, and which classes are taken for which, as lines and as a picture.

    Args:
      run: of an encoder.
      params: of it.
      checkpoint: the run directory.
      step: of the parameters.
    """
    with jax.set_mesh(run.mesh), memory_errors("a batch of the run's size"):
        result = EncoderValidation(run, _BATCHES.value)(params)
    classes = ()
    if result.confusion is not None:
        classes = class_names(run)
    if _JSON.value:
        say(encoder_as_json(result, classes, step))
    else:
        say_encoder(result, classes)
    if result.confusion is None or jax.process_index() != 0:
        return
    # Entries beyond the classes of the data are never right.
    named = (*classes, *map(str, range(len(classes), len(result.confusion))))
    if not is_bucket(checkpoint):
        require_no_links(Path(checkpoint, PICTURE))
    with Mirror(checkpoint, say) as files:
        path = files.folder / PICTURE
        title = f"step {step}: {result.accuracy:.2%} of {result.targets:,} images"
        draw_confusion(result.confusion, named, title, path)
        files.upload()
        if not _JSON.value:
            say(files.shown(str(path)))


def say_encoder(result: EncoderEvaluation, classes: tuple[str, ...]) -> None:
    """Loss, accuracy, and the classes that are confused most."""
    what = "image" if classes else "masked token"
    loss = f"{result.loss:.4f} ± {result.loss_error:.4f} nats per {what}"
    say(f"loss            {loss} ({result.targets:,} {what}s)")
    say(f"accuracy        {result.accuracy:.2%} ± {result.accuracy_error:.2%}")
    if result.confusion is not None:
        named = (*classes, *map(str, range(len(classes), len(result.confusion))))
        for line in most_confused(result.confusion, named):
            say(f"confused        {line}")


def encoder_as_json(result: EncoderEvaluation, classes: tuple[str, ...], step: int) -> str:
    """The evaluation as one line of JSON."""
    values = {"step": step, **_numbers(result)}
    if result.confusion is not None:
        values["classes"] = classes
        values["confusion"] = result.confusion.tolist()
    return json.dumps(values)


def say_losses(result: Evaluation, length: int | None) -> None:
    """Loss, perplexity, bits per byte; in one line for each length, if lengths were asked for."""
    loss = f"{result.loss:.4f} ± {result.loss_error:.4f}"
    bits = f"{result.bits_per_byte:.4f} ± {result.bits_per_byte_error:.4f}"
    if length is not None:
        say(f"length {length:<8} {loss} nats per token, {bits} bits per byte ({result.tokens:,})")
        return
    say(f"loss            {loss} nats per token ({result.tokens:,} tokens)")
    say(f"perplexity      {result.perplexity:.3f}")
    say(f"bits per byte   {bits}")


def say_rounded(result: Evaluation | None) -> None:
    """Loss and perplexity with rounded activations, if they were asked for."""
    if result is None:
        return
    loss = f"{result.loss:.4f} ± {result.loss_error:.4f} nats per token"
    bits = f"with activations of {_ACTIVATION_BITS.value} bits"
    say(f"rounded         {loss}, perplexity {result.perplexity:.3f}, {bits}")


def say_references(report: Report) -> None:
    """What gzip and xz need for the same text, and how fast the model reads and writes."""
    for name, bits in report.compressors.items():
        say(f"{name:15} {bits:.4f} bits per byte, all of the text in one stream")
    say(f"cache           {as_text(report.cache, tokens_of_a_row())}")
    if report.on_demand is not None:
        had = f"{report.on_demand.had:.2f} learners or loops a token"
        flops = f"{report.on_demand.flops / 1e6:.3f} MFLOP a token, forward"
        say(f"on demand       {had}, {flops}")
    if report.speed is None:
        say("prefill, decode: not measured, the parameters do not fit one device")
        return
    prompt = f"one prompt of {_PROMPT_TOKENS.value} tokens"
    say(f"prefill         {report.speed.prefill:,.0f} tokens/s, {prompt}")
    say(f"decode          {report.speed.decode:,.0f} tokens/s, one token at a time")


def as_json(report: Report) -> str:
    """The report as one line of JSON; a number that is not finite is null."""
    evaluations = []
    for length, result in report.evaluations.items():
        numbers: dict[str, Any] = {"length": length, **_numbers(result)}
        if length in report.rounded:
            numbers["activation_bits"] = _ACTIVATION_BITS.value
            numbers["rounded"] = _numbers(report.rounded[length])
        evaluations.append(numbers)
    speed = report.speed
    values = {
        "step": report.step,
        "evaluations": evaluations,
        "compressors_bits_per_byte": report.compressors,
        "prefill_tokens_per_s": None if speed is None else speed.prefill,
        "decode_tokens_per_s": None if speed is None else speed.decode,
        "cache_bytes": report.cache._asdict(),
    }
    if report.on_demand is not None:
        values["on_demand"] = report.on_demand._asdict()
    return json.dumps(values)


def _numbers(result: Evaluation | EncoderEvaluation) -> dict[str, Any]:
    """The numbers of an evaluation by name; one that is not finite is None."""
    numbers = {key: x for key, x in result._asdict().items() if isinstance(x, float | int)}
    if isinstance(result, Evaluation):
        numbers["perplexity"] = result.perplexity
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def speed_on_one_device(run: Run, params: PyTree) -> Speed | None:
    """Prefill and decoding on one device; None if the parameters do not fit one.

    Every process measures itself.
    """
    if not fits_one_device(run):
        return None
    copies = NamedSharding(run.mesh, PartitionSpec())
    params = jax.jit(lambda p: p, out_shardings=copies)(params)
    params = jax.tree.map(lambda p: p.addressable_data(0), params)
    return speed(
        run.config,
        params,
        _PROMPT_TOKENS.value,
        _DECODE_TOKENS.value,
    )


def run() -> None:
    """The command: parses the flags, then calls `main`."""
    cli.run(main)


if __name__ == "__main__":
    run()
