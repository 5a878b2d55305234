"""The stage "torch", and the compilation of fla's candidates that prepares it."""

import functools
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import cases
from benchmarks.gpu.guard import WorkerOptions
from benchmarks.gpu.records import append_record, one_line
from benchmarks.gpu.samples import SAMPLES, calls_of_sample, median_and_spread
from benchmarks.gpu.torch_peers import TorchBuilt, TorchProgram, torch_programs

WARM_UP_CALLS = 3
# Milliseconds that Triton's autotuner times each candidate for: a fifth of its default.
AUTOTUNER_WARM_UP, AUTOTUNER_REPEAT = 5, 20


def time_torch(options: WorkerOptions) -> None:
    """The stage "torch"."""
    settings = options.settings
    if not settings.dry:
        shorten_autotuning()

    def record(program: TorchProgram, case: str, **fields: Any) -> None:
        append_record(
            settings.out,
            stage="torch",
            kind="time",
            case=case,
            implementation=program.implementation,
            **fields,
        )

    for program in torch_programs(settings.dry):
        try:
            for name, function in passes(program.build()).items():
                ms, spread = median_ms(function, settings.dry)
                cost = program.costs[name]
                record(
                    program,
                    f"{program.case} {name}",
                    ms=ms,
                    spread=spread,
                    tflops=cost.flops / ms / 1e9,
                    gbs=cost.bytes / ms / 1e6,
                )
        except Exception as error:
            traceback.print_exc()
            record(program, program.case, error=one_line(error))
            if "CUDA error" in str(error):
                sys.exit("the CUDA context is broken: no other program of torch can run")


def passes(built: TorchBuilt) -> dict[str, Callable[[], None]]:
    """The forward pass without saving anything, and both passes."""
    inputs, function = built

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    with torch.no_grad():
        cotangent = torch.randn_like(function(*inputs))

    def both() -> None:
        for tensor in inputs:
            tensor.grad = None
        function(*inputs).backward(cotangent)

    return {"fwd": forward, "both": both}


def median_ms(function: Callable[[], None], dry: bool) -> tuple[float, float]:
    """Milliseconds of a call, and the spread of the samples, as in timing.py."""
    for _ in range(WARM_UP_CALLS):
        function()
    ms_of_call = ms_of_call_on_cpu if dry else ms_of_call_on_gpu
    calls = calls_of_sample(ms_of_call(function, 2) / 1e3)
    return median_and_spread([ms_of_call(function, calls) for _ in range(SAMPLES)])


def ms_of_call_on_gpu(function: Callable[[], None], calls: int) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def ms_of_call_on_cpu(function: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls * 1e3


def shorten_autotuning() -> None:
    """Triton's autotuner times each candidate more briefly."""
    import triton.testing

    triton.testing.do_bench = functools.partial(
        triton.testing.do_bench,
        warmup=AUTOTUNER_WARM_UP,
        rep=AUTOTUNER_REPEAT,
    )


def compile_fla(options: WorkerOptions) -> None:
    """Compiles this process's part of every autotuner's candidates into Triton's cache.

    Which of them is the fastest is found later, in the stage "torch", when nothing else runs.
    """
    shorten_autotuning()
    import triton.runtime.autotuner as autotuner

    prune = autotuner.Autotuner.prune_configs

    def prune_to_part(self, kwargs, *arguments, **options_of_call):
        found = list(prune(self, kwargs, *arguments, **options_of_call))
        return options.own(found) or found[:1]

    autotuner.Autotuner.prune_configs = prune_to_part

    def record(program: TorchProgram, **fields: Any) -> None:
        append_record(
            options.settings.out,
            stage="parallel",
            kind="compile_fla",
            case=program.case,
            part=options.part,
            **fields,
        )

    of_fla = (cases.FLA, cases.FLA_ATTENTION)
    for program in torch_programs(options.settings.dry):
        if program.implementation not in of_fla:
            continue
        began = time.perf_counter()
        try:
            inputs, function = program.build()
            function(*inputs).sum().backward()
            torch.cuda.synchronize()
            record(program, seconds=round(time.perf_counter() - began, 1))
            del inputs
            torch.cuda.empty_cache()
        except Exception as error:
            traceback.print_exc()
            record(program, error=one_line(error))
