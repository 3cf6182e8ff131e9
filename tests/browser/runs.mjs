// Runs to look at: real ones of the built-in model, and variants of them that a
// real run would take hours or a broken machine to make. A variant is a run.json,
// rendered by `runner report` like any other.
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const root = new URL("../..", import.meta.url).pathname;
export const runner = process.env.RUNNER ?? join(root, "target/debug/runner");
const place = mkdtempSync(join(tmpdir(), "runner-browser-"));
export const runs = join(place, "runs");

// Runs the shipped stages once; gives the folder of the run.
export function realRun(extra = [], command = ["run", "stages/"]) {
  mkdirSync(runs, { recursive: true });
  const before = new Set(readdirSync(runs));
  try {
    execFileSync(runner, [...command, "--runs", runs, ...extra], { cwd: root, stdio: "pipe" });
  } catch (error) {
    // A falsified stage is what some of these runs are for.
    if (error.status !== 1) throw error;
  }
  const made = readdirSync(runs).filter((name) => !before.has(name) && name !== "cache");
  return join(runs, made.sort().at(-1));
}

export const record = (folder) => JSON.parse(readFileSync(join(folder, "run.json"), "utf8"));

// Writes a changed run and renders it, as one does beside a folder `runs`.
export function variant(name, run) {
  const folder = join(runs, name);
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, "run.json"), JSON.stringify({ ...run, id: name }));
  execFileSync(runner, ["report", name], { cwd: place, stdio: "pipe" });
  return folder;
}

// The same run with stage B's layers repeated until there are `layers`, and
// every pair of streams that a device would add.
export function deepened(run, layers) {
  const deep = structuredClone(run);
  const stage = deep.stages.find((stage) => stage.id === "B");
  const inLayer = (site) => /^blk\.(\d+)\.(.+)$/.exec(site);
  const has = 1 + Math.max(...stage.measures.map((m) => Number(inLayer(m.site)?.[1] ?? 0)));
  const many = [];
  const pairs = [["emulated", "reference@emulated"], ["emulated", "reference"],
    ["device", "reference@device"], ["device", "reference"], ["device", "emulated"]];
  for (const [subject, judge] of pairs) {
    const kind = judge.includes("@") ? "reference@emulated" : "reference";
    for (const measure of stage.measures.filter((m) => m.judge === kind)) {
      const found = inLayer(measure.site);
      if (!found) { many.push({ ...measure, subject, judge }); continue; }
      for (let layer = Number(found[1]); layer < layers; layer += has) {
        many.push({ ...measure, subject, judge, site: `blk.${layer}.${found[2]}` });
      }
    }
  }
  stage.measures = many;
  stage.accounts = ["emulated", "device"].flatMap((subject) => stage.accounts.flatMap((account) => {
    const found = inLayer(account.site);
    if (!found) return [{ ...account, subject }];
    const repeated = [];
    for (let layer = Number(found[1]); layer < layers; layer += has) {
      repeated.push({ ...account, subject, site: `blk.${layer}.${found[2]}` });
    }
    return repeated;
  }));
  stage.growth = ["emulated", "device"].flatMap((subject) => stage.growth.map((growth) => ({
    ...growth, subject,
    layers: Array.from({ length: layers }, (_, layer) => ({ ...growth.layers[layer % has], layer })),
  })));
  stage.shares = [stage.shares[0], ["device", stage.shares[0][1]]];
  for (const name of ["q_norm", "k_norm"]) {
    for (const measure of many.filter((m) => m.site.endsWith(".q"))) {
      many.push({ ...measure, site: measure.site.replace(/\.q$/, `.${name}`) });
    }
  }
  return deep;
}
