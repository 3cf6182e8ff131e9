//! JSON Schema of manifests, of `pipeline.toml` and of contracts, for editors.
//!
//! Kept by hand beside the readers in `manifest/`; a test holds both to the same
//! files, good and bad. What only the whole folder shows (references, cycles,
//! contracts that do not fit) is the readers' alone.

use serde_json::{Value, json};

use crate::block_format::BlockFormat;
use crate::chip::Evidence;
use crate::dtype::Format;
use crate::manifest::names::presets;
use crate::manifest::{LONGEST_TIMEOUT, MOST_PATTERNS, MOST_THREADS};
use crate::metric::Metric;
use crate::op::{Arm, ChipName, Distribution, Engine, Stream};

/// The draft that all of them are written in.
const DRAFT: &str = "https://json-schema.org/draft/2020-12/schema";
/// Names that can stand in a selection and a path.
const NAME: &str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$";

/// The schema of a stage's manifest.
pub fn stage() -> Value {
    let ops = [
        ("forward", forward()),
        ("embed", embed()),
        ("rms_norm", rms_norm()),
        ("matmul", matmul()),
        ("rope", rope()),
        ("attention", attention()),
        ("swiglu", swiglu()),
        ("compare", compare()),
        ("command", command()),
    ];
    let one_of: Vec<Value> = ops.iter().map(|(name, _)| json!({ "required": [name] })).collect();
    let mut properties = json!({
        "id": says("unique in the folder; what selections and other stages name", name()),
        "title": says("the question, for people", said()),
        "needs": says("stages that must have a result first", list(text(), 0)),
        "contract": says("the contract that judges the stage", text()),
        "tags": says("words by which `--select tag:WORD` finds the stage", list(name(), 0)),
        "for": {
            "type": "object",
            "minProperties": 1,
            "description": "one stage for each combination of these values, which stand in the \
                            manifest as `{key}`",
            "additionalProperties": { "type": "array", "minItems": 1 }
        },
    });
    add(&mut properties, settings());
    add(&mut properties, json!({ "recorded": recorded(), "external": external() }));
    for (name, schema) in ops {
        add(&mut properties, json!({ name: schema }));
    }
    let plain = json!({
        "type": "object",
        "required": ["id", "title", "contract"],
        "properties": properties,
        "additionalProperties": false,
        "oneOf": one_of,
        // A program is asked for what a model's tensors make.
        "dependentSchemas": {
            "external": { "not": { "anyOf": [
                { "required": ["compare"] },
                { "required": ["command"] },
                { "properties": { "matmul": { "required": ["x"] } }, "required": ["matmul"] },
            ] } },
        },
    });
    // What a `[for]` puts in stands there as `"{name}"`: such manifests are held to
    // their keys alone.
    let mut family = plain.clone();
    if let Some(properties) = family["properties"].as_object_mut() {
        for (name, schema) in properties {
            if !matches!(name.as_str(), "id" | "title" | "contract" | "for") {
                *schema = json!({});
            }
        }
    }
    family["required"] = json!(["id", "title", "contract", "for"]);
    let mut alone = plain;
    alone["not"] = json!({ "required": ["for"] });
    json!({
        "$schema": DRAFT,
        "title": "runner: a stage",
        "anyOf": [alone, family],
    })
}

/// The schema of `pipeline.toml`.
pub fn pipeline() -> Value {
    let mut properties = settings();
    add(
        &mut properties,
        json!({
            "contracts": says("the folder of contracts, relative to this file", text()),
            "profile": profiles(),
            "cache": shared_cache(),
            "recorded": recorded(),
            "external": external(),
        }),
    );
    // One name cannot stand for the sites of every stage.
    if let Some(table) = properties["recorded"]["properties"].as_object_mut() {
        table.remove("tensor");
    }
    json!({
        "$schema": DRAFT,
        "title": "runner: what the stages of a folder inherit",
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    })
}

/// The schema of a contract.
pub fn contract() -> Value {
    let streams: Vec<String> = Stream::ALL.iter().map(Stream::to_string).collect();
    let streams: Vec<String> = streams.into_iter().chain(["command".to_owned()]).collect();
    let metrics: Vec<&str> = Metric::ALL.iter().map(|metric| metric.name()).collect();
    let equation = closed(
        &["id", "formula", "why"],
        json!({
            "id": says("its name, unique in the contract", name()),
            "formula": says("what the arithmetic must satisfy", said()),
            "why": says("its derivation or source", said()),
        }),
    );
    let mut falsifier = closed(
        &["id", "equation", "prediction", "metric", "if_fails", "why"],
        json!({
            "id": says("its name, unique in the contract", name()),
            "equation": says("the equation that falls with it", text()),
            "prediction": says("what must be seen, for people", said()),
            "compare": says("the subject, and what it is judged against", json!({
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "items": { "enum": streams },
            })),
            "metric": says("what is measured", json!({ "title": "a metric", "enum": metrics })),
            "sites": says(
                "patterns of the sites that it judges; every site where none is written",
                list(text(), 1),
            ),
            "unless_exact": says(
                "leaves out sites of which the recipe's engine makes every bit from the subject's \
                 own input; false where none is written",
                json!({ "type": "boolean" }),
            ),
            "min": says("the smallest value that passes; this or `max`, or both", number()),
            "max": says("the largest value that passes", number()),
            "if_fails": says(
                "the verdict if it falls",
                json!({ "enum": ["structural", "drift"] }),
            ),
            "why": says("the bound's derivation", said()),
        }),
    );
    // A command's outcome stands against the bound alone.
    let of_commands: Vec<&str> =
        Metric::ALL.iter().filter(|metric| metric.of_commands_only()).map(|m| m.name()).collect();
    falsifier["if"] = json!({ "properties": { "metric": { "enum": of_commands } } });
    falsifier["else"] = json!({ "required": ["compare"] });
    falsifier["anyOf"] = json!([{ "required": ["min"] }, { "required": ["max"] }]);
    json!({
        "$schema": DRAFT,
        "title": "runner: a contract",
        "type": "object",
        "required": ["name", "version", "falsifier"],
        "properties": {
            "name": says("what manifests call it", name()),
            "version": says("three numbers; raise it when a bound changes", json!({
                "type": "string",
                "pattern": "^(0|[1-9][0-9]{0,8})\\.(0|[1-9][0-9]{0,8})\\.(0|[1-9][0-9]{0,8})$",
            })),
            "evidence": says(
                "the least that the emulated arm's arithmetic must rest on, else its claims are \
                 unmeasured; anything where none is written",
                json!({ "enum": Evidence::ALL.map(Evidence::name) }),
            ),
            "equation": says(
                "what the arithmetic must satisfy",
                json!({ "type": "array", "items": equation }),
            ),
            "falsifier": says(
                "what would show that it does not",
                json!({ "type": "array", "minItems": 1, "items": falsifier }),
            ),
        },
        "additionalProperties": false,
    })
}

/// The schema of what an op reads: another stage's tensor, a file's, or a generated one.
pub fn input() -> Value {
    json!({ "title": "an input", "oneOf": [site(), file(), generated()] })
}

fn settings() -> Value {
    let arms: Vec<&str> = Arm::ALL.iter().map(|arm| arm.name()).collect();
    let arms =
        json!({ "type": "array", "minItems": 1, "uniqueItems": true, "items": { "enum": arms } });
    let tokens = list(json!({ "type": "integer", "minimum": 0, "maximum": u32::MAX }), 1);
    json!({
        "model": says("`synthetic:PRESET`, a GGUF file or a safetensors folder", said()),
        "tokens": says("the prompt as token ids; this or `prompt`", tokens),
        "prompt": says(
            "the prompt as text, for the model's tokenizer",
            json!({ "type": "string", "minLength": 1 }),
        ),
        "chat": says(
            "whether `prompt` is a user's message, laid through the model's own chat template",
            json!({ "type": "boolean" }),
        ),
        "system": says("what the system says before it, with `chat`", said()),
        "seed": says("where generated values start", whole(0)),
        "arms": says("who computes the stage", arms),
        "recipe": recipe(),
        "resources": says("what the stage takes of the machine", closed(&[], json!({
            "threads": says(
                "threads that compute; all where none is written",
                json!({ "type": "integer", "minimum": 1, "maximum": MOST_THREADS }),
            ),
            "cores": says("cores that it has to itself", whole(0)),
            "memory": says("GiB of memory, likewise", whole(0)),
            "gpus": says("GPUs, likewise; of no use to arms on the CPU", whole(0)),
            "gpu_memory": says("GiB of each of these GPUs; all of it where none is written", whole(0)),
        }))),
        "executor": executor(),
    })
}

fn executor() -> Value {
    let name = || json!({ "type": "string", "pattern": "^\\S+$" });
    says(
        "where the stage's work is done, and what is asked of Slurm there",
        closed(
            &[],
            json!({
                "on": says("on this machine, or in jobs of Slurm", json!({ "enum": ["here", "slurm"] })),
                "partition": says("Slurm's partition; its default one where none is written", name()),
                "account": says("the account that pays", name()),
                "qos": says("the quality of service", name()),
                "constraint": says(
                    "the features of the nodes, such as the kind of GPU; of a stage with GPUs it is \
                     of the work that needs them",
                    name(),
                ),
                "gpu": says("the type of GPU, as Slurm's `gres` names it", name()),
                "time": says("minutes that one item may take", whole(1)),
                "retries": says(
                    "how often an item is submitted again whose job ended by no fault of its own; 3",
                    whole(0),
                ),
                "program": says(
                    "the runner's absolute path on the nodes; this very file where none is written",
                    json!({ "type": "string", "pattern": "^/" }),
                ),
                "shared_folder": says(
                    "false where the nodes do not see the folder of runs: the shared cache \
                     (`--cache`) then carries what jobs are told and what they make",
                    json!({ "type": "boolean" }),
                ),
                "options": says(
                    "other options of `sbatch`, a word each",
                    list(json!({ "type": "string", "pattern": "^-" }), 0),
                ),
            }),
        ),
    )
}

fn recipe() -> Value {
    let chips: Vec<&str> = ChipName::ALL.iter().map(|chip| chip.name()).collect();
    let scale = closed(
        &[],
        json!({
            "weight": says(
                "what shares a weight's scale",
                json!({ "enum": ["tensor", "channel", "block128"] }),
            ),
            "activation": says(
                "what shares an activation's scale",
                json!({ "enum": ["tensor", "token", "block128"] }),
            ),
        }),
    );
    let pin = closed(
        &[],
        json!({
            "algorithm": says("cuBLASLt's id of the algorithm", whole(0)),
            "tile": says("its id of the tile", whole(0)),
            "stages": says("its id of the stages", whole(0)),
            "split_k": says("parts that K is cut into; 1 where none is written", whole(1)),
        }),
    );
    says(
        "the arithmetic under test",
        closed(
            &[],
            json!({
                "gemm": says(
                    "the operands' format in every GEMM; `int8`: integers with exact sums; `mxfp8` to `nvfp4`: elements \
                     with a scale for each block of 32 or 16; `checkpoint`: FP8, integer and block-scaled codes and \
                     scales as the model's file holds them, other weights in their own type",
                    gemms(),
                ),
                "scale": says("how operands are scaled before they are rounded", scale),
                "accumulate": says(
                    "`promoted`: every 128 products the sum is added to one in f32 and starts again",
                    json!({ "enum": ["fast", "promoted"] }),
                ),
                "output": says("the format that a GEMM's result is rounded to", json!({ "enum": ["f32", "bf16", "f16"] })),
                "engine": says(
                    "the engine whose kernels the emulated arm computes: a shipped one, or a file",
                    said(),
                ),
                "decoded": says(
                    "how many of the last tokens the engine computed in steps of their own, with a KV cache",
                    whole(0),
                ),
                "batch": says(
                    "how many prompts of the same length each step of the engine held; this one was the first",
                    whole(1),
                ),
                "stream": says(
                    "the type in which a foreign engine passes tensors from op to op",
                    json!({ "enum": ["f32", "bf16", "f16"] }),
                ),
                "kv_cache": says(
                    "the type in which attention keeps keys and values; FP8 with the checkpoint's scales, or 1",
                    json!({ "enum": ["none", "bf16", "f16", "e4m3", "e5m2"] }),
                ),
                "tensor_parallel": says(
                    "GPUs that compute one pass together, each a part of K of `attn_output` and `ffn_down`",
                    whole(1),
                ),
                "chip": says("whose tensor cores; `auto` is the device's, where there is one", json!({ "enum": chips })),
                "pin": says("the library's algorithm, instead of the one that the rule picks", pin),
            }),
        ),
    )
}

fn shared_cache() -> Value {
    says(
        "a cache that many machines share, behind this one's",
        closed(
            &["url"],
            json!({
                "url": says("where it is, as `s3://BUCKET/PATH`", text()),
                "read_only": says("send nothing", json!({ "type": "boolean" })),
                "anonymous": says("sign nothing", json!({ "type": "boolean" })),
                "largest": says(
                    "results above so many bytes stay on their machine; 4 GiB where none is \
                     written",
                    json!({ "type": "integer", "minimum": 0 }),
                ),
                "commands": says(
                    "send commands' results too, with what the programs printed",
                    json!({ "type": "boolean" }),
                ),
                "runs": says(
                    "put the run.json of each run there too, for `runner fleet report URL`",
                    json!({ "type": "boolean" }),
                ),
            }),
        ),
    )
}

fn profiles() -> Value {
    let profile = closed(
        &[],
        json!({
            "select": says("the stages, as `--select` names them", text()),
            "fresh": says(
                "arms that are measured anew although their results are there",
                list(json!({ "enum": Arm::MEASURED.map(Arm::name) }), 0),
            ),
            "require": says(
                "arms without which a stage is an error",
                list(json!({ "enum": ["device", "recorded", "external"] }), 0),
            ),
            "repeats": says("the least number of times that forward passes are repeated", whole(1)),
            "keep": says("finished runs to keep", whole(1)),
        }),
    );
    says(
        "how a run of `--profile NAME` differs from a typed one, by name",
        json!({ "type": "object", "additionalProperties": profile }),
    )
}

fn forward() -> Value {
    says(
        "op: the whole transformer on the prompt",
        closed(
            &[],
            json!({
                "capture": says(
                    "what is kept and compared; `last-logits` are the last token's alone",
                    json!({ "enum": ["logits", "last-logits", "every-site"] }),
                ),
                "repeats": says("how often each arm computes it, to see whether it repeats itself", whole(1)),
                "decode": says("tokens that are decoded greedily after the prompt", whole(0)),
            }),
        ),
    )
}

fn embed() -> Value {
    let keys = json!({ "weight": says("the table; `token_embd` where none is written", weight()) });
    says("op: the prompt's rows of the embedding", closed(&[], keys))
}

fn rms_norm() -> Value {
    says(
        "op: one norm",
        closed(
            &["input", "weight"],
            json!({
                "input": says("what is normed", input()),
                "weight": says("the norm's gain", weight()),
            }),
        ),
    )
}

fn matmul() -> Value {
    let of_model = closed(
        &["input", "weights"],
        json!({
            "input": says("what is projected", input()),
            "weights": says("the projections' weights", list(weight(), 1)),
        }),
    );
    let coded = closed(
        &["x", "w"],
        json!({
            "x": says("codes of the left operand, instead of `input`", codes()),
            "w": says("codes of the right one, instead of `weights`", codes()),
        }),
    );
    says("op: projections, or a product of codes from files", json!({ "oneOf": [of_model, coded] }))
}

fn rope() -> Value {
    says(
        "op: one rotation, positions from 0",
        closed(
            &["input", "site"],
            json!({
                "input": says("what is rotated", input()),
                "site": says("`blk.N.q_rope` or `blk.N.k_rope`", text()),
            }),
        ),
    )
}

fn attention() -> Value {
    says(
        "op: causal attention",
        closed(
            &["q", "k", "v", "site"],
            json!({
                "q": says("the queries", input()),
                "k": says("the keys", input()),
                "v": says("the values", input()),
                "site": says("`blk.N.attn`", text()),
            }),
        ),
    )
}

fn swiglu() -> Value {
    says(
        "op: `silu(gate) * up`",
        closed(
            &["gate", "up", "site"],
            json!({
                "gate": says("what passes through SiLU", input()),
                "up": says("what it is multiplied with", input()),
                "site": says("`blk.N.ffn_swiglu`", text()),
            }),
        ),
    )
}

fn compare() -> Value {
    let mut sides = json!({
        "site": says("what the tensor is called; `compared` where none is written", name()),
    });
    for arm in Arm::ALL {
        let side = json!({ "title": "a stage's site, or a file", "oneOf": [site(), file()] });
        add(&mut sides, json!({ arm.name(): says("where this arm's tensor is read", side) }));
    }
    let mut table = closed(&["reference"], sides);
    table["minProperties"] = json!(2);
    says("op: nothing is computed, both sides are read", table)
}

/// What a program of the user's is, whatever it is for.
fn program() -> Value {
    json!({
        "argv": says("the program and its arguments; nothing expands them", list(text(), 1)),
        "shell": says("instead of `argv`: a text for `/bin/sh -c`", said()),
        "inputs": says("files and folders that it reads", list(text(), 0)),
        "env": says("names of variables that it sees as the runner does", list(text(), 0)),
        "set": says("variables with values", texts()),
        "timeout": says(
            "seconds after which it is killed",
            json!({ "type": "integer", "minimum": 1, "maximum": LONGEST_TIMEOUT }),
        ),
        "retries": says(
            "how often it is started again after a failure",
            json!({ "type": "integer", "minimum": 0, "maximum": 10 }),
        ),
    })
}

fn command() -> Value {
    let mut properties = program();
    let pattern = closed(
        &["name", "pattern"],
        json!({
            "name": says("its site is `match.<name>`", text()),
            "of": says("`stdout`, `stderr` or an output; `stdout` where none is written", text()),
            "pattern": says("a regular expression; `^` and `$` are a line's ends", text()),
        }),
    );
    let status = json!({ "type": "integer", "minimum": 0, "maximum": 255 });
    add(
        &mut properties,
        json!({
            "outputs": says("files that it must write", list(text(), 0)),
            "accepts": says("exit statuses that count as a result; 0 where none is written", list(status, 1)),
            "patterns": says("what is counted in its output", most(list(pattern, 0), MOST_PATTERNS)),
            "digests": says("the blake3 hash that an output must have, by path", texts()),
        }),
    );
    let mut table = closed(&[], properties);
    table["oneOf"] = json!([{ "required": ["argv"] }, { "required": ["shell"] }]);
    says("op: a program with its inputs, outputs and variables", table)
}

fn external() -> Value {
    let engines: Vec<&str> = Engine::ALL.iter().map(|(name, _)| *name).collect();
    let mut properties = program();
    add(
        &mut properties,
        json!({
            "version": says("what the engine is; part of the key", text()),
            "names": names(),
            "emulate": says("the engine whose arithmetic the emulated arm has", json!({ "enum": engines })),
        }),
    );
    let mut table = closed(&["version"], properties);
    table["oneOf"] = json!([{ "required": ["argv"] }, { "required": ["shell"] }]);
    says("the arm `external`: a program that is asked for tensors", table)
}

fn recorded() -> Value {
    says(
        "the arm `recorded`: a file that holds what a device made",
        closed(
            &["file"],
            json!({
                "file": says(
                    "its path, relative to the manifest; or a folder with a `.npy` or `.pt` for each tensor",
                    text(),
                ),
                "tensor": says("its tensor, where it has several and the op makes one", text()),
                "names": names(),
                "dtype": says("the values' format, where the file does not say it", formats()),
                "shape": says("the tensor's shape, where the file does not say it", shape()),
            }),
        ),
    )
}

/// The names of tensors by site, or those of a preset.
fn names() -> Value {
    let presets: Vec<&str> = presets().collect();
    says(
        "the tensor of each site, or `preset`: the modules of an engine; `*` is the layer's number, \
         `{*+1}` the next one, and `[0:576]` some columns",
        json!({ "oneOf": [{ "enum": presets }, texts()] }),
    )
}

fn site() -> Value {
    closed(
        &["stage", "site"],
        json!({
            "stage": says("the stage whose reference arm made it", text()),
            "site": says("its site", text()),
        }),
    )
}

fn file() -> Value {
    closed(
        &["file"],
        json!({
            "file": says("its path, relative to the manifest: safetensors, npy, npz, pt, GGUF, Polygraphy's JSON or raw", text()),
            "tensor": says("the tensor's name in it", text()),
            "dtype": says("the values' format, where the file does not say it", formats()),
            "shape": says("the tensor's shape, where the file does not say it", shape()),
            "scale": says(
                "what the values are multiplied with: a number or a tensor of the file",
                json!({ "oneOf": [text(), { "type": "number", "exclusiveMinimum": 0 }] }),
            ),
        }),
    )
}

fn codes() -> Value {
    let mut codes = file();
    codes["title"] = json!("a file");
    codes
}

fn generated() -> Value {
    let names: Vec<&str> = Distribution::ALL.iter().map(|(name, _)| *name).collect();
    closed(
        &["generate", "rows"],
        json!({
            "generate": says("how the values are distributed, from the stage's `seed`", json!({ "enum": names })),
            "rows": says(
                "tokens",
                json!({ "type": "integer", "minimum": 1, "maximum": 1 << 20 }),
            ),
        }),
    )
}

fn formats() -> Value {
    let names: Vec<&str> = Format::ALL.iter().map(|format| format.name()).collect();
    json!({ "enum": names })
}

fn gemms() -> Value {
    let names = Format::ALL.iter().map(|format| format.name());
    let names = names.chain(BlockFormat::ALL.iter().map(|format| format.name()));
    let names = names.chain(["checkpoint"]);
    json!({ "enum": names.collect::<Vec<_>>() })
}

fn shape() -> Value {
    list(whole(1), 1)
}

fn weight() -> Value {
    json!({ "type": "string", "pattern": "\\S", "not": { "pattern": "\\.weight$" } })
}

fn text() -> Value {
    json!({ "type": "string" })
}

/// A text that says something.
fn said() -> Value {
    json!({ "type": "string", "pattern": "\\S" })
}

fn name() -> Value {
    json!({ "type": "string", "pattern": NAME })
}

fn number() -> Value {
    json!({ "type": "number" })
}

/// A whole number from `least` on.
fn whole(least: u32) -> Value {
    json!({ "type": "integer", "minimum": least })
}

fn texts() -> Value {
    json!({ "type": "object", "additionalProperties": text() })
}

fn list(items: Value, least: usize) -> Value {
    json!({ "type": "array", "minItems": least, "items": items })
}

/// The same list with at most so many items.
fn most(mut list: Value, most: usize) -> Value {
    list["maxItems"] = json!(most);
    list
}

/// What a key means, for editors and the reference.
fn says(words: &str, mut schema: Value) -> Value {
    schema["description"] = json!(words);
    schema
}

/// A table with these keys and no others.
fn closed(required: &[&str], properties: Value) -> Value {
    json!({
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": false,
    })
}

fn add(to: &mut Value, more: Value) {
    if let (Value::Object(to), Value::Object(more)) = (to, more) {
        to.extend(more);
    }
}
