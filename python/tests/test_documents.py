"""What docs/python.md says of captures is what their receipt says."""

import json
import re
from collections import Counter

from conftest import ROOT

DOCUMENT = (ROOT / "docs/python.md").read_text()
RECEIPT = json.loads((ROOT / "runs/receipts/captures/h200.json").read_text())
ENGINES = {"transformers": "transformers", "torchao": "torchao", "vLLM": "vllm", "SGLang": "sglang", "llama.cpp": "llama-cpp"}


def test_the_table_of_captures_is_the_receipt_s():
    said, counted = {}, {}
    for name, prefix in ENGINES.items():
        row = re.search(rf"^\| {re.escape(name)} \S+.*?\| (\d+) \| (\d+) of (\d+) \| (\w+) \|$", DOCUMENT, re.MULTILINE)
        said[name] = tuple(map(int, row.groups()[:3])) + (row[4],)
        of = [each for each in RECEIPT["passes"] if each["name"].startswith(f"{prefix}-")]
        verdicts = Counter(each["verdict"] for each in of)
        assert len(verdicts) == 1
        exact, sites = (sum(each[key] for each in of) for key in ("to_the_bit", "sites"))
        counted[name] = (len(of), exact, sites, next(iter(verdicts)))
    assert said == counted
    assert sum(count for count, *_ in said.values()) == len(RECEIPT["passes"])
    assert f"Each of the {len(RECEIPT['passes'])} passes below" in DOCUMENT


def test_what_a_capture_costs_is_the_receipt_s():
    flat = " ".join(DOCUMENT.split())
    for cost in RECEIPT["cost"]:
        assert f"{cost['alone_s'] * 1e3:.1f} ms alone and {cost['within_capture_s'] * 1e3:.1f} ms" in flat
        assert f"{cost['until_written_s']:.2f} s" in flat and f"file of {cost['bytes'] / 1e9:.1f} GB" in flat
        assert cost["within_capture_s"] < 2 * cost["alone_s"]


def test_the_operations_that_were_compared_are_the_receipt_s():
    said = RECEIPT["operations"]
    assert f"{said['to_the_bit']} of {said['compared']} products and norms" in " ".join(DOCUMENT.split())
