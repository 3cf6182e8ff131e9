"""`judge` on recordings of engines on a GPU, and on what it cannot judge."""

import pytest
from conftest import ROOT

import runner
from runner import RunnerError

PROMPT = [503, 245]


def ids_of(stage):
    text = stage.read_text()
    return [int(token) for token in text.split("tokens")[1].split("[")[1].split("]")[0].split(",")]


def test_a_pass_of_vllm_on_a_gpu_is_to_the_bit(runs):
    verdict = runner.judge(
        ROOT / "examples/vllm/fp8-block.safetensors", model=ROOT / "examples/vllm/model", engine="vllm-fp8-block", runs=runs,
        tokens=ids_of(ROOT / "examples/vllm/stages/fp8-block-pass.toml"), contract="exact-engine", stages=runs / "kept",
    )
    assert verdict and len(verdict.exact) == len(verdict.sites) == 33
    assert (runs / "kept/capture.toml").exists()


@pytest.mark.parametrize(
    ("name", "engine", "site", "cause"),
    [
        ("another-base", "transformers", "blk.0.q_rope", "rope-base"),
        ("scale-not-loaded", "vllm-fp8", "blk.1.q", "scale-missing"),
        ("cache-in-e4m3", "transformers", "blk.0.attn", "kv-cache-format"),
    ],
)
def test_a_published_bug_in_a_real_engine_is_located_and_named(name, engine, site, cause, runs):
    bugs = ROOT / "examples/public-bugs"
    verdict = runner.judge(
        bugs / f"{name}.safetensors", model=ROOT / "examples/vllm/model", engine=engine, runs=runs,
        tokens=ids_of(bugs / f"stages/{name}.toml"),
    )
    assert (verdict.outcome, verdict.first, verdict.cause) == ("structural", site, cause)


def test_a_capture_that_says_too_little_is_refused_with_what_to_give(runs):
    path = ROOT / "examples/vllm/fp8-block.safetensors"
    with pytest.raises(RunnerError, match="give engine="):
        runner.judge(ROOT / "examples/transformers-bf16/capture.safetensors", runs=runs)
    with pytest.raises(RunnerError, match="give model="):
        runner.judge(path, engine="vllm-fp8-block", tokens=PROMPT, runs=runs)
    with pytest.raises(RunnerError, match="no such model|no folder"):
        runner.judge(path, engine="vllm-fp8-block", model="somebody/no-such-model", tokens=PROMPT, runs=runs)


def test_tokens_of_another_pass_are_refused(runs):
    with pytest.raises(RunnerError, match="rows|tokens|steps"):
        runner.judge(
            ROOT / "examples/vllm/fp8-block.safetensors", model=ROOT / "examples/vllm/model", engine="vllm-fp8-block",
            tokens=PROMPT, runs=runs,
        )


def test_an_unknown_engine_is_refused_in_the_runner_s_words(runs):
    with pytest.raises(RunnerError, match="no engine is called `vlm`"):
        runner.judge(
            ROOT / "examples/vllm/fp8-block.safetensors", model=ROOT / "examples/vllm/model", engine="vlm", tokens=PROMPT, runs=runs
        )


def test_without_the_command_it_is_said_where_it_was_sought(monkeypatch):
    from runner import _program

    monkeypatch.setenv("RUNNER", "/no/such/program")
    with pytest.raises(RunnerError, match="cannot start /no/such/program"):
        _program.ask(["--version"])
