//! Opening files that somebody else wrote: the one place where that is done, so that each
//! guard stands once.
//!
//! Only regular files are opened, since a pipe or a device may make whoever reads it wait for
//! ever; what is read into memory has a bound; what is mapped is looked at again, and a file
//! that becomes shorter afterwards ends the program with its name.

mod mapped;
mod spill;

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

pub use mapped::Mapped;
pub use spill::{Spill, tensor_within};

/// Opens a regular file to read it. Nothing else is opened, and nothing is waited for.
///
/// # Errors
/// If it cannot be opened, or is something else.
pub fn open(path: &Path) -> io::Result<File> {
    check_regular(&std::fs::metadata(path)?)?;
    // What stands there now may be another thing than a moment ago.
    let without_waiting = rustix::fs::OFlags::NONBLOCK.bits();
    let file = File::options().read(true).custom_flags(without_waiting as i32).open(path)?;
    check_regular(&file.metadata()?)?;
    Ok(file)
}

/// Reads a regular file of at most `largest` bytes.
///
/// # Errors
/// As [`open`], or if it is larger.
pub fn read_whole(path: &Path, largest: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(largest + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > largest {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has more than {largest} bytes, which no such file needs"),
        ));
    }
    Ok(bytes)
}

/// As [`read_whole`], for a text.
///
/// # Errors
/// As [`read_whole`], or if it is not UTF-8.
pub fn read_text(path: &Path, largest: u64) -> io::Result<String> {
    String::from_utf8(read_whole(path, largest)?).map_err(|error| {
        let place = error.utf8_error().valid_up_to();
        let problem = format!("it is not UTF-8: byte {place} starts no character");
        io::Error::new(io::ErrorKind::InvalidData, problem)
    })
}

fn check_regular(facts: &Metadata) -> io::Result<()> {
    let kind = facts.file_type();
    let what = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_dir() => "a folder",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("it is {what}, not a regular file; name a regular file"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read_and_nothing_is_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let pipe = folder.path().join("pipe");
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, 0o600.into(), 0).expect("a pipe");
        let text = folder.path().join("text");
        std::fs::write(&text, b"12345\xff").expect("written");
        let why = |path: &Path| open(path).expect_err("refused").to_string();
        assert!(why(&pipe).contains("a pipe"));
        assert!(why(Path::new("/dev/zero")).contains("a device"));
        assert!(why(folder.path()).contains("a folder"));
        assert_eq!(read_whole(&text, 6).expect("read"), b"12345\xff");
        assert!(read_whole(&text, 5).expect_err("refused").to_string().contains("5 bytes"));
        assert!(read_text(&text, 6).expect_err("refused").to_string().contains("byte 5"));
    }
}
