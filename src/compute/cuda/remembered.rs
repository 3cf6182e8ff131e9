//! What this machine has, known again without starting the driver.
//!
//! Starting the driver takes some 200 ms, ten times as long as a run that has nothing
//! to do. What it said is written down with everything that can change what it says and
//! that the file system tells at once. One difference, and the driver is asked again.
//! Only a machine that has all pieces and a GPU is written down: what is missing may
//! come at any time.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Survey;
use crate::cache::{KeyWalk, Stamp, now, sealed, unsealed, write_whole};
use crate::text::Shown;

/// The file's name.
const NAME: &str = "machine.json";

/// Variables by which the driver and the loader are told what to see.
const PREFIXES: [&str; 3] = ["CUDA_", "NVIDIA_", "LD_"];

/// Lines of a GPU's information that are the same whether or not it is in use.
const LASTING: [&str; 4] = ["Model", "Bus Location", "Device Minor", "GPU Excluded"];

/// What is written down.
#[derive(Serialize, Deserialize)]
struct Note {
    identity: String,
    /// The libraries that were loaded, with their stamps.
    libraries: Vec<(PathBuf, [u64; 5])>,
    survey: Survey,
}

/// The machine as the file system shows it.
pub struct Machine {
    /// The folder that holds `proc`, `dev` and `etc`.
    pub root: PathBuf,
    /// The variables of the process.
    pub variables: BTreeMap<OsString, OsString>,
}

impl Machine {
    /// This one.
    pub fn here() -> Machine {
        Machine { root: PathBuf::from("/"), variables: std::env::vars_os().collect() }
    }

    /// What was written down in `folder`, if nothing has changed since.
    pub fn remembered(&self, folder: &Path) -> Option<Survey> {
        let bytes = std::fs::read(folder.join(NAME)).ok()?;
        let note: Note = serde_json::from_slice(unsealed(&bytes)?).ok()?;
        let same = self.identity()? == note.identity
            && note.libraries.iter().all(|(file, stamp)| stamp_of(file) == Some(*stamp));
        same.then_some(note.survey)
    }

    /// Asks `look`, and writes down what it saw if nothing changed meanwhile. It also gives
    /// the libraries that were loaded for it. A machine that cannot be known again is not
    /// written down.
    pub fn look_and_remember(
        &self,
        folder: &Path,
        look: impl FnOnce() -> (Survey, BTreeSet<PathBuf>),
    ) -> Survey {
        let before = self.identity();
        let (survey, libraries) = look();
        let whole = survey.pieces.iter().all(|piece| piece.state.is_ok());
        if let Some(identity) = before
            && whole
            && !survey.gpus.is_empty()
            && self.identity().as_ref() == Some(&identity)
        {
            write_down(folder, identity, &survey, libraries);
        }
        survey
    }
    /// Everything that decides what the driver says; none where no driver shows itself.
    fn identity(&self) -> Option<String> {
        let mut walk = KeyWalk::new("machine");
        walk.field("runner", format!("{:?}", stamp_of(Path::new("/proc/self/exe"))?));
        walk.field("user", std::fs::metadata("/proc/self").ok()?.uid());
        walk.field("boot", self.text("proc/sys/kernel/random/boot_id").unwrap_or_default());
        let releases = ["proc/driver/nvidia/version", "sys/module/nvidia/version"];
        let releases: Vec<String> = releases.iter().filter_map(|file| self.text(file)).collect();
        if releases.is_empty() {
            return None;
        }
        walk.field("driver", releases.join("\n"));
        for gpu in self.names("proc/driver/nvidia/gpus") {
            let information = self.text(&format!("proc/driver/nvidia/gpus/{gpu}/information"));
            let information = information.unwrap_or_default();
            // Other lines are known only while somebody uses the GPU.
            let lasting =
                information.lines().filter(|l| LASTING.iter().any(|name| l.starts_with(name)));
            walk.field(&gpu, lasting.collect::<Vec<_>>().join("\n"));
        }
        // What of a GPU that is cut into parts is handed to this process.
        self.tree("proc/driver/nvidia/capabilities", &mut walk);
        let nodes = self.names("dev").into_iter().filter(|name| name.starts_with("nvidia"));
        let nodes: Vec<String> = nodes.collect();
        if nodes.is_empty() {
            return None;
        }
        for node in nodes {
            let facts = std::fs::metadata(self.root.join("dev").join(&node)).ok()?;
            let facts = [facts.rdev(), facts.mode().into(), facts.uid().into(), facts.gid().into()];
            walk.field(&node, format!("{facts:?}"));
        }
        walk.field("loader", format!("{:?}", stamp_of(&self.root.join("etc/ld.so.cache"))));
        for (name, value) in &self.variables {
            let name = name.to_string_lossy();
            if PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
                walk.field(&name, format!("{value:?}"));
            }
        }
        // A library that is put into one of these folders is found before the others.
        let folders = self.variables.get(&OsString::from("LD_LIBRARY_PATH"));
        for folder in folders.iter().flat_map(std::env::split_paths) {
            walk.field(&format!("{folder:?}"), format!("{:?}", stamp_of(&folder)));
        }
        Some(walk.key().0)
    }

    fn text(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(file)).ok()
    }

    /// The names in a folder, in order; none if there is no such folder.
    fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.join(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort_unstable();
        names
    }

    /// The names and texts of all files below a folder.
    fn tree(&self, folder: &str, walk: &mut KeyWalk) {
        for name in self.names(folder) {
            let path = format!("{folder}/{name}");
            let is_folder = self.root.join(&path).is_dir();
            let text = if is_folder { None } else { self.text(&path) };
            walk.field(&path, text.unwrap_or_default());
            if is_folder {
                self.tree(&path, walk);
            }
        }
    }
}

/// Writes down a machine, unless one of its libraries may still change unseen.
fn write_down(folder: &Path, identity: String, survey: &Survey, libraries: BTreeSet<PathBuf>) {
    let mut stamps = Vec::new();
    for file in libraries {
        match std::fs::metadata(&file).map(|facts| Stamp::of(&facts)) {
            Ok(stamp) if stamp.settled(now()) => stamps.push((file, stamp.to_words())),
            _ => return,
        }
    }
    let note = Note { identity, libraries: stamps, survey: survey.clone() };
    let Ok(text) = serde_json::to_vec(&note) else { return };
    if let Err(error) = write_whole(&folder.join(NAME), &sealed(text)) {
        tracing::warn!("what this machine has is not kept: {error}");
    }
}

/// Forgets what was written down in a folder: it turned out to be wrong.
pub fn forget(folder: &Path) {
    let file = folder.join(NAME);
    match std::fs::remove_file(&file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!("`{}` is wrong and cannot be removed: {error}", file.shown());
        }
        _ => {}
    }
}

/// The shared libraries that this process has loaded.
pub fn loaded_libraries() -> BTreeSet<PathBuf> {
    libraries_in(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default())
}

/// The shared libraries in a list of mappings. The path is the rest of a line.
fn libraries_in(maps: &str) -> BTreeSet<PathBuf> {
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let is_library = |path: &&Path| {
        let name = path.file_name().map(|name| name.to_string_lossy());
        name.is_some_and(|name| name.ends_with(".so") || name.contains(".so."))
    };
    paths.filter(is_library).map(Path::to_owned).collect()
}

fn stamp_of(path: &Path) -> Option<[u64; 5]> {
    std::fs::metadata(path).ok().map(|facts| Stamp::of(&facts).to_words())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::cuda::{GpuFacts, Piece};

    /// A machine with a driver and one GPU, made of files; its library is an hour old.
    fn machine() -> (tempfile::TempDir, Machine) {
        let root = tempfile::tempdir().expect("a folder");
        let files = [
            ("proc/driver/nvidia/version", "NVRM version: 580.65"),
            ("proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: one\nVideo BIOS: ??"),
            ("proc/sys/kernel/random/boot_id", "today"),
            ("dev/nvidiactl", ""),
            ("proc/driver/nvidia/capabilities/gpu0/mig/config", "DeviceFileMinor: 1"),
            ("dev/nvidia0", ""),
            ("etc/ld.so.cache", "cuda"),
            ("lib/libcuda.so.1", "code"),
        ];
        for (file, text) in files {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, text).expect("written");
        }
        // Else the library is too young to be known again.
        std::thread::sleep(std::time::Duration::from_millis(30));
        let library_path = root.path().join("lib").into_os_string();
        let variables = BTreeMap::from([("LD_LIBRARY_PATH".into(), library_path)]);
        let machine = Machine { root: root.path().to_owned(), variables };
        (root, machine)
    }

    const LIBRARY: &str = "lib/libcuda.so.1";

    fn survey() -> Survey {
        let gpu = GpuFacts {
            ordinal: 0,
            name: "a GPU".to_owned(),
            capability: (9, 0),
            chip: Some(crate::op::ChipName::Hopper),
            memory: 1,
            uuid: "GPU-1".to_owned(),
        };
        let piece = Piece { name: "driver".to_owned(), state: Ok("580.65".to_owned()) };
        Survey { pieces: vec![piece], gpus: vec![gpu] }
    }

    #[test]
    fn a_machine_is_known_again_until_anything_that_the_driver_goes_by_changes() {
        type Change = fn(&Path, &mut Machine);
        let changes: [(&str, Change); 11] = [
            ("driver", |root, _| rewrite(root, "proc/driver/nvidia/version")),
            ("gpu", |root, _| rewrite(root, "proc/driver/nvidia/gpus/0000:01:00.0/information")),
            ("another gpu", |root, _| {
                std::fs::create_dir(root.join("proc/driver/nvidia/gpus/0000:02:00.0"))
                    .expect("made")
            }),
            ("part", |root, _| rewrite(root, "proc/driver/nvidia/capabilities/gpu0/mig/config")),
            ("node gone", |root, _| std::fs::remove_file(root.join("dev/nvidia0")).expect("gone")),
            ("node's mode", |root, _| {
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
                std::fs::set_permissions(root.join("dev/nvidia0"), mode).expect("changed")
            }),
            ("boot", |root, _| rewrite(root, "proc/sys/kernel/random/boot_id")),
            ("library", |root, _| rewrite(root, LIBRARY)),
            ("loader", |root, _| rewrite(root, "etc/ld.so.cache")),
            ("nearer library", |root, _| rewrite(root, "lib/libnvrtc.so.13")),
            ("variable", |_, machine| {
                machine.variables.insert("CUDA_VISIBLE_DEVICES".into(), "1".into());
            }),
        ];
        for (what, change) in changes {
            let (root, mut machine) = machine();
            let kept = tempfile::tempdir().expect("a folder");
            let libraries = [root.path().join(LIBRARY)].into();
            machine.look_and_remember(kept.path(), || (survey(), libraries));
            // What is only known of a GPU in use.
            let information = "proc/driver/nvidia/gpus/0000:01:00.0/information";
            std::fs::write(root.path().join(information), "Model: one\nVideo BIOS: 96")
                .expect("written");
            assert_eq!(machine.remembered(kept.path()), Some(survey()), "before: {what}");
            change(root.path(), &mut machine);
            assert_eq!(machine.remembered(kept.path()), None, "after: {what}");
        }
    }

    fn rewrite(root: &Path, file: &str) {
        std::fs::write(root.join(file), "something else").expect("written");
    }

    #[test]
    fn what_is_missing_or_damaged_is_never_remembered() {
        let (root, machine) = machine();
        let libraries = || BTreeSet::from([root.path().join(LIBRARY)]);
        let kept = tempfile::tempdir().expect("a folder");
        let mut broken = survey();
        broken.pieces[0].state = Err("it does not start".to_owned());
        machine.look_and_remember(kept.path(), || (broken, libraries()));
        assert_eq!(machine.remembered(kept.path()), None, "a driver that did not start");
        let empty = Survey { gpus: Vec::new(), ..survey() };
        machine.look_and_remember(kept.path(), || (empty, libraries()));
        assert_eq!(machine.remembered(kept.path()), None, "no GPU");
        machine.look_and_remember(kept.path(), || {
            rewrite(root.path(), "proc/driver/nvidia/version");
            (survey(), libraries())
        });
        assert_eq!(machine.remembered(kept.path()), None, "a driver that changed meanwhile");
        rewrite(root.path(), LIBRARY);
        machine.look_and_remember(kept.path(), || (survey(), libraries()));
        assert_eq!(machine.remembered(kept.path()), None, "a library that may still change");

        let (root, machine) = self::machine();
        let libraries = [root.path().join(LIBRARY)].into();
        machine.look_and_remember(kept.path(), || (survey(), libraries));
        assert_eq!(machine.remembered(kept.path()), Some(survey()));
        let file = kept.path().join(NAME);
        let text = std::fs::read_to_string(&file).expect("kept");
        // Still JSON, still this machine: only the check at the end can tell.
        std::fs::write(&file, text.replace("a GPU", "b GPU")).expect("written");
        assert_eq!(machine.remembered(kept.path()), None, "a flipped bit");
    }

    #[test]
    fn a_library_is_what_is_named_so_wherever_it_lies() {
        let maps = "7f00-7f01 r-xp 0000 fe:00 12   /a folder/libcuda.so.580.65\n\
                    7f01-7f02 r--p 0000 fe:00 13   /data/x.source/model.gguf\n\
                    7f02-7f03 rw-p 0000 00:00 0    [heap]\n";
        assert_eq!(libraries_in(maps), ["/a folder/libcuda.so.580.65".into()].into());
    }
}
