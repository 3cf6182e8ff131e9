//! `runner schema`: JSON Schema of what people write, for their editors.

use clap::ValueEnum;

use super::print;
use crate::schema;

/// What a file is.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum SchemaOf {
    /// A stage's manifest.
    Stage,
    /// `pipeline.toml`.
    Pipeline,
    /// A contract.
    Contract,
}

pub(super) fn schema(of: SchemaOf) -> Result<u8, String> {
    let schema = match of {
        SchemaOf::Stage => schema::stage(),
        SchemaOf::Pipeline => schema::pipeline(),
        SchemaOf::Contract => schema::contract(),
    };
    let text = serde_json::to_string_pretty(&schema)
        .map_err(|error| format!("the schema cannot be encoded: {error}"))?;
    print(&(text + "\n"))
}
