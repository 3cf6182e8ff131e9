//! Shell completions and man pages, made from the commands themselves.

use crate::text::Shown;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, print, print_bytes};

/// The completions of a shell.
pub(super) fn completions(shell: Shell) -> Result<u8, String> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "runner", &mut script);
    print_bytes(&script)
}

/// A man page for the runner and one for each command.
pub(super) fn man(folder: &Path) -> Result<u8, String> {
    let cannot = |error: std::io::Error| format!("cannot write to `{}`: {error}", folder.shown());
    std::fs::create_dir_all(folder).map_err(cannot)?;
    clap_mangen::generate_to(Cli::command(), folder).map_err(cannot)?;
    print(&format!("{}\n", folder.shown()))
}
