"""Whether a series of measurements is flat: the figures of a soak run, judged.

Two questions: is the last fifth after the warm-up higher than the first by more than is allowed, by their medians; and
does the line through all of them rise by more than that. Both must say no.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Sample = tuple[float, float]


def warmed_up(samples: Sequence[Sample], share: float, least: float = 0.0) -> list[Sample]:
    """The samples after the first `share` of the time, and not before `least` seconds."""
    if not samples:
        return []
    begin, end = samples[0][0], samples[-1][0]
    start = begin + max((end - begin) * share, least)
    return [sample for sample in samples if sample[0] >= start]


def growth(samples: Sequence[Sample]) -> float:
    """Median of the last fifth less that of the first."""
    fifth = max(len(samples) // 5, 1)
    values = [value for _, value in samples]
    return statistics.median(values[-fifth:]) - statistics.median(values[:fifth])


def rise(samples: Sequence[Sample]) -> float:
    """By how much the straight line through all rises over their time."""
    if len(samples) < 2:
        return 0.0
    times, values = zip(*samples, strict=True)
    rising: float = statistics.linear_regression(times, values).slope * (times[-1] - times[0])
    return rising


def judge(what: str, samples: Sequence[Sample], allowed: float) -> list[str]:
    """What is wrong with them: nothing, or that they grow."""
    if len(samples) < 5:
        return [f"{what}: only {len(samples)} samples after the warm-up"]
    grown, risen = growth(samples), rise(samples)
    if grown > allowed or risen > allowed:
        return [
            f"{what} grows: by {grown:.0f} from the first fifth to the last, {risen:.0f} by its trend; "
            f"allowed are {allowed:.0f}"
        ]
    return []
