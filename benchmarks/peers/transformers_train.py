"""The worker of `train_cpu.py` on the side of transformers and torch, which are all that it needs.

Its one argument is JSON: "architecture" (a class of transformers), "config" (its configuration's
arguments), "experts" (the implementation of sparse layers, or null), "compile", "batch_size",
"seq_len", "threads", "optim" (arguments of torch.optim.AdamW) and "clip_norm". It says one JSON
line when it has warmed up; then for each line on stdin, a number of steps, it runs them and says
how long they took.
"""

import json
import os
import resource
import sys
import time

import torch

# Where it can import fla, transformers calls its GPU kernels, on a CPU too, where they fail.
sys.modules["fla"] = None
import transformers  # noqa: E402

BATCHES = 8
WARMUP_STEPS = 3


def main() -> None:
    """Build -> warm up -> say what was built -> steps on demand."""
    say = _protocol()
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    model = build(spec)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **spec["optim"])
    forward = torch.compile(model) if spec["compile"] else model
    shape = (spec["batch_size"], spec["seq_len"])
    batches = [torch.randint(spec["config"]["vocab_size"], shape) for _ in range(BATCHES)]

    def steps(count: int) -> float:
        for i in range(count):
            tokens = batches[i % BATCHES]
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip_norm"])
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    steps(WARMUP_STEPS)
    total, active = parameter_counts(model)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    say({"total": total, "active": active, "versions": versions})
    for line in sys.stdin:
        start = time.perf_counter()
        cpu_start = time.process_time()
        loss = steps(int(line))
        times = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
        }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
        say({**times, "loss": loss, "peak_rss_bytes": peak})


def build(spec: dict) -> torch.nn.Module:
    """The model in float32, random weights, ready to train."""
    architecture = getattr(transformers, spec["architecture"])
    config = architecture.config_class(**spec["config"])
    options = {"experts_implementation": spec["experts"]} if spec["experts"] else {}
    model = architecture._from_config(
        config, attn_implementation="sdpa", dtype=torch.float32, **options
    )
    return model.train()


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters, and those that take part in one token: of the experts only the chosen ones."""
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if experts:
        experts -= experts * model.config.num_experts_per_tok // model.config.num_experts
    return total, total - experts


def _protocol():
    """Prints JSON lines on stdout; whatever libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=out, flush=True)


if __name__ == "__main__":
    main()
