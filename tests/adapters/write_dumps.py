"""Dumps as other programs' own code writes them, for tests/it/dumps.rs.

    pip install torch==2.11.0 transformers==5.17.0 polygraphy==0.53.6 mindstudio-probe==26.2.0
    pip install flashinfer-bench==0.1.2 --no-deps; pip download sglang==0.5.17 --no-deps
    python write_dumps.py FOLDER SGLANG

SGLANG is the unpacked wheel's folder `sglang/srt/debug_utils`: its two dumpers need torch alone, and
the rest of SGLang a GPU. Beside a tensor stand its values as f32 in `NAME.expected`. CI has no
torch: the files in tests/fixtures/dumps are what this script wrote.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import types

import torch

FOLDER, SGLANG = map(pathlib.Path, sys.argv[1:3])
ROWS, WIDTH = 3, 4
VALUES = torch.sin(torch.arange(ROWS * WIDTH, dtype=torch.float64)).reshape(ROWS, WIDTH) * 3


def main():
    if len(sys.argv) > 3:
        return dump_by_msprobe(sys.argv[3])
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_torch(made("torch"))
    write_polygraphy(made("polygraphy"))
    write_sglang(made("sglang"))
    write_msprobe(made("msprobe"))
    write_flashinfer(made("flashinfer"))


def made(name):
    folder = FOLDER / name
    folder.mkdir(parents=True)
    return folder


def expect(folder, name, tensor):
    values = tensor.detach().to(torch.float32).contiguous().numpy()
    (folder / f"{name}.expected").write_bytes(values.astype("<f4").tobytes())


def write_torch(folder):
    kinds = {
        "f32": torch.float32,
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "f64": torch.float64,
    }
    tensors = {name: VALUES.to(kind) for name, kind in kinds.items()}
    wide = VALUES.to(torch.bfloat16).repeat(2, 3)
    # Views of one storage, with a place and strides of their own.
    tensors["transposed"] = VALUES.to(torch.float32).T.contiguous().T
    tensors["columns"] = wide[1:4, 2:6]
    tensors["rows"] = wide[2:5]
    tensors["expanded"] = VALUES[:, :1].to(torch.float16).expand(ROWS, WIDTH)
    tensors["eighths"] = tensors["e4m3"].repeat(2, 2)[1:4, 1:5]
    tensors["whole"] = torch.nn.Parameter(VALUES.to(torch.float32), requires_grad=True)
    for name, tensor in tensors.items():
        expect(folder, name, tensor)
    ids = {"ids": torch.tensor([3, 1, 4]), "flags": torch.tensor([True, False, True])}
    nested = {"layers": [{"out": tensors["bf16"]}, (tensors["f16"], None)], 7: tensors["f32"]}
    others = {"step": 3, "name": "prefill", "scale": 0.5, "shape": VALUES.shape, "none": None}
    others["dtype"], others["big"] = torch.bfloat16, 1 << 70
    torch.save({**tensors, **ids, **nested, **others}, folder / "dict.pt")
    torch.save({**tensors, **ids, **nested}, folder / "protocol4.pt", pickle_protocol=4)
    torch.save(tensors["columns"], folder / "one.pt")
    model = torch.nn.Linear(WIDTH, ROWS)
    model.weight.data.copy_(VALUES)
    torch.save(model.state_dict(), folder / "state.pth")
    torch.save(tensors["f32"], folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": model}, folder / "object.pt")
    torch.save({"array": VALUES.numpy()}, folder / "numpy.pt")
    torch.save({"x": tensors["f32"].to_sparse()}, folder / "sparse.pt")


def write_polygraphy(folder):
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    f32, f16 = VALUES.to(torch.float32).numpy(), VALUES.to(torch.float16).numpy()
    expect(folder, "f32", VALUES.to(torch.float32))
    expect(folder, "f16", VALUES.to(torch.float16))
    expect(folder, "bf16", VALUES.to(torch.bfloat16))
    # The names that `polygraphy run` gives runners end with their number and the time.
    one = RunResults()
    one.add([{"hidden": f32, "half": f16}], runtime=0.25, runner_name="trt-runner-N0-11/30/26-01:02:03")
    one.save(str(folder / "outputs.json"))
    two = RunResults()
    for name in ["trt-runner-N0-11/30/26-01:02:03", "onnxrt-runner-N1-11/30/26-01:02:04"]:
        two.add([{"hidden": f32}, {"hidden": f16.astype("<f4")}], runner_name=name)
    two.save(str(folder / "two.json"))
    tensors = RunResults()
    tensors.add([{"hidden": VALUES.to(torch.bfloat16), "half": f16}], runner_name="torch")
    tensors.save(str(folder / "torch.json"))
    save_json([{"x": f32}], str(folder / "inputs.json"))
    iterations = made("polygraphy/iterations")
    for place, single in enumerate(two.split()):
        del single.lst[1]
        single.save(str(iterations / f"{place:010d}.json"))
    save_json({"x": [1, 2, 3]}, str(folder / "nothing.json"))


def write_sglang(folder):
    # What the dumper imports of SGLang is for its server alone.
    for name in ["managers.io_struct", "runtime_context", "layers.logits_processor"]:
        for part in ["sglang", "sglang.srt", f"sglang.srt.{name.split('.')[0]}", f"sglang.srt.{name}"]:
            sys.modules.setdefault(part, types.ModuleType(part))
    batches = types.ModuleType("sglang.srt.model_executor.forward_batch_info")
    sys.modules["sglang.srt.model_executor"] = types.ModuleType("sglang.srt.model_executor")
    sys.modules[batches.__name__] = batches
    batches.ForwardBatch = batches.PPProxyTensors = type("Unused", (), {})
    sys.modules["sglang.srt.layers.logits_processor"].LogitsProcessorOutput = batches.ForwardBatch
    messages = sys.modules["sglang.srt.managers.io_struct"]
    messages.sock_recv = messages.sock_send = messages.wrap_as_pickle = None
    sys.modules["sglang.srt.runtime_context"].get_serving = None
    sys.path.insert(0, str(SGLANG))
    import dumper as module

    def dump(name, steps):
        config = module.DumperConfig(
            enable=True, dir=str(folder), exp_name=name, non_intrusive_mode="all"
        )
        dumper = module._Dumper(config=config)
        _, model = small_model()
        dumper.register_non_intrusive_dumper(model)
        for _ in range(steps):
            model(VALUES.to(torch.float32))
            dumper.dump("attn_out", VALUES.to(torch.bfloat16), layer_id=3)
            if name != "repeated":
                dumper.step()
        for file in (folder / name).iterdir():
            if name != "one" and "attn_out" not in file.name:
                file.unlink()

    for name, steps in [("one", 1), ("two", 2), ("repeated", 2)]:
        dump(name, steps)
    write_pass(folder)
    block, _ = small_model()
    expect(folder, "block", block(VALUES.to(torch.float32)))
    expect(folder, "attn_out", VALUES.to(torch.bfloat16))


def write_pass(folder):
    """`--debug-tensor-dump-output-folder`: a file for each pass, with what the modules return."""
    import tensor_dump_forward_hook as hook

    _, model = small_model()
    norm = torch.nn.LayerNorm(WIDTH)
    norm.register_forward_hook(lambda _, inputs, out: (out, inputs[0]))
    model.model.norm = norm
    dumper = hook.register_forward_hook_for_model(model, str(folder), None, 1, 0, 0)
    x = VALUES.to(torch.float32)
    model.model.forward = lambda x: norm(model.model.layers[0](x))[0]
    model.model(x)
    made = pathlib.Path(dumper.get_dump_dir())
    shutil.move(made / "Pass00000.pt", folder / "Pass00000.pt")
    made.rmdir()


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.mlp = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.mlp(x)


def small_model():
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([Layer()])
    model.forward = lambda x: model.model.layers[0](x)
    return model.model.layers[0].mlp, model


def write_msprobe(folder):
    """A whole pass of a small Qwen2, dumped as tensors and as statistics."""
    model, tokens = small_qwen2()
    with torch.no_grad():
        seen = {}
        for name, part in model.named_modules():
            part.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        model(tokens)
    for name in ["model.layers.0.self_attn.q_proj", "model.layers.0", "lm_head"]:
        expect(folder, name, seen[name][0] if isinstance(seen[name], tuple) else seen[name])
    for task in ["tensor", "statistics"]:
        # It writes until its process ends.
        subprocess.run([sys.executable, *sys.argv, task], check=True)
        # The folder of a process has its number, and the stacks name files of this machine.
        (dumped,) = (folder / task / "step0").iterdir()
        dumped = dumped.rename(dumped.with_name("rank0"))
        (dumped / "stack.json").unlink()
        said = json.loads((dumped / "dump.json").read_text())
        said["dump_data_dir"] = None
        (dumped / "dump.json").write_text(json.dumps(said, indent=1))


def small_qwen2():
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    torch.manual_seed(1)
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    return model, torch.tensor([[3, 1, 4, 1, 5]])


def dump_by_msprobe(task):
    from msprobe.pytorch import PrecisionDebugger

    model, tokens = small_qwen2()
    path = FOLDER / "msprobe" / "config.json"
    settings = {
        "task": task,
        "dump_path": str(FOLDER / "msprobe" / task),
        "rank": [],
        "step": [],
        "level": "L0",
        task: {"scope": [], "list": [], "data_mode": ["output"]},
    }
    path.write_text(json.dumps(settings))
    debugger = PrecisionDebugger(config_path=str(path))
    debugger.start(model=model)
    with torch.no_grad():
        model(tokens)
    debugger.stop()
    debugger.step()
    path.unlink()


def write_flashinfer(folder):
    import safetensors.torch
    from flashinfer_bench.data import Definition, Trace, Workload
    from flashinfer_bench.data.workload import RandomInput, SafetensorsInput, ScalarInput

    axis = {"M": {"type": "var"}, "N": {"type": "const", "value": 2}, "K": {"type": "const", "value": WIDTH}}
    run = "import torch\n\ndef run(A, B, alpha):\n    return alpha * torch.matmul(A, B.T)\n"
    spec = lambda *shape: {"shape": list(shape) or None, "dtype": "bfloat16"}
    definition = Definition(
        name="gemm_n2_k4",
        op_type="gemm",
        axes=axis,
        inputs={"A": spec("M", "K"), "B": spec("N", "K"), "alpha": spec()},
        outputs={"C": spec("M", "N")},
        reference=run,
    )
    blob = "blob/workloads/gemm/gemm_n2_k4/first.safetensors"
    (folder / blob).parent.mkdir(parents=True)
    x = VALUES.to(torch.bfloat16)
    expect(folder, "A", x)
    safetensors.torch.save_file({"A": x, "other": x[:1].clone()}, folder / blob)
    stored = SafetensorsInput(path=blob, tensor_key="A")
    workloads = folder / "workloads/gemm"
    workloads.mkdir(parents=True)
    lines = []
    for uuid in ["0b1c", "77aa"]:
        inputs = {"A": stored, "B": RandomInput(), "alpha": ScalarInput(value=0.5)}
        workload = Workload(axes={"M": ROWS}, inputs=inputs, uuid=uuid)
        lines.append(Trace(definition=definition.name, workload=workload).model_dump_json())
    (workloads / "gemm_n2_k4.jsonl").write_text(lines[0] + "\n")
    (workloads / "both.jsonl").write_text("\n".join(lines) + "\n")


main()
