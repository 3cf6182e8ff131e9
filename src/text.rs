//! Numbers as people read them, the same in every report, and patterns in the
//! texts of programs.
//!
//! It knows digits and lines, not what is counted.

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
    regex::bytes::RegexBuilder::new(pattern).multi_line(true).build()
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
