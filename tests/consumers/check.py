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
import pyarrow.ipc

runner, runs, name = sys.argv[1:]
folder = pathlib.Path(runs) / name
run = json.loads((folder / "run.json").read_text())


def report_bytes(kind):
    command = [runner, "report", name, "--runs", runs, "--format", kind]
    return subprocess.run(command, check=True, capture_output=True).stdout


def report(kind):
    return report_bytes(kind).decode()


# run.json against its published schema; the schema can say no.
schema = json.loads((pathlib.Path(__file__).parents[2] / "docs/run.schema.json").read_text())
validator = jsonschema.Draft202012Validator(schema)
jsonschema.Draft202012Validator.check_schema(schema)
validator.validate(run)
for broken in [{**run, "verdict": "fine"}, {**run, "schema": 2}, {**run, "stages": [{}]}]:
    assert not validator.is_valid(broken)

# All runs of the folder as a fleet of one machine, against its schema.
fleet_schema = json.loads((pathlib.Path(__file__).parents[2] / "docs/fleet.schema.json").read_text())
fleet_validator = jsonschema.Draft202012Validator(fleet_schema)
jsonschema.Draft202012Validator.check_schema(fleet_schema)
told = subprocess.run([runner, "fleet", "report", runs, "--format", "json"], capture_output=True)
fleet = json.loads(told.stdout)
assert told.returncode == fleet["exit_code"], told.stderr
fleet_validator.validate(fleet)
assert [machine["name"] for machine in fleet["machines"]] == [run["provenance"]["machine"]]
for broken in [{**fleet, "verdict": "fine"}, {**fleet, "schema": 2}, {**fleet, "findings": [{}]}]:
    assert not fleet_validator.is_valid(broken)

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

# SARIF against the standard's own schema, which a package for Node ships; it can say no.
sarif = json.loads(report("sarif"))
package = pathlib.Path(__file__).parent / "node_modules/@microsoft/jest-sarif"
sarif_schema = json.loads((package / "lib/schemas/sarif-2.1.0-rtm.5.json").read_text())
sarif_validator = jsonschema.Draft4Validator(sarif_schema)
jsonschema.Draft4Validator.check_schema(sarif_schema)
sarif_validator.validate(sarif)
tool = sarif["runs"][0]["tool"]
for broken in [
    {**sarif, "version": "2.0"},
    {**sarif, "runs": [{"tool": tool, "results": [{"ruleId": "x"}]}]},
    {**sarif, "runs": [{"tool": tool, "results": [{"message": {"text": "x"}, "level": "bad"}]}]},
    {**sarif, "runs": [{"results": []}]},
]:
    assert not sarif_validator.is_valid(broken), broken

# A result per falsified claim, at a line of a manifest that is there.
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

# Arrow: the columns of the CSV with their types; what is not there is null, not NaN.
(folder / "measures.arrow").write_bytes(report_bytes("arrow"))
arrow = pyarrow.ipc.open_file(folder / "measures.arrow").read_all()
arrow.validate(full=True)
assert arrow.column_names == list(table.columns)
kinds = {"layer": "uint32", "rows": "uint64", "width": "uint64", "worst_row": "uint64"}
kinds |= {metric: "double" for metric in schema["$defs"]["metric"]["enum"]}
for column in arrow.schema:
    assert str(column.type) == kinds.get(column.name, str(column.type)), column
numeric = {"uint32", "uint64", "double"}
columns = zip(arrow.to_pylist(), rows)
for row, in_csv in columns:
    for column in arrow.schema:
        value, text = row[column.name], in_csv[column.name]
        if value is None or value != value:
            assert text != text, (column.name, value, text)
        elif str(column.type) in numeric:
            assert value == float(text), (column.name, value, text)
        else:
            assert value == str(text), (column.name, value, text)
for row, (stage, measure) in zip(arrow.to_pylist(), measures):
    for metric in schema["$defs"]["metric"]["enum"]:
        assert (row[metric] is None) == (metric not in measure["metrics"]), (metric, row[metric])
frame = pandas.read_feather(folder / "measures.arrow")
assert frame.shape == table.shape

print(f"{len(measures)} measures, {len(suites)} suites, {len(results)} findings read back")
