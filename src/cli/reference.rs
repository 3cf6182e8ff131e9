//! `runner reference`: commands, verdicts, metrics and exit codes, as the code has them.
//!
//! `docs/reference.md` is its output; a test holds it to that.

use std::fmt::Write;

use clap::CommandFactory;

use super::{Cli, print};
use crate::metric::Metric;
use crate::verdict::Verdict;

pub(super) fn reference() -> Result<u8, String> {
    print(&text())
}

fn text() -> String {
    let mut text = String::from(
        "# Reference\nMade by `runner reference`; do not edit. Keys of manifests and contracts: \
         see the manifests in `stages/` and `contracts/`, and `runner check`, which names every \
         key that it does not know with the nearest that it does.\n\n",
    );
    verdicts(&mut text);
    exit_codes(&mut text);
    metrics(&mut text);
    text.push_str("## Commands\n");
    let mut cli = Cli::command().term_width(96);
    cli.build();
    for command in cli.get_subcommands_mut().filter(|command| !command.is_hide_set()) {
        if command.get_name() == "help" {
            continue;
        }
        let help = command.clone().term_width(96).render_long_help().to_string();
        let help: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
        // Writing to a string cannot fail.
        let _ = write!(text, "\n### {}\n```text\n{}\n```\n", command.get_name(), help.join("\n"));
    }
    text
}

fn verdicts(text: &mut String) {
    text.push_str("## Verdicts\n| verdict | meaning | exit code |\n|---|---|---|\n");
    let meaning = |verdict: Verdict| match verdict {
        Verdict::Pass => "everything was measured and nothing falsified",
        Verdict::Drift => "explained by the recipe's arithmetic, but beyond the contract's budget",
        Verdict::Structural => "unexplained: a bug",
        Verdict::Unmeasured => "nothing, or too little, was compared",
        Verdict::Blocked => "a stage that it needs has no result",
        Verdict::Error => "it could not run",
    };
    for verdict in [
        Verdict::Pass,
        Verdict::Drift,
        Verdict::Structural,
        Verdict::Unmeasured,
        Verdict::Blocked,
        Verdict::Error,
    ] {
        let (meaning, code) = (meaning(verdict), verdict.exit_code());
        let _ = writeln!(text, "| `{verdict}` | {meaning} | {code} |");
    }
    text.push_str(
        "\nA run has the gravest of its stages' verdicts: structural, drift, error, blocked, \
         unmeasured, pass.\n\n",
    );
}

fn exit_codes(text: &mut String) {
    text.push_str(
        "## Exit codes\n| code | meaning |\n|---|---|\n| 0 | pass |\n| 1 | falsified; of `diff`: \
         something changed |\n| 2 | bad manifest or usage |\n| 3 | nothing was measured |\n\
         | 4 | a required arm could not run |\n| 70 | a bug of ours |\n| 130 | stopped on request \
         |\n\n",
    );
}

fn metrics(text: &mut String) {
    text.push_str(
        "## Metrics\nBetween a subject `a` and a judge `b`, at one site.\n\n\
         | metric | meaning | from | to |\n|---|---|---|---|\n",
    );
    for metric in Metric::ALL {
        let (low, high) = metric.range();
        let meaning = metric.meaning().replace('|', "\\|");
        let _ = writeln!(text, "| `{metric}` | {meaning} | {low} | {high} |");
    }
    text.push('\n');
}
