//! Resources of this machine, handed out to jobs of all runners on it.
//!
//! Every core, GiB of memory, GPU and GiB of a GPU's memory is a small file, and
//! whoever holds its lock has it. Locks end with their process, so nothing has to
//! be given back after a `kill -9`, and two runners share one machine without
//! knowing of each other. A request is taken whole or not at all, under one lock
//! over all, so that two half-served requests cannot wait for each other.
//!
//! It knows counts, not what they are used for.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::interrupt;
use crate::manifest::Resources;
use crate::text::Shown;

/// How often a job that waits asks again.
const ASK_AGAIN: Duration = Duration::from_millis(25);

/// What a machine has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Cores.
    pub cores: usize,
    /// GiB of memory.
    pub memory: usize,
    /// GiB of each GPU's memory, in the order of their numbers.
    pub gpus: Vec<usize>,
}

/// The machine's resources, wherever a runner on it asks.
#[derive(Debug)]
pub struct Slots {
    folder: PathBuf,
    /// Asked for when somebody first wants something of it.
    machine: OnceLock<Machine>,
    /// The GPUs of a job whose resources somebody else has handed out already.
    handed_out: Option<Vec<usize>>,
}

/// What a job has until it lets go.
#[derive(Debug, Default)]
pub struct Held {
    /// The numbers of its GPUs.
    pub gpus: Vec<usize>,
    _locks: Vec<File>,
}

/// Why a request can never be served, or not now.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// It asks for more than there is.
    #[error(
        "it asks for {asked} {what}, and this machine has {there}; ask for less under `[resources]`"
    )]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much.
        asked: usize,
        /// How much there is.
        there: usize,
    },
    /// The files of the slots cannot be used.
    #[error("cannot use `{}` to share this machine's resources: {source}", path.shown())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The user asked to stop.
    #[error("stopped on request")]
    Stopped,
}

impl Machine {
    /// This machine, as the system describes it. GPUs are those that the driver's
    /// own tool lists; without it there are none to hand out.
    pub fn here() -> Machine {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = total.and_then(|text| text.trim().trim_end_matches(" kB").parse::<usize>().ok());
        Machine { cores, memory: kib.map_or(1, |kib| kib >> 20).max(1), gpus: gpus() }
    }
}

fn gpus() -> Vec<usize> {
    let listed = std::process::Command::new("nvidia-smi")
        .args(["--query-gpu=memory.total", "--format=csv,noheader,nounits"])
        .output();
    let text = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let mib = |line: &str| line.trim().parse::<usize>().ok();
    text.unwrap_or_default().lines().filter_map(mib).map(|mib| mib >> 10).collect()
}

/// Makes the folder, or sees that it is this user's alone: in a shared folder for temporary
/// files anybody may have made it first.
fn own_folder(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        made => return made,
    }
    let facts = std::fs::symlink_metadata(folder)?;
    if facts.is_dir() && facts.uid() == rustix::process::getuid().as_raw() {
        return Ok(());
    }
    Err(std::io::Error::new(
        std::io::ErrorKind::PermissionDenied,
        "somebody else made it; set XDG_RUNTIME_DIR to a folder of yours",
    ))
}

impl Slots {
    /// The slots of this machine, shared by all runners of this user.
    pub fn here() -> Slots {
        let run = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let run = run.filter(|path| path.is_absolute()).unwrap_or_else(std::env::temp_dir);
        let user = rustix::process::getuid().as_raw();
        Slots {
            folder: run.join(format!("runner-slots-{user}")),
            machine: OnceLock::new(),
            handed_out: None,
        }
    }

    /// Slots of some machine, whose files lie in `folder`.
    pub fn new(folder: &Path, machine: Machine) -> Slots {
        Slots { folder: folder.to_owned(), machine: OnceLock::from(machine), handed_out: None }
    }

    /// What a scheduler has handed out to this process alone: nothing is shared, and nobody
    /// waits. The GPUs are those that it lets the process see.
    pub fn handed_out() -> Slots {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
        let gpus = visible.split(',').filter_map(|number| number.trim().parse().ok());
        Slots { folder: PathBuf::new(), machine: OnceLock::new(), handed_out: Some(gpus.collect()) }
    }

    /// Waits until all that is asked for is free, and takes it.
    ///
    /// # Errors
    /// If the machine never has so much.
    pub fn take(&self, asked: &Resources) -> Result<Held, SlotError> {
        if let Some(gpus) = &self.handed_out {
            let wanted = asked.gpus.max(usize::from(asked.gpu_memory > 0));
            if wanted > gpus.len() {
                let (what, there) = ("GPUs", gpus.len());
                return Err(SlotError::TooMuch { what, asked: wanted, there });
            }
            return Ok(Held { gpus: gpus[..wanted].to_vec(), _locks: Vec::new() });
        }
        if *asked == (Resources { threads: asked.threads, ..Resources::default() }) {
            return Ok(Held::default());
        }
        self.check(asked)?;
        let failed = |source| SlotError::Io { path: self.folder.clone(), source };
        own_folder(&self.folder).map_err(failed)?;
        let mut told = false;
        loop {
            if interrupt::requested() {
                return Err(SlotError::Stopped);
            }
            let one_at_a_time = self.open("all")?;
            one_at_a_time.lock().map_err(failed)?;
            if let Some(held) = self.try_take(asked)? {
                return Ok(held);
            }
            drop(one_at_a_time);
            if !told {
                tracing::info!("waiting for resources that other jobs on this machine have");
                told = true;
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }

    fn machine(&self) -> &Machine {
        self.machine.get_or_init(Machine::here)
    }

    fn check(&self, asked: &Resources) -> Result<(), SlotError> {
        let Machine { cores, memory, gpus } = self.machine();
        let largest = gpus.iter().copied().max().unwrap_or(0);
        let wants = [
            ("cores", asked.cores, *cores),
            ("GiB of memory", asked.memory, *memory),
            ("GPUs", asked.gpus, gpus.len()),
            ("GiB of one GPU's memory", asked.gpu_memory, largest),
        ];
        match wants.into_iter().find(|(_, asked, there)| asked > there) {
            Some((what, asked, there)) => Err(SlotError::TooMuch { what, asked, there }),
            None => Ok(()),
        }
    }

    /// Everything, or nothing.
    fn try_take(&self, asked: &Resources) -> Result<Option<Held>, SlotError> {
        let mut held = Held::default();
        for (name, count, there) in [
            ("core", asked.cores, self.machine().cores),
            ("memory", asked.memory, self.machine().memory),
        ] {
            if !self.some(name, count, there, &mut held)? {
                return Ok(None);
            }
        }
        let wanted = asked.gpus.max(usize::from(asked.gpu_memory > 0));
        for (gpu, memory) in self.machine().gpus.iter().enumerate() {
            if held.gpus.len() == wanted {
                break;
            }
            // A whole GPU is all of its memory.
            let count = if asked.gpu_memory > 0 { asked.gpu_memory } else { (*memory).max(1) };
            let mut more = Held::default();
            if self.some(&format!("gpu{gpu}"), count, (*memory).max(1), &mut more)? {
                held.gpus.push(gpu);
                held._locks.append(&mut more._locks);
            }
        }
        Ok((held.gpus.len() == wanted).then_some(held))
    }

    /// Takes `count` of the `there` files of one kind, if so many are free.
    fn some(
        &self,
        name: &str,
        count: usize,
        there: usize,
        held: &mut Held,
    ) -> Result<bool, SlotError> {
        let mut taken = 0;
        for number in 0..there {
            if taken == count {
                break;
            }
            let file = self.open(&format!("{name}-{number}"))?;
            match file.try_lock() {
                Ok(()) => {
                    held._locks.push(file);
                    taken += 1;
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => {
                    return Err(SlotError::Io { path: self.folder.clone(), source });
                }
            }
        }
        Ok(taken == count)
    }

    fn open(&self, name: &str) -> Result<File, SlotError> {
        let path = self.folder.join(name);
        let file = File::options().create(true).append(true).open(&path);
        file.map_err(|source| SlotError::Io { path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine { cores: 4, memory: 8, gpus: vec![80, 80] }
    }

    fn asked(cores: usize, gpus: usize, gpu_memory: usize) -> Resources {
        Resources { cores, gpus, gpu_memory, ..Resources::default() }
    }

    #[test]
    fn what_one_holds_another_has_to_wait_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let slots = Slots::new(folder.path(), machine());
        let other = Slots::new(folder.path(), machine());
        let first = slots.take(&asked(3, 1, 0)).expect("free");
        assert_eq!(first.gpus, [0]);
        assert!(other.try_take(&asked(2, 0, 0)).expect("asked").is_none());
        assert_eq!(other.try_take(&asked(1, 1, 0)).expect("asked").expect("free").gpus, [1]);
        drop(first);
        assert!(other.try_take(&asked(4, 2, 0)).expect("asked").is_some());
    }

    #[test]
    fn gpus_are_shared_by_memory() {
        let folder = tempfile::tempdir().expect("a folder");
        let slots = Slots::new(folder.path(), machine());
        let first = slots.take(&asked(0, 0, 50)).expect("free");
        let second = slots.take(&asked(0, 0, 50)).expect("free");
        let third = slots.take(&asked(0, 0, 30)).expect("free");
        assert_eq!((first.gpus[0], second.gpus[0], third.gpus[0]), (0, 1, 0));
        assert!(slots.try_take(&asked(0, 0, 31)).expect("asked").is_none());
    }

    #[test]
    fn a_request_that_can_never_be_served_says_so() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = Slots::new(folder.path(), machine()).take(&asked(5, 0, 0));
        let text = error.expect_err("too much").to_string();
        assert!(text.contains("5 cores") && text.contains("has 4"), "{text}");
    }
}
