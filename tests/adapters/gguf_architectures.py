"""Holds the reading of GGUF files to llama.cpp: writes small models of many architectures as its
converter does, runs both, and compares logits.

    gguf_architectures.py RUNNER FOLDER...

Each FOLDER is a Hugging Face folder with `golden.safetensors`, which names the token ids. Needs gguf,
llama-cpp-python and NumPy (tests/adapters/requirements.txt).
"""

import ctypes
import json
import os
import struct
import subprocess
import sys
import tempfile

import gguf
import llama_cpp
import numpy as np

# llama.cpp's names, and whether its converter permutes queries and keys.
KINDS = {
    "llama": ("llama", True),
    "qwen2": ("qwen2", False),
    "mixtral": ("llama", True),
    "granite": ("granite", True),
    "smollm3": ("smollm3", True),
    "olmo2": ("olmo2", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "glm4": ("glm4", False),
    "stablelm": ("stablelm", False),
    "starcoder2": ("starcoder2", False),
    "qwen2_moe": ("qwen2moe", False),
    "qwen3_moe": ("qwen3moe", False),
    "gpt_oss": ("gpt-oss", False),
    "deepseek_v3": ("deepseek2", False),
    "qwen3_next": ("qwen3next", False),
}
# What the llama.cpp that is at hand does not know; transformers' pass alone is compared.
UNKNOWN = ["qwen3_next"]
# What is written in two ways.
SPLIT = ["deepseek_v3", "qwen3_next"]
NORMS = {"olmo2": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}}
GEMMA = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
NORMS |= {"gemma2": GEMMA, "gemma3_text": GEMMA}
NORMS["glm4"] = {
    "input_layernorm": "attn_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
NORMS["gpt_oss"] = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"}
NORMS["qwen3_next"] = NORMS["gpt_oss"]
# Where nothing else is said.
USUAL = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "linear_attn.in_proj_qkvz": "ssm_in",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
HEAD_NORMS = {"self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm"}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
EXPERTS |= {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def safetensors(path):
    """Every tensor of a file, as f32 or as it is."""
    with open(path, "rb") as file:
        data = file.read()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + place for place in entry["data_offsets"])
        raw, shape = data[begin:end], entry["shape"]
        if entry["dtype"] == "BF16":
            words = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
            tensors[name] = words.view(np.float32).reshape(shape)
        else:
            kinds = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "U8": np.uint8}
            tensors[name] = np.frombuffer(raw, kinds[entry["dtype"]]).reshape(shape)
    return tensors


def permuted(weight, heads):
    """Halves of each head as neighbours, as llama.cpp's converter stores llama's queries and keys."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def mxfp4(writer, name, codes, scales):
    """Blocks of 32 codes as ggml has them: a scale, and bytes that hold a code of the first half and one of the second."""
    low, high = codes & 15, codes >> 4
    values = np.stack([low, high], axis=-1).reshape(*codes.shape[:-1], 32)
    packed = values[..., :16] | values[..., 16:] << 4
    blocks = np.concatenate([scales[..., None], packed], axis=-1)
    blocks = blocks.reshape(*codes.shape[:-2], -1)
    writer.add_tensor(name, np.ascontiguousarray(blocks), raw_dtype=gguf.GGMLQuantizationType.MXFP4)


def of_all_codes(writer, layer, name, codes, scales):
    """gpt-oss's codes of all experts; gate and up take turns along the outputs."""
    parts = {"ffn_down_exps": slice(None)}
    if name.startswith("gate_up_proj"):
        parts = {"ffn_gate_exps": slice(0, None, 2), "ffn_up_exps": slice(1, None, 2)}
    for known, rows in parts.items():
        mxfp4(writer, f"blk.{layer}.{known}.weight", codes[:, rows], scales[:, rows])


def of_all_experts(writer, layer, name, values):
    """gpt-oss's tensors of all experts: gate and up take turns along the outputs, and matrices are transposed."""
    ending = "bias" if name.endswith("_bias") else "weight"
    if ending == "weight":
        values = values.swapaxes(1, 2)
    parts = {"ffn_down_exps": values}
    if name.startswith("gate_up_proj"):
        parts = {"ffn_gate_exps": values[:, 0::2], "ffn_up_exps": values[:, 1::2]}
    for known, part in parts.items():
        writer.add_tensor(f"blk.{layer}.{known}.{ending}", np.ascontiguousarray(part))


def keys_and_values(writer, layer, config, values):
    """The product of latent attention in two, as llama.cpp multiplies them: keys with their rows as columns."""
    heads, keys = config["num_attention_heads"], config["qk_nope_head_dim"]
    values = values.reshape(heads, keys + config["v_head_dim"], -1)
    parts = {"attn_k_b": values[:, :keys].swapaxes(1, 2), "attn_v_b": values[:, keys:]}
    for known, part in parts.items():
        writer.add_tensor(f"blk.{layer}.{known}.weight", np.ascontiguousarray(part))


def projection_of_delta(writer, layer, config, values):
    """The projection of a delta net in two: queries, keys and values of all heads, and gates."""
    heads, keys = config["linear_num_key_heads"], config["linear_key_head_dim"]
    group = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    query, key, value, gate = np.split(values.reshape(heads, -1, values.shape[-1]), np.cumsum([keys, keys, group]), axis=1)
    flat = [part.reshape(-1, values.shape[-1]) for part in (query, key, value)]
    writer.add_tensor(f"blk.{layer}.attn_qkv.weight", np.concatenate(flat))
    writer.add_tensor(f"blk.{layer}.attn_gate.weight", np.ascontiguousarray(gate.reshape(-1, values.shape[-1])))


def add_delta(writer, config):
    """The keys of delta nets."""
    heads = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * config["linear_value_head_dim"])


def add_latent(writer, config, rope, split):
    """The keys of latent attention and of the experts beside it; groups are left out, which this llama.cpp does not know."""
    still, turned, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_head_count_kv(1 if split else config["num_attention_heads"])
    writer.add_key_length(rank + turned if split else still + turned)
    writer.add_value_length(rank if split else config["v_head_dim"])
    if split:
        writer.add_key_length_mla(still + turned)
        writer.add_value_length_mla(config["v_head_dim"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_rope_dimension_count(turned)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def write(folder, path, layout=None):
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    kind = config["model_type"]
    name, permutes = KINDS[kind]
    heads, keys = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_vocab_size(config["vocab_size"])
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    writer.add_rope_freq_base(full.get("rope_theta", 10000.0))
    if kind == "deepseek_v3":
        add_latent(writer, config, full, layout == "split")
    else:
        writer.add_head_count_kv(keys)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(int(head * full.get("partial_rotary_factor", 1.0)))
    if full.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if full.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    if kind in ("stablelm", "starcoder2"):
        writer.add_layer_norm_eps(config.get("layer_norm_eps") or config.get("norm_epsilon"))
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if kind in ("gemma2", "gemma3_text", "gpt_oss"):
        writer.add_sliding_window(config["sliding_window"])
        if config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if kind == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if "num_experts_per_tok" in config:
        count = next(key for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key))
        writer.add_expert_count(config[count])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if kind == "qwen3_next":
        add_delta(writer, config)
    if kind in ("qwen2_moe", "qwen3_moe", "qwen3_next"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if kind == "gpt_oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if kind in ("qwen2_moe", "qwen3_next"):
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    # A vocabulary is needed to load; its words are not.
    words = [f"w{number}" for number in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if kind == "stablelm":
        writer.add_parallel_residual(config["use_parallel_residual"])
    experts, gains = {}, {}
    held = safetensors(os.path.join(folder, "model.safetensors"))
    for tensor, values in held.items():
        if tensor.endswith("_scales"):
            continue
        if tensor.endswith("_blocks"):
            layer, name = tensor.removeprefix("model.layers.").split(".mlp.experts.")
            of_all_codes(writer, layer, name, values, held[tensor.replace("_blocks", "_scales")])
            continue
        values = np.array(values, np.float32)
        stem, ending = tensor.rsplit(".", 1)
        less_one = kind == "qwen3_next" and not stem.endswith("linear_attn.norm")
        if (kind in ("gemma2", "gemma3_text") or less_one) and "norm" in stem:
            values = values + np.float32(1.0)
        fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        if stem in fixed:
            writer.add_tensor(f"{fixed[stem]}.{ending}", values)
            continue
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        if int(layer) >= config["num_hidden_layers"]:
            continue
        if ending == "e_score_correction_bias":
            writer.add_tensor(f"blk.{layer}.exp_probs_b.bias", values)
            continue
        if ending == "A_log":
            writer.add_tensor(f"blk.{layer}.ssm_a", -np.exp(values))
            continue
        if ending == "dt_bias":
            writer.add_tensor(f"blk.{layer}.ssm_dt.bias", values)
            continue
        if part == "linear_attn.conv1d":
            values = values[:, 0]
        if layout == "split" and part == "linear_attn.in_proj_qkvz":
            projection_of_delta(writer, layer, config, values)
            continue
        if layout == "split" and part == "self_attn.kv_b_proj":
            keys_and_values(writer, layer, config, values)
            continue
        if part == "mlp.experts":
            of_all_experts(writer, layer, ending, values)
            continue
        if ending == "sinks":
            writer.add_tensor(f"blk.{layer}.attn_sinks.weight", values)
            continue
        if "layernorm.norms." in part:
            norms, head = part.split(".norms.")
            gains.setdefault((layer, HEAD_NORMS[norms]), {})[int(head)] = values
            continue
        if ".experts." in part:
            _, expert, projection = part.rsplit(".", 2)
            experts.setdefault((layer, EXPERTS[projection]), {})[int(expert)] = values
            continue
        if permutes and part == "self_attn.q_proj":
            values = permuted(values, heads)
        if permutes and part == "self_attn.k_proj":
            values = permuted(values, keys)
        if part == "mlp.shared_expert_gate":
            values = values[0]
        known = NORMS.get(kind, USUAL).get(part) or PARTS[part]
        writer.add_tensor(f"blk.{layer}.{known}.{ending}", np.ascontiguousarray(values))
    for (layer, known), parts in experts.items():
        writer.add_tensor(f"blk.{layer}.{known}.weight", np.stack([parts[number] for number in range(len(parts))]))
    for (layer, known), parts in gains.items():
        writer.add_tensor(f"blk.{layer}.{known}.weight", np.stack([parts[number] for number in range(len(parts))]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_llama_cpp(path, tokens):
    """The logits of every token."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        raise SystemExit(f"llama.cpp does not load {path}")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = 256
    parameters.n_batch = parameters.n_ubatch = 256
    parameters.type_k = parameters.type_v = 0
    parameters.n_threads = parameters.n_threads_batch = 2
    if hasattr(parameters, "flash_attn_type"):
        parameters.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, parameters)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [llama_cpp.llama_get_logits_ith(context, place)[:width] for place in range(len(tokens))]
    logits = np.array(rows)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


def of_runner(runner, work, model, tokens):
    """The reference's logits of every token."""
    os.makedirs(os.path.join(work, "stages"), exist_ok=True)
    os.makedirs(os.path.join(work, "contracts"), exist_ok=True)
    with open(os.path.join(work, "contracts", "any.toml"), "w") as file:
        file.write(CONTRACT)
    with open(os.path.join(work, "stages", "a.toml"), "w") as file:
        file.write(STAGE.format(model=os.path.abspath(model), tokens=tokens))
    runs = os.path.join(work, "runs")
    subprocess.run([runner, "run", os.path.join(work, "stages"), "--runs", runs, "-q"], capture_output=True, text=True)
    out = os.path.join(work, "logits.safetensors")
    if os.path.exists(out):
        os.remove(out)
    done = subprocess.run([runner, "export", "latest", "A", "reference", out, "--runs", runs], capture_output=True, text=True)
    if done.returncode:
        done = subprocess.run([runner, "check", os.path.join(work, "stages")], capture_output=True, text=True)
        raise SystemExit(f"{model}: {done.stdout}{done.stderr}")
    return safetensors(out)["logits"]


CONTRACT = """name    = "any"
version = "1.0.0"
[[equation]]
id = "e"
formula = "f"
why = "w"
[[falsifier]]
id = "F-001"
equation = "e"
prediction = "finite"
compare = ["emulated", "reference"]
metric = "non_finite"
max = 0
if_fails = "structural"
why = "w"
"""
STAGE = """id = "A"
title = "logits"
contract = "any"
model = "{model}"
tokens = {tokens}
arms = ["reference", "emulated"]
[recipe]
gemm = "f32"
output = "f32"
[forward]
capture = "logits"
"""


def load_backends():
    """Backends that lie beside the library are loaded when asked for."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    if folder:
        library = ctypes.CDLL(os.path.join(folder, "libggml.so"))
        library.ggml_backend_load_all_from_path(folder.encode())


def what_is_lost(folder):
    """A setting that no key of a GGUF file holds, where it is not what llama.cpp takes."""
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    kind, layers = config["model_type"], range(config["num_hidden_layers"])
    if kind in ("starcoder2", "mixtral") and config["sliding_window"]:
        return "`sliding_window`"
    if kind == "smollm3" and config["no_rope_layers"] != [int((layer + 1) % 4 != 0) for layer in layers]:
        return "`no_rope_layers`"
    if kind in ("gemma2", "gemma3_text") and config["query_pre_attn_scalar"] != config["head_dim"]:
        return "`query_pre_attn_scalar`"
    if kind == "deepseek_v3" and config["topk_group"] < config["n_group"]:
        return "`n_group`"
    if kind == "gpt_oss" and not (config.get("rope_parameters") or {}).get("truncate", True):
        return "`truncate`"
    if kind == "gemma3_text" and config["layer_types"] != [
        "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in layers
    ]:
        return "`layer_types`"
    return None


def is_unknown(folder):
    """Whether llama.cpp does not know its kind."""
    with open(os.path.join(folder, "config.json")) as file:
        return json.load(file)["model_type"] in UNKNOWN


def layouts(folder):
    """The ways in which files of its kind are written."""
    with open(os.path.join(folder, "config.json")) as file:
        return [None, "split"] if json.load(file)["model_type"] in SPLIT else [None]


def off(a, b):
    return float(np.abs(np.float64(a) - np.float64(b)).max() / np.abs(np.float64(b)).max())


def main():
    # What llama.cpp says is shown where it does not load a file.
    said = []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    callback = kind(lambda level, text, data: said.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, None)
    load_backends()
    runner, wrong, count, forms = sys.argv[1], [], 0, {}
    for folder, layout in [(folder, layout) for folder in sys.argv[2:] for layout in layouts(folder)]:
        recorded = os.path.join(folder, "golden.safetensors")
        # Two forms of one model share a pass.
        recorded = recorded if os.path.exists(recorded) else os.path.join(folder, "..", "golden.safetensors")
        golden = safetensors(recorded)
        tokens = [int(token) for token in golden["ids"]]
        with tempfile.TemporaryDirectory() as work:
            path = os.path.join(work, "model.gguf")
            write(folder, path, layout)
            own = of_runner(runner, work, path, tokens)
            try:
                theirs = None if is_unknown(folder) else of_llama_cpp(path, tokens)
            except SystemExit as error:
                raise SystemExit(f"{folder}: {error}\n{''.join(said[-8:])}")
        kind = os.path.basename(folder.rstrip("/"))
        to_golden, to_llama = off(own, golden["logits"]), 0.0 if theirs is None else off(own, theirs)
        lost = what_is_lost(folder)
        note = f" ({layout})" if layout else ""
        note += f"; the file does not hold {lost}" if lost else ""
        told = "not known to llama.cpp" if theirs is None else f"{to_llama:.1e} of llama.cpp"
        print(f"{kind:12} reference of the GGUF file: {to_golden:.1e} of transformers in f64, {told}{note}")
        count += 1
        # llama.cpp's GELU is a table in f16, and beside blocks of codes it rounds activations to 8 bits.
        bound = 3e-3 if kind.startswith(("gemma", "starcoder")) else 5e-2 if kind == "packed" else 1e-5
        # Other layouts and types of the same values give the same bits.
        same = np.array_equal(forms.setdefault(os.path.realpath(recorded), own), own)
        if not same or to_llama > bound or (to_golden > 2e-5 and not lost):
            wrong.append(kind)
    if wrong or not count:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
