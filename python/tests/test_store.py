"""The file of a capture: whole or not there, and what others read from it."""

import resource
import subprocess
import sys

import numpy
import pytest
from safetensors.numpy import load_file

from runner import CaptureError
from runner._dtypes import values_of
from runner._store import Store, read_header, write


def rows(array):
    return values_of(array, "x")


def test_what_is_written_others_read_the_same(tmp_path):
    path = str(tmp_path / "a.safetensors")
    tensors = {
        "f32": numpy.arange(12, dtype=numpy.float32).reshape(3, 4),
        "f16": numpy.arange(6, dtype=numpy.float16).reshape(3, 2),
        "none": numpy.zeros((0, 5), numpy.float32),
        "backwards": numpy.arange(8, dtype=numpy.float64)[::-1].reshape(2, 4),
        "swapped": numpy.arange(4, dtype=">i4"),
    }
    write(path, {name: rows(array) for name, array in tensors.items()}, {"who": "a test"})
    read = load_file(path)
    assert sorted(read) == sorted(tensors)
    for name, array in tensors.items():
        assert read[name].shape == array.shape and numpy.array_equal(read[name], array)
    assert read_header(path)[0]["__metadata__"] == {"who": "a test"}


@pytest.mark.parametrize("room", [0, 8, 100_000])
def test_rows_that_came_in_steps_stand_below_one_another(tmp_path, room):
    store = Store(str(tmp_path / "a.safetensors"))
    store.leave_room(room)
    whole = {name: numpy.random.default_rng(1).standard_normal((9, 5)).astype(numpy.float32) for name in "ab"}
    for start, end in [(0, 4), (4, 8), (8, 9)]:
        for name, array in whole.items():
            store.add(name, rows(array[start:end]))
    assert not (tmp_path / "a.safetensors").exists()
    store.end({})
    read = load_file(str(tmp_path / "a.safetensors"))
    for name, array in whole.items():
        assert numpy.array_equal(read[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_with_room_for_the_header_nothing_is_copied(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "a.safetensors"))
    store.leave_room(4096)
    store.add("a", rows(numpy.ones((2, 3), numpy.float32)))
    monkeypatch.setattr(store, "put_together", None)
    store.end({"a": "b"})
    assert numpy.array_equal(load_file(str(tmp_path / "a.safetensors"))["a"], numpy.ones((2, 3)))


def test_rows_of_another_width_or_type_are_refused(tmp_path):
    store = Store(str(tmp_path / "a.safetensors"))
    store.add("a", rows(numpy.ones((2, 3), numpy.float32)))
    with pytest.raises(CaptureError, match=r"a came as F32 with rows \[3\] at first, and then as F32 with rows \[4\]"):
        store.add("a", rows(numpy.ones((2, 4), numpy.float32)))
    store.discard()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_and_is_said(tmp_path):
    code = f"""
import errno, resource, numpy
from runner import CaptureError, _store
from runner._dtypes import values_of
store = _store.Store({str(tmp_path / "a.safetensors")!r})
real = store.file.write
def write(data):
    if store.file.tell() + len(data) > 100_000:
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(data)
class File:
    def __getattr__(self, name): return write if name == "write" else getattr(file, name)
file, store.file = store.file, File()
try:
    for _ in range(10):
        store.add("a", values_of(numpy.ones((10, 1000), numpy.float32), "a"))
except CaptureError as error:
    store.discard()
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no room for the capture ") and "write it to another disk" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_limit_of_the_file_size_leaves_nothing_and_is_said(tmp_path):
    path = tmp_path / "a.safetensors"
    code = f"""
import numpy
from runner import CaptureError, _store
from runner._dtypes import values_of
try:
    _store.write({str(path)!r}, {{"a": values_of(numpy.ones((100, 1000), numpy.float32), "a")}})
except CaptureError as error:
    print(error)
"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit)
    assert "cannot write the capture" in done.stdout, done
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "no-header", "not-json", "missing"])
def test_a_damaged_capture_is_named_and_said(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    write(str(path), {"a": rows(numpy.ones((4, 4), numpy.float32))})
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-3], "no-header": data[:5], "not-json": data[:8] + b"x" * (len(data) - 8)}[damage])
    with pytest.raises(CaptureError) as error:
        read_header(str(path))
    assert str(path) in str(error.value)
