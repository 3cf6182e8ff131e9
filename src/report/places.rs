//! Where in a manifest a breach is shown: the line of the stage's contract, else
//! of its id, else the first.
//!
//! The file is read when the report is written; a file that has gone has no lines.

use std::path::Path;

use toml::de::DeTable;

use crate::files;

/// No manifest is larger: what is, is another file.
const LARGEST: u64 = 1 << 20;

/// The line, counted from 1, at which a stage's breach is shown.
pub(super) fn line(file: &str) -> usize {
    let Ok(text) = files::read_text(Path::new(file), LARGEST) else { return 1 };
    let (table, _) = DeTable::parse_recoverable(&text);
    let key = ["contract", "id"].iter().find_map(|wanted| {
        table.get_ref().iter().find(|(key, _)| key.get_ref() == wanted).map(|(key, _)| key.span())
    });
    let start = key.map_or(0, |span| span.start);
    1 + text.as_bytes().iter().take(start).filter(|byte| **byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn the_line_is_the_contracts() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = "# head\nid = \"E\"\n\ncontract = \"c\"\n[matmul]\nid = 3\n";
        std::fs::write(file.path(), text).expect("written");
        assert_eq!(line(file.path().to_str().expect("text")), 4);
        assert_eq!(line("no/such/file.toml"), 1);
    }
}
