"""Counts what a run of clean passes came to: a small receipt of a run.json that may be large.

    python scripts/count_clean_passes.py runs/RUN/run.json > receipt.json

For each stage its verdict, the shape that was drawn (the first line of the stage's file), the sites that some kernel
gives to the bit, and of the others how many values differ.
"""

import json
import os
import sys


def main():
    with open(sys.argv[1]) as file:
        run = json.load(file)
    cases = {}
    for stage in run["stages"]:
        seed = stage["id"].rsplit("-", 1)[-1]
        case = cases.setdefault(seed, {"shape": shape_of(stage["file"]), "verdicts": {}})
        if stage["contract"][0] in case["verdicts"]:
            sys.exit(f"two stages of {seed} have one contract: count runs of clean passes alone")
        case["verdicts"][stage["contract"][0]] = stage["verdict"]
        sites = [site for site in stage["kernels"] if site["subject"] == "recorded"]
        case["sites"] = len(sites)
        case["values"] = sum(site["values"] for site in sites)
        off = [site for site in sites if site["mismatches"]]
        case["sites_not_to_the_bit"] = [
            [site["site"], site["mismatches"], site["values"]] for site in off
        ]
        if stage["verdict"] != "pass":
            case.setdefault("why", {})[stage["contract"][0]] = stage["why"]
    total = {
        "passes": len(cases),
        "passed_all": sum(set(case["verdicts"].values()) == {"pass"} for case in cases.values()),
        "sites": sum(case["sites"] for case in cases.values()),
        "sites_to_the_bit": sum(
            case["sites"] - len(case["sites_not_to_the_bit"]) for case in cases.values()
        ),
        "values": sum(case["values"] for case in cases.values()),
        "provenance": run["provenance"],
        "cases": cases,
    }
    json.dump(total, sys.stdout, indent=1)
    print()


def shape_of(path):
    if not os.path.exists(path):
        return None
    with open(path) as file:
        first = file.readline()
    return first[1:].strip() if first.startswith("#") else None


if __name__ == "__main__":
    main()
