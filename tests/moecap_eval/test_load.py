"""Open-loop load: arrivals, latencies from the schedule, refusals."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from moecap_eval.load import LoadReport, open_loop, poisson_arrivals, read_arrivals
from moecap_eval.workloads.text_params import Arrivals


class Overloaded(RuntimeError):
    retry_after_s = 0.1


def answered(value: object = None) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def test_cap23_arrivals_are_a_poisson_process() -> None:
    arrivals = poisson_arrivals(50.0, 5000, seed=3)
    gaps = np.diff(arrivals, prepend=0.0)
    assert (gaps > 0).all()
    assert stats.kstest(gaps, "expon", args=(0, 1 / 50.0)).pvalue > 0.01
    assert (poisson_arrivals(50.0, 5000, seed=3) == arrivals).all()
    assert not (poisson_arrivals(50.0, 5000, seed=4) == arrivals).all()
    for rate, count in ((0.0, 3), (1.0, -1)):
        with pytest.raises(ValueError, match="must"):
            poisson_arrivals(rate, count)


def test_cap23_a_stall_shows_in_the_latencies_behind_it() -> None:
    """One worker, 5 ms a request, arrivals every 10 ms; the fifth request stalls for 300 ms."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        report = open_loop(
            lambda index: pool.submit(time.sleep, 0.3 if index == 4 else 0.005),
            range(40),
            np.arange(40) * 0.010,
        )
    assert report.failed == report.rejected == 0
    assert report.latency_s[:4].max() < 0.15
    # Requests due during the stall waited for it: a closed loop would have sent them afterwards.
    behind = report.latency_s[5:15]
    assert (behind > 0.1).all()
    assert report.percentile(99) > 0.25
    assert report.percentile(50) < report.percentile(99)
    assert report.duration_s >= 0.39


def test_cap23_latency_counts_from_the_schedule_even_if_submit_blocks() -> None:
    def slow_submit(_request: object) -> Future:
        time.sleep(0.05)
        return answered()

    report = open_loop(slow_submit, range(5), np.zeros(5))
    assert (np.diff(report.latency_s) > 0.04).all()
    assert report.lateness_s[4] >= 0.2
    assert not report.valid(slo_s=0.5)
    assert report.valid(slo_s=10.0)


def test_cap23_refused_and_failed_requests_have_no_latency() -> None:
    late_failure: Future = Future()
    threading.Timer(0.02, late_failure.set_exception, [KeyError("x")]).start()
    late_refusal: Future = Future()
    late_refusal.set_exception(Overloaded())

    def submit(index: int) -> Future:
        if index == 1:
            raise Overloaded
        if index == 2:
            raise OSError("broken")
        return {3: late_failure, 4: late_refusal}.get(index) or answered()

    report = open_loop(submit, range(6), np.linspace(0, 0.05, 6))
    assert (report.rejected, report.failed) == (2, 2)
    assert np.isnan(report.latency_s).tolist() == [False, True, True, True, True, False]
    assert report.duration_s >= 0.05


def test_cap23_goodput_counts_what_met_the_objective() -> None:
    report = LoadReport(
        latency_s=np.array([0.1, 0.2, np.nan, 0.6]),
        lateness_s=np.array([0.0, 0.0, 0.0, 0.02]),
        rejected=1,
        failed=0,
        duration_s=2.0,
    )
    assert report.goodput(0.2) == 1.0
    assert report.goodput(1.0) == 1.5
    assert report.percentile(50) == pytest.approx(0.2)
    assert report.valid(slo_s=0.5)
    assert not report.valid(slo_s=0.1)


def test_cap23_nothing_to_send() -> None:
    report = open_loop(answered, [], [])
    assert report.duration_s == 0.0
    assert report.goodput(1.0) == 0.0
    assert np.isnan(report.percentile(99))
    assert report.valid(1.0)


@pytest.mark.parametrize("arrivals", [[0.0], [0.0, -1.0], [1.0, 0.5], [0.0, float("nan")], [-0.1, 0.0]])
def test_cap23_impossible_schedules_are_refused(arrivals: list) -> None:
    sent = []
    with pytest.raises(ValueError, match="arrivals"):
        open_loop(lambda request: sent.append(request) or answered(), [1, 2], arrivals)
    assert sent == []


def test_cap23_a_recorded_trace_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("100\n101.5\n\n104\n")
    assert read_arrivals(path).tolist() == [0.0, 1.5, 4.0]
    times = Arrivals(trace_file=str(path)).times(5, seed=0)
    assert times.tolist() == [0.0, 1.5, 4.0, 6.0, 7.5]  # again after the mean gap
    assert (Arrivals(rate=3.0).times(50, seed=1) == poisson_arrivals(3.0, 50, seed=1)).all()
    for text, message in (("1\nx\n", "must be a number"), ("2\n1\n", "ascending"), ("\n", "at least one")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_arrivals(path)
