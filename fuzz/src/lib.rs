//! What the fuzz targets share: the readers of the campaign, and a folder for the one that runs.

use std::sync::OnceLock;

#[path = "../../tests/it/campaign/readers.rs"]
pub mod readers;

/// Has a reader read these bytes; the same one each time, for a process is one target.
pub fn read(reader: &str, bytes: &[u8]) {
    static PLACE: OnceLock<(readers::Reader, tempfile::TempDir)> = OnceLock::new();
    let (reader, folder) = PLACE.get_or_init(|| {
        let (reader, folder) = (readers::of(reader), tempfile::tempdir().expect("a folder"));
        (reader.prepare)(folder.path());
        (reader, folder)
    });
    // A refusal in words is as good as an answer.
    let _ = readers::check(reader, folder.path(), bytes);
}
