"""Kernel times by class, and their projection: by the T4's rates, 24 TFLOP/s and 250 GB/s."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kernel_times


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void kDequantizeBlockwise<__half, 512, 64, 8, 2>(float*, unsigned char*)", "dequantisation"),
        ("_dequantise", "dequantisation"),
        ("fmha_cutlassF_f16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __half>", "products"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("Memcpy DtoH (Device -> Pinned)", kernel_times.HOST),
        ("Memcpy HtoD (Pinned -> Device)", kernel_times.HOST),
        ("triton_poi_fused_mul_silu_0", "elementwise"),
    ],
)
def test_the_class_of_a_kernel(kernel, kind):
    assert kernel_times.class_of(kernel) == kind


def test_products_are_projected_by_flops_and_the_rest_by_bandwidth():
    # 40 us of products and 10 of attention at 30 times a T4's FLOP/s; 10 of copies at 12 times its bandwidth.
    times = {"products": 40.0, "attention": 10.0, "copies": 10.0}
    assert kernel_times.projected(times, 720, 3000) == pytest.approx(1e6 / (50 * 30 + 10 * 12))
    assert kernel_times.projected(times | {kernel_times.HOST: 99.0}, 720, 3000) == kernel_times.projected(
        times, 720, 3000
    )


def test_times_are_summed_per_token():
    found = kernel_times.summed({"gemm_a": 300.0, "gemm_b": 100.0, "triton": 50.0}, 100)
    assert found["us_per_token"] == {"products": 4.0, "elementwise": 0.5}
    assert found["longest"][0] == ["gemm_a", 3.0]


def test_waits_are_what_no_kernel_of_any_stream_covers():
    spans = [(9_000, 12_000, "gemm_b"), (1_000, 5_000, "gemm_a"), (2_000, 3_000, "triton"), (11_000, 14_000, "triton")]
    found = kernel_times.waits([*spans, (15_000, 16_000, "gemm_b")])
    assert found == {"no kernel before gemm_b": 5.0}
    assert kernel_times.summed(found, 10)["us_per_token"] == {kernel_times.WAITS: 0.5}
    assert kernel_times.projected({"products": 40.0, kernel_times.WAITS: 9.0}, 720, 3000) == pytest.approx(1e6 / 1200)
    assert kernel_times.waits([]) == {}
