"""Holds the shared cache to a real S3 server (moto), with a proxy between both that fails on purpose, and to
Azure's own emulator of its blobs (Azurite).

    npm ci --prefix tests/consumers
    python tests/consumers/s3_cache.py target/release/runner

Google hands out no server of its store for tests. `gs://` is tried on the S3 server: both speak the XML of S3
there, and a proxy signs the requests for that server.

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
    # What signs a request on its way, instead of what the client signed it with; the server believes all.
    signs = None

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
        if Proxy.signs:
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
            headers["Authorization"] = Proxy.signs
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
ENV = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "AZURE_", "GOOGLE_", "RUNNER_"))}
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}


def run(folder, endpoint, *more, expect=0, keys=KEYS, wait=True, path="team"):
    env = dict(ENV, **keys, XDG_CACHE_HOME=folder + "/home")
    if endpoint:
        env["AWS_ENDPOINT_URL"] = endpoint
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


class Azurite:
    """Azure's own emulator of its blobs, with an empty container."""

    # As Azure publishes them for its emulator.
    ACCOUNT = "devstoreaccount1"
    KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def __init__(self):
        port = free_port()
        program = os.path.join(os.path.dirname(__file__), "node_modules/.bin/azurite-blob")
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [program, "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--blobPort", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )

    def __enter__(self):
        from azure.storage.blob import BlobServiceClient

        client = BlobServiceClient(f"{self.url}/{self.ACCOUNT}", credential=self.KEY)
        for tries in range(300):
            try:
                client.create_container(BUCKET)
                break
            except OSError:
                time.sleep(0.1)
            except Exception as error:
                if tries == 299 or "Connection refused" not in str(error):
                    raise
                time.sleep(0.1)
        self.container = client.get_container_client(BUCKET)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def azure(base):
    """What holds on S3 holds on Azure: shared results, wrong credentials, clearing."""
    new = iter(f"{base}/azure-{number}" for number in range(100))
    with Azurite() as server:
        keys = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": server.url}
        path = f"az://{BUCKET}/team"
        shared(new, keys, path)
        held("results of one machine are another one's through az://")

        _, err = run(next(new), None, keys=keys, path="az://nobody/x", expect=2)
        assert "ContainerNotFound" in err and "refuses" in err, err
        wrong = dict(keys, AZURE_STORAGE_ACCOUNT_KEY="bm90LXRoZS1rZXk=")
        folder = next(new)
        _, err = run(folder, None, keys=wrong, path=path, expect=2)
        assert "refuses" in err and not glob.glob(folder + "/runs/2*"), err
        held("on az:// a container that is not there and a wrong key are errors before anything is computed")

        clear(base, keys, path)
        left = [blob.name for blob in server.container.list_blobs() if "actions" in blob.name]
        assert left == [], left
        held("gc clears az://")


def google(base, client, proxy):
    """The same with Google's client, on the XML that its store shares with S3."""
    new = iter(f"{base}/google-{number}" for number in range(100))
    account = {"gcs_base_url": proxy, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    signed = {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account), "GOOGLE_BASE_URL": proxy}
    path = f"gs://{BUCKET}/google"
    Proxy.signs = (
        "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    )
    shared(new, signed, path)
    held("results of one machine are another one's through gs://")
    _, err = run(next(new), None, keys=signed, path="gs://nobody/x", expect=2)
    assert "NoSuchBucket" in err and "refuses" in err, err
    held("on gs:// a bucket that is not there is an error before anything is computed")
    clear(base, signed, path)
    left = [entry["Key"] for entry in keys(client, "google") if "actions" in entry["Key"]]
    assert left == [], left
    held("gc clears gs://")
    Proxy.signs = None


def shared(new, keys, path):
    first, second = next(new), next(new)
    run(first, None, keys=keys, path=path)
    assert record(first)["cache"]["problems"] == [] and record(first)["cache"]["sent"] > 0, record(first)["cache"]
    run(second, None, keys=keys, path=path)
    assert states(second) == ["reused"] and verdicts(second) == verdicts(first), record(second)["cache"]


def clear(base, keys, path):
    command = [RUNNER, "cache", "gc", "--cache", path, "--budget", "0", "--runs", base + "/none"]
    subprocess.run(command, env=dict(ENV, **keys), check=True, capture_output=True)


def main(base):
    azure(base)
    with Server() as server:
        Proxy.upstream = server.url
        proxy = Threads(("127.0.0.1", 0), Proxy)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.server_address[1]}"
        google(base, server.client, address)
        checks(base, server.client, server.url, address)


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
