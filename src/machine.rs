//! The name of the machine: what tells the results of one from those of another.
//!
//! It is the host's name, or what `RUNNER_MACHINE` says: containers often get another host
//! name at every start.

use std::sync::OnceLock;

/// The variable that names the machine.
const VARIABLE: &str = "RUNNER_MACHINE";

/// The name of this machine.
pub fn name() -> &'static str {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| {
        let set = std::env::var_os(VARIABLE).map(|name| name.to_string_lossy().into_owned());
        let host = || nix::unistd::gethostname().ok()?.into_string().ok();
        chosen(set, host)
    })
}

/// The variable's value where it names something, else the host's name.
fn chosen(set: Option<String>, host: impl FnOnce() -> Option<String>) -> String {
    let named = |name: &String| !name.trim().is_empty();
    let name = set.filter(named).or_else(|| host().filter(named));
    name.map_or_else(|| "unknown".to_owned(), |name| crate::text::shown(name.trim()))
}

/// A file name that belongs to this machine alone: `NAME-` and sixteen digits of its name's hash.
pub fn file_of(stem: &str) -> String {
    format!("{stem}-{}", &blake3::hash(name().as_bytes()).to_hex()[..16])
}

#[cfg(test)]
mod tests {
    use super::chosen;

    #[test]
    fn a_machine_is_named_by_the_variable_else_by_its_host() {
        let host = || Some("node07".to_owned());
        assert_eq!(chosen(None, host), "node07");
        assert_eq!(chosen(Some(" rack 3 ".to_owned()), host), "rack 3");
        assert_eq!(chosen(Some(" ".to_owned()), host), "node07");
        assert_eq!(chosen(Some("a\nb\x1b[2J".to_owned()), host), "a\u{fffd}b\u{fffd}[2J");
        assert_eq!(chosen(None, || None), "unknown");
    }
}
