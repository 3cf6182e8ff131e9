#!/usr/bin/env python3
"""Holds the runner's cache and scheduler beside ninja, razel, Snakemake, DVC and b3sum.

    benches/peers.py --install DIR      installs the peers into DIR, with pip and cargo
    benches/peers.py --peers DIR        measures and prints the tables as Markdown

It needs a release build of the runner. All tools run in the same invocation, one
after the other, on folders below --work; --stages 1000,10000 says how many stages.
The folders are left there: ext4 without a journal takes longer to make files for
minutes after many were removed.
"""
import argparse, os, shutil, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ["ninja==1.13.0", "dvc==3.67.1", "snakemake==9.27.1"]
CRATES = [("b3sum", "1.8.7"), ("razel", "0.5.7")]


def install(peers):
    if not shutil.which("protoc"):
        sys.exit("razel is built with protoc: apt-get install protobuf-compiler")
    subprocess.run([sys.executable, "-m", "venv", peers / "venv"], check=True)
    subprocess.run([peers / "venv/bin/pip", "install", "-q", *WHEELS], check=True)
    for name, version in CRATES:
        subprocess.run(["cargo", "install", "-q", "--locked", "--root", peers, f"{name}@{version}"], check=True)


def source(shape, i):
    return "in" if shape == "fan" or i == 0 else f"out/{i - 1}"


def write_project(tool, shape, count, folder):
    """`count` stages that each copy one small file."""
    folder.mkdir(parents=True)
    (folder / "in").write_text("1\n")
    if tool == "runner":
        (folder / "stages").mkdir()
        (folder / "contracts").mkdir()
        shutil.copy(ROOT / "contracts/command.toml", folder / "contracts")
        for i in range(count):
            (folder / f"stages/s{i:05}.toml").write_text(
                f'id = "s{i:05}"\ntitle = "step {i}"\ncontract = "command"\n[command]\n'
                f'argv = ["cp", "{source(shape, i)}", "out/{i}"]\n'
                f'inputs = ["{source(shape, i)}"]\noutputs = ["out/{i}"]\n')
        return
    (folder / "out").mkdir()
    if tool == "ninja":
        lines = ["rule cp", "  command = cp $in $out"]
        lines += [f"build out/{i}: cp {source(shape, i)}" for i in range(count)]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    elif tool == "razel":
        lines = [f'{{"name":"{i}","executable":"cp","args":["{source(shape, i)}","out/{i}"],'
                 f'"inputs":["{source(shape, i)}"],"outputs":["out/{i}"]}}' for i in range(count)]
        (folder / "razel.jsonl").write_text("\n".join(lines) + "\n")
    elif tool == "snakemake":
        rules = [f"rule all:\n    input: " + ", ".join(f"'out/{i}'" for i in range(count))]
        rules += [f"rule s{i}:\n    input: '{source(shape, i)}'\n    output: 'out/{i}'\n"
                  f"    shell: 'cp {{input}} {{output}}'" for i in range(count)]
        (folder / "Snakefile").write_text("\n".join(rules) + "\n")
    elif tool == "dvc":
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        stages = [f"  s{i}:\n    cmd: cp {source(shape, i)} out/{i}\n    deps: [{source(shape, i)}]\n"
                  f"    outs: [out/{i}]" for i in range(count)]
        (folder / "dvc.yaml").write_text("stages:\n" + "\n".join(stages) + "\n")


def command(tool, runner, peers):
    venv = peers / "venv/bin"
    return {
        "runner": [runner, "run", "stages", "--format", "plain"],
        "ninja": [venv / "ninja", "-j2"],
        "razel": [peers / "bin/razel", "exec"],
        "snakemake": [venv / "snakemake", "-c2", "-q"],
        "dvc": [venv / "dvc", "repro", "-q"],
    }[tool]


def timed(arguments, folder, env=None, fine=(0,)):
    """Seconds, seconds of CPU with all children, and the largest resident size in MiB."""
    with open(folder / "log", "w") as log:
        start = time.perf_counter()
        process = subprocess.Popen([str(a) for a in arguments], cwd=folder, stdout=log, stderr=log, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status) not in fine:
        sys.exit(f"{arguments} failed in {folder}:\n" + (folder / "log").read_text()[-2000:])
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def best(count, measure):
    return min(measure() for _ in range(count))


def stages_table(args, env):
    """Tools take turns, since others use the machine too."""
    print(f"| stages | tool | cold (best of {args.rounds} where runner and ninja have 1,000) | of CPU | nothing to do (best of 5) | of CPU |")
    print("|---|---|---|---|---|---|")
    slow = ("snakemake", "dvc")
    for count in args.stages:
        for shape in ["chain", "fan"]:
            tools = [tool for tool in args.tools if tool not in slow or (count <= 1000 and shape == "chain")]
            lines = {tool: command(tool, args.runner, args.peers) for tool in tools}
            sizes = {tool: min(count, args.dvc_stages) if tool == "dvc" else count for tool in tools}
            cold = {tool: [] for tool in tools}
            for turn in range(args.rounds if count <= 1000 else 1):
                for tool in tools:
                    # What razel has run it knows wherever it is run again.
                    if turn and tool in ("razel", *slow):
                        continue
                    folder = args.work / f"{tool}-{shape}-{count}-{turn}"
                    if folder.exists():
                        sys.exit(f"{folder} is there; name an empty --work")
                    write_project(tool, shape, sizes[tool], folder)
                    if tool == "dvc":
                        subprocess.run([args.peers / "venv/bin/dvc", "init", "-q"], cwd=folder, check=True)
                    time.sleep(0.1)
                    cold[tool].append(timed(lines[tool], folder, env))
            for tool in tools:
                seconds, cpu, _ = min(cold[tool])
                folder = args.work / f"{tool}-{shape}-{count}-0"
                idle = best(1 if tool in slow else 5, lambda: timed(lines[tool], folder, env))
                print(f"| {sizes[tool]:,} in a {shape} | {tool} | {seconds:.2f} s | {cpu:.2f} s "
                      f"| {idle[0]:.3f} s | {idle[1]:.3f} s |", flush=True)


def write_large(file, gigabytes):
    """Blocks of which no two are the same. Small ones: a program counts as its own memory the
    most that its parent ever held."""
    block = os.urandom(1 << 20)
    with open(file, "wb") as out:
        for i in range(gigabytes * 1024):
            out.write(i.to_bytes(8, "little") + block[8:])


def digest_table(args, env):
    """One large file: hashed, found unchanged, touched."""
    file = args.work / "large"
    if not file.exists():
        write_large(file, args.gigabytes)
    os.utime(file, (time.time() - 1000,) * 2)
    b3sum = [args.peers / "bin/b3sum", file]
    ours = [args.runner, "cache", "digest", file]
    anew = ours + ["--rehash"]
    timed(b3sum, args.work)  # The page cache is warm for all.
    rows = []
    pairs = [(timed(b3sum, args.work), timed(anew, args.work, env)) for _ in range(5)]
    rows.append(("b3sum", *min(pair[0] for pair in pairs)))
    rows.append(("runner, hashing", *min(pair[1] for pair in pairs)))
    rows.append(("runner, unchanged", *best(5, lambda: timed(ours, args.work, env))))
    os.utime(file)
    time.sleep(0.05)
    rows.append(("runner, after touch", *timed(ours, args.work, env)))
    elsewhere = ours + ["--runs", args.work / "other"]
    rows.append(("runner, from another folder", *best(5, lambda: timed(elsewhere, args.work, env))))
    print(f"\n| {args.gigabytes} GiB file | time | of CPU | memory, the mapped file included |\n|---|---|---|---|")
    for name, seconds, cpu, memory in rows:
        print(f"| {name} | {seconds:.3f} s | {cpu:.3f} s | {memory:.0f} MiB |")


def model_table(args, env):
    """Stages over a model: the first run, and nothing to do."""
    folder = args.work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for part in ["stages", "contracts"]:
        shutil.copytree(ROOT / part, folder / part)
    line = [args.runner, "run", "stages", "--format", "plain", "--model", args.model,
            *(["--tokens", args.tokens] if args.tokens else [])]
    cold = timed(line, folder, env, (0, 1))[0]
    idle = best(10, lambda: timed(line, folder, env, (0, 1))[0])
    contract = folder / "contracts/per-layer.toml"
    original, rejudge = contract.read_text(), []
    for bound in range(5):
        contract.write_text(original.replace("max        = 0.1\n", f"max        = 0.{bound + 2}\n"))
        time.sleep(0.05)
        rejudge.append(timed(line, folder, env, (0, 1))[0])
    size = f" ({Path(args.model).stat().st_size / 1e9:.2f} GB)" if Path(args.model).exists() else ""
    print(f"\n| five stages over {args.model}{size} | time |\n|---|---|")
    print(f"| first run | {cold:.1f} s |\n| nothing to do (best of 10) | {idle * 1000:.1f} ms |\n"
          f"| a contract changed: all judged anew (best of 5) | {min(rejudge) * 1000:.1f} ms |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--runner", type=Path, default=ROOT / "target/release/runner")
    parser.add_argument("--work", type=Path, default=Path("/tmp/runner-peers"))
    parser.add_argument("--stages", type=lambda s: [int(n) for n in s.split(",") if n], default=[1000, 10000])
    parser.add_argument("--tools", type=lambda s: s.split(","), default="runner,ninja,razel,snakemake,dvc".split(","))
    parser.add_argument("--rounds", type=int, default=5, help="cold runs of runner and ninja")
    parser.add_argument("--dvc-stages", type=int, default=100, help="DVC needs 0.15 s for each")
    parser.add_argument("--gigabytes", type=int, default=5)
    parser.add_argument("--model", help="a model for the five shipped stages")
    parser.add_argument("--tokens", help="their prompt; the manifests' own by default")
    args = parser.parse_args()
    if args.install:
        return install(args.install.resolve())
    args.peers, args.runner, args.work = args.peers.resolve(), args.runner.resolve(), args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    # Where razel keeps what it did before, and the runner its digests.
    shutil.rmtree(args.work / "home", ignore_errors=True)
    env = dict(os.environ, XDG_CACHE_HOME=str(args.work / "home"))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start\n")
    stages_table(args, env)
    if args.gigabytes:
        digest_table(args, env)
    if args.model:
        model_table(args, env)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
