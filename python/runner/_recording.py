"""What one pass leaves in a file: the rows of every site, and which tokens they are of.

An engine's hooks say when a step begins and hand over tensors; what is kept is copied where it
stands, at once, as kernels go on to write there, and goes to disk beside the pass. It knows
steps, rows and files, and no engine.
"""

from __future__ import annotations

import os
import platform
import struct
import sys
import threading
from collections import deque
from typing import Any, Callable, Collection, Deque, Dict, List, Optional, Sequence, Tuple

from ._dtypes import Values, torch_values
from ._errors import CaptureError
from ._store import Store

# Bytes of copies that may wait for the disk, unless `buffer` says otherwise.
BUFFER = 4 << 30
# Bytes that the header of a file needs for each site, and beside them.
ROOM_OF_SITE = 144
ROOM = 4096


class Recording:
    """A pass that is being captured.

    `sites` are those to keep, all for None. `row` is which prompt of a batch is kept. `buffer`
    is how many bytes of copies may wait before the engine does.
    """

    def __init__(
        self,
        path: str,
        sites: Optional[Collection[str]] = None,
        row: Optional[int] = None,
        buffer: Optional[int] = None,
    ) -> None:
        self.path = path
        self.wanted = None if sites is None else set(sites)
        self.row = row
        self.ids: List[int] = []
        # Whether the pass's tokens are known: a model may be given embeddings instead.
        self.told_ids = True
        # Rows of each step, and the sequences that ran beside each other.
        self.steps: List[int] = []
        self.batch = 1
        self.about: Dict[str, str] = {}
        # Sites that the file lacks, and why.
        self.left_out: Dict[str, str] = {}
        # Tensors that take the place of what was kept, as a site of which only some rows came.
        self.instead: Dict[str, Any] = {}
        # What must be done when the pass has ended, before the file is closed.
        self.at_end: List[Callable[[], None]] = []
        self.store = Store(path)
        self.copies = Copies(self.store, buffer)

    def expect(self, sites: Collection[str]) -> None:
        """Says which sites will come, before the first does.

        Raises:
            CaptureError: none of those that are wanted is among them.
        """
        unknown = [] if self.wanted is None else sorted(self.wanted - set(sites) - {"logits"})
        if unknown:
            there = ", ".join(list(dict.fromkeys(sites))[:24])
            raise CaptureError(f"sites: no module makes {', '.join(unknown[:6])}; there are {there}")
        self.store.leave_room(ROOM + ROOM_OF_SITE * (len(sites) + 1))

    def wants(self, site: str) -> bool:
        """Whether a site is to be kept."""
        return self.wanted is None or site in self.wanted

    def step(self, ids: Optional[Sequence[int]], rows: int, first: Optional[int]) -> None:
        """A step of so many rows begins; `first` is the position of its first token, if known.

        Raises:
            CaptureError: it does not go on where the last step ended.
        """
        so_far = sum(self.steps)
        if first is None:
            first = so_far
        if self.steps and first == 0:
            raise CaptureError(
                f"a second pass began after {so_far} tokens: one capture holds one prompt and the "
                "tokens that follow it with the cache (use_cache=True); open another capture"
            )
        if first != so_far:
            taken_back = "tokens were taken back, as assisted or speculative decoding does: switch it off"
            cached = "a prefix stands in the cache already: open the capture before the prompt"
            raise CaptureError(
                f"the step begins at token {first}, and {so_far} were captured; {taken_back if so_far else cached}"
            )
        self.steps.append(rows)
        if ids is None:
            self.told_ids = False
        elif len(ids) == rows:
            self.ids.extend(int(token) for token in ids)

    def keep(self, site: str, rows: Any) -> None:
        """Keeps rows of a site: a tensor whose first dimension is the tokens of this step."""
        if self.wants(site):
            self.copies.put(site, rows)

    def keep_values(self, site: str, values: Values) -> None:
        """Keeps rows of a site that are in memory already."""
        if self.wants(site):
            self.store.add(site, values)

    def end(self) -> None:
        """Leaves the file.

        Raises:
            CaptureError: nothing ran, or the disk is full; no file is left.
        """
        try:
            for last in self.at_end:
                last()
            self.copies.end()
            self.check()
            self.store.end(self.metadata())
        except BaseException:
            self.discard()
            raise

    def check(self) -> None:
        """Puts right what is not whole, or leaves it out, or refuses the pass."""
        rows = sum(self.steps)
        for site, tensor in self.instead.items():
            if site in self.store.tensors:
                self.store.drop(site)
            self.store.add(site, torch_values(tensor, site))
        if not self.store.tensors and self.steps and self.wanted is not None:
            raise CaptureError(f"sites: the pass made none of {', '.join(sorted(self.wanted)[:6])}")
        if not self.store.tensors:
            raise CaptureError(
                f"nothing was captured for {self.path}: run the model within the `with`, in this "
                "process and without CUDA graphs"
            )
        for site in list(self.store.tensors):
            found = self.store.rows(site)
            if found != rows:
                self.left_out[site] = f"{found} of {rows} rows"
                self.store.drop(site)
        if not self.store.tensors:
            few = ", ".join(f"{site}: {why}" for site, why in list(self.left_out.items())[:3])
            raise CaptureError(f"no site of {self.path} has a row for each token: {few}")
        if self.told_ids and len(self.ids) == rows:
            data = memoryview(struct.pack(f"<{rows}q", *self.ids))
            self.store.add("ids", Values("I64", (rows,), data))

    def metadata(self) -> Dict[str, str]:
        about = dict(self.about)
        if os.path.exists(about.get("model", "")):
            about["model"] = os.path.abspath(about["model"])
        about["batch"] = str(self.batch)
        about["steps"] = str(len(self.steps))
        about["prompt"] = str(self.steps[0] if self.steps else 0)
        about["python"] = platform.python_version()
        if self.left_out:
            about["left_out"] = "; ".join(f"{site}: {why}" for site, why in self.left_out.items())
        return about

    def discard(self) -> None:
        """Leaves nothing."""
        self.copies.stop()
        self.store.discard()


class Copies:
    """Copies of tensors on their way to disk.

    A copy is made on the tensor's device, in the stream in which the engine computes, and waits
    there. A thread takes them to disk when half of the buffer is full, or when the pass has ended:
    while an engine launches kernels, another busy thread would cost it more than the copies do.
    """

    def __init__(self, store: Store, buffer: Optional[int]) -> None:
        self.store = store
        self.buffer = buffer
        self.waiting: Deque[Tuple[str, Any]] = deque()
        self.bytes = 0
        self.error: Optional[BaseException] = None
        self.closed = False
        self.change = threading.Condition()
        self.thread: Optional[threading.Thread] = None

    def put(self, site: str, tensor: Any) -> None:
        if self.error is not None:
            raise self.error
        copied = (tensor.detach() if tensor.requires_grad else tensor).clone()
        size = copied.numel() * copied.element_size()
        if self.buffer is None:
            self.buffer = room_on(sys.modules["torch"], copied.device)
        with self.change:
            self.bytes += size
            self.waiting.append((site, copied))
            is_full = 2 * self.bytes > self.buffer
        if is_full:
            self.drain()

    def drain(self) -> None:
        """Lets the thread write; waits where the buffer is full."""
        assert self.buffer is not None
        with self.change:
            if self.thread is None:
                self.thread = threading.Thread(target=self.write, name="runner-capture", daemon=True)
                self.thread.start()
            self.change.notify_all()
            while self.bytes > self.buffer and self.error is None:
                self.change.wait()

    def write(self) -> None:
        """What the thread does: to disk what waits, in order."""
        host = Host()
        while True:
            with self.change:
                while not self.waiting and not self.closed:
                    self.change.wait()
                batch = [self.waiting.popleft() for _ in range(len(self.waiting))]
                if not batch:
                    return
            host.catch_up({tensor.device for _, tensor in batch})
            while batch:
                site, tensor = batch.pop(0)
                try:
                    if self.error is None:
                        host.to(self.store, site, tensor)
                except BaseException as error:
                    self.error = error
                with self.change:
                    self.bytes -= tensor.numel() * tensor.element_size()
                    self.change.notify_all()
                del tensor

    def end(self) -> None:
        """Writes what waits.

        Raises:
            CaptureError: the disk is full, or what a site gave does not fit together.
        """
        self.stop()
        if self.waiting and self.error is None:
            self.write()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Ends the thread, when it has written what it has."""
        with self.change:
            self.closed = True
            self.change.notify_all()
        if self.thread is not None:
            self.thread.join()


class Host:
    """The way of a tensor into memory, through one pinned block and a stream of its device."""

    # Bytes that leave a device at once.
    BLOCK = 1 << 26

    def __init__(self) -> None:
        self.torch = sys.modules["torch"]
        self.block: Any = None
        self.streams: Dict[Any, Any] = {}

    def catch_up(self, devices: Collection[Any]) -> None:
        """Waits until the copies that were asked for so far have been made."""
        for device in devices:
            if device.type == "cuda":
                self.torch.cuda.synchronize(device)

    def to(self, store: Store, site: str, tensor: Any) -> None:
        """Adds a tensor to the store."""
        torch = self.torch
        rows = tensor.reshape(tensor.shape[0], -1)
        size = rows.numel() * rows.element_size()
        if not tensor.is_cuda or size > self.BLOCK:
            store.add(site, torch_values(rows, site))
            return
        with torch.no_grad():
            if self.block is None:
                self.block = torch.empty(self.BLOCK, dtype=torch.uint8, pin_memory=True)
            stream = self.streams.get(tensor.device)
            if stream is None:
                stream = self.streams[tensor.device] = torch.cuda.Stream(tensor.device)
            part = self.block[:size].view(rows.dtype).view(rows.shape)
            with torch.cuda.stream(stream):
                part.copy_(rows, non_blocking=True)
                stream.synchronize()
            store.add(site, torch_values(part, site))


def room_on(torch: Any, device: Any) -> int:
    """The bytes of copies that may wait on a device: a part of what is free there."""
    if device.type != "cuda":
        return BUFFER
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(BUFFER, int(free) // 4))
