"""Peaks by the kinds that JAX reports, and no peak for what only sounds alike."""

from types import SimpleNamespace

import pytest

from crescendo.experiments.runtime.errors import UserError
from crescendo.experiments.runtime.hardware import KNOWN_DEVICES, known_device, named_device, peak_flops_per_second

TERAFLOPS = {
    "NVIDIA A10": 125,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "NVIDIA RTX A6000": 154.8,
    "TPU v4": 275,
    "TPU v5": 459,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "TPU7x": 1153.5,
}
UNKNOWN = (
    "cpu",
    "NVIDIA A10G",
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
    "NVIDIA A1000",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA L40",
    "NVIDIA RTX 6000 Ada Generation",
    "TPU v4 lite",
    "TPU v3",
)


@pytest.mark.parametrize("kind", TERAFLOPS)
def test_the_peak_is_the_data_sheets(kind):
    assert peak_flops_per_second(SimpleNamespace(device_kind=kind)) == TERAFLOPS[kind] * 1e12


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_only_sounds_alike_has_no_peak(kind):
    assert peak_flops_per_second(SimpleNamespace(device_kind=kind)) is None


def test_every_device_is_known_by_its_own_name_and_has_some_kind_here():
    for each in KNOWN_DEVICES:
        assert named_device(f" {each.name.upper()}") == each
        assert peak_flops_per_second(each) == each.peak_flops_per_second
        assert each.memory_bytes == each.memory_gib * 2**30
    with pytest.raises(UserError, match="--device H300: known are A10, A100"):
        named_device("H300")
    assert {known_device(kind) for kind in TERAFLOPS} == set(KNOWN_DEVICES)
