//! What people read on a terminal or in a log: the one place that writes to stdout and stderr.
//!
//! A reader of stderr who has gone away, or a full disk behind it, is no reason to lose a run.
//! What moves a cursor, changes a title or turns the direction of writing does not get
//! through; names are made one line earlier, where they are put into a message
//! ([`crate::text::Shown`]).

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use crate::text::cleaned;

/// Writes to stderr in one piece.
pub fn tell(text: &str) {
    // Nobody could be told.
    let _ = io::stderr().lock().write_all(for_people(text).as_bytes());
}

/// As [`tell`], with a line end.
pub fn tell_line(text: &str) {
    tell(&format!("{text}\n"));
}

/// Writes a text to stdout.
///
/// # Errors
/// As [`print_bytes`].
pub fn print(text: &str) -> Result<(), String> {
    print_bytes(for_people(text).as_bytes())
}

/// Writes bytes to stdout as they are, for another program; a reader who has gone away is no
/// error.
///
/// # Errors
/// If they cannot be written.
pub fn print_bytes(bytes: &[u8]) -> Result<(), String> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write to stdout: {error}; is the disk behind it full?"))
        }
        _ => Ok(()),
    }
}

/// Whether messages are coloured.
pub fn coloured() -> bool {
    static COLOURED: OnceLock<bool> = OnceLock::new();
    *COLOURED.get_or_init(|| io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
}

/// For the lines of `tracing`: it would panic if a write failed.
pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        tell(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A text of many lines as a terminal may have it. Colours are let through where there are
/// any: nothing else that a terminal obeys.
fn for_people(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for (index, part) in text.split('\x1b').enumerate() {
        let (colour, rest) = match index {
            0 => ("", part),
            _ => colour_at(part).unwrap_or(("", part)),
        };
        if !colour.is_empty() && coloured() {
            safe.push('\x1b');
            safe.push_str(colour);
        } else if index > 0 {
            safe.push('\u{fffd}');
            safe.push_str(colour);
        }
        for (number, line) in rest.split('\n').enumerate() {
            if number > 0 {
                safe.push('\n');
            }
            safe.extend(line.chars().map(|c| if c == '\t' { c } else { cleaned(c) }));
        }
    }
    safe
}

/// What is left of an escape sequence that sets a colour, and what follows.
fn colour_at(text: &str) -> Option<(&str, &str)> {
    let numbers = text.strip_prefix('[')?;
    let end = numbers.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    numbers[end..].starts_with('m').then(|| text.split_at(end + 2))
}

#[cfg(test)]
mod tests {
    use super::for_people;

    #[test]
    fn what_a_terminal_would_obey_does_not_get_through() {
        // Tests have no terminal, hence no colours.
        assert_eq!(for_people("a\tb\nc"), "a\tb\nc");
        assert_eq!(for_people("\x1b[2Jx"), "\u{fffd}[2Jx");
        assert_eq!(for_people("a\x1b]0;t\x07"), "a\u{fffd}]0;t\u{fffd}");
        assert_eq!(for_people("\x1b[31mred\x1b[0m"), "\u{fffd}[31mred\u{fffd}[0m");
        assert_eq!(for_people("\u{202e}\u{2028}\u{9b}\r"), "\u{fffd}".repeat(4));
        assert_eq!(for_people("\x1b"), "\u{fffd}");
    }
}
