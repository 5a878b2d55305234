"""The GPU kit: what one run of ten minutes on a GPU machine can tell about the kernels.

    bash benchmarks/gpu.sh 560        or: python -m benchmarks.gpu --budget=560

README.md says how to run it and how to read the results. The main process imports no jax. It runs
the stages one after the other, each as processes of their own with a time limit, and goes on
whatever happens to one of them. In reading order:

    __main__         the command line, the stages within the budget, the summary
    settings         folders, and the environment of the processes
    records          gpu_results.jsonl
    unpack           wheels and ptxas that pack.sh has put beside the checkout
    stages           the processes of each stage; processes.py runs and ends them
    training, ncu    two stages that run other programs; clocks.py watches the GPU beside them
    summary          the text at the end
    worker           the processes that import jax or torch; guard.py keeps them going
    versions         what is installed, bandwidth and matmul rate
    numerics         every kernel against float64; numeric_cases.py, numeric_inputs.py
    cases            what is timed: shapes and implementations
    programs         those of jax; timing.py and samples.py time them
    variants         block sizes and warps to try; tune.py picks the best, by kernel_times.py
    torch_peers      those of torch and flash-linear-attention; torch_timing.py
"""
