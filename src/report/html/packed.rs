//! The parts of a long page that few will read: deflated, and unfolded by the page's script.
//!
//! It knows bytes; what they show is not its concern.

use std::io::{Cursor, Write};

use maud::{Markup, PreEscaped, html};
use regex::Regex;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Figures that the script unfolds when their fold is opened. What cannot be packed stands as
/// it is.
pub(super) fn packed(figures: &Markup) -> Markup {
    let lean = lean(&figures.0);
    html! {
        details class="fold" {
            summary { h3 { "All claims, causes, maps and measures" } }
            @match deflated(lean.as_bytes()) {
                Ok(bytes) => div class="packed" data-packed=(base64(&bytes)) {
                    noscript { "In a page of this size they are unfolded by a script." }
                },
                Err(_) => (PreEscaped(lean)),
            }
        }
    }
}

/// The same without the places of figures in run.json and without the tables below charts,
/// whose marks say the numbers too. Text is escaped, so that no name looks like this.
fn lean(figures: &str) -> String {
    let rules = [
        ("<details><summary>The numbers</summary>.*?</details>", ""),
        ("<data [^>]*>(.*?)</data>", "$1"),
        (" data-(m|a|j)=\"[0-9]+\"", " data-$1"),
    ];
    rules.iter().fold(figures.to_owned(), |text, (pattern, with)| {
        // The patterns are ours; a wrong one leaves the text as it is.
        match Regex::new(&format!("(?s){pattern}")) {
            Ok(rule) => rule.replace_all(&text, *with).into_owned(),
            Err(_) => text,
        }
    })
}

/// The bytes as a raw deflate stream (RFC 1951), which browsers read as `deflate-raw`.
fn deflated(bytes: &[u8]) -> zip::result::ZipResult<Vec<u8>> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
    writer.start_file("body", options)?;
    writer.write_all(bytes)?;
    let archive = writer.finish()?.into_inner();
    let mut entries = ZipArchive::new(Cursor::new(&archive))?;
    let mut entry = entries.by_index_raw(0)?;
    let mut stream = Vec::new();
    std::io::copy(&mut entry, &mut stream)?;
    Ok(stream)
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |place: usize| u32::from(chunk.get(place).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * place) & 63) as usize];
            text.push(if place > chunk.len() { '=' } else { char::from(digit) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_base64_as_rfc_4648_has_it() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn what_is_packed_has_its_numbers_but_not_their_places() {
        let figures = "<td><data value=\"1.5\" data-at=\"/a\">1.5</data></td><rect data-m=\"12\"/>\
                       <details><summary>The numbers</summary><p>1.5</p></details>";
        assert_eq!(lean(figures), "<td>1.5</td><rect data-m/>");
    }

    #[test]
    fn what_repeats_itself_is_packed_small() {
        let bytes = b"<td>0.98</td>".repeat(1000);
        let packed = deflated(&bytes).expect("packed");
        assert!(packed.len() < 200, "{}", packed.len());
    }
}
