"""What the CUDA kernels should take by their model: no device and no torch are needed."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "cuda.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.append(str(ROOT))

from bench import cuda, cuda_model  # noqa: E402


def test_the_model_is_linear_where_the_method_is():
    for hashes, bits in ((16, 8), (32, 9)):
        short, long = (cuda_model.Case(seq=n, hashes=hashes, bits=bits) for n in (16384, 65536))
        assert 3.8 < cuda_model.forward_seconds(long) / cuda_model.forward_seconds(short) < 4.6
        assert cuda_model.training_seconds(short) > 2 * cuda_model.forward_seconds(short)
        backward = cuda_model.collision_attention_bwd(short).seconds
        whole = cuda_model.expectation_training_seconds(short)
        assert whole == pytest.approx(backward + cuda_model.expectation_seconds(short), rel=0.01)
    dense = [cuda_model.collision_attention(cuda_model.Case(seq=n)).seconds for n in (16384, 65536)]
    assert dense[1] / dense[0] == pytest.approx(16, rel=0.01)


def test_a_model_is_its_slowest_unit_and_its_launches():
    work = cuda_model.Work(dram=4.3e12, flops=310e12, instructions=1, kernels=3)
    assert work.bound == "DRAM" and work.seconds == pytest.approx(1 + 6e-6)
    assert cuda_model.Work(flops=620e12).bound == "matrix"
    both = cuda_model.Work(flops=620e12) + work + cuda_model.Work(l2=5.5e10)
    assert both.seconds == pytest.approx(2.01 + 10e-6) and len(both.parts) == 3
    assert both.bytes == 4.3e12 and both.operations == 930e12


def test_the_model_has_the_figures_of_the_kernels():
    """Those that their header comments give, for (16, 8), B * H = 96, N = 16384, D = 64 and bfloat16."""
    case, wide = cuda_model.Case(), cuda_model.Case(bits=9)
    entries, cycles = case.tokens * case.hashes, 4 * case.tokens * 32
    assert cuda_model.build_tables(case).instructions / entries == 29
    assert cuda_model.build_tables(wide).instructions / entries == 43
    assert cuda_model.build_tables(case).wavefronts / entries == pytest.approx(2.7)
    assert cuda_model.build_tables(case).seconds == pytest.approx(0.8e-3, rel=0.02)
    assert cuda_model.gather_tables(case).wavefronts / entries == pytest.approx(2.5, rel=0.01)
    assert cuda_model.gather_tables(case).seconds == pytest.approx(0.28e-3, rel=0.02)
    assert [cuda_model.gather_tables(c).bound for c in (case, wide)] == ["shared", "L2"]
    pairs = cuda_model.bucket_gradient(case, size_dout=4).parts[-1]
    assert pairs.l2 == pytest.approx(79e9, rel=0.01) and pairs.seconds == pytest.approx(14e-3, rel=0.03)
    assert cuda_model.collision_attention(case).parts[-1].seconds == pytest.approx(37e-3, rel=0.03)
    backward = [part.seconds for part in cuda_model.collision_attention_bwd(case).parts[1:3]]
    assert backward == pytest.approx([57e-3, 62e-3], rel=0.03)
    assert cuda_model.l2_normalize(case).instructions / case.tokens == 62
    assert cuda_model.lsh_hash(case).instructions * 32 / cycles == pytest.approx(36, rel=0.01)
    assert cuda_model.bucket_segments(case).seconds == pytest.approx(5.3e-3, rel=0.03)
    short = cuda_model.Case(seq=512, hashes=32)
    assert cuda_model.bucket_attention(short).seconds == pytest.approx(0.13e-3, rel=0.03)


def test_the_predicted_table_needs_no_device(capsys):
    assert cuda.main(["--model"]) == 0
    text = capsys.readouterr().out
    for name in (*cuda_model.OPERATORS, "yoso (16, 8) forward", "SDPA forward", "expectation"):
        assert name in text
