"""What a finished training shows: a piece of text, and the picture of the run."""

from gatedjax.config import Config
from gatedjax.data import validation_text
from gatedjax.data.tokenizer import Tokenizer
from gatedjax.errors import InputError
from gatedjax.evaluation.compressors import bits_per_byte_of_compressors
from gatedjax.evaluation.sampling import generate_text
from gatedjax.reporting.console import say
from gatedjax.reporting.curves import plot_run
from gatedjax.runtime.mirror import Mirror
from gatedjax.training.run import Run
from gatedjax.training.state import TrainState, params_for_evaluation


def sample(run: Run, state: TrainState, tokenizer: Tokenizer) -> None:
    """A piece of text from the trained model, unless `sample_tokens` is 0 or it is an encoder."""
    if not run.config.train.sample_tokens or run.config.model.task != "lm":
        return
    prompt = run.config.train.sample_prompt
    say(f"--- sample, temperature 0.8, prompt {prompt!r}")
    pieces = generate_text(
        run.config.model,
        params_for_evaluation(state),
        tokenizer,
        prompt,
        run.config.train.sample_tokens,
    )
    say(prompt + "".join(pieces) + "\n---")


def draw_curves(files: Mirror, config: Config) -> None:
    """The picture of the run.

    A finished training does not fail for want of matplotlib, or of its sources.
    """
    try:
        compressors = {}
        if config.model.task == "lm":
            compressors = bits_per_byte_of_compressors(validation_text(config.data))
        say(f"curves: {files.shown(str(plot_run(files.folder, compressors)))}")
    except InputError as error:
        say(f"no picture: {error}")
