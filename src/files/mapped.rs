//! Files in the address space, and what happens when one becomes shorter under a reader.
//!
//! The kernel then sends SIGBUS, of which a program dies without a word. Here a handler
//! looks up which file it was, says so, and leaves with the exit code of an arm that could
//! not run. It knows places in memory and names, not what the files hold.

use std::collections::BTreeSet;
use std::fs::{File, Metadata};
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use memmap2::{Mmap, MmapMut, MmapOptions};
use nix::libc;

use crate::text::Shown;

/// A mapped file, or a copy of bytes with the same alignment.
#[derive(Debug)]
pub struct Mapped {
    map: Mmap,
    /// Its place in [`PLACES`].
    place: Option<&'static Place>,
}

impl Mapped {
    /// Maps a file that [`super::open`] opened; `path` is its name in messages.
    ///
    /// # Errors
    /// If it cannot be mapped, or changed its length meanwhile.
    pub fn of(file: &File, path: &Path) -> io::Result<(Mapped, Metadata)> {
        watch();
        let facts = file.metadata()?;
        // SAFETY: the map is read-only and private to this process. What is not sound in
        // principle is that another process may write the file while it is mapped: the bytes
        // would change under a `&[u8]`. They are only ever decoded as plain numbers, for which
        // every bit pattern is valid. An access past a new end raises SIGBUS, which the
        // handler here answers by ending the program.
        let map = unsafe { Mmap::map(file)? };
        if file.metadata()?.len() != map.len() as u64 || facts.len() != map.len() as u64 {
            return Err(io::Error::other("its length changed while it was opened"));
        }
        let place = Place::take(&map, message(path));
        Ok((Mapped { map, place }, facts))
    }

    /// Maps a part of a file of this process's own, which nobody else can open.
    ///
    /// # Errors
    /// If it cannot be mapped.
    pub(super) fn part(file: &File, offset: u64, length: usize) -> io::Result<Mapped> {
        // SAFETY: the map is read-only. The file has no name, so no other process writes it, and its
        // owner writes every place once, before it is mapped, and never makes the file shorter.
        let map = unsafe { MmapOptions::new().offset(offset).len(length).map(file)? };
        Ok(Mapped { map, place: None })
    }

    /// A copy of bytes in memory, aligned as a mapped file is.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn copy(bytes: &[u8]) -> io::Result<Mapped> {
        let mut copy = MmapMut::map_anon(bytes.len())?;
        copy.copy_from_slice(bytes);
        Ok(Mapped { map: copy.make_read_only()?, place: None })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            place.start.store(FREE, Ordering::Release);
        }
    }
}

/// Where a file is mapped, readable by a signal handler, which may take no lock.
#[derive(Debug)]
struct Place {
    /// The first byte, or [`FREE`], or [`TAKEN`] while the rest is filled in.
    start: AtomicUsize,
    length: AtomicUsize,
    message: AtomicPtr<u8>,
    message_length: AtomicUsize,
}

const FREE: usize = 0;
const TAKEN: usize = 1;
/// Files that are mapped at once and named; more are mapped all the same.
const MOST: usize = 1024;

static PLACES: [Place; MOST] = [const {
    Place {
        start: AtomicUsize::new(FREE),
        length: AtomicUsize::new(0),
        message: AtomicPtr::new(std::ptr::null_mut()),
        message_length: AtomicUsize::new(0),
    }
}; MOST];

impl Place {
    fn take(bytes: &[u8], message: &'static str) -> Option<&'static Place> {
        let take = |place: &&Place| {
            let free =
                place.start.compare_exchange(FREE, TAKEN, Ordering::AcqRel, Ordering::Relaxed);
            free.is_ok()
        };
        let place = PLACES.iter().find(take)?;
        place.length.store(bytes.len(), Ordering::Relaxed);
        place.message.store(message.as_ptr().cast_mut(), Ordering::Relaxed);
        place.message_length.store(message.len(), Ordering::Relaxed);
        place.start.store(bytes.as_ptr() as usize, Ordering::Release);
        Some(place)
    }

    /// The message of the file that is mapped at an address.
    fn message_at(address: usize) -> Option<(*const u8, usize)> {
        let holds = |place: &&Place| {
            let start = place.start.load(Ordering::Acquire);
            // A page more: the last one is mapped whole.
            let length = place.length.load(Ordering::Relaxed).next_multiple_of(4096);
            start > TAKEN && (start..start + length).contains(&address)
        };
        let place = PLACES.iter().find(holds)?;
        let message = place.message.load(Ordering::Relaxed).cast_const();
        Some((message, place.message_length.load(Ordering::Relaxed)))
    }
}

/// What is said of a file that became shorter; kept for ever, once for each path, since the
/// handler may read it at any moment.
fn message(path: &Path) -> &'static str {
    static KEPT: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let text = format!(
        "error: `{}` became shorter while it was read; run again when nobody writes it\n",
        path.shown()
    );
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = kept.get(text.as_str()) {
        return known;
    }
    let text: &'static str = text.leak();
    kept.insert(text);
    text
}

/// Sets the handler, once.
fn watch() {
    static SET: Once = Once::new();
    SET.call_once(|| {
        use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        let action = SigAction::new(SigHandler::SigAction(on_bus_error), flags, SigSet::empty());
        // SAFETY: the handler calls `write`, `_exit` and `signal` alone, which may be called
        // in one, and reads atomics and texts that are never freed.
        let set = unsafe { sigaction(Signal::SIGBUS, &action) };
        if let Err(error) = set {
            tracing::debug!("files that become shorter are not named: {error}");
        }
    });
}

extern "C" fn on_bus_error(_: libc::c_int, facts: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// The exit code of an arm that could not run.
    const NOT_RUN: libc::c_int = 4;
    // SAFETY: the kernel hands the handler a valid `siginfo_t`; of SIGBUS it has an address.
    let address = unsafe { (*facts).si_addr() } as usize;
    match Place::message_at(address) {
        Some((message, length)) => {
            // SAFETY: both functions may be called in a handler, and the message is a text of
            // this length that is never freed.
            unsafe {
                libc::write(libc::STDERR_FILENO, message.cast(), length);
                libc::_exit(NOT_RUN)
            }
        }
        // Not a file of ours: the instruction is tried again and ends the program as usual.
        // SAFETY: `signal` may be called in a handler.
        None => unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
        },
    }
}
