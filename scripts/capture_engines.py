"""Captures small random models in real engines with the Python package, for the runner to judge.

    python scripts/capture_engines.py --engine transformers --out captures     # on a GPU
    runner run captures/stages

`--engine` is transformers, torchao, vllm, sglang or llama-cpp; each must be installed, and this package or
`PYTHONPATH=python`. Two architectures each, a prompt and, but for torchao, decoded tokens. Before a pass is captured it runs unobserved,
and the bits of its logits must be the same. `--time` also measures what observing costs, with 28 layers
of Qwen2.5-7B's shape and 300 tokens. The models follow from their seeds alone: `--models-only` makes them again elsewhere.
"""

import argparse
import concurrent.futures
import json
import os
import random
import subprocess
import sys
import time

SHAPES = {
    # hidden, ffn, layers, heads, key heads, vocabulary
    "qwen2": (256, 512, 2, 4, 2, 512),
    "llama": (512, 1024, 2, 8, 2, 512),
    "qwen3": (384, 768, 3, 6, 3, 640),
}
KINDS = {
    "transformers": [("qwen2", "bfloat16", "sdpa"), ("llama", "bfloat16", "eager"), ("qwen3", "bfloat16", "sdpa")]
    + [("qwen2", "float16", "eager"), ("llama", "float16", "sdpa")],
    "torchao": [("qwen2", "bfloat16", "sdpa"), ("llama", "bfloat16", "sdpa")],
    "vllm": [(model, kind, "") for model in ["qwen2", "llama"] for kind in ["", "fp8", "fp8_per_channel", "fp8_per_block"]]
    + [("qwen3", "", "")],
    "sglang": [(model, kind, "triton") for model in ["qwen2", "llama", "qwen3"] for kind in ["", "fp8"]],
    "llama-cpp": [(model, kind, "") for model in ["qwen2", "llama", "qwen3"] for kind in ["q4_K", "q8_0", "f16"]],
}


def main():
    options = read_options()
    out = os.path.abspath(options.out)
    os.makedirs(os.path.join(out, "stages"), exist_ok=True)
    make = gguf_model if options.engine == "llama-cpp" else folder_model
    for model, kind, _ in KINDS[options.engine]:
        make(out, model, kind)
    if options.models_only:
        return
    cases = {name_of(options.engine, case): case for case in KINDS[options.engine]}
    if options.case:
        return one(options, out, options.case, cases[options.case])
    own = [sys.executable, os.path.abspath(__file__), "--engine", options.engine, "--out", out, "--decode", str(options.decode)]
    failed = []
    # A process for each, as an engine leaves much behind in its own.
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        work = {name: pool.submit(subprocess.run, [*own, "--case", name], capture_output=True, text=True) for name in cases}
        for name, future in work.items():
            done = future.result()
            last = done.stdout.strip().splitlines()[-1:] or [""]
            print(last[0] if done.returncode == 0 else f"{name} FAILED:\n{done.stderr[-3000:]}", flush=True)
            failed += [name] if done.returncode else []
    if options.time:
        print(json.dumps(TIMES[options.engine]()), flush=True)
    if failed:
        sys.exit(f"{len(failed)} of {len(cases)} failed: {', '.join(failed)}")


def name_of(engine, case):
    return "-".join(part.replace("_", "-") for part in [engine, *case] if part)


def one(options, out, name, case):
    """Captures one pass, and writes the stage that judges it."""
    import runner
    from runner import _judge, _store

    model, kind, attention = case
    dice = random.Random(name)
    tokens = [dice.randrange(SHAPES[model][5]) for _ in range(dice.randint(20, 60))]
    place = os.path.join(out, "models", model_of(options.engine, model, kind))
    capture = os.path.join(out, f"{name}.safetensors")
    run = RUNS[options.engine](place, kind, attention, len(tokens) + options.decode)
    before = run(tokens, options.decode)
    with runner.capture(run.model, capture) as held:
        seen = run(tokens, options.decode)
    if before != seen:
        sys.exit(f"{name}: observed, the engine computed something else")
    header, data = _store.read_header(capture)
    recipe, contract = _judge.plan(header["__metadata__"], None, None)
    ids = _judge.ids_of(capture, header, data)
    text = _judge.manifest(f"../{name}.safetensors", f"../models/{os.path.basename(place)}", ids, recipe, contract)
    with open(os.path.join(out, "stages", f"{name}.toml"), "w") as file:
        file.write(text.replace('id       = "capture"', f'id       = "{name}"'))
    sites = len([part for part in header if part not in ("__metadata__", "ids")])
    print(json.dumps({"name": name, "sites": sites, "rows": len(ids), "left_out": held.left_out}), flush=True)


def read_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True, choices=KINDS)
    parser.add_argument("--out", required=True, help="a folder for models, captures and stages")
    parser.add_argument("--decode", type=int, default=5, help="tokens to go on for")
    parser.add_argument("--jobs", type=int, default=1, help="engines beside each other")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help="measure what observing costs")
    parser.add_argument("--models-only", action="store_true", help="make the models, and capture nothing")
    return parser.parse_args()


def model_of(engine, model, kind):
    return f"{model}-{kind}.gguf" if engine == "llama-cpp" else model


def folder_model(out, name, _):
    """A Hugging Face folder in bf16; the same on every machine with the same PyTorch."""
    path = os.path.join(out, "models", name)
    if os.path.isdir(path):
        return
    import torch
    import transformers

    torch.manual_seed(len(name))
    model = getattr(transformers, f"{name.capitalize()}ForCausalLM")(config_of(name, transformers)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif "bias" in parameter_name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(path)


def config_of(name, transformers, shape=None):
    hidden, ffn, layers, heads, key_heads, vocabulary = shape or SHAPES[name]
    return getattr(transformers, f"{name.capitalize()}Config")(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        use_sliding_window=False,
    )


def gguf_model(out, name, kind):
    path = os.path.join(out, "models", f"{name}-{kind}.gguf")
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    from clean_llama_passes import make_model

    hidden, ffn, layers, heads, key_heads, vocabulary = SHAPES[name]
    hidden = 512 if kind == "q4_K" and hidden % 256 else hidden
    case = {"type": kind, "architecture": name, "hidden": hidden, "head": 64, "heads": hidden // 64, "ffn": ffn}
    case.update(key_heads=2, layers=layers, vocabulary=vocabulary, theta=1e4)
    make_model(path, len(name), case)


class Transformers:
    """A model of transformers on a GPU; called, it gives the bits of its logits."""

    quantise = None

    def __init__(self, place, kind, attention, _):
        import torch
        import transformers

        self.torch = torch
        of = transformers.AutoModelForCausalLM
        self.model = of.from_pretrained(place, dtype=getattr(torch, kind), attn_implementation=attention).cuda().eval()

    def __call__(self, tokens, decode):
        torch, bits, cache = self.torch, [], None
        step = torch.tensor([tokens], device="cuda")
        with torch.inference_mode():
            for _ in range(decode):
                result = self.model(input_ids=step, past_key_values=cache, use_cache=True)
                cache, step = result.past_key_values, result.logits[:, -1:].argmax(-1)
                bits.append(result.logits.float().cpu().numpy().tobytes())
        return bits



class Torchao(Transformers):
    """The same with torchao's FP8 in all linear layers but the last."""

    def __init__(self, place, kind, attention, length):
        super().__init__(place, kind, attention, length)
        sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "adapters"))
        from transformers_hooks import quantise

        quantise(self.model)

    def __call__(self, tokens, decode):
        return super().__call__(tokens, 1)


class Vllm:
    """vLLM's offline engine."""

    def __init__(self, place, kind, _, length):
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}
        settings.update(VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER="0", VLLM_NO_USAGE_STATS="1")
        os.environ.update(settings)
        import vllm

        self.vllm = vllm
        self.model = vllm.LLM(
            model=place,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            quantization=kind or None,
            max_model_len=length + 8,
            max_num_batched_tokens=2048,
            max_num_seqs=1,
            kv_cache_memory_bytes=1 << 28,
            gpu_memory_utilization=0.3,
            enforce_eager=True,
            enable_prefix_caching=False,
            async_scheduling=False,
            load_format="auto" if os.path.exists(os.path.join(place, "model.safetensors")) else "dummy",
        )

    def __call__(self, tokens, decode):
        (model,) = self.model.apply_model(lambda model: model)
        computed, bits = model.compute_logits, []

        def observed(*arguments, **named):
            result = computed(*arguments, **named)
            bits.append(result.float().cpu().numpy().tobytes())
            return result

        model.compute_logits = observed
        asked = self.vllm.SamplingParams(temperature=0.0, max_tokens=decode, ignore_eos=True, detokenize=False)
        self.model.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)
        model.compute_logits = computed
        return bits



class Sglang:
    """SGLang's own one-batch path in this process."""

    def __init__(self, place, kind, attention, _):
        from runner.engines import sglang

        self.model = sglang.load(
            place,
            dtype="bfloat16",
            quantization=kind or None,
            attention_backend=attention,
            mem_fraction_static=0.6,
            context_length=512,
            max_running_requests=4,
        )

    def __call__(self, tokens, decode):
        processor = self.model.model_runner.model.logits_processor
        product, bits = processor._compute_lm_head, []

        def observed(*arguments, **named):
            result = product(*arguments, **named)
            bits.append(result.float().cpu().numpy().tobytes())
            return result

        processor._compute_lm_head = observed
        self.model.runner.clear()
        bits.append(self.model.run(tokens, decode))
        processor._compute_lm_head = product
        return bits



class LlamaCpp:
    """llama.cpp through llama-cpp-python, all layers on the GPU."""

    def __init__(self, place, kind, _, length):
        os.environ["GGML_CUDA_DISABLE_GRAPHS"] = "1"
        import llama_cpp
        from runner.engines import llama_cpp as known

        known.load_backends(llama_cpp)
        self.model = llama_cpp.Llama(place, n_gpu_layers=99, logits_all=True, n_ctx=1024, n_batch=1024, n_ubatch=1024, verbose=False)

    def __call__(self, tokens, decode):
        self.model.reset()
        step, bits = list(tokens), []
        for _ in range(decode):
            self.model.eval(step)
            scores = self.model.scores[self.model.n_tokens - len(step) : self.model.n_tokens]
            bits.append(scores.tobytes())
            step = [int(scores[-1].argmax())]
        return bits



RUNS = {"transformers": Transformers, "torchao": Torchao, "vllm": Vllm, "sglang": Sglang, "llama-cpp": LlamaCpp}
LARGE = (3584, 18944, 28, 28, 4, 152064)


def time_transformers():
    """Seconds of a forward pass alone, within a capture, and until the file is there."""
    import runner
    import torch
    import transformers

    torch.manual_seed(0)
    with torch.device("cuda"):
        config = config_of("qwen2", transformers, LARGE)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    ids = torch.randint(0, 1000, (1, 300), device="cuda")
    return timed("transformers", lambda: model(input_ids=ids, use_cache=False), model, torch, runner)


def time_vllm():
    import tempfile

    import runner
    import torch
    import transformers

    folder = tempfile.mkdtemp()
    config_of("qwen2", transformers, LARGE).save_pretrained(folder)
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    config.update(architectures=["Qwen2ForCausalLM"], torch_dtype="bfloat16")
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)
    run = Vllm(folder, "", "", 400)
    tokens = [at % 1000 for at in range(300)]
    asked = run.vllm.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    call = lambda: run.model.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)  # noqa: E731
    return timed("vllm", call, run.model, torch, runner)


def timed(engine, call, model, torch, runner):
    def seconds(work):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    alone = sorted(seconds(call) for _ in range(7))[3]
    within, whole, size = [], [], 0
    path = os.path.join(os.environ.get("TMPDIR", "/tmp"), "timed.safetensors")
    for sites in [None, None, None, None, None]:
        start = time.perf_counter()
        with runner.capture(model, path, sites=sites, buffer=4 << 30):
            within.append(seconds(call))
        whole.append(time.perf_counter() - start)
        size = os.path.getsize(path)
        os.remove(path)
    return {
        "engine": engine,
        "layers": 28,
        "tokens": 300,
        "alone_s": round(alone, 4),
        "within_capture_s": round(sorted(within)[2], 4),
        "until_written_s": round(sorted(whole)[2], 4),
        "bytes": size,
    }


TIMES = {"transformers": time_transformers, "vllm": time_vllm}

if __name__ == "__main__":
    main()
