"""A safetensors file that grows while an engine runs.

Rows come in the order in which the engine makes them, and go to disk at once: what is held in
memory is what has not been written yet, up to a bound. A file that was not ended is called
`NAME.partial` and is removed; what stands under the file's own name is always whole. It knows
bytes, names and rows, and nothing of models.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from typing import Any, BinaryIO, Dict, List, Mapping, Tuple

from ._dtypes import BYTES, Values, text_of
from ._errors import CaptureError

# Bytes that are copied at a time where a file is put together.
PIECE = 1 << 24


class Store:
    """The tensors of a capture: rows are added to each, and `end` leaves the file.

    With room left for the header, and if each tensor came in one piece, nothing is copied at the
    end.
    """

    def __init__(self, path: str) -> None:
        self.path = os.fspath(path)
        self.partial = f"{self.path}.partial"
        # Of each tensor its format, the shape of a row, and its pieces: where, and how many rows.
        self.tensors: Dict[str, Tuple[str, Tuple[int, ...], List[Tuple[int, int]]]] = {}
        self.room = 0
        self.size = 8
        with told(self.path):
            self.file: BinaryIO = open(self.partial, "wb+")
            self.file.seek(self.size)

    def leave_room(self, room: int) -> None:
        """Leaves so many bytes for the header, before the first tensor."""
        if not self.tensors:
            self.room = -(-room // 8) * 8
            self.size = 8 + self.room
            self.file.seek(self.size)

    def add(self, name: str, values: Values) -> None:
        """Adds rows to a tensor, the first dimension of `values`."""
        rows, row = values.shape[0], values.shape[1:]
        format, wide, pieces = self.tensors.setdefault(name, (values.format, row, []))
        if (format, wide) != (values.format, row):
            raise CaptureError(
                f"{name} came as {format} with rows {text_of(wide)} at first, and then as "
                f"{values.format} with rows {text_of(row)}: one capture holds one pass of one model"
            )
        with told(self.path):
            self.file.write(values.data)
        pieces.append((self.size, rows))
        self.size += len(values.data)

    def rows(self, name: str) -> int:
        """How many rows a tensor has."""
        return sum(rows for _, rows in self.tensors[name][2])

    def drop(self, name: str) -> None:
        """Leaves a tensor out of the file."""
        del self.tensors[name]

    def end(self, about: Mapping[str, str]) -> None:
        """Puts the file in its place, with what is said about it."""
        with told(self.path):
            in_place = self.header(about, [8 + self.room])
            if in_place is not None and len(in_place) <= self.room:
                self.file.seek(0)
                self.file.write(struct.pack("<Q", self.room) + in_place.ljust(self.room))
            else:
                self.put_together(about)
            self.file.flush()
            self.file.close()
            os.replace(self.partial, self.path)

    def header(self, about: Mapping[str, str], start: List[int]) -> Any:
        """The header of the file as it stands, if its tensors stand there one after another."""
        header: Dict[str, Any] = {"__metadata__": dict(about)} if about else {}
        at = start[0]
        for name, (format, row, pieces) in sorted(self.tensors.items(), key=lambda item: item[1][2][0][0]):
            if len(pieces) != 1 or pieces[0][0] != at:
                return None
            end = at + pieces[0][1] * size_of(format, row)
            offsets = [at - start[0], end - start[0]]
            header[name] = {"dtype": format, "shape": [pieces[0][1], *row], "data_offsets": offsets}
            at = end
        return json.dumps(header).encode()

    def put_together(self, about: Mapping[str, str]) -> None:
        """Writes the file anew, the pieces of each tensor side by side."""
        header: Dict[str, Any] = {"__metadata__": dict(about)} if about else {}
        at = 0
        for name, (format, row, pieces) in self.tensors.items():
            rows = sum(rows for _, rows in pieces)
            end = at + rows * size_of(format, row)
            header[name] = {"dtype": format, "shape": [rows, *row], "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        whole = f"{self.partial}.whole"
        try:
            with open(whole, "wb") as out:
                out.write(struct.pack("<Q", len(text)) + text)
                for format, row, pieces in self.tensors.values():
                    for place, rows in pieces:
                        self.file.seek(place)
                        copy(self.file, out, rows * size_of(format, row))
            os.replace(whole, self.partial)
        except BaseException:
            remove(whole)
            raise

    def discard(self) -> None:
        """Leaves nothing."""
        self.file.close()
        remove(self.partial)


class told:
    """Says of an error of the disk which capture it cost, and what to do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: Any, _trace: Any) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(os.path.dirname(os.path.abspath(self.path))).free
            raise CaptureError(
                f"no room for the capture {self.path}: {free / 2**20:.0f} MiB are free there; "
                "write it to another disk, or capture fewer sites (`sites=`)"
            ) from error
        raise CaptureError(f"cannot write the capture {self.path}: {error.strerror or error}") from error


def size_of(format: str, row: Tuple[int, ...]) -> int:
    """The bytes of a row."""
    size = BYTES[format]
    for width in row:
        size *= width
    return size


def copy(source: BinaryIO, out: BinaryIO, size: int) -> None:
    """Copies so many bytes, a piece at a time."""
    while size > 0:
        piece = source.read(min(size, PIECE))
        if not piece:
            raise OSError(errno.EIO, "the capture's own file became shorter")
        out.write(piece)
        size -= len(piece)


def remove(path: str) -> None:
    """Removes a file, if it is there."""
    try:
        os.remove(path)
    except FileNotFoundError:
        pass


def write(path: str, tensors: Mapping[str, Values], about: Mapping[str, str] = {}) -> None:
    """Writes tensors that are all there."""
    store = Store(path)
    store.leave_room(4096 + 160 * len(tensors) + sum(map(len, tensors)))
    try:
        for name, values in tensors.items():
            shaped = values if values.shape else values._replace(shape=(1,))
            store.add(name, shaped)
        store.end(about)
    except BaseException:
        store.discard()
        raise


def read_header(path: str) -> Tuple[Dict[str, Any], int]:
    """A safetensors file's header, and where its data begins."""
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            text = file.read(min(size, 100_000_000))
            if len(text) != size:
                raise ValueError("it ends within its header")
            header = json.loads(text)
            data = os.fstat(file.fileno()).st_size - 8 - size
            parts = {name: part for name, part in header.items() if name != "__metadata__"}
            end = max((part["data_offsets"][1] for part in parts.values()), default=0)
            if data < end:
                raise ValueError(f"{end - data} of its {end} bytes of tensors are missing")
    except OSError as error:
        raise CaptureError(f"cannot read the capture {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CaptureError(
            f"{path} is no whole safetensors file ({error}): if it was cut off on its way, capture again"
        ) from error
    return header, 8 + size
