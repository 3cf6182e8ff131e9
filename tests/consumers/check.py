"""Reads what a run leaves with the programs that others read it with.

Usage: check.py RUNNER RUNS RUN. Every figure is held against run.json.
"""

import json
import math
import pathlib
import subprocess
import sys

import jsonschema
import junitparser
import pandas

runner, runs, name = sys.argv[1:]
folder = pathlib.Path(runs) / name
run = json.loads((folder / "run.json").read_text())


def report(kind):
    command = [runner, "report", name, "--runs", runs, "--format", kind]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# run.json against its published schema; the schema can say no.
schema = json.loads((pathlib.Path(__file__).parents[2] / "docs/run.schema.json").read_text())
validator = jsonschema.Draft202012Validator(schema)
jsonschema.Draft202012Validator.check_schema(schema)
validator.validate(run)
for broken in [{**run, "verdict": "fine"}, {**run, "schema": 2}, {**run, "stages": [{}]}]:
    assert not validator.is_valid(broken)

# junit.xml: a suite per stage, a case per falsifier and one for the verdict.
suites = junitparser.JUnitXml.fromfile(str(folder / "junit.xml"))
assert [suite.name for suite in suites] == [stage["id"] for stage in run["stages"]]
for suite, stage in zip(suites, run["stages"]):
    cases = list(suite)
    assert len(cases) == len(stage["judgements"]) + 1
    for case, judgement in zip(cases, stage["judgements"]):
        assert case.name.startswith(judgement["falsifier"])
        kinds = {"held": set(), "falsified": {"Failure"}, "unmeasured": {"Skipped"}}
        assert {type(r).__name__ for r in case.result} == kinds[judgement["outcome"]], case.name
    passed = not cases[-1].result
    assert passed == (stage["verdict"] == "pass"), stage["id"]

# SARIF: a result per falsified claim, at a line of a manifest that is there.
sarif = json.loads(report("sarif"))
fallen = [
    judgement["falsifier"]
    for stage in run["stages"]
    for judgement in stage["judgements"]
    if judgement["outcome"] == "falsified"
]
results = sarif["runs"][0]["results"]
assert [r["ruleId"] for r in results if "-" in r["ruleId"]] == fallen
rules = {rule["id"] for rule in sarif["runs"][0]["tool"]["driver"]["rules"]}
for result in results:
    assert result["ruleId"] in rules
    place = result["locations"][0]["physicalLocation"]
    line = pathlib.Path(place["artifactLocation"]["uri"]).read_text().splitlines()[
        place["region"]["startLine"] - 1
    ]
    assert line.startswith("contract"), line

# CSV: every measure, to the last bit.
(folder / "measures.csv").write_text(report("csv"))
table = pandas.read_csv(folder / "measures.csv", float_precision="round_trip")
rows = table.to_dict("records")
measures = [(stage, m) for stage in run["stages"] for m in stage["measures"]]
assert len(rows) == len(measures)
for row, (stage, measure) in zip(rows, measures):
    layer = "" if math.isnan(row["layer"]) else f"blk.{int(row['layer'])}."
    assert (row["stage"], layer + row["site"]) == (stage["id"], measure["site"])
    assert (row["subject"], row["judge"]) == (measure["subject"], measure["judge"])
    for metric in schema["$defs"]["metric"]["enum"]:
        value = measure["metrics"].get(metric)
        assert math.isnan(row[metric]) if value is None else row[metric] == value, (row, metric)

print(f"{len(measures)} measures, {len(suites)} suites, {len(results)} findings read back")
