"""`compare`: one operation at a time, from whatever somebody has at hand."""

import pathlib

import ml_dtypes
import numpy
import pytest
import torch

import runner
from runner import RunnerError

DICE = numpy.random.default_rng(7)
X = DICE.standard_normal((16, 128)).astype(numpy.float16)
W = DICE.standard_normal((32, 128)).astype(numpy.float16)
Y = (X.astype(numpy.float64) @ W.astype(numpy.float64).T).astype(numpy.float16)


def test_a_product_that_is_right_says_whose_arithmetic_it_is():
    answer = runner.compare(X, W, Y)
    assert answer and answer.answer == "to-the-bit" and answer.differing == 0 and answer.values == 512
    assert "rounded once to f16" in answer.sentence and "rounded once" in (answer.schedule or "")
    assert answer.sentence in str(answer) and "to the bit" in answer._repr_html_()


def test_tensors_of_pytorch_numpy_and_ml_dtypes_are_the_same():
    b = [array.astype(ml_dtypes.bfloat16) for array in (X, W)]
    y = (b[0].astype(numpy.float64) @ b[1].astype(numpy.float64).T).astype(ml_dtypes.bfloat16)
    of_torch = [torch.from_numpy(array.astype(numpy.float32)).to(torch.bfloat16) for array in (*b, y)]
    assert runner.compare(*b, y).answers == runner.compare(*of_torch).answers
    assert runner.compare(*b, y).answer == "to-the-bit"


def test_a_column_that_was_not_written_is_named():
    wrong = Y.copy()
    wrong[:, 5] = 0
    answer = runner.compare(X, W, wrong)
    assert not answer and answer.answer == "wrong" and "column 5" in answer.sentence
    assert answer.differing == 16 and answer.causes


def test_fp8_with_scales():
    x, w = (array.astype(ml_dtypes.float8_e4m3fn) for array in (X, W))
    sx = numpy.abs(DICE.standard_normal((16, 1))).astype(numpy.float32)
    exact = (x.astype(numpy.float64) * sx) @ (w.astype(numpy.float64) * 0.5).T
    assert runner.compare(x, w, exact.astype(numpy.float32), scale_x=sx, scale_w=0.5)
    assert not runner.compare(x, w, (exact * 1.02).astype(numpy.float32), scale_x=sx, scale_w=0.5)


def test_a_norm():
    x = DICE.standard_normal((8, 64)).astype(numpy.float32)
    weight = DICE.standard_normal(64).astype(numpy.float32)
    wide = x.astype(numpy.float64)
    y = (wide / numpy.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight).astype(numpy.float32)
    assert runner.compare(x, weight, y, op="norm", eps=1e-5)
    assert not runner.compare(x, weight, y * numpy.float32(1.001), op="norm", eps=1e-5)


def test_two_tensors_that_should_be_the_same():
    a = DICE.standard_normal((16, 64)).astype(numpy.float32)
    assert runner.compare(a, a.copy()).answer == "to-the-bit"
    rounded = runner.compare(a, a.astype(ml_dtypes.bfloat16))
    assert rounded.answer == "within-rounding" and "bf16" in rounded.sentence
    scaled = runner.compare(a, a * numpy.float32(1.02))
    assert not scaled and "1.02" in str(scaled.causes), scaled
    swapped = runner.compare(a, a[:, ::-1])
    assert not swapped and swapped.differing > 1000


def test_a_tensor_of_one_value_is_a_number():
    half = (X.astype(numpy.float64) @ W.astype(numpy.float64).T * 0.5).astype(numpy.float16)
    assert runner.compare(X, W, half, alpha=torch.tensor(0.5)).answer == "to-the-bit"


def test_bits_of_a_schedule_that_is_not_the_exact_result_differ_in_no_value():
    x, w = torch.randn(8, 300), torch.randn(9, 300)
    answer = runner.compare(x, w, x @ w.T)
    assert answer and (answer.answer != "to-the-bit" or answer.differing == 0)


def test_what_does_not_fit_is_refused_in_words():
    with pytest.raises(RunnerError, match="op='norm' takes 3 tensors"):
        runner.compare(X, op="norm")
    with pytest.raises(RunnerError, match="say which operation it is. same: a, b; matmul"):
        runner.compare(X, W, Y, Y)
    with pytest.raises(RunnerError, match="no format known here"):
        runner.compare(X.astype(complex), W, Y)
    with pytest.raises(RunnerError, match=r"\[16, 128\]|K|width"):
        runner.compare(X, W[:, :5], Y)
    with pytest.raises(RunnerError, match="--epsilon"):
        runner.compare(X, W, Y, epsilon=1)


def test_operations_keep_operands_and_judge_themselves(tmp_path):
    layer = torch.nn.Linear(64, 32)
    x = torch.randn(8, 64)
    path = tmp_path / "ops.safetensors"
    with torch.no_grad():
        want = layer(x)
        with runner.capture(layer, path, level="operations", only=["aten::addmm", "aten::relu", "aten::mul_"]):
            got = layer(x)
            torch.relu(got)
            got.clone().mul_(2)
    assert torch.equal(want, got)
    product, relu, scaled = runner.operations(path)
    assert (product.name, relu.name, scaled.name) == ("aten::addmm", "aten::relu", "aten::mul_")
    assert "float32[8, 64]" in str(product)
    assert product.compare()
    assert list(scaled.written) == ["self"]
    with pytest.raises(RunnerError, match="aten::relu is no product or norm that is known here"):
        relu.compare()


def test_a_capture_of_no_operation_leaves_nothing(tmp_path):
    with pytest.raises(runner.CaptureError, match="no operation ran"):
        with runner.capture(None, tmp_path / "ops.safetensors", level="operations", only=["nothing::"]):
            torch.ones(2) + 1
    assert not list(tmp_path.iterdir())


def test_a_capture_of_modules_lists_no_operations():
    from conftest import ROOT

    with pytest.raises(RunnerError, match="lists no operations"):
        runner.operations(ROOT / "examples/vllm/fp8-block.safetensors")


def test_operations_of_vllm_on_a_gpu_are_to_the_bit():
    """Cut from captures of an H200: norms, FP8 products with scales per token and output and in blocks, bf16."""
    listed = runner.operations(pathlib.Path(__file__).parent / "fixtures/vllm-operations.safetensors")
    names = ["_C::rms_norm", "_C::cutlass_scaled_mm", "_C::cutlass_scaled_mm", "_C::fused_add_rms_norm", "vllm::fp8_gemm_nt_op"]
    assert [operation.name for operation in listed] == [*names, "aten::linear"]
    # The second product's weight is square, so that its scales would also fit its rows.
    assert listed[2].arguments["b"]["shape"] == [256, 256]
    for operation in listed:
        answer = operation.compare()
        assert answer.answer == "to-the-bit", f"{operation}: {answer}"
