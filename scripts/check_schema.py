#!/usr/bin/env python3
"""Holds `runner schema` and `runner check` to the same files, with a real validator.

Every manifest and contract that ships must pass both; each of these mistakes must
fail both. Usage: check_schema.py RUNNER (needs the Python package jsonschema).
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib

import jsonschema

RUNNER = str(pathlib.Path(sys.argv[1]).resolve())
ROOT = pathlib.Path(__file__).resolve().parent.parent

STAGE = """
id = "X"
title = "t"
contract = "%s"
"""
# A sound line or table, and the same with one mistake: contract, sound, mistaken.
MISTAKES = [
    ("embedding", "[embed]\n", "[embed]\nwieght = \"x\"\n"),
    ("embedding", "[embed]\n", "[embedd]\n"),
    ("embedding", "[embed]\n", ""),
    ("embedding", "[embed]\n", "[embed]\n[forward]\n"),
    ("embedding", "tokens = [1]\n[embed]\n", "tokens = [-1]\n[embed]\n"),
    ("embedding", "tokens = [1]\n[embed]\n", "tokens = []\n[embed]\n"),
    ("embedding", "arms = [\"reference\", \"device\"]\n[embed]\n", "arms = [\"gpu\"]\n[embed]\n"),
    ("embedding", "tags = [\"a\"]\n[embed]\n", "tags = [\"a b\"]\n[embed]\n"),
    ("embedding", "[embed]\n[recipe]\ngemm = \"bf16\"\n", "[embed]\n[recipe]\ngemm = \"fp8\"\n"),
    ("embedding", "[embed]\n[recipe]\ntensor_parallel = 2\n", "[embed]\n[recipe]\ntensor_parallel = 0\n"),
    ("embedding", "[embed]\n[resources]\nthreads = 2\n", "[embed]\n[resources]\nthreads = 0\n"),
    ("embedding", "[embed]\n[resources]\ncores = 2\n", "[embed]\n[resources]\ncores = -2\n"),
    ("embedding", "[embed]\n[executor]\non = \"slurm\"\n", "[embed]\n[executor]\non = \"pbs\"\n"),
    ("embedding", "[embed]\n[executor]\npartition = \"gpu\"\n", "[embed]\n[executor]\npartition = \"g pu\"\n"),
    ("embedding", "[embed]\n[executor]\ntime = 5\n", "[embed]\n[executor]\ntime = 0\n"),
    ("embedding", "[embed]\n[executor]\nprogram = \"/a\"\n", "[embed]\n[executor]\nprogram = \"a\"\n"),
    ("embedding", "[embed]\n[executor]\noptions = [\"--exclusive\"]\n", "[embed]\n[executor]\noptions = [\"exclusive\"]\n"),
    ("embedding", "[embed]\nweight = \"token_embd\"\n", "[embed]\nweight = \"token_embd.weight\"\n"),
    ("reproducer", "[forward]\nrepeats = 2\n", "[forward]\nrepeats = 0\n"),
    (
        "embedding",
        "[embed]\n[external]\nargv = [\"a\"]\nversion = \"1\"\n",
        "[command]\nargv = [\"a\"]\n[external]\nargv = [\"a\"]\nversion = \"1\"\n",
    ),
    ("rope", "[rope]\ninput = { generate = \"normal\", rows = 4 }\nsite = \"blk.0.q_rope\"\n",
     "[rope]\ninput = { generate = \"gaussian\", rows = 4 }\nsite = \"blk.0.q_rope\"\n"),
    ("rope", "[rope]\ninput = { generate = \"normal\", rows = 4 }\nsite = \"blk.0.q_rope\"\n",
     "[rope]\ninput = { generate = \"normal\", rows = 0 }\nsite = \"blk.0.q_rope\"\n"),
    ("rope", "[rope]\ninput = { file = \"x.npy\" }\nsite = \"blk.0.q_rope\"\n",
     "[rope]\ninput = { file = \"x.npy\", generate = \"normal\" }\nsite = \"blk.0.q_rope\"\n"),
    ("rope", "[rope]\ninput = { file = \"x.npy\", scale = 2.0 }\nsite = \"blk.0.q_rope\"\n",
     "[rope]\ninput = { file = \"x.npy\", scale = -2.0 }\nsite = \"blk.0.q_rope\"\n"),
    ("comparison", "[compare]\nreference = { file = \"a.npy\" }\nrecorded = { file = \"b.npy\" }\n",
     "[compare]\nrecorded = { file = \"b.npy\" }\n"),
    ("coded-matmul", "[matmul]\nx = { file = \"a.npy\" }\nw = { file = \"b.npy\" }\n",
     "[matmul]\nx = { file = \"a.npy\" }\n"),
    ("command", "[command]\nargv = [\"true\"]\n", "[command]\nargv = [\"true\"]\ntimeout = 0\n"),
    ("command", "[command]\nargv = [\"true\"]\n", "[command]\n"),
]

PIPELINE = """[cache]
url = "s3://bucket/team"
read_only = true
anonymous = false
largest = 5
commands = true
"""
PIPELINE_MISTAKES = [
    PIPELINE.replace('url = "s3://bucket/team"\n', ""),
    PIPELINE.replace("5", "-5"),
    PIPELINE.replace("true", '"yes"', 1),
    PIPELINE + "budget = 1\n",
]
# A NumPy file of one row and one column.
HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1), }".ljust(117) + b"\n"
NPY = b"\x93NUMPY\x01\x00" + len(HEADER).to_bytes(2, "little") + HEADER + bytes(4)


def schema(of):
    text = subprocess.run([RUNNER, "schema", of], check=True, capture_output=True).stdout
    loaded = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(loaded)
    return jsonschema.Draft202012Validator(loaded)


def check(folder):
    return subprocess.run([RUNNER, "check", str(folder)], capture_output=True).returncode == 0


def main():
    stage, pipeline, contract = schema("stage"), schema("pipeline"), schema("contract")
    good = 0
    folders = [ROOT / "stages", *sorted(ROOT.glob("examples/*/stages"))]
    for folder in folders:
        assert check(folder), f"runner check refuses {folder}"
        for path in sorted(folder.glob("*.toml")):
            validator = pipeline if path.name == "pipeline.toml" else stage
            validator.validate(tomllib.loads(path.read_text()))
            good += 1
    for path in sorted((ROOT / "contracts").glob("*.toml")):
        contract.validate(tomllib.loads(path.read_text()))
        good += 1

    with tempfile.TemporaryDirectory() as temporary:
        project = pathlib.Path(temporary)
        shutil.copytree(ROOT / "contracts", project / "contracts")
        (project / "stages").mkdir()
        # `check` also looks at the files that a manifest names.
        for name in ["a", "b", "x"]:
            (project / "stages" / f"{name}.npy").write_bytes(NPY)
        for name, sound, mistaken in MISTAKES:
            for text, expected in [(sound, True), (mistaken, False)]:
                manifest = STAGE % name + text
                (project / "stages" / "x.toml").write_text(manifest)
                answers = check(project / "stages"), stage.is_valid(tomllib.loads(manifest))
                assert answers == (expected, expected), f"check, schema: {answers} for\n{manifest}"
        (project / "stages" / "x.toml").write_text(STAGE % "embedding" + "[embed]\n")
        for text, expected in [(PIPELINE, True), *((text, False) for text in PIPELINE_MISTAKES)]:
            (project / "stages" / "pipeline.toml").write_text(text)
            answers = check(project / "stages"), pipeline.is_valid(tomllib.loads(text))
            assert answers == (expected, expected), f"check, schema: {answers} for\n{text}"
        (project / "stages" / "pipeline.toml").unlink()
        text = (project / "contracts" / "embedding.toml").read_text()
        for old, new in [("1.0.0", "1.0"), ("structural", "terrible"), ("bit_mismatches", "bits"),
                         ("max        = 0\n", "")]:
            mistaken = text.replace(old, new, 1)
            (project / "contracts" / "embedding.toml").write_text(mistaken)
            answers = check(project / "stages"), contract.is_valid(tomllib.loads(mistaken))
            assert answers == (False, False), f"check, schema: {answers} for {old} -> {new}"
    print(f"{good} files pass both, {len(MISTAKES) + len(PIPELINE_MISTAKES) + 4} mistakes fail both")


main()
