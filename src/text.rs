//! Numbers as people read them, the same in every report, patterns in the texts of
//! programs, and names from outside that are put into a message.
//!
//! It knows digits, letters and lines, not what is counted or named.

use std::fmt;
use std::path::Path;

/// A number for people: four significant digits, plain where that is short.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if value.fract() == 0.0 && size < 1e9 {
        return format!("{value:.0}");
    }
    if !(1e-3..1e6).contains(&size) {
        return format!("{value:.2e}");
    }
    let digits = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// `1 value is`, `1,234 values are`.
pub fn values_are(count: usize) -> String {
    match count {
        1 => "1 value is".to_owned(),
        many => format!("{} values are", grouped(many)),
    }
}

/// `1234567` as `1,234,567`.
pub fn grouped(count: usize) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A regular expression over a text of many lines, where `^` and `$` mean a line's ends.
///
/// # Errors
/// In the words of the expression's parser.
pub fn lines_pattern(pattern: &str) -> Result<regex::bytes::Regex, regex::Error> {
    /// Bytes of a compiled pattern: an alphabet repeated a hundred times fits.
    const LARGEST: usize = 1 << 20;
    regex::bytes::RegexBuilder::new(pattern).multi_line(true).size_limit(LARGEST).build()
}

/// A letter that may stand within a line, or what stands for one that may not: what a
/// terminal obeys, what ends a line, and what turns the direction of writing.
pub fn cleaned(c: char) -> char {
    match c {
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
            '\u{fffd}'
        }
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

/// A text as one line: white space stays white space, and what is not to be printed is
/// replaced.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_whitespace() { ' ' } else { cleaned(c) }).collect()
}

/// A name out of a file as it may be printed: one line, and no novel.
pub fn shown(name: &str) -> String {
    const LONGEST: usize = 120;
    let printable = name.chars().map(cleaned);
    match name.chars().count() {
        0..=LONGEST => printable.collect(),
        _ => printable.take(LONGEST).chain(['\u{2026}']).collect(),
    }
}

/// What is said where the system starts no more threads.
pub fn no_threads(wanted: usize, error: &dyn std::fmt::Display) -> String {
    format!(
        "the system does not start {wanted} threads ({error}); allow more processes (`ulimit -u`, \
         the container's limit of pids), or ask for fewer cores"
    )
}

/// A path as it may be printed: on one line, with nothing that a terminal obeys.
pub trait Shown {
    /// To be put into a message.
    fn shown(&self) -> ShownPath<'_>;
}

impl Shown for Path {
    fn shown(&self) -> ShownPath<'_> {
        ShownPath(self)
    }
}

/// See [`Shown`].
pub struct ShownPath<'a>(&'a Path);

impl fmt::Display for ShownPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string_lossy();
        text.chars().try_for_each(|c| fmt::Write::write_char(f, cleaned(c)))
    }
}

/// Bytes as people read them: `512 B`, `3.0 GiB`.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// Seconds, as far as a reader looks at them: `42 ms`, `4.20 s`, `42 s`, `42 min`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 0.0995 => format!("{:.0} ms", 1e3 * s),
        s if s < 9.95 => format!("{s:.2} s"),
        s if s < 600.0 => format!("{s:.0} s"),
        s => format!("{:.0} min", s / 60.0),
    }
}

/// A share as per cent, three significant digits.
pub fn percent(share: f64) -> String {
    let value = 100.0 * share;
    if value == 0.0 {
        return "0 %".to_owned();
    }
    if value.abs() < 1e-3 {
        return format!("{value:.1e} %");
    }
    let digits = (2 - value.abs().log10().floor() as i32).clamp(0, 5) as usize;
    format!("{value:.digits$} %")
}

/// A share of a bound in per cent; beyond a bound of 0 there is no share.
pub fn share(used: f64) -> String {
    match used {
        used if used == f64::MAX => "beyond 0".to_owned(),
        used if used > 10.0 => format!("{}x", number(used)),
        used => format!("{:.0} %", 100.0 * used),
    }
}
