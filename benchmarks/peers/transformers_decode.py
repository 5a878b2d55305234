"""The worker of `decode_cpu.py` that is transformers: LlamaForCausalLM.generate, greedy.

    python transformers_decode.py '{"width": ...}'

Answers every line of the input, a number of tokens, with the seconds that these took after the
first one. It needs torch and transformers, and nothing of ours.
"""

import json
import sys
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Sizes -> model -> rounds."""
    sizes = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(sizes["threads"])
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["hidden"],
        tie_word_embeddings=False,
        # Nothing ends a row early.
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(0, sizes["vocab_size"], (sizes["rows"], sizes["prompt"]))
    clock = time.process_time if sizes["cpu_seconds"] else time.perf_counter
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        seconds = []
        for tokens in (1 + int(line), 1):
            start = clock()
            with torch.inference_mode():
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=tokens,
                    do_sample=False,
                )
            seconds.append(clock() - start)
        print(json.dumps(seconds[0] - seconds[1]), flush=True)


if __name__ == "__main__":
    main()
