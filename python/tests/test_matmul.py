"""`matmul`: products as chips compute them."""

import numpy
import pytest
import torch

import runner
from runner import RunnerError

DICE = numpy.random.default_rng(11)
X = DICE.standard_normal((5, 256)).astype(numpy.float32)
W = DICE.standard_normal((7, 256)).astype(numpy.float32)
EXACT = X.astype(numpy.float64) @ W.astype(numpy.float64).T


@pytest.mark.parametrize(
    ("format", "chip", "off"),
    [("bf16", "hopper", 0.02), ("e4m3", "hopper", 0.2), ("mxfp8", "blackwell", 0.2), ("nvfp4", "blackwell", 0.7)],
)
def test_a_product_is_off_by_what_its_format_costs(format, chip, off):
    y = runner.matmul(X, W, chip=chip, format=format)
    assert y.dtype == numpy.float32 and y.shape == (5, 7)
    error = numpy.sqrt(numpy.mean((y - EXACT) ** 2) / numpy.mean(EXACT**2))
    assert 0 < error < off / 2


def test_what_is_computed_is_judged_to_the_bit():
    x, w = (torch.from_numpy(part).to(torch.bfloat16) for part in (X, W))
    y = runner.matmul(x, w, output="bf16")
    assert y.dtype == torch.bfloat16 and tuple(y.shape) == (5, 7)
    assert runner.compare(x, w, y).answer == "to-the-bit"


def test_accumulation_splits_and_chips_are_told_apart():
    fast = runner.matmul(X, W, format="e4m3", accumulate="fast")
    assert (fast != runner.matmul(X, W, format="e4m3")).any()
    assert (fast != runner.matmul(X, W, format="e4m3", accumulate="fast", split_k=2)).any()
    assert (fast != runner.matmul(X, W, format="e4m3", accumulate="fast", chip="blackwell")).any()


def test_scales_of_rows_multiply_their_rows():
    scales = numpy.array([1, 2, 4, 8, 16], numpy.float32)
    y = runner.matmul(X * scales[:, None], W, format="e4m3", scales_x=scales * numpy.float32(0.01), scale_w=0.01)
    one = runner.matmul(X, W, format="e4m3", scale_x=0.01, scale_w=0.01)
    assert (y == one * scales[:, None]).all()


def test_codes_and_scales_of_blocks_are_those_of_their_values():
    # 1 is the code 2 of E2M1; the scales are powers of two.
    codes = numpy.full((3, 32), 0x22, numpy.uint8)
    scales = numpy.array([[127, 128], [127, 127], [126, 126]], numpy.uint8)
    y = runner.matmul(codes, codes, chip="blackwell", format="mxfp4", scales_x=scales, scales_w=scales)
    values = numpy.repeat(2.0 ** (scales.astype(float) - 127), 32, axis=1)
    assert (y == values @ values.T).all()


def test_what_does_not_fit_is_told():
    for asked, words in [
        ({"format": "nvfp4"}, "the chip `hopper` does not multiply"),
        ({"format": "fp9"}, "no number format"),
        ({"accumulate": "slow"}, "one of promoted, fast"),
        ({"output": "e4m3"}, "one of f32, bf16, f16"),
        ({"format": "e4m3", "scales_x": numpy.ones(4, numpy.float32)}, "needs 5 scales and has 4"),
        ({"format": "e4m3", "scale_x": numpy.ones(5, numpy.float32)}, "is one number"),
        ({"chip": "vega"}, "no chip is called"),
    ]:
        with pytest.raises(RunnerError, match=words):
            runner.matmul(X, W, **asked)
    with pytest.raises(RunnerError, match="whole blocks"):
        runner.matmul(X[:, :40], W[:, :40], chip="blackwell", format="mxfp4")
