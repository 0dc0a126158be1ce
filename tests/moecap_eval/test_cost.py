"""The cost model against a hand-made sheet."""

from __future__ import annotations

import pytest

from moecap_eval.cost import CostModel

SHEET = CostModel(
    device_usd=30_000,
    host_usd=10_000,
    watts=1000,
    lifetime_years=4,
    utilisation=0.5,
    usd_per_kwh=0.10,
    pue=1.2,
    memory={
        "dram": {"usd_per_gib": 5, "installed_gib": 512},
        "disk": {"usd_per_gib": 0.1, "installed_gib": 4000},
    },
)
# 30,000 + 10,000 + 512*5 + 4,000*0.1 = 42,960 USD over 4*365*86,400*0.5 = 63,072,000 paid seconds.
CAPITAL = 42_960 / 63_072_000


def test_cap10_equals_the_hand_sheet() -> None:
    assert SHEET.capital_usd_per_s() == pytest.approx(CAPITAL, rel=1e-12)
    # 3.6 MJ are one kWh: 1.2 * 0.10 USD.
    assert SHEET.energy_usd(3.6e6) == pytest.approx(0.12, rel=1e-12)
    hour = 3600 * CAPITAL + 1000 * 3600 * 1.2 * 0.10 / 3.6e6
    assert SHEET.usd(3600) == pytest.approx(hour, rel=1e-12)
    assert SHEET.usd(3600, joules=0.0) == pytest.approx(3600 * CAPITAL, rel=1e-12)


def test_cap10_twice_the_time_is_twice_the_cost() -> None:
    assert SHEET.usd(84.0) == pytest.approx(2 * SHEET.usd(42.0), rel=1e-12)
    assert SHEET.usd(84.0, joules=2e4) == pytest.approx(2 * SHEET.usd(42.0, joules=1e4), rel=1e-12)


def test_cap10_used_memory_is_charged_by_the_byte() -> None:
    sheet = CostModel(
        device_usd=1000, memory={"dram": {"usd_per_gib": 5, "installed_gib": 512}}, memory_accounting="used"
    )
    paid = 3 * 365 * 86400 * 0.8
    assert sheet.capital_usd_per_s({"dram": 3 * 2**30}) == pytest.approx(1015 / paid, rel=1e-12)
    assert sheet.capital_usd_per_s({"hbm": 2**30}) == pytest.approx(1000 / paid, rel=1e-12)
    with pytest.raises(ValueError, match="needs the bytes in use"):
        sheet.usd(1.0)


def test_cap10_a_rental_price_replaces_everything() -> None:
    rented = CostModel(device_usd=1e9, watts=1e6, usd_per_hour=3.6)
    assert rented.usd(10.0, joules=1e12) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devise_usd": 1}, r"cost\.devise_usd: unknown key; did you mean 'device_usd'\?"),
        ({"utilisation": 0}, r"cost\.utilisation must be above 0, got 0"),
        ({"utilisation": 1.2}, r"cost\.utilisation must be at most 1"),
        ({"pue": 0.9}, r"cost\.pue must be at least 1"),
        ({"watts": "90"}, r"cost\.watts must be a number, got '90'"),
        ({"watts": float("nan")}, r"cost\.watts must be a number"),
        ({"lifetime_years": 0}, r"cost\.lifetime_years must be above 0"),
        ({"memory_accounting": "all"}, r"must be 'installed' or 'used', got 'all'"),
        (
            {"memory": {"dram": {"usd_per_gb": 4}}},
            r"cost\.memory\.dram\.usd_per_gb: unknown key; did you mean",
        ),
        ({"memory": {"dram": 4}}, r"cost\.memory\.dram must have usd_per_gib and installed_gib"),
        ({"memory": 4}, r"cost\.memory must map tiers to prices"),
    ],
)
def test_cap10_mistakes_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostModel.from_mapping(options)
