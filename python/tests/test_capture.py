"""Captures of modules: what is kept, what is refused, and that nothing changes by being watched."""

import subprocess
import sys

import pytest
import torch
from conftest import NAMES, Own
from safetensors.torch import load_file

import runner
from runner import CaptureError


def test_what_modules_computed_is_in_the_file(own, tmp_path):
    ids = torch.tensor([[3, 5, 7]])
    seen = {}
    own.blocks[1].w1.register_forward_hook(lambda _, __, out: seen.update(up=out[0].clone()))
    own.blocks[1].w2.register_forward_hook(lambda _, inputs, __: seen.update(act=inputs[0][0].clone()))
    with torch.no_grad(), runner.capture(own, tmp_path / "run.safetensors", names=NAMES):
        logits = own(ids)
    kept = load_file(tmp_path / "run.safetensors")
    assert torch.equal(kept["logits"], logits[0])
    assert torch.equal(kept["blk.1.ffn_up"], seen["up"])
    assert torch.equal(kept["blk.1.ffn_swiglu"], seen["act"])
    assert kept["ids"].tolist() == [3, 5, 7]
    assert len(kept) == 9


def test_no_bit_changes_by_being_watched_and_no_hook_stays(own, tmp_path):
    ids = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        before = own(ids)
        with runner.capture(own, tmp_path / "run.safetensors", names=NAMES):
            within = own(ids)
        after = own(ids)
    assert torch.equal(before, within) and torch.equal(before, after)
    for module in own.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert "forward" not in vars(own)


def test_what_an_operation_writes_into_later_is_kept_as_it_was(tmp_path):
    class InPlace(Own):
        def forward(self, input_ids):
            x = self.table(input_ids)
            x.mul_(0)
            return self.head(x)

    torch.manual_seed(0)
    model = InPlace()
    with torch.no_grad(), runner.capture(model, tmp_path / "run.safetensors", names={"embed": "table"}):
        model(torch.tensor([[1, 2]]))
    assert load_file(tmp_path / "run.safetensors")["embed"].abs().max() > 0


def test_types_stay_as_they_are(own, tmp_path):
    own = own.to(torch.bfloat16)
    with torch.no_grad(), runner.capture(own, tmp_path / "run.safetensors", names={"blk.*.ffn_norm": "blocks.*.norm"}):
        own(torch.tensor([[1, 2]]))
    assert load_file(tmp_path / "run.safetensors")["blk.0.ffn_norm"].dtype == torch.bfloat16


def test_of_a_batch_the_row_that_was_asked_for_is_kept(own, tmp_path):
    ids = torch.tensor([[3, 5, 7], [4, 6, 8]])
    with torch.no_grad(), runner.capture(own, tmp_path / "run.safetensors", names=NAMES, row=1):
        logits = own(ids)
    kept = load_file(tmp_path / "run.safetensors")
    assert kept["ids"].tolist() == [4, 6, 8] and torch.equal(kept["logits"], logits[1])


def one_pass(own):
    own(torch.tensor([[1, 2]]))


def two_passes(own):
    one_pass(own)
    one_pass(own)


WRONG = {
    "a batch": (lambda own: own(torch.tensor([[1, 2], [3, 4]])), {}, "2 prompts ran in one pass.*row=0"),
    "a row that is not there": (one_pass, {"row": 3}, "row=3, and 1 prompts ran"),
    "two passes": (two_passes, {}, "a second pass began after 2 tokens"),
    "padding": (
        lambda own: own(torch.tensor([[1, 2]]), attention_mask=torch.tensor([[0, 1]])),
        {},
        "the pass has padding",
    ),
    "nothing": (lambda own: None, {}, "nothing was captured"),
    "no ids": (lambda own: own("text"), {}, "without token ids"),
    "an unknown module": (one_pass, {"names": {"embed": "tabel"}}, "no module `tabel` for embed; it has table"),
    "an unknown site": (one_pass, {"sites": ["blk.9.q"]}, "no module makes blk.9.q; there are embed"),
    "a star on one side": (one_pass, {"names": {"blk.*.q": "table"}}, "stands once in both or in none"),
    "an unknown side": (one_pass, {"names": {"embed": "table:middle"}}, "ends with `:middle`"),
    "an unknown level": (one_pass, {"level": "kernels"}, "level='kernels': it is 'modules' or 'operations'"),
    "no buffer": (one_pass, {"buffer": 0}, "buffer=0"),
    "names that are a list": (one_pass, {"names": ["table"]}, "a dictionary from site to the name of a module"),
    "a site that is no list": (one_pass, {"sites": "embed"}, r"a list of sites, as \[\"embed\"\]"),
    "a buffer in words": (one_pass, {"buffer": "1GB"}, "buffer='1GB': it is a number of bytes"),
    "names of operations": (one_pass, {"level": "operations"}, "names, sites and row are for level"),
    "names that are not known": (one_pass, {"names": None}, "Own is not built as a model that is known here.*missing: model.embed_tokens"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_captured_is_refused_and_leaves_nothing(own, tmp_path, wrong):
    run, options, words = WRONG[wrong]
    with pytest.raises(CaptureError, match=words), torch.no_grad():
        with runner.capture(own, tmp_path / "run.safetensors", **{"names": NAMES, **options}):
            run(own)
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        own(torch.tensor([[1, 2]]))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(CaptureError, match="builtins.str is nothing that can be captured"):
        with runner.capture("model", tmp_path / "run.safetensors"):
            pass


def test_an_error_of_the_model_is_its_own_and_leaves_nothing(own, tmp_path):
    with pytest.raises(IndexError), torch.no_grad():
        with runner.capture(own, tmp_path / "run.safetensors", names=NAMES):
            own(torch.tensor([[99]]))
    assert not list(tmp_path.iterdir())


def test_an_older_capture_stays_until_the_next_one_is_whole(own, tmp_path):
    path = tmp_path / "run.safetensors"
    with torch.no_grad(), runner.capture(own, path, names=NAMES):
        one_pass(own)
    before = path.read_bytes()
    with pytest.raises(CaptureError), runner.capture(own, path, names=NAMES):
        two_passes(own)
    assert path.read_bytes() == before and [at.name for at in tmp_path.iterdir()] == [path.name]


def test_a_capture_larger_than_memory_goes_to_disk(tmp_path):
    code = f"""
import resource, torch, runner
class Big(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(60))
    def forward(self, input_ids):
        x = torch.zeros(1, input_ids.shape[1], 1 << 19)
        for at, part in enumerate(self.parts):
            x.fill_(at)
            part(x)
model = Big()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model(torch.zeros(1, 8, dtype=torch.long))
before = peak()
with runner.capture(model, {str(tmp_path / "run.safetensors")!r}, names={{"blk.*.ffn_down": "parts.*"}}, buffer=1 << 25):
    model(torch.zeros(1, 8, dtype=torch.long))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size = (tmp_path / "run.safetensors").stat().st_size
    assert size > 60 * (16 << 20)
    assert int(done.stdout) < 300 << 10, "KiB more than without it, of a file of 960 MiB"
    header, start = __import__("runner._store", fromlist=["x"]).read_header(str(tmp_path / "run.safetensors"))
    with open(tmp_path / "run.safetensors", "rb") as file:
        for at in [0, 31, 59]:
            file.seek(start + header[f"blk.{at}.ffn_down"]["data_offsets"][0])
            assert torch.frombuffer(bytearray(file.read(8)), dtype=torch.float32).tolist() == [at, at]


def test_what_is_no_file_stays_and_links_are_followed(own, tmp_path):
    with pytest.raises(CaptureError, match="/dev/null is there and is no file"):
        runner.capture(own, "/dev/null", names=NAMES)
    (tmp_path / "link").symlink_to(tmp_path / "file.safetensors")
    with torch.no_grad(), runner.capture(own, tmp_path / "link", names=NAMES):
        one_pass(own)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file.safetensors").is_file()


def test_another_folder_within_a_capture_does_not_lose_it(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    with torch.no_grad(), runner.capture(own, "run.safetensors", names=NAMES):
        monkeypatch.chdir(tmp_path / "below")
        one_pass(own)
    assert (tmp_path / "run.safetensors").is_file()


@pytest.mark.parametrize("shape", [(8,), (5, 8), (1, 5, 8)])
def test_values_in_the_place_of_ids_keep_their_rows(shape, tmp_path):
    layers = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 8))
    x = torch.randn(shape)
    with torch.no_grad(), runner.capture(layers, tmp_path / "run.safetensors", names={"h": "0", "y": "1"}):
        y = layers(x)
    kept = load_file(tmp_path / "run.safetensors")
    assert torch.equal(kept["y"], y.reshape(-1, 8)) and "ids" not in kept
