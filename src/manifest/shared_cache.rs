//! `[cache]` of `pipeline.toml`: the cache that many machines share.
//!
//! It opens nothing: whether the store is there is seen when a run begins.

use super::fields::Fields;
use super::problem::Findings;

/// A cache of many machines, and what a machine may do with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedCache {
    /// Where it is.
    pub url: String,
    /// Nothing is sent.
    pub read_only: bool,
    /// Nothing is signed.
    pub anonymous: bool,
    /// Results above so many bytes stay on their machine.
    pub largest: Option<u64>,
    /// Whether commands' results are sent too, with what the programs printed.
    pub commands: bool,
    /// Whether the run.json of each run is put there.
    pub runs: bool,
}

pub(super) fn read(fields: &mut Fields<'_>, findings: &mut Findings) -> Option<SharedCache> {
    let mut table = fields.table("cache", findings)?;
    let url = table.need::<String>("url", "\"s3://BUCKET/PATH\"", findings);
    let read_only = table.take::<bool>("read_only", findings);
    let anonymous = table.take::<bool>("anonymous", findings);
    let largest = table.take::<u64>("largest", findings);
    let commands = table.take::<bool>("commands", findings);
    let runs = table.take::<bool>("runs", findings);
    table.finish(findings);
    Some(SharedCache {
        url: url?.value,
        read_only: read_only.is_some_and(|read_only| read_only.value),
        anonymous: anonymous.is_some_and(|anonymous| anonymous.value),
        largest: largest.map(|largest| largest.value),
        commands: commands.is_some_and(|commands| commands.value),
        runs: runs.is_some_and(|runs| runs.value),
    })
}
