"""`judge`: what the runner says of a captured pass."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from ._errors import RunnerError
from ._program import ask
from ._store import read_header
from .engines.transformers import SHAPE

STAGE = "capture"
# The end of a run of which a stage is in error: its record says why.
IN_ERROR = 4
# Engines that say what they round and not which kernels run.
OF_UNKNOWN_KERNELS = ("f32", "llama-cpp-cpu")
# Outcomes that say nothing is wrong, and those that say something is.
GOOD, BAD = ("pass",), ("structural", "drift")


@dataclass(frozen=True)
class Site:
    """One site: how many of its values no kernel of the engine gives, and which kernel fits best.

    `differing` is None where the engine's kernels are not known: then the contract's floors hold.
    """

    name: str
    values: int
    differing: Optional[int]
    kernel: Optional[str]

    @property
    def exact(self) -> bool:
        """Whether every bit is what the kernel gives."""
        return self.differing == 0


@dataclass(frozen=True)
class Verdict:
    """What is said of a pass.

    `outcome` is `pass`, `drift` (arithmetic, but over the budget), `structural` (a bug) or
    `unmeasured`; `why` is the sentence; `first` the first site that is wrong and `cause` what it
    looks like; `report` a page with everything, `run` its numbers as JSON.
    """

    outcome: str
    why: str
    first: Optional[str]
    cause: Optional[str]
    sites: Tuple[Site, ...]
    report: str
    run: str
    seconds: float
    text: str = field(repr=False, default="")

    def __bool__(self) -> bool:
        """Whether it passed."""
        return self.outcome in GOOD

    @property
    def exact(self) -> Tuple[Site, ...]:
        """The sites of which every bit is explained."""
        return tuple(site for site in self.sites if site.exact)

    def __str__(self) -> str:
        return self.text or f"{self.outcome}: {self.why}"

    def _repr_html_(self) -> str:
        colour = "#1a7f37" if self.outcome in GOOD else "#b42318" if self.outcome in BAD else "#8a6d00"
        rows = "".join(
            f"<tr><td style='text-align:left'><code>{html.escape(site.name)}</code></td>"
            f"<td style='text-align:right'>{differing_of(site)}</td>"
            f"<td style='text-align:right'>{site.values:,}</td>"
            f"<td style='text-align:left'>{html.escape(site.kernel or '')}</td></tr>"
            for site in self.sites
        )
        table = (
            f"<details><summary>{len(self.exact)} of {len(self.sites)} sites to the bit</summary><table><thead><tr>"
            "<th style='text-align:left'>site</th><th>differing</th><th>values</th><th style='text-align:left'>kernel</th>"
            f"</tr></thead><tbody>{rows}</tbody></table></details>"
            if self.sites
            else ""
        )
        return (
            f"<div><p><b style='color:{colour}'>{html.escape(self.outcome)}</b> {html.escape(self.why)}</p>{table}"
            f"<p><small>{html.escape(self.report)}</small></p></div>"
        )


def differing_of(site: Site) -> str:
    return "" if site.differing is None else f"{site.differing:,}"


def judge(
    capture: "str | os.PathLike[str]",
    *,
    model: Any = None,
    engine: Optional[str] = None,
    contract: Optional[str] = None,
    tokens: Optional[Sequence[int]] = None,
    runs: "str | os.PathLike[str]" = "runs",
    stages: "str | os.PathLike[str] | None" = None,
) -> Verdict:
    """Judges a captured pass: is every site what the engine's kernels must return?

    ::

        print(runner.judge("run.safetensors"))

    Args:
        capture: the file that :func:`runner.capture` left.
        model: the model's folder or GGUF file, or the model itself, which is then written to a
            folder for the time being; by default the folder that the capture names.
        engine: whose kernels are expected: `transformers`, `vllm-fp8-block`, a file
            `mine.toml`, ...; by default what the capture says.
        contract: by default `exact-engine` where the engine's kernels are known for the GPU that
            ran (Hopper); and where its bits are others, all within rounding, or on another
            machine, `engine`, `f32-engine` or `llama-cpp-cuda`, whose floors need no kernel.
        tokens: the ids of the pass, where the capture does not hold them.
        runs: the folder of runs, with the cache.
        stages: a folder that the stage is written to, to run it again; by default it is not kept.

    Returns:
        The verdict; it is true if it passed.

    Raises:
        RunnerError: the pass could not be judged; the text says why and what to do.
    """
    path = os.path.abspath(os.fspath(capture))
    header, data = read_header(path)
    about: Dict[str, str] = header.get("__metadata__") or {}
    recipe, held_to = plan(about, engine, contract)
    ids = list(tokens) if tokens is not None else ids_of(path, header, data)
    if not ids:
        raise RunnerError(f"{path} does not say which tokens it is of: give tokens=[...]")
    with contextlib.ExitStack() as stack:
        place = folder_of(model, about, stack)
        fits(about, place)
        folder = os.fspath(stages) if stages is not None else stack.enter_context(tempfile.TemporaryDirectory())
        os.makedirs(folder, exist_ok=True)

        def run(held_to: str) -> Tuple[Verdict, bool]:
            with open(os.path.join(folder, f"{STAGE}.toml"), "w", encoding="utf-8") as file:
                file.write(manifest(path, place, ids, recipe, held_to))
            arguments = ["run", folder, "--runs", os.fspath(runs), "--format", "plain", "--select", STAGE]
            done = ask(arguments, also=(IN_ERROR,))
            return verdict_of(done.stdout, done.stderr, os.path.abspath(os.fspath(runs)))

        verdict, within_rounding = run(held_to)
        if contract is None and held_to == "exact-engine" and within_rounding:
            # Other bits than those of the kernels that are known, and all within what rounding may
            # do: another kernel or order, and no bug. Then the floors say whether every site is.
            verdict, _ = run("llama-cpp-cuda" if recipe.get("engine") == "llama-cpp-cuda" else "engine")
    return verdict


def plan(about: Dict[str, str], engine: Optional[str], contract: Optional[str]) -> Tuple[Dict[str, Any], str]:
    """The recipe and the contract of a capture."""
    name = engine or about.get("engine_file")
    if not name:
        raise RunnerError(
            "the capture does not say which engine it is of, or it is one whose kernels are not known "
            f"({about.get('arithmetic') or about.get('class') or 'unknown'}): give engine=\"transformers\" or another of the "
            "runner's engines, or judge its products one by one (level=\"operations\")"
        )
    stream = {"float16": "f16", "bfloat16": "bf16"}.get(about.get("dtype", ""))
    recipe: Dict[str, Any]
    if contract is None:
        contract = contract_of(name, about)
    if contract == "engine" and engine is None and stream and name == "transformers":
        # Its kernels are known for Hopper alone: what rounding may cost is known for every machine.
        recipe = {"gemm": stream, "output": stream, "stream": stream}
    else:
        recipe = {"engine": name}
        if stream == "f16" and not name.startswith("llama-cpp"):
            recipe["stream"] = stream
    if "engine" in recipe and name not in OF_UNKNOWN_KERNELS:
        # What ran in one step decides which kernel ran; floors are the same for all.
        listed = about.get("decoded", "").count(",") + 1
        steps, batch = number(about, "steps", listed), number(about, "batch", 1)
        if steps > 1:
            recipe["decoded"] = steps - 1
        if batch > 1:
            recipe["batch"] = batch
    return recipe, contract


def number(about: Dict[str, str], key: str, otherwise: int) -> int:
    """A number that a capture says."""
    try:
        return int(about.get(key, otherwise))
    except ValueError:
        raise RunnerError(f"the capture says {key} = {about[key]!r}, which is no number: capture again") from None


def contract_of(engine: str, about: Dict[str, str]) -> str:
    """What such a capture can be held to."""
    # llama.cpp's CPU kernels lose what those for CUDA lose, or less: 8 bits, or f16, and a cache in f16.
    fixed = {"f32": "f32-engine", "llama-cpp-cpu": "llama-cpp-cuda"}
    if engine in fixed:
        return fixed[engine]
    hopper = about.get("device") == "cuda" and about.get("capability", "9.0").startswith("9.")
    if hopper:
        return "exact-engine"
    return "llama-cpp-cuda" if engine == "llama-cpp-cuda" else "engine"


def ids_of(path: str, header: Dict[str, Any], data: int) -> List[int]:
    """The tokens that a capture says it is of."""
    part = header.get("ids")
    if not part or part.get("dtype") not in ("I64", "I32"):
        return []
    start, end = part["data_offsets"]
    with open(path, "rb") as file:
        file.seek(data + start)
        block = memoryview(file.read(end - start))
    return list(block.cast("q" if part["dtype"] == "I64" else "i"))


def folder_of(model: Any, about: Dict[str, str], stack: contextlib.ExitStack) -> str:
    """Where the model's weights lie; a model in memory is written out for the time being."""
    if model is not None and hasattr(model, "save_pretrained"):
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        try:
            model.save_pretrained(folder)
        except Exception as error:
            raise RunnerError(
                f"this model cannot be written to a folder ({error}): give model= the folder that it was made from; of a model that "
                "was quantised in memory that is what it was before"
            ) from error
        return folder
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise RunnerError(f"model: a {type(model).__name__} is no folder, no file and no model of transformers; give its folder or GGUF file")
    place = model if model is not None else about.get("model")
    if place is None:
        raise RunnerError("the capture does not name its model: give model= its folder, its GGUF file, or the model itself")
    place = os.fspath(place)
    if os.path.exists(place) or place.startswith("synthetic:"):
        return place if place.startswith("synthetic:") else os.path.abspath(place)
    return of_hub(place)


def fits(about: Dict[str, str], folder: str) -> None:
    """Refuses a folder of a model of another kind or size than the one that was captured."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        # The runner itself says what is wrong with a folder.
        return
    config = config.get("text_config", config)
    for key in SHAPE:
        captured, there = about.get(key), config.get(key)
        if captured is not None and there is not None and captured != str(there):
            raise RunnerError(f"the capture is of a model with {key} {captured}, and {folder}/config.json says {there}: give model= its own folder")


def of_hub(name: str) -> str:
    """The folder in which Hugging Face's cache keeps a model of this name; nothing is fetched."""
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, local_files_only=True))
    except ImportError:
        pass
    except Exception as error:
        raise RunnerError(
            f"no folder `{name}`, and Hugging Face's cache has no model of that name ({error}): give model= its folder"
        ) from error
    raise RunnerError(f"no such model: `{name}`; give model= its folder, its GGUF file, or the model itself")


def manifest(capture: str, model: str, ids: Sequence[int], recipe: Dict[str, Any], contract: str) -> str:
    """The stage that judges a capture."""
    settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in recipe.items())
    return (
        f'id       = "{STAGE}"\n'
        'title    = "Is every site of this capture what the engine must return?"\n'
        f"contract = {quoted(contract)}\n"
        f"model    = {quoted(model)}\n"
        f"tokens   = [{', '.join(map(str, ids))}]\n"
        'arms     = ["reference", "emulated", "recorded"]\n'
        f"recipe   = {{ {settings} }}\n\n"
        '[forward]\ncapture = "every-site"\n\n'
        f"[recorded]\nfile = {quoted(capture)}\n"
    )


def quoted(text: str) -> str:
    """A text as TOML writes it; JSON's escapes are TOML's."""
    return json.dumps(text, ensure_ascii=False)


def verdict_of(printed: str, errors: str, runs: str) -> Tuple[Verdict, bool]:
    """The verdict of a run, from its record, and whether what is wrong lies within rounding."""
    found = re.search(r"^run: .*?\s(\S*/report\.html)\s*$", printed, re.MULTILINE)
    if not found:
        raise RunnerError(f"the runner did not say where its run lies:\n{printed or errors}")
    folder = os.path.join(runs, os.path.basename(os.path.dirname(found[1])))
    record = os.path.join(folder, "run.json")
    with open(record, encoding="utf-8") as file:
        run = json.load(file)
    stage = next(stage for stage in run["stages"] if stage["id"] == STAGE)
    if stage["verdict"] in ("error", "blocked"):
        raise RunnerError(stage["why"])
    diagnoses = stage.get("diagnoses", [])
    within_rounding = bool(diagnoses) and all(diagnosis["within_rounding"] for diagnosis in diagnoses)
    verdict = Verdict(
        outcome=stage["verdict"],
        why=stage["why"],
        first=(stage.get("first") or {}).get("site"),
        cause=(stage.get("first") or {}).get("cause"),
        sites=tuple(sites_of(stage)),
        report=os.path.join(folder, "report.html"),
        run=record,
        seconds=float(stage["seconds"]),
        text=printed.strip(),
    )
    return verdict, within_rounding


def sites_of(stage: Dict[str, Any]) -> Iterator[Site]:
    """The sites of a stage that were recorded, in the order of the pass."""
    kernels = {kernel["site"]: kernel for kernel in stage.get("kernels", []) if kernel["subject"] == "recorded"}
    recorded = stage["arms"].get("recorded", {}).get("sites", [])
    for site in recorded:
        kernel = kernels.get(site["site"])
        values = 1
        for width in site["shape"]:
            values *= width
        if kernel:
            yield Site(site["site"], kernel["values"], kernel["mismatches"], kernel["kernel"])
        else:
            yield Site(site["site"], values, None, None)
