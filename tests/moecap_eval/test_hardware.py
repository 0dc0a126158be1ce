"""Profiles, measured peaks and energy meters."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from moecap_eval.hardware import Peaks, list_profiles, load_hardware, measure_peaks
from moecap_eval.hardware.energy import NoMeter, RaplMeter, TdpMeter, open_meter


@pytest.mark.parametrize("name", list_profiles())
def test_cap18_every_figure_has_source_and_date(name: str) -> None:
    profile = load_hardware(name)
    figures = [*profile.tiers.values(), *profile.flops_per_s.values(), *profile.links.values()]
    figures += [profile.tdp_w] if profile.tdp_w else []
    assert profile.name == name
    for figure in figures:
        assert figure.source
        assert len(figure.date.split("-")) == 3
    assert profile.peak_bytes_per_s > 1e9
    assert profile.peak_flops_per_s("torch.bfloat16") > profile.peak_bytes_per_s


def test_cap18_dense_peaks_not_sparse_ones() -> None:
    assert load_hardware("h200-sxm").peak_flops_per_s("bfloat16") == pytest.approx(989.5e12)
    assert load_hardware("mi300x").peak_flops_per_s("bfloat16") == pytest.approx(1307.4e12)


def test_cap18_measured_peaks_replace_stated_ones() -> None:
    profile = load_hardware("h200-sxm").with_peaks(Peaks(4.1e12, 2.0e12, {"bfloat16": 7.9e14}), "2026-11-24")
    assert profile.peak_bytes_per_s == 4.1e12
    assert profile.peak_flops_per_s("bfloat16") == 7.9e14
    assert profile.peak_flops_per_s("fp8") == load_hardware("h200-sxm").peak_flops_per_s("fp8")
    assert "measured" in profile.tiers["hbm"].source


def test_cap18_peaks_of_this_machine() -> None:
    peaks = measure_peaks("cpu", seconds=0.4)
    assert peaks.read_bytes_per_s > 1e8
    assert peaks.copy_bytes_per_s > 1e8
    assert set(peaks.flops_per_s) == {"float32", "bfloat16"}
    assert min(peaks.flops_per_s.values()) > 1e8
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        measure_peaks("tpu")
    with pytest.raises(ValueError, match="seconds must be positive"):
        measure_peaks("cpu", seconds=0)


@pytest.mark.gpu
def test_cap18_peaks_of_the_gpu() -> None:
    peaks = measure_peaks("cuda", seconds=4.0)
    assert peaks.read_bytes_per_s > 1e11
    assert peaks.flops_per_s["bfloat16"] > 1e13


def test_profiles_with_faults_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown hardware profile 'h200'; did you mean 'h200-sxm'\?"):
        load_hardware("h200")
    with pytest.raises(FileNotFoundError):
        load_hardware(tmp_path / "none.yaml")
    good = {
        "name": "mine",
        "tiers": {"dram": {"bytes": 1, "bytes_per_s": 2.0, "source": "x", "date": "2026-01-01"}},
        "flops_per_s": {"float32": {"value": 3.0, "source": "x", "date": "2026-01-01"}},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(good))
    assert load_hardware(path).tdp_w is None

    for change, message in [
        ({"flops_per_s": {"float32": {"value": 3.0, "source": "x"}}}, r"flops_per_s\.float32 needs exactly"),
        ({"flops_per_s": {"float32": {**good["flops_per_s"]["float32"], "value": -1}}}, "positive number"),
        ({"tiers": {"disk": good["tiers"]["dram"]}}, "needs hbm or dram"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"tiers": None}, "tiers is missing"),
    ]:
        path.write_text(yaml.safe_dump({**good, **change}))
        with pytest.raises(ValueError, match=message):
            load_hardware(path)


def _powercap(root: Path, package_uj: int, span_uj: int = 1_000_000) -> Path:
    for name, value in {
        "intel-rapl:0": package_uj,
        "intel-rapl:0:0": 1,
        "intel-rapl:1": 2 * package_uj,
    }.items():
        zone = root / name
        zone.mkdir(exist_ok=True, parents=True)
        (zone / "energy_uj").write_text(f"{value}\n")
        (zone / "max_energy_range_uj").write_text(f"{span_uj}\n")
    return root


def test_cap11_rapl_sums_packages_and_survives_the_wrap(tmp_path: Path) -> None:
    meter = RaplMeter(_powercap(tmp_path, 100_000))
    meter.begin()
    time.sleep(0.02)
    _powercap(tmp_path, 150_000)
    energy = meter.end()
    assert energy.source == "rapl"
    assert energy.joules == pytest.approx(0.15)

    _powercap(tmp_path, 499_990)  # the second package counts to 999,980 of 1,000,000
    meter.begin()
    time.sleep(0.02)
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("10\n")
    assert meter.end().joules == pytest.approx((1_000_001 - 999_980 + 10) / 1e6)


def test_cap11_unknown_is_null_never_zero(tmp_path: Path) -> None:
    meter = RaplMeter(_powercap(tmp_path, 100_000))
    meter.begin()
    short = meter.end()
    assert (short.joules, short.source) == (None, "none")

    none = NoMeter()
    none.begin()
    assert none.end().joules is None

    meter.begin()
    time.sleep(0.02)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.end().joules is None
    with pytest.raises(RuntimeError, match=r"without begin"):
        meter.end()
    with pytest.raises(FileNotFoundError, match="intel-rapl"):
        RaplMeter(tmp_path / "elsewhere")


def test_cap11_tdp_is_power_times_time() -> None:
    meter = TdpMeter(50.0)
    meter.begin()
    begin = time.perf_counter()
    time.sleep(0.05)
    energy = meter.end()
    elapsed = time.perf_counter() - begin
    assert energy.source == "tdp"
    assert 50.0 * 0.05 <= energy.joules <= 50.0 * (elapsed + 0.01)
    with pytest.raises(ValueError, match="watts must be positive"):
        TdpMeter(0)


def test_cap11_the_best_meter_is_chosen() -> None:
    meter = open_meter()
    meter.begin()
    time.sleep(0.15)
    energy = meter.end()
    assert energy.source in {"nvml", "rapl", "none"}
    assert (energy.joules is None) == (energy.source == "none")
    assert open_meter(tdp_w=10.0).source in {"nvml", "rapl", "tdp"}


@pytest.mark.gpu
def test_cap11_nvml_reads_the_gpu() -> None:
    import torch

    meter = open_meter()
    assert meter.source == "nvml"
    meter.begin()
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    deadline = time.perf_counter() + 1.0
    while time.perf_counter() < deadline:
        torch.mm(left, left)
        torch.cuda.synchronize()
    assert meter.end().joules > 50.0
