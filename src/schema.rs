//! JSON Schema of manifests, of `pipeline.toml` and of contracts, for editors.
//!
//! Kept by hand beside the readers in `manifest/`; a test holds both to the same
//! files, good and bad. What only the whole folder shows (references, cycles,
//! contracts that do not fit) is the readers' alone.

use serde_json::{Value, json};

use crate::dtype::Format;
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
        ("embed", closed(&[], json!({ "weight": weight() }))),
        ("rms_norm", closed(&["input", "weight"], json!({ "input": input(), "weight": weight() }))),
        ("matmul", matmul()),
        ("rope", closed(&["input", "site"], json!({ "input": input(), "site": text() }))),
        (
            "attention",
            closed(
                &["q", "k", "v", "site"],
                json!({ "q": input(), "k": input(), "v": input(), "site": text() }),
            ),
        ),
        (
            "swiglu",
            closed(
                &["gate", "up", "site"],
                json!({ "gate": input(), "up": input(), "site": text() }),
            ),
        ),
        ("compare", compare()),
        ("command", command()),
    ];
    let mut properties = settings();
    let one_of: Vec<Value> = ops.iter().map(|(name, _)| json!({ "required": [name] })).collect();
    add(
        &mut properties,
        json!({
            "id": { "type": "string", "pattern": NAME, "description": "Unique in the folder" },
            "title": { "type": "string", "pattern": "\\S", "description": "The question, for people" },
            "needs": list(text(), 0),
            "contract": { "type": "string", "description": "The contract that judges the stage" },
            "tags": list(json!({ "type": "string", "pattern": NAME }), 0),
            "recorded": recorded(),
            "external": external(),
            "for": {
                "type": "object",
                "minProperties": 1,
                "description": "One stage for each combination of these values",
                "additionalProperties": { "type": "array", "minItems": 1 }
            },
        }),
    );
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
            "contracts": text(),
            "profile": profiles(),
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
    let id = json!({ "type": "string", "pattern": NAME });
    let said = json!({ "type": "string", "pattern": "\\S" });
    let equation =
        closed(&["id", "formula", "why"], json!({ "id": id, "formula": said, "why": said }));
    let mut falsifier = closed(
        &["id", "equation", "prediction", "metric", "if_fails", "why"],
        json!({
            "id": id,
            "equation": { "type": "string", "description": "The equation that falls with it" },
            "prediction": said,
            "compare": {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "items": { "enum": streams },
                "description": "The subject, and what it is judged against"
            },
            "metric": { "enum": metrics },
            "sites": list(text(), 1),
            "min": { "type": "number" },
            "max": { "type": "number" },
            "if_fails": { "enum": ["structural", "drift"] },
            "why": said,
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
            "name": { "type": "string", "pattern": NAME },
            "version": {
                "type": "string",
                "pattern": "^(0|[1-9][0-9]{0,8})\\.(0|[1-9][0-9]{0,8})\\.(0|[1-9][0-9]{0,8})$"
            },
            "equation": { "type": "array", "items": equation },
            "falsifier": { "type": "array", "minItems": 1, "items": falsifier },
        },
        "additionalProperties": false,
    })
}

fn settings() -> Value {
    let arms: Vec<&str> = Arm::ALL.iter().map(|arm| arm.name()).collect();
    let chips: Vec<&str> = ChipName::ALL.iter().map(|chip| chip.name()).collect();
    json!({
        "model": {
            "type": "string",
            "pattern": "\\S",
            "description": "`synthetic:<preset>`, a GGUF file or a safetensors folder"
        },
        "tokens": list(json!({ "type": "integer", "minimum": 0, "maximum": u32::MAX }), 1),
        "prompt": { "type": "string", "minLength": 1 },
        "seed": { "type": "integer", "minimum": 0 },
        "arms": { "type": "array", "minItems": 1, "uniqueItems": true, "items": { "enum": arms } },
        "recipe": closed(&[], json!({
            "gemm": formats(),
            "scale": closed(&[], json!({
                "weight": { "enum": ["tensor", "channel", "block128"] },
                "activation": { "enum": ["tensor", "token", "block128"] },
            })),
            "accumulate": { "enum": ["fast", "promoted"] },
            "output": { "enum": ["f32", "bf16", "f16"] },
            "chip": { "enum": chips },
            "pin": closed(&[], json!({
                "algorithm": { "type": "integer", "minimum": 0 },
                "tile": { "type": "integer", "minimum": 0 },
                "stages": { "type": "integer", "minimum": 0 },
                "split_k": { "type": "integer", "minimum": 1 },
            })),
        })),
        "resources": closed(&[], json!({ "threads": { "type": "integer", "minimum": 1 } })),
    })
}

fn profiles() -> Value {
    json!({
        "type": "object",
        "additionalProperties": closed(&[], json!({
            "select": text(),
            "require": list(json!({ "enum": ["device", "recorded", "external"] }), 0),
            "repeats": { "type": "integer", "minimum": 1 },
            "keep": { "type": "integer", "minimum": 1 },
        })),
    })
}

fn forward() -> Value {
    closed(
        &[],
        json!({
            "capture": { "enum": ["logits", "every-site"] },
            "repeats": { "type": "integer", "minimum": 1 },
            "decode": { "type": "integer", "minimum": 0 },
        }),
    )
}

fn matmul() -> Value {
    let of_model =
        closed(&["input", "weights"], json!({ "input": input(), "weights": list(weight(), 1) }));
    let coded = closed(&["x", "w"], json!({ "x": file(), "w": file() }));
    json!({ "oneOf": [of_model, coded] })
}

fn compare() -> Value {
    let mut sides = json!({ "site": { "type": "string", "pattern": NAME } });
    let side = json!({ "oneOf": [site(), file()] });
    for arm in Arm::ALL {
        add(&mut sides, json!({ arm.name(): side }));
    }
    let mut table = closed(&["reference"], sides);
    table["minProperties"] = json!(2);
    table
}

fn program() -> Value {
    json!({
        "argv": list(text(), 1),
        "shell": { "type": "string", "pattern": "\\S" },
        "inputs": list(text(), 0),
        "env": list(text(), 0),
        "set": texts(),
        "timeout": { "type": "integer", "minimum": 1, "description": "Seconds" },
    })
}

fn command() -> Value {
    let mut properties = program();
    add(
        &mut properties,
        json!({
            "outputs": list(text(), 0),
            "accepts": list(json!({ "type": "integer", "minimum": 0, "maximum": 255 }), 1),
            "patterns": list(
                closed(
                    &["name", "pattern"],
                    json!({ "name": text(), "of": text(), "pattern": text() }),
                ),
                0
            ),
            "digests": texts(),
        }),
    );
    let mut table = closed(&[], properties);
    table["oneOf"] = json!([{ "required": ["argv"] }, { "required": ["shell"] }]);
    table
}

fn external() -> Value {
    let engines: Vec<&str> = Engine::ALL.iter().map(|(name, _)| *name).collect();
    let mut properties = program();
    add(
        &mut properties,
        json!({
            "retries": { "type": "integer", "minimum": 0, "maximum": 10 },
            "version": { "type": "string", "description": "What the engine is; part of the key" },
            "names": texts(),
            "emulate": { "enum": engines },
        }),
    );
    let mut table = closed(&["version"], properties);
    table["oneOf"] = json!([{ "required": ["argv"] }, { "required": ["shell"] }]);
    table
}

fn recorded() -> Value {
    closed(
        &["file"],
        json!({
            "file": text(),
            "tensor": text(),
            "names": texts(),
            "dtype": formats(),
            "shape": shape(),
        }),
    )
}

fn input() -> Value {
    json!({ "oneOf": [site(), file(), generated()] })
}

fn site() -> Value {
    closed(&["stage", "site"], json!({ "stage": text(), "site": text() }))
}

fn file() -> Value {
    closed(
        &["file"],
        json!({
            "file": text(),
            "tensor": text(),
            "dtype": formats(),
            "shape": shape(),
            "scale": { "oneOf": [text(), { "type": "number", "exclusiveMinimum": 0 }] },
        }),
    )
}

fn generated() -> Value {
    let names: Vec<&str> = Distribution::ALL.iter().map(|(name, _)| *name).collect();
    closed(
        &["generate", "rows"],
        json!({
            "generate": { "enum": names },
            "rows": { "type": "integer", "minimum": 1, "maximum": 1 << 20 },
        }),
    )
}

fn formats() -> Value {
    let names: Vec<&str> = Format::ALL.iter().map(|format| format.name()).collect();
    json!({ "enum": names })
}

fn shape() -> Value {
    list(json!({ "type": "integer", "minimum": 1 }), 1)
}

fn weight() -> Value {
    json!({ "type": "string", "pattern": "\\S", "not": { "pattern": "\\.weight$" } })
}

fn text() -> Value {
    json!({ "type": "string" })
}

fn texts() -> Value {
    json!({ "type": "object", "additionalProperties": text() })
}

fn list(items: Value, least: usize) -> Value {
    json!({ "type": "array", "minItems": least, "items": items })
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
