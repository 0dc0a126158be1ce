"""How many blocks does it take to find a 3 % slow-down: paired and interleaved, or unpaired?

A simulation with a stated noise, so that the truth is known: each block's time has noise of its own (1 %) and
part that comes and goes with the machine: interleaved arms share it within a block, separate runs do not.
The unpaired side is Welch's t-test on two separate runs, as tools do that compare the means of runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from benchmarks.common import Headline, write_result
from moecap_eval import paired_ratio

SLOWDOWN, OWN_NOISE, SHARED_NOISE = 1.03, 0.01, (0.0, 0.01, 0.03)
POWER, RUNS, SIZES = 0.9, 1000, (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 25, 30, 40, 50, 60)


def paired(plain: np.ndarray, other: np.ndarray) -> bool:
    """Interval and exact sign-flip test, as a report asks for."""
    estimate = paired_ratio(plain, other)
    return (estimate.low or 0.0) > 1 and (estimate.p_value or 0.0) <= 0.05


def unpaired(plain: np.ndarray, other: np.ndarray) -> bool:
    """Welch's t-test on the logarithms."""
    result = stats.ttest_ind(np.log(other), np.log(plain), equal_var=False)
    return bool(result.pvalue <= 0.05 and result.statistic > 0)


def found_share(test: Callable[..., bool], n: int, shared: float, slowdown: float) -> float:
    """Share of simulated runs of ``n`` blocks an arm in which the test reports a slow-down."""
    generator = np.random.default_rng([n, round(1000 * shared)])
    hits = 0
    for _ in range(RUNS):
        machine = np.exp(shared * generator.standard_normal(n))
        later = machine if test is paired else np.exp(shared * generator.standard_normal(n))
        plain = machine * np.exp(OWN_NOISE * generator.standard_normal(n))
        other = later * np.exp(OWN_NOISE * generator.standard_normal(n))
        hits += test(plain, slowdown * other)
    return hits / RUNS


def main() -> None:
    samples: dict[str, list[float]] = {}
    headline = []
    for shared in SHARED_NOISE:
        needed: dict[str, int | None] = {}
        for name, test in (("paired", paired), ("unpaired", unpaired)):
            found: list[float] = []
            for n in SIZES:
                found.append(found_share(test, n, shared, SLOWDOWN))
                if found[-1] >= POWER:
                    break
            needed[name] = n if found[-1] >= POWER else None
            noise = f"shared noise {100 * shared:g} %"
            samples[f"{name}, power at each of sizes, {noise}"] = found
            samples[f"{name}, false alarms at the last of them, {noise}"] = [
                found_share(test, n, shared, 1.0)
            ]
            print(name, noise, needed[name], samples[f"{name}, false alarms at the last of them, {noise}"])
        ratio = (needed["paired"] or math.nan) / (needed["unpaired"] or math.nan)
        bound = 1 / (1 + (shared / OWN_NOISE) ** 2)  # ratio of the variances of the two estimates
        headline.append(
            Headline(
                f"blocks needed, paired over unpaired, shared noise {100 * shared:g} %",
                ratio if math.isfinite(ratio) else None,
                "1",
                target="<= 1/3",
                note=f"simulated, power {POWER:g}: {needed['paired']} against {needed['unpaired']} blocks; "
                f"by the variances alone {bound:.2f}",
            )
        )
    write_result(
        "moecap_eval_power",
        question="How many blocks does it take to find a 3 % slow-down, paired and unpaired?",
        headline=headline,
        samples=samples,
        sizes=list(SIZES),
        runs=RUNS,
        own_noise=OWN_NOISE,
        slowdown=SLOWDOWN,
        standard_error_of_a_share=math.sqrt(POWER * (1 - POWER) / RUNS),
    )


if __name__ == "__main__":
    main()
