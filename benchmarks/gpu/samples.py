"""How many calls make a sample, and what is said about the samples. Imports no jax, no torch."""

import statistics

# A sample is several calls, so that the latency of a launch is no part of the figure.
SAMPLE_SECONDS = 0.03
FEWEST_CALLS = 2
MOST_CALLS = 40
SAMPLES = 9


def calls_of_sample(seconds: float) -> int:
    """How many calls, of so many seconds each, one sample takes."""
    calls = int(SAMPLE_SECONDS / max(seconds, 1e-6))
    return max(FEWEST_CALLS, min(MOST_CALLS, calls))


def median_and_spread(samples: list[float]) -> tuple[float, float]:
    """The median, and the distance between the quartiles as a fraction of it."""
    ordered = sorted(samples)
    quarter = len(ordered) // 4
    median = statistics.median(ordered)
    between_quartiles = ordered[-1 - quarter] - ordered[quarter]
    return median, between_quartiles / median
