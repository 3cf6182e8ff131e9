"""How long a run takes whose results are all in a shared cache, beside copying them.

    target/s3/bin/python benches/shared_cache.py target/release/runner

The Python needs tests/consumers/s3.txt, whose S3 server (moto) it starts and ends. Copied is by `cp -r`
from a folder, and by curl, eight objects at once, from S3. Every round is a machine of its own: its folder
of runs holds the generated model and no result. Once the folder is in memory, once it comes from the disk. `everything
here` is the same run with all results in its own cache already: what is left without a shared one.
"""

import argparse
import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def load(runner):
    """The servers and runs of the test, which reads the runner from its command line."""
    sys.argv = [sys.argv[0], runner]
    place = os.path.join(HERE, "..", "tests", "consumers", "s3_cache.py")
    spec = importlib.util.spec_from_file_location("s3_cache", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed(what):
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def forget(folder):
    """Has the kernel read the files of a folder from the disk again."""
    for file in glob.glob(folder + "/**/*.*", recursive=True):
        if os.path.isfile(file):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def median(values):
    return sorted(values)[len(values) // 2]


def main(base):
    parser = argparse.ArgumentParser()
    parser.add_argument("runner")
    parser.add_argument("--model", default="synthetic:qwen2-tiny@8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    s3 = load(args.runner)
    tokens = ",".join(str(100 + n) for n in range(args.tokens))
    model = ["--model", args.model, "--tokens", tokens]
    shared = base + "/shared"
    os.makedirs(shared)
    print("| store | results | copied | the run | times | everything here |")
    print("|---|---|---|---|---|---|")
    with s3.Server() as server:
        places = {
            "`file://`, in memory": f"file://{shared}",
            "`file://`, on disk": f"file://{shared}",
            "S3": f"s3://{s3.BUCKET}/timed",
        }
        first = base + "/first"
        for number, (name, url) in enumerate(places.items()):
            if number == 0:
                s3.run(first, server.url, *model, path="off")
            env = dict(s3.ENV, **s3.KEYS, AWS_ENDPOINT_URL=server.url)
            push = [args.runner, "cache", "push", "--cache", url, "--runs", first + "/runs"]
            subprocess.run(push, env=env, check=True, stdout=subprocess.DEVNULL)
            if name == "S3":
                entries = s3.keys(server.client, "timed")
                sizes = [entry["Size"] for entry in entries]
                sign = lambda entry: server.client.generate_presigned_url(
                    "get_object", Params={"Bucket": s3.BUCKET, "Key": entry["Key"]}
                )
                urls = [sign(entry) for entry in entries]
            else:
                files = glob.glob(shared + "/v1/**/*.*", recursive=True)
                sizes = [os.path.getsize(file) for file in files]

            def copy(to):
                os.makedirs(to)
                if name != "S3":
                    return lambda: subprocess.run(["cp", "-r", shared + "/v1", to], check=True)
                argv = ["curl", "--silent", "--fail", "--parallel", "--parallel-max", "8"]
                for number, url in enumerate(urls):
                    argv += ["-o", f"{to}/{number}", url]
                return lambda: subprocess.run(
                    argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )

            copied, ran, here = [], [], []
            for number in range(args.rounds):
                to = f"{base}/copy"
                before = lambda: forget(shared) if name.endswith("disk") else None
                before()
                copied.append(timed(copy(to)))
                shutil.rmtree(to)
                machine = f"{base}/machine"
                os.makedirs(machine + "/runs/cache/v1")
                shutil.copytree(first + "/runs/cache/v1/models", machine + "/runs/cache/v1/models")
                # What is known of the model's file is known by its stamp.
                s3.run(machine, server.url, *model, "--dry-run", path=url)
                before()
                ran.append(timed(lambda: s3.run(machine, server.url, *model, path=url)))
                had = s3.record(machine)["cache"]
                assert s3.states(machine) == ["reused"] and had["sent"] == 0, had
                shutil.rmtree(machine + "/runs/cache/v1/unchanged")
                here.append(timed(lambda: s3.run(machine, server.url, *model, path="off")))
                shutil.rmtree(machine)
            copied, ran, here = median(copied), median(ran), median(here)
            print(f"| {name} | {sum(sizes) / 2**20:.0f} MiB in {len(sizes)} objects | {copied:.2f} s "
                  f"| {ran:.2f} s | {ran / copied:.2f} | {here:.2f} s |", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
