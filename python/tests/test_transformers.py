"""Models of transformers: three lines to a verdict, and what it says of a bug."""

import concurrent.futures

import pytest
import torch
import transformers
from safetensors.torch import load_file

import runner


def tiny(kind="Qwen2", **more):
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=None,
        **more,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


IDS = torch.tensor([[3, 5, 7, 11, 13, 17]])


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Mistral"])
def test_three_lines_lead_to_a_verdict(kind, tmp_path, runs):
    model = tiny(kind)
    model.save_pretrained(tmp_path / "model")
    model = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(tmp_path / "model").eval()
    with torch.no_grad(), runner.capture(model, tmp_path / "run.safetensors"):
        model(IDS)
    verdict = runner.judge(tmp_path / "run.safetensors", runs=runs)
    assert verdict, str(verdict)
    assert verdict.outcome == "pass" and len(verdict.sites) == 33 and verdict.first is None
    assert "pass" in verdict._repr_html_() and "blk.1.ffn_down" in verdict._repr_html_()


def test_in_bf16_every_site_is_held_to_what_rounding_costs(tmp_path, runs):
    model = tiny().to(torch.bfloat16)
    with torch.no_grad(), runner.capture(model, tmp_path / "run.safetensors"):
        model(IDS)
    verdict = runner.judge(tmp_path / "run.safetensors", model=model, runs=runs)
    assert verdict, str(verdict)


def test_decoded_tokens_follow_the_prompt(tmp_path, runs):
    model = tiny()
    with torch.no_grad(), runner.capture(model, tmp_path / "run.safetensors") as capture:
        made = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    kept = load_file(tmp_path / "run.safetensors")
    assert kept["ids"].tolist() == made[0, :-1].tolist()
    assert kept["blk.1.q"].shape[0] == 9
    # transformers computes the logits of the prompt's last position alone; the others follow it.
    assert capture.left_out == {} and kept["logits"].shape == (9, 100)
    verdict = runner.judge(tmp_path / "run.safetensors", model=model, runs=runs)
    assert verdict, str(verdict)


def test_a_bug_is_located_and_named(tmp_path, runs):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.02)
        with runner.capture(model, tmp_path / "run.safetensors"):
            model(IDS)
    verdict = runner.judge(tmp_path / "run.safetensors", model=tmp_path / "model", runs=runs)
    assert not verdict and verdict.outcome == "structural"
    assert verdict.first == "blk.1.ffn_up" and "1.02" in verdict.why, verdict.why


def test_a_model_of_another_kind_is_refused_by_name(tmp_path):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)).eval()
    with pytest.raises(runner.CaptureError, match="model_type = 'gpt2', and known are llama"):
        with runner.capture(model, tmp_path / "run.safetensors"):
            model(IDS)


def test_a_batch_with_padding_is_refused(tmp_path):
    model = tiny()
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(runner.CaptureError, match="padding"), torch.no_grad():
        with runner.capture(model, tmp_path / "run.safetensors", row=0):
            model(torch.tensor([[0, 1, 2], [3, 4, 5]]), attention_mask=mask)


def test_without_a_cache_a_second_call_is_another_pass(tmp_path):
    model = tiny()
    with pytest.raises(runner.CaptureError, match="a second pass began after 6 tokens"), torch.no_grad():
        with runner.capture(model, tmp_path / "run.safetensors"):
            model.generate(IDS, max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=0)


def test_the_rotation_is_the_module_s_own_again(tmp_path):
    from transformers.models.qwen2 import modeling_qwen2

    rotate = modeling_qwen2.apply_rotary_pos_emb
    model = tiny()
    with torch.no_grad(), runner.capture(model, tmp_path / "run.safetensors"):
        model(IDS)
    assert modeling_qwen2.apply_rotary_pos_emb is rotate


def test_what_ran_is_said_in_the_file(tmp_path):
    from runner._store import read_header

    model = tiny()
    with torch.no_grad(), runner.capture(model, tmp_path / "run.safetensors"):
        model(IDS)
    about = read_header(str(tmp_path / "run.safetensors"))[0]["__metadata__"]
    assert about["engine"] == f"transformers {transformers.__version__}"
    assert about["torch"] == f"PyTorch {torch.__version__}"
    assert (about["engine_file"], about["dtype"], about["device"], about["steps"]) == ("f32", "float32", "cpu", "1")


def test_captures_that_end_in_any_order_and_in_threads_leave_the_module_as_it_was(tmp_path):
    from transformers.models.qwen2 import modeling_qwen2

    rotate = modeling_qwen2.apply_rotary_pos_emb
    models = [tiny(), tiny()]
    first, second = (runner.capture(model, tmp_path / f"{at}.safetensors") for at, model in enumerate(models))
    with torch.no_grad():
        first.__enter__(), second.__enter__()
        models[0](IDS), models[1](IDS[:, :4])
        first.__exit__(None, None, None), second.__exit__(None, None, None)
    assert modeling_qwen2.apply_rotary_pos_emb is rotate

    def one(at):
        with torch.no_grad(), runner.capture(models[at], tmp_path / f"{at}.safetensors") as capture:
            models[at](IDS[:, : 6 - 2 * at])
        return capture.left_out

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda at: [one(at) for _ in range(8)], [0, 1])) == [[{}] * 8] * 2
    assert modeling_qwen2.apply_rotary_pos_emb is rotate
    for at in range(2):
        kept = load_file(tmp_path / f"{at}.safetensors")
        assert kept["blk.1.q_rope"].shape[0] == 6 - 2 * at and len(kept) == 34


def test_every_site_of_a_capture_can_be_asked_for(tmp_path):
    model = tiny()
    with torch.no_grad(), runner.capture(model, tmp_path / "all.safetensors"):
        model(IDS)
    sites = set(load_file(tmp_path / "all.safetensors")) - {"ids"}
    with torch.no_grad(), runner.capture(model, tmp_path / "few.safetensors", sites=sorted(sites)):
        model(IDS)
    assert set(load_file(tmp_path / "few.safetensors")) - {"ids"} == sites


def test_a_part_of_the_sites_is_no_false_alarm(tmp_path, runs):
    model = tiny("Llama")
    sites = ["embed", "blk.0.attn_residual", "blk.0.ffn_residual", "blk.1.ffn_swiglu", "logits"]
    with torch.no_grad(), runner.capture(model, tmp_path / "run.safetensors", sites=sites):
        model(IDS)
    verdict = runner.judge(tmp_path / "run.safetensors", model=model, runs=runs)
    assert verdict.outcome in ("pass", "unmeasured"), str(verdict)


def test_the_folder_of_another_model_is_refused(tmp_path):
    model, other = tiny(), tiny("Llama")
    other.save_pretrained(tmp_path / "other")
    with torch.no_grad(), runner.capture(model, tmp_path / "run.safetensors"):
        model(IDS)
    with pytest.raises(runner.RunnerError, match="a model with model_type qwen2, and .* says llama"):
        runner.judge(tmp_path / "run.safetensors", model=tmp_path / "other")
    with pytest.raises(runner.RunnerError, match="a Linear is no folder"):
        runner.judge(tmp_path / "run.safetensors", model=torch.nn.Linear(2, 2))


def test_dropout_and_wrappers_are_refused_with_what_to_do(tmp_path):
    model = tiny(attention_dropout=0.1)
    with pytest.raises(runner.CaptureError, match="give what it wraps, `model.module`"):
        with runner.capture(torch.nn.DataParallel(model), tmp_path / "run.safetensors"):
            pass
    with pytest.raises(runner.CaptureError, match="give the whole model, of a class ...ForCausalLM"):
        with runner.capture(model.model, tmp_path / "run.safetensors"):
            pass
    model.lm_head.train(), model.add_module("drop", torch.nn.Dropout(0.1))
    with pytest.raises(runner.CaptureError, match="drop drops values at random: call model.eval"):
        with runner.capture(model.train(), tmp_path / "run.safetensors"):
            pass


def test_a_model_on_the_cpu_beside_a_gpu_is_held_to_no_kernel_of_that_gpu(tmp_path, monkeypatch):
    from runner._judge import plan
    from runner._store import read_header

    beside = {"device": "cuda", "gpu": "NVIDIA H200", "capability": "9.0"}
    monkeypatch.setattr(runner.capture, "provenance", lambda _: dict(beside))
    with torch.no_grad(), runner.capture(tiny().to(torch.bfloat16), tmp_path / "run.safetensors") as capture:
        capture.model(IDS)
    about = read_header(str(tmp_path / "run.safetensors"))[0]["__metadata__"]
    assert about["device"] == "cpu" and plan(about, None, None)[1] == "engine"
    with pytest.raises(runner.RunnerError, match="says steps = 'many', which is no number"):
        plan({**about, "device": "cuda", "steps": "many"}, None, None)
