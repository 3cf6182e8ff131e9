//! Where the cache of many machines is: the command line, the environment, pipeline.toml.

use clap::{Args, ValueEnum};

use crate::cache::{LARGEST_SENT, RemoteOptions};
use crate::manifest::SharedCache;

/// The variable that names it, below the command line and above pipeline.toml.
const URL: &str = "RUNNER_CACHE";
/// The variable that says what this machine may do with it.
const MODE: &str = "RUNNER_CACHE_MODE";

#[derive(Args)]
pub(super) struct RemoteArgs {
    /// A cache that many machines share, behind this one's: s3://BUCKET/PATH, gs://BUCKET/PATH,
    /// az://CONTAINER/PATH, https://HOST/PATH or file:///PATH; `off` does without. Else the variable
    /// RUNNER_CACHE, else `[cache]` of pipeline.toml.
    #[arg(long, value_name = "URL")]
    cache: Option<String>,
    /// What this machine may do there; else the variable RUNNER_CACHE_MODE, else pipeline.toml.
    #[arg(long, value_enum)]
    cache_mode: Option<CacheMode>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum CacheMode {
    /// Take results, and send new ones.
    ReadWrite,
    /// Take results only.
    ReadOnly,
}

impl RemoteArgs {
    /// The cache of many machines, if there is to be one.
    pub fn options(&self, written: Option<&SharedCache>) -> Result<Option<RemoteOptions>, String> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let url = self.cache.clone().or_else(|| variable(URL));
        let url = url.or_else(|| written.map(|written| written.url.clone()));
        let Some(url) = url.filter(|url| url != "off") else { return Ok(None) };
        let of_variable = match variable(MODE).as_deref() {
            None => None,
            Some("read-only") => Some(CacheMode::ReadOnly),
            Some("read-write") => Some(CacheMode::ReadWrite),
            Some(other) => {
                return Err(format!(
                    "{MODE} is `{}`; write `read-only` or `read-write`",
                    crate::text::shown(other)
                ));
            }
        };
        let read_only = match self.cache_mode.or(of_variable) {
            Some(mode) => mode == CacheMode::ReadOnly,
            None => written.is_some_and(|written| written.read_only),
        };
        Ok(Some(RemoteOptions {
            url,
            read_only,
            anonymous: written.is_some_and(|written| written.anonymous),
            largest: written.and_then(|written| written.largest).unwrap_or(LARGEST_SENT),
            commands: written.is_some_and(|written| written.commands),
            runs: written.is_some_and(|written| written.runs),
        }))
    }
}
