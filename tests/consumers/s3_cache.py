"""Holds the shared cache to a real S3 server (moto), with a proxy between both that fails on purpose.

    python tests/consumers/s3_cache.py target/release/runner

It starts the servers and ends them. Every line that it prints is one thing that held; it ends with an
error at the first that does not. What such a run costs benches/shared_cache.py measures.
"""

import glob
import http.server
import json
import os
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import boto3
from botocore.config import Config

RUNNER = os.path.abspath(sys.argv[1])
STAGES = os.path.abspath("stages")
BUCKET = "runner"


def free_port():
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


class Proxy(http.server.BaseHTTPRequestHandler):
    """Hands requests on; `fault(method, path, times)` may say `500`, `half`, `wrong`, `slow` or `expired`."""

    protocol_version = "HTTP/1.1"
    fault = staticmethod(lambda method, path, times: None)
    seen = {}
    upstream = ""

    def log_message(self, *_):
        pass

    def handle_any(self):
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        key = (self.command, self.path.split("?")[0])
        Proxy.seen[key] = Proxy.seen.get(key, 0) + 1
        fault = Proxy.fault(*key, Proxy.seen[key])
        if fault == "500":
            self.answer(500, {}, b"")
            return
        if fault == "expired":
            code = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
            self.answer(400, {}, code)
            return
        if fault == "slow":
            time.sleep(0.5)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection",)}
        # Else urllib says that it is a form, and the server reads it as one.
        headers.setdefault("Content-Type", "application/octet-stream")
        asked = urllib.request.Request(
            Proxy.upstream + self.path, data=body or None, headers=headers, method=self.command
        )
        try:
            with urllib.request.urlopen(asked) as got:
                status, back, data = got.status, dict(got.headers), got.read()
        except urllib.error.HTTPError as error:
            status, back, data = error.code, dict(error.headers), error.read()
        if fault == "wrong":
            data = bytes(byte ^ 0x55 for byte in data)
        if fault == "half" and len(data) > 1:
            self.send_response(status)
            for name, value in back.items():
                if name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.answer(status, back, data)

    def answer(self, status, headers, data):
        self.send_response(status)
        length = headers.get("Content-Length") if self.command == "HEAD" else str(len(data))
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("content-length", length or "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any


class Threads(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A runner that was killed hangs up in the middle: no news."""


# No key that somebody has here is used.
SECRET = "not-for-anybody"
ENV = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RUNNER_"))}
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}


def run(folder, endpoint, *more, expect=0, keys=KEYS, wait=True, path="team"):
    env = dict(ENV, **keys, AWS_ENDPOINT_URL=endpoint, XDG_CACHE_HOME=folder + "/home")
    url = path if "://" in path or path == "off" else f"s3://{BUCKET}/{path}"
    argv = [RUNNER, "run", STAGES, "--arms", "reference,emulated", "--runs", folder + "/runs"]
    process = subprocess.Popen(
        argv + ["--format", "plain", "--cache", url, *more],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    if not wait:
        return process
    try:
        out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == expect, f"{process.returncode}, not {expect}\n{out}\n{err}"
    assert SECRET not in out + err, "a secret was printed"
    for file in glob.glob(folder + "/runs/2*/*"):
        with open(file, "rb") as text:
            assert SECRET.encode() not in text.read(), f"a secret in {file}"
    return out, err


def record(folder):
    with open(sorted(glob.glob(folder + "/runs/2*/run.json"))[-1]) as file:
        return json.load(file)


def states(folder):
    arms = [arm for stage in record(folder)["stages"] for arm in stage["arms"].values()]
    return sorted({arm["state"] for arm in arms})


def verdicts(folder):
    return {stage["id"]: stage["verdict"] for stage in record(folder)["stages"]}


def held(what):
    print(f"holds: {what}", flush=True)


class Server:
    """An S3 server with an empty bucket."""

    def __init__(self):
        port = free_port()
        program = os.path.join(os.path.dirname(sys.executable), "moto_server")
        self.process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self):
        for _ in range(300):
            try:
                urllib.request.urlopen(self.url + "/moto-api/").close()
                break
            except OSError:
                time.sleep(0.1)
        self.client = boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="test",
            aws_secret_access_key=SECRET, config=Config(s3={"addressing_style": "path"}),
        )
        self.client.create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def main(base):
    with Server() as server:
        Proxy.upstream = server.url
        proxy = Threads(("127.0.0.1", 0), Proxy)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        checks(base, server.client, server.url, f"http://127.0.0.1:{proxy.server_address[1]}")


def keys(client, path="team"):
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=path)
    return [entry for page in pages for entry in page.get("Contents", [])]


def checks(base, client, direct, flaky):
    new = iter(f"{base}/{number}" for number in range(100))

    first = next(new)
    run(first, direct)
    wanted = verdicts(first)
    assert record(first)["cache"]["problems"] == [], record(first)["cache"]
    second = next(new)
    run(second, direct)
    assert states(second) == ["reused"] and verdicts(second) == wanted
    held(f"{record(second)['cache']['fetched']} results of one machine are another one's")

    third = next(new)
    run(third, direct, "--force")
    assert record(third)["cache"]["problems"] == [], "two writers of one key agree"
    held("two writers of one key agree, and it is seen")

    Proxy.seen.clear()
    Proxy.fault = staticmethod(lambda method, path, times: {1: "500", 2: "half"}.get(times))
    folder = next(new)
    run(folder, flaky)
    assert verdicts(folder) == wanted, "server errors and broken bodies"
    assert states(folder) == ["reused"], record(folder)["cache"]
    held("a server that fails once and breaks off once for each object is asked again")

    Proxy.fault = staticmethod(lambda method, path, times: "slow")
    folder = next(new)
    run(folder, flaky)
    assert states(folder) == ["reused"] and verdicts(folder) == wanted
    held("a slow server is waited for")

    wrong = lambda method, path, _: "wrong" if method == "GET" and "objects" in path else None
    Proxy.fault = staticmethod(wrong)
    folder = next(new)
    _, err = run(folder, flaky, "--cache-mode", "read-only")
    assert "its hash is not its name" in err and verdicts(folder) == wanted, err
    held("wrong bytes are named, not believed, and computed again")

    down = lambda method, path, times: "500" if "objects" in path else None
    Proxy.fault = staticmethod(down)
    folder = next(new)
    _, err = run(folder, flaky)
    assert err.count("was left alone after it failed") == 1 and verdicts(folder) == wanted, err
    held("a server that goes down in the middle costs a warning and no verdict")
    Proxy.fault = staticmethod(lambda *_: None)

    _, err = run(next(new), direct, path="s3://nobody/x", expect=2)
    assert "NoSuchBucket" in err and "refuses" in err, err
    held("a bucket that is not there is an error before anything is computed")

    Proxy.fault = staticmethod(lambda *_: "expired")
    _, err = run(next(new), flaky, expect=2)
    assert "ExpiredToken" in err and "refuses" in err, err
    Proxy.fault = staticmethod(lambda *_: None)
    folder = next(new)
    _, err = run(folder, direct, expect=2, keys={})
    assert "no credentials were found" in err and not glob.glob(folder + "/runs/2*"), err
    held("credentials that are expired or missing are an error before anything is computed")

    for number in range(10):
        process = run(next(new), flaky, wait=False, path="killed")
        time.sleep(0.1 + 0.06 * number)
        process.kill()
        process.wait()
        folder = next(new)
        run(folder, direct, path="killed")
        assert verdicts(folder) == wanted and record(folder)["cache"]["problems"] == []
    held("10 runners were killed while they worked: no other one believes anything half-written")

    env = dict(ENV, **KEYS, AWS_ENDPOINT_URL=direct)
    gc = [RUNNER, "cache", "gc", "--cache", f"s3://{BUCKET}/killed", "--budget", "0",
          "--runs", base + "/none"]
    print("      " + subprocess.run(gc, env=env, check=True, capture_output=True, text=True).stdout.strip())
    left = [entry["Key"] for entry in keys(client, "killed") if "actions" in entry["Key"]]
    assert left == [], left
    held("gc leaves no record above the budget")

    folder = next(new)
    with Server() as other:
        # Slowly, so that it is not over before its server.
        Proxy.upstream = other.url
        Proxy.fault = staticmethod(lambda *_: "slow")
        process = run(folder, flaky, wait=False)
        while process.poll() is None and not any("actions" in e["Key"] for e in keys(other.client)):
            time.sleep(0.01)
        assert process.poll() is None, "the run was over before its server could be killed"
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and verdicts(folder) == wanted, err
    assert err.count("was left alone after it failed") == 1, err
    assert record(folder)["cache"]["unsent"] > 0, record(folder)["cache"]
    push = [RUNNER, "cache", "push", "--cache", f"s3://{BUCKET}/pushed", "--runs", folder + "/runs"]
    subprocess.run(push, env=env, check=True, capture_output=True)
    after = next(new)
    run(after, direct, path="pushed")
    assert states(after) == ["reused"] and verdicts(after) == wanted
    held("a server that is killed in the middle costs a warning, and push sends what it did not get")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        main(base)
