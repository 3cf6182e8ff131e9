//! Work that is done in jobs of Slurm.
//!
//! Whoever has work hands over items; those that ask for the same become the tasks of an array,
//! several to a task where there are many more than the cluster does at once. What a task says
//! is read from a file of its own (`folder`), how it stands is asked of the queue
//! (`commands`). Nothing is submitted twice for one key: before a submission stands in the
//! queue it stands in the shared folder, where every other runner looks first.
//!
//! It knows resources, queues and files, not what an item computes.

mod class;
mod cluster;
mod commands;
mod ending;
mod folder;
mod post;

pub use class::TASK_ARGUMENT;
pub use ending::NO_STORE;
pub use folder::{Head, Orders, Said, Teller, build, heard, log_of, orders_of, read, results_of};
pub use post::{LOG_VARIABLE, Letters, STORE_VARIABLE};

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use serde_json::value::RawValue;

use crate::cache::Remote;
use crate::manifest::{Executor, Resources};
use crate::text::{Shown, grouped, shown};
use class::{Class, Source, options, script};
use cluster::Cluster;
use commands::Row;
use ending::{Ending, GONE, has_ended, is_for_now, is_of_quota, never_starts};
use folder::Root;
use post::PostBox;

/// Between two questions to the queue.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// Between two looks at what tasks have said.
const LOOK: Duration = Duration::from_millis(100);
/// How long items are gathered before they are submitted.
const GATHER: Duration = Duration::from_millis(150);
/// How long after a task's end its last words may still come: a shared file system shows them late.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long to wait before what was refused for now is submitted again.
const REFUSED: Duration = Duration::from_secs(5);
/// After so long a submission of another runner without a number is looked for by its name.
const UNNUMBERED: Duration = Duration::from_secs(30);
/// So many tasks are submitted for each that the cluster does at once.
const TASKS_EACH: usize = 4;
/// Clocks that differ by more are an error.
pub const MOST_SKEW: i64 = 600;

/// Why Slurm cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SlurmError {
    /// One of its programs is not there.
    #[error(
        "`{0}` is not installed here, so nothing can be run on Slurm: start the runner on a \
         login node of the cluster, or leave out `--on slurm`"
    )]
    NotThere(String),
    /// One of its programs failed.
    #[error("Slurm's `{program}` failed: {said}; is the controller up (`scontrol ping`)?")]
    Silent {
        /// The program.
        program: String,
        /// What it said.
        said: String,
    },
    /// What is asked for can never be had.
    #[error("{0}")]
    Never(String),
    /// The shared folder cannot be used.
    #[error("{0}")]
    Folder(String),
    /// The shared cache, which carries what is told, cannot be used.
    #[error("{0}")]
    Post(String),
    /// Clocks differ.
    #[error(
        "the clock of this machine and that of Slurm's controller are {0} apart; set them by NTP, \
         since files and results are known by their times"
    )]
    Clock(String),
    /// Jobs of a runner that died are in the queue.
    #[error(
        "a runner that died has left jobs in the queue: {0}; take them up with `--attach`, or \
         cancel them with `scancel {1}`"
    )]
    Left(String, String),
}

/// Something to be done.
#[derive(Clone, Debug)]
pub struct Item {
    /// By which whoever handed it over knows it.
    pub ticket: usize,
    /// What it makes, as far as that is known before.
    pub key: String,
    /// For people: the stage and what is done with it.
    pub name: String,
    /// What it may use.
    pub resources: Resources,
    /// Whether it needs the GPUs among them.
    pub on_gpu: bool,
    /// How it is asked for.
    pub executor: Executor,
    /// What the task is told.
    pub order: Box<RawValue>,
}

/// What is told of an item, or of a job.
#[derive(Debug)]
pub enum News {
    /// It began.
    Began {
        /// The item.
        ticket: usize,
    },
    /// It is done.
    Done {
        /// The item.
        ticket: usize,
        /// What its task said.
        answer: Box<RawValue>,
        /// How long it took.
        seconds: f64,
        /// Whether another item had the same key, and this is its answer too.
        shared: bool,
    },
    /// It cannot be done, for a reason that is not its own.
    Lost {
        /// The item.
        ticket: usize,
        /// Why, and what to do.
        problem: String,
    },
    /// How a job or one of its tasks stands.
    Job {
        /// Its number in the queue, with the task.
        job: String,
        /// In a word.
        state: &'static str,
        /// Where, if it has a node.
        node: Option<String>,
        /// More words.
        why: String,
    },
    /// How many items stand where.
    Count {
        /// In the queue, or to be submitted.
        waiting: usize,
        /// At work.
        running: usize,
        /// Done.
        done: usize,
        /// What most of the waiting ones wait for.
        why: String,
    },
}

/// An item that is in the queue.
struct Flight {
    item: Item,
    /// How often its job ended through no fault of its own.
    tries: usize,
    /// Whether its task has begun it.
    began: bool,
}

/// A task of an array.
#[derive(Default)]
struct Task {
    /// Who waits for each of its items, in its order.
    flights: Vec<Vec<usize>>,
    /// Answers that came before somebody waited for them.
    early: BTreeMap<usize, (Box<RawValue>, f64)>,
    /// Those items that it has finished.
    finished: BTreeSet<usize>,
    /// Where each file of what it says was read to, by its number of starts.
    offsets: BTreeMap<usize, u64>,
    log_offset: u64,
    state: String,
    reason: String,
    node: String,
    ended: Option<Instant>,
    /// Whether it needs no more looks.
    over: bool,
}

/// One submission.
struct Batch {
    folder: PathBuf,
    name: String,
    job: Option<u64>,
    keys: Vec<Vec<String>>,
    /// Whether its tasks speak through letters.
    by_letters: bool,
    tasks: Vec<Task>,
    /// Whether this runner cancels it: it is its own, or that of a dead one.
    own: bool,
    /// What another one submits is not in the queue at once.
    seen: Instant,
}

/// What the queue says, or why it says nothing.
type Rows = Result<Vec<Row>, SlurmError>;

/// Jobs of Slurm.
pub struct Slurm {
    root: Root,
    run: String,
    folder: PathBuf,
    _locks: Vec<File>,
    common: Box<RawValue>,
    /// The shared cache as nodes are told of it, and the letters in it.
    post: Option<(String, PostBox)>,
    cluster: Cluster,
    flights: BTreeMap<usize, Flight>,
    last_flight: usize,
    batches: Vec<Batch>,
    /// Where each key stands: in which submission, task and place.
    places: HashMap<String, Vec<[usize; 3]>>,
    last_batch: usize,
    /// To be submitted, with the number of tries that they had.
    waiting: Vec<(Item, usize)>,
    gathered: Instant,
    not_before: Instant,
    /// The most tasks in one submission, where a limit on them was met.
    most_tasks: usize,
    asked: Instant,
    /// The question that is asked, and when that was.
    answer: Option<(Instant, Receiver<Rows>)>,
    silent: bool,
    /// Whether it was told that the shared cache does not answer.
    unreached: bool,
    full: bool,
    looked: Instant,
    counted: (usize, usize, usize),
    done: usize,
    /// Whether what jobs have written is of use to a person.
    keep_folder: bool,
    /// Those whose jobs' folders are removed when this ends.
    adopted: Vec<PathBuf>,
}

impl Slurm {
    /// Asks what the cluster is, and finds what other runners have in the queue. `common` is
    /// what every task is told; `store` is the shared cache where a node may see no folder,
    /// with what nodes are told of it.
    ///
    /// # Errors
    /// If there is no Slurm, or jobs of a dead runner are there and are not to be taken up.
    pub fn open(
        folder: &Path,
        run: &str,
        common: Box<RawValue>,
        store: Option<(String, Arc<Remote>)>,
        attach: bool,
    ) -> Result<Slurm, SlurmError> {
        let cluster = Cluster::ask()?;
        if let Some(theirs) = cluster.limits.now {
            let skew = theirs - now();
            if skew.abs() > MOST_SKEW {
                return Err(SlurmError::Clock(duration(skew.abs())));
            }
        }
        let root = Root::open(folder)?;
        let alone = root.alone()?;
        let (own, lock) = root.make(run)?;
        let post = match store {
            None => None,
            Some((told, remote)) => {
                let post = PostBox::open(remote, root.path())?;
                post.watch(run);
                Some((told, post))
            }
        };
        let now = Instant::now();
        let mut slurm = Slurm {
            root,
            run: run.to_owned(),
            folder: own,
            _locks: vec![lock],
            common,
            post,
            cluster,
            flights: BTreeMap::new(),
            last_flight: 0,
            batches: Vec::new(),
            places: HashMap::new(),
            last_batch: 0,
            waiting: Vec::new(),
            gathered: now,
            not_before: now,
            most_tasks: usize::MAX,
            asked: now.checked_sub(ASK_AGAIN).unwrap_or(now),
            answer: None,
            silent: false,
            unreached: false,
            full: false,
            looked: now,
            counted: (0, 0, 0),
            done: 0,
            keep_folder: false,
            adopted: Vec::new(),
        };
        let found = slurm.find_left(attach);
        drop(alone);
        if found.is_err() {
            let _ = std::fs::remove_dir_all(&slurm.folder);
        }
        found.map(|()| slurm)
    }

    /// Whether what an item asks for can be had, as far as that is known before.
    ///
    /// # Errors
    /// What cannot be had, and what there is.
    pub fn check(
        &self,
        resources: &Resources,
        on_gpu: bool,
        executor: &Executor,
    ) -> Result<(), SlurmError> {
        self.cluster.check(resources, on_gpu, executor)
    }

    /// Finds what dead runners have left in the queue.
    fn find_left(&mut self, attach: bool) -> Result<(), SlurmError> {
        let mut left = Vec::new();
        for (folder, lock) in self.root.others(&self.run)? {
            let Some(lock) = lock else { continue };
            let mut batches = self.batches_of(&folder, true)?;
            batches.retain(|batch| batch.job.is_some());
            let jobs: Vec<u64> = batches.iter().filter_map(|batch| batch.job).collect();
            let rows = if jobs.is_empty() { Vec::new() } else { commands::queue(&jobs)? };
            let lives =
                |job: &u64| rows.iter().any(|row| row.job == *job && !has_ended(&row.state));
            let living: Vec<u64> = jobs.iter().copied().filter(lives).collect();
            let run = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if living.is_empty() {
                if let Some((_, post)) = &self.post {
                    post.clear(&run);
                }
                drop(lock);
                remove(&folder);
                continue;
            }
            if attach && self.post.is_none() && batches.iter().any(|batch| batch.by_letters) {
                return Err(SlurmError::Post(format!(
                    "jobs of run {} speak through a shared cache; name it with `--cache`, as that \
                     run did",
                    shown(&run)
                )));
            }
            if attach {
                if let Some((_, post)) = &self.post {
                    post.watch(&run);
                }
                // Whoever looks at it now finds a living runner.
                self._locks.push(lock);
                self.adopted.push(folder);
                batches.into_iter().for_each(|batch| self.add(batch));
            } else {
                left.push((folder, living));
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        let runs: Vec<String> = left
            .iter()
            .map(|(folder, jobs)| {
                let run = folder.file_name().unwrap_or_default().to_string_lossy();
                let jobs: Vec<String> = jobs.iter().map(u64::to_string).collect();
                format!("{} of run {}", jobs.join(", "), shown(&run))
            })
            .collect();
        let jobs = left.iter().flat_map(|(_, jobs)| jobs).map(u64::to_string);
        Err(SlurmError::Left(runs.join("; "), jobs.collect::<Vec<_>>().join(" ")))
    }

    /// The submissions in a run's folder. Of a dead runner's the queue is asked whether one
    /// whose number was not written down came through.
    fn batches_of(&self, run: &Path, dead: bool) -> Result<Vec<Batch>, SlurmError> {
        let mut batches = Vec::new();
        for (_, folder) in folder::batches_in(run) {
            if self.batches.iter().any(|batch| batch.folder == folder) {
                continue;
            }
            // Without its head it was never submitted.
            let Ok(head) = read::<Head>(&folder.join("head.json")) else { continue };
            let job = match job_in(&folder) {
                None if dead => commands::job_called(&head.name)?,
                job => job,
            };
            let tasks = head
                .keys
                .iter()
                .map(|keys| Task { flights: vec![Vec::new(); keys.len()], ..Task::default() });
            batches.push(Batch {
                tasks: tasks.collect(),
                folder,
                name: head.name,
                job,
                keys: head.keys,
                by_letters: head.by_letters,
                own: dead,
                seen: Instant::now(),
            });
        }
        Ok(batches)
    }

    /// Leaves everything as it was found: jobs that were taken up are in the queue as before.
    pub fn leave(self) {
        if let Some((_, post)) = &self.post {
            post.clear(&self.run);
        }
        remove(&self.folder);
    }

    /// What of dead runners was taken up, a line each.
    pub fn taken_up(&self) -> Vec<String> {
        let lines = self.adopted.iter().map(|folder| {
            let of = |batch: &&Batch| batch.folder.starts_with(folder);
            let batches: Vec<&Batch> = self.batches.iter().filter(of).collect();
            let jobs: Vec<String> =
                batches.iter().filter_map(|b| b.job).map(|job| job.to_string()).collect();
            let items: usize = batches.iter().flat_map(|b| &b.keys).map(Vec::len).sum();
            let run = folder.file_name().unwrap_or_default().to_string_lossy();
            format!(
                "slurm: took up {} items of run {} (jobs {})",
                grouped(items),
                shown(&run),
                jobs.join(", ")
            )
        });
        lines.collect()
    }

    /// Takes an item, to be submitted soon with others like it, or finds it in the queue.
    pub fn hand_over(&mut self, item: Item) {
        self.gathered = Instant::now();
        self.waiting.push((item, 0));
    }

    /// How long to wait at most before the next [`Slurm::step`].
    pub fn pause(&self) -> Duration {
        LOOK.saturating_sub(self.looked.elapsed()).max(Duration::from_millis(2))
    }

    /// Submits what is to be submitted, and looks at what is in the queue. `more` says whether
    /// further items may come at once.
    pub fn step(&mut self, more: bool) -> Vec<News> {
        let mut news = Vec::new();
        let gathered = !more || self.gathered.elapsed() > GATHER;
        if !self.waiting.is_empty() && gathered && Instant::now() >= self.not_before {
            self.submit(&mut news);
        }
        if self.looked.elapsed() >= LOOK {
            self.looked = Instant::now();
            self.listen(&mut news);
            self.tell_of_letters(&mut news);
            self.ask(&mut news);
            self.bury(&mut news);
            self.count(&mut news);
        }
        news
    }

    /// Finds in the queue what other submissions hold, and submits the rest.
    fn submit(&mut self, news: &mut Vec<News>) {
        let waiting = std::mem::take(&mut self.waiting);
        if let Err(error) = self.try_submit(waiting, news) {
            // Something of the folder: the next try may go well, and is bounded by the user.
            self.wait_for_room(&error.to_string(), news);
        }
    }

    fn try_submit(
        &mut self,
        waiting: Vec<(Item, usize)>,
        news: &mut Vec<News>,
    ) -> Result<(), SlurmError> {
        let mut waiting = waiting;
        let alone = match self.root.alone() {
            Ok(alone) => alone,
            Err(error) => {
                self.waiting = waiting;
                return Err(error);
            }
        };
        // What other living runners have submitted meanwhile.
        if let Ok(others) = self.root.others(&self.run) {
            for (folder, lock) in others {
                if lock.is_none() && !self.adopted.contains(&folder) {
                    let found = self.batches_of(&folder, false).unwrap_or_default();
                    found.into_iter().for_each(|batch| self.add(batch));
                }
            }
        }
        waiting.retain(|(item, tries)| !self.join(item, *tries, news));
        let mut classes: BTreeMap<Class, Vec<(Item, usize)>> = BTreeMap::new();
        let mut keys: BTreeSet<String> = BTreeSet::new();
        for (item, tries) in waiting {
            // Of two with one key the second joins the first when that stands in the queue.
            if !keys.insert(item.key.clone()) {
                self.waiting.push((item, tries));
                continue;
            }
            let class = self.cluster.class(&item.resources, item.on_gpu, &item.executor);
            classes.entry(class).or_default().push((item, tries));
        }
        if classes.is_empty() {
            return Ok(());
        }
        let mut room = match commands::jobs_kept() {
            Ok(kept) => self.cluster.limits.jobs.saturating_sub(kept + 1),
            Err(error) => {
                self.waiting.extend(classes.into_values().flatten());
                return Err(error);
            }
        };
        let mut full = room == 0;
        for (class, mut items) in classes {
            while !items.is_empty() {
                let most = self.most_tasks.min(self.cluster.limits.array).min(room);
                if full || most == 0 {
                    full = true;
                    self.waiting.append(&mut items);
                    break;
                }
                let at_once = self.cluster.at_once(&class);
                let tasks = items.len().min(at_once.saturating_mul(TASKS_EACH)).min(most);
                let mut each = items.len().div_ceil(tasks.max(1));
                if let (Some(time), Some(limit)) =
                    (class.executor.time, self.cluster.longest(&class.executor))
                {
                    each = each.min((limit / time.max(1)).max(1));
                }
                // What goes beyond the largest array is the next one's.
                let count = items.len().min(each.saturating_mul(most));
                let taken: Vec<(Item, usize)> = items.drain(..count).collect();
                match self.sbatch(&class, taken, each, &alone, news) {
                    Ok(tasks) => {
                        room = room.saturating_sub(tasks);
                        self.full = false;
                    }
                    Err(Refused::ForNow(said, mut back)) => {
                        let tasks = back.len().div_ceil(each);
                        back.append(&mut items);
                        // A limit on how many one may submit is met with fewer.
                        if tasks > 1 && is_of_quota(&said) {
                            self.most_tasks = tasks / 2;
                            items = back;
                            continue;
                        }
                        self.waiting.extend(back);
                        let ours =
                            self.batches.iter().any(|b| b.own && b.tasks.iter().any(|t| !t.over));
                        if is_of_quota(&said) && !ours {
                            for (item, _) in std::mem::take(&mut self.waiting) {
                                let problem = format!(
                                    "Slurm's limits for you are met, and none of this run's jobs \
                                     is in the queue whose end would help: {}; wait for your \
                                     other jobs, or ask for another `qos` or `account`",
                                    shown(&said)
                                );
                                news.push(News::Lost { ticket: item.ticket, problem });
                            }
                        }
                        self.wait_for_room(&said, news);
                        full = true;
                    }
                    Err(Refused::Ever(said, back)) => {
                        for (item, _) in back {
                            let problem = format!(
                                "Slurm refused the job: {}; nothing of it was computed",
                                shown(&said)
                            );
                            news.push(News::Lost { ticket: item.ticket, problem });
                        }
                    }
                }
            }
        }
        if full && room == 0 {
            let said =
                format!("the controller keeps {} jobs at most", grouped(self.cluster.limits.jobs));
            self.wait_for_room(&said, news);
        }
        drop(alone);
        Ok(())
    }

    fn wait_for_room(&mut self, said: &str, news: &mut Vec<News>) {
        self.not_before = Instant::now() + REFUSED;
        if !std::mem::replace(&mut self.full, true) {
            news.push(News::Job {
                job: String::new(),
                state: "full",
                node: None,
                why: format!(
                    "nothing can be submitted for now, and is tried again: {}",
                    shown(said)
                ),
            });
        }
    }

    fn add(&mut self, batch: Batch) {
        let number = self.batches.len();
        for (task, keys) in batch.keys.iter().enumerate() {
            for (place, key) in keys.iter().enumerate() {
                self.places.entry(key.clone()).or_default().push([number, task, place]);
            }
        }
        self.batches.push(batch);
    }

    /// Finds an item among those that are in the queue, or were.
    fn join(&mut self, item: &Item, tries: usize, news: &mut Vec<News>) -> bool {
        // An item whose job failed is not looked for where it failed.
        if tries > 0 {
            return false;
        }
        for [batch, task, place] in self.places.get(&item.key).into_iter().flatten().copied() {
            let task = &mut self.batches[batch].tasks[task];
            if let Some((answer, seconds)) = task.early.remove(&place) {
                self.done += 1;
                let (ticket, shared) = (item.ticket, false);
                news.push(News::Began { ticket });
                news.push(News::Done { ticket, answer, seconds, shared });
                return true;
            }
            if task.over || task.finished.contains(&place) {
                continue;
            }
            self.last_flight += 1;
            let flight = Flight { item: item.clone(), tries, began: false };
            self.flights.insert(self.last_flight, flight);
            task.flights[place].push(self.last_flight);
            return true;
        }
        false
    }

    /// Submits items of one class as an array; gives the number of its tasks.
    fn sbatch(
        &mut self,
        class: &Class,
        items: Vec<(Item, usize)>,
        each: usize,
        alone: &File,
        news: &mut Vec<News>,
    ) -> Result<usize, Refused> {
        self.last_batch += 1;
        let folder = self.folder.join(self.last_batch.to_string());
        let name = format!("runner-{}-{}", self.run, self.last_batch);
        let chunks: Vec<&[(Item, usize)]> = items.chunks(each.max(1)).collect();
        let tasks = chunks.len();
        let keys: Vec<Vec<String>> = chunks
            .iter()
            .map(|chunk| chunk.iter().map(|(item, _)| item.key.clone()).collect())
            .collect();
        let post = self.post.as_ref().filter(|_| class.executor.without_folder);
        let written = std::fs::create_dir_all(&folder)
            .map_err(|error| folder::io(&folder, &error))
            .and_then(|()| {
                for (task, chunk) in chunks.iter().enumerate() {
                    let items = chunk.iter().map(|(item, _)| item.order.clone()).collect();
                    folder::write(&orders_of(&folder, task), &Orders { items })?;
                    // A shared file system remembers for long that a file is not there.
                    let results = results_of(&folder, task, 0);
                    File::create(&results).map_err(|error| folder::io(&results, &error))?;
                }
                let head = Head {
                    build: build(),
                    run: self.run.clone(),
                    submitted: now(),
                    name: name.clone(),
                    keys: keys.clone(),
                    by_letters: post.is_some(),
                    common: self.common.clone(),
                };
                // With it the submission counts as made.
                folder::write(&folder.join("head.json"), &head)
            })
            .and_then(|()| match post {
                Some((_, post)) => post.send(&self.run, &folder, self.last_batch, tasks),
                None => Ok(()),
            });
        let letters = format!("{}/{}", self.run, self.last_batch);
        // On the node: a name that no other task has there.
        let log = format!("/tmp/{name}-");
        let source = match post {
            Some((store, _)) => Source::Letters { store, batch: &letters, log: &log },
            None => Source::Folder(&folder),
        };
        let script = script(class, &source);
        let output = match post {
            Some(_) => format!("{log}%a.log"),
            None => format!("{}/%a.log", folder.display()),
        };
        let path = folder.join("job.sh");
        let written = written.and_then(|()| {
            std::fs::write(&path, script).map_err(|error| folder::io(&path, &error))
        });
        if let Err(error) = written {
            remove(&folder);
            return Err(Refused::ForNow(error.to_string(), items));
        }
        let mut arguments = options(class, each);
        arguments.extend([
            "--parsable".to_owned(),
            format!("--job-name={name}"),
            format!("--array=0-{}", tasks - 1),
            format!("--output={output}"),
            "--open-mode=append".to_owned(),
            path.display().to_string(),
        ]);
        let answer = commands::ask_holding("sbatch", &arguments, Some(alone));
        let (job, said) = match answer {
            Ok(answer) if answer.good => {
                (answer.out.trim().split(';').next().and_then(|id| id.parse().ok()), answer.said)
            }
            Ok(answer) => (None, answer.said),
            Err(error) => (None, error.to_string()),
        };
        // It may have come through although nobody could say so.
        let job = match job {
            None if is_for_now(&said) => commands::job_called(&name).ok().flatten(),
            job => job,
        };
        let Some(job) = job else {
            remove(&folder);
            return Err(match is_for_now(&said) {
                true => Refused::ForNow(said, items),
                false => Refused::Ever(said, items),
            });
        };
        if let Err(error) = folder::write(&folder.join("job"), &job) {
            tracing::warn!("{error}");
        }
        let count = items.len();
        let mut batch = Batch {
            folder,
            name,
            job: Some(job),
            keys,
            by_letters: post.is_some(),
            tasks: Vec::new(),
            own: true,
            seen: Instant::now(),
        };
        let mut items = items.into_iter();
        for keys in &batch.keys {
            let mut task = Task::default();
            for (item, tries) in items.by_ref().take(keys.len()) {
                self.last_flight += 1;
                self.flights.insert(self.last_flight, Flight { item, tries, began: false });
                task.flights.push(vec![self.last_flight]);
            }
            batch.tasks.push(task);
        }
        self.add(batch);
        self.asked = Instant::now();
        let why = match (count, tasks) {
            (1, _) => "1 item".to_owned(),
            (count, 1) => format!("{} items in 1 task", grouped(count)),
            (count, tasks) => format!("{} items in {} tasks", grouped(count), grouped(tasks)),
        };
        news.push(News::Job { job: job.to_string(), state: "submitted", node: None, why });
        Ok(tasks)
    }

    /// Reads what tasks have said since the last look.
    fn listen(&mut self, news: &mut Vec<News>) {
        let Slurm { batches, flights, done, .. } = self;
        for batch in batches {
            if batch.job.is_none() {
                batch.job = job_in(&batch.folder);
            }
            for (number, task) in batch.tasks.iter_mut().enumerate() {
                if task.over {
                    continue;
                }
                let job = batch.job.map_or(String::new(), |job| format!("{job}_{number}"));
                // A task that is started again writes another file.
                let starts = task.offsets.keys().next_back().map_or(0, |last| last + 1);
                for start in 0..=starts {
                    let path = results_of(&batch.folder, number, start);
                    let known = task.offsets.get(&start).copied();
                    if known.is_none() && !path.is_file() {
                        continue;
                    }
                    let mut offset = known.unwrap_or(0);
                    for said in heard(&path, &mut offset) {
                        match said {
                            Said::Began { item, node } => {
                                task.node = node;
                                for flight in task.flights.get(item).into_iter().flatten() {
                                    let Some(flight) = flights.get_mut(flight) else { continue };
                                    if !std::mem::replace(&mut flight.began, true) {
                                        news.push(News::Began { ticket: flight.item.ticket });
                                    }
                                }
                            }
                            Said::Done { item, answer, seconds } => {
                                if !task.finished.insert(item) {
                                    continue;
                                }
                                let waiting = task.flights.get_mut(item).map(std::mem::take);
                                let waiting = waiting.unwrap_or_default().into_iter();
                                let waiting = waiting.filter_map(|flight| flights.remove(&flight));
                                let mut waiting = waiting.peekable();
                                if waiting.peek().is_none() {
                                    task.early.insert(item, (answer, seconds));
                                    continue;
                                }
                                for (place, flight) in waiting.enumerate() {
                                    *done += 1;
                                    let (ticket, shared) = (flight.item.ticket, place > 0);
                                    if !flight.began {
                                        news.push(News::Began { ticket });
                                    }
                                    let answer = answer.clone();
                                    news.push(News::Done { ticket, answer, seconds, shared });
                                }
                            }
                            Said::Refused { node, problem } => {
                                let problem = format!(
                                    "job {job} on node {}: {}",
                                    shown(&node),
                                    shown(&problem)
                                );
                                for flight in task.flights.iter_mut().flat_map(std::mem::take) {
                                    let Some(flight) = flights.remove(&flight) else { continue };
                                    let (ticket, problem) = (flight.item.ticket, problem.clone());
                                    news.push(News::Lost { ticket, problem });
                                }
                            }
                        }
                    }
                    task.offsets.insert(start, offset);
                }
                let text = folder::new_text(&log_of(&batch.folder, number), &mut task.log_offset);
                let text = String::from_utf8_lossy(&text).into_owned();
                for line in text.lines().filter(|line| !line.trim().is_empty()) {
                    let node = Some(task.node.clone()).filter(|node| !node.is_empty());
                    let (job, why) = (job.clone(), shown(line));
                    news.push(News::Job { job, state: "said", node, why });
                }
                task.over = task.finished.len() == task.flights.len();
            }
        }
    }

    /// Tells once that letters cannot be read, and once that they can be again.
    fn tell_of_letters(&mut self, news: &mut Vec<News>) {
        let Some((_, post)) = &self.post else { return };
        let (job, node) = (String::new(), None);
        match (post.trouble(), std::mem::take(&mut self.unreached)) {
            (None, false) => {}
            (None, true) => {
                let why = "the shared cache answers again".to_owned();
                news.push(News::Job { job, state: "answers", node, why });
            }
            (Some(problem), told) => {
                self.unreached = true;
                if !told {
                    let why = format!("{problem} Jobs go on, and it is asked again.");
                    news.push(News::Job { job, state: "silent", node, why });
                }
            }
        }
    }

    /// Finds the number of what another runner submits, which may have died in the act.
    fn find_numbers(&mut self) {
        for batch in self.batches.iter_mut().filter(|batch| batch.job.is_none()) {
            if batch.seen.elapsed() < UNNUMBERED {
                continue;
            }
            batch.seen = Instant::now();
            match commands::job_called(&batch.name) {
                Ok(Some(job)) => batch.job = Some(job),
                Ok(None) => {
                    for task in &mut batch.tasks {
                        GONE.clone_into(&mut task.state);
                        task.ended = Some(batch.seen);
                    }
                }
                Err(error) => tracing::debug!("{error}"),
            }
        }
    }

    /// Asks the queue now and then, beside everything else.
    fn ask(&mut self, news: &mut Vec<News>) {
        self.find_numbers();
        let question = self.answer.as_ref().map_or(self.asked, |(asked, _)| *asked);
        match self.answer.as_ref().map(|(_, answer)| answer.try_recv()) {
            None => {
                let open = |batch: &&Batch| batch.tasks.iter().any(|task| !task.over);
                let jobs = self.batches.iter().filter(open).filter_map(|batch| batch.job);
                let jobs: Vec<u64> = jobs.collect();
                if jobs.is_empty() || self.asked.elapsed() < ASK_AGAIN {
                    return;
                }
                let (sender, receiver) = channel();
                let asked = Instant::now();
                let asking = std::thread::Builder::new().spawn(move || {
                    // Nobody listens any more when the run is over.
                    let _ = sender.send(commands::queue(&jobs));
                });
                // Without a thread it is asked the next time.
                self.asked = Instant::now();
                self.answer = asking.is_ok().then_some((asked, receiver));
            }
            Some(Err(TryRecvError::Empty)) => {}
            Some(Err(TryRecvError::Disconnected)) => self.answer = None,
            Some(Ok(answer)) => {
                self.answer = None;
                self.asked = Instant::now();
                match answer {
                    Ok(rows) => {
                        if std::mem::replace(&mut self.silent, false) {
                            let why = "Slurm's controller answers again".to_owned();
                            let (job, state, node) = (String::new(), "answers", None);
                            news.push(News::Job { job, state, node, why });
                        }
                        self.note(rows, question, news);
                    }
                    Err(error) => {
                        if !std::mem::replace(&mut self.silent, true) {
                            let why = format!("{error} Its jobs go on, and it is asked again.");
                            let (job, state, node) = (String::new(), "silent", None);
                            news.push(News::Job { job, state, node, why });
                        }
                    }
                }
            }
        }
    }

    /// Notes how tasks stand in the queue.
    fn note(&mut self, rows: Vec<Row>, question: Instant, news: &mut Vec<News>) {
        let mut rows: BTreeMap<(u64, usize), Row> =
            rows.into_iter().map(|row| ((row.job, row.task), row)).collect();
        for batch in &mut self.batches {
            // What was submitted after the question is in no answer.
            let Some(job) = batch.job.filter(|_| batch.seen < question) else { continue };
            for (number, task) in batch.tasks.iter_mut().enumerate().filter(|(_, t)| !t.over) {
                let row = rows.remove(&(job, number)).unwrap_or_else(|| Row {
                    job,
                    task: number,
                    state: GONE.to_owned(),
                    reason: String::new(),
                    node: String::new(),
                });
                let name = format!("{job}_{number}");
                if row.state != task.state {
                    let ran = matches!(task.state.as_str(), "RUNNING" | "COMPLETING");
                    let why = row.reason.clone();
                    if row.state == "RUNNING" {
                        let node = Some(row.node.clone());
                        let (job, state) = (name.clone(), "running");
                        news.push(News::Job { job, state, node, why: String::new() });
                    } else if ran && !has_ended(&row.state) && row.state != "COMPLETING" {
                        let (job, state) = (name.clone(), "requeued");
                        let node = Some(task.node.clone()).filter(|node| !node.is_empty());
                        news.push(News::Job { job, state, node, why });
                    }
                }
                if !row.node.is_empty() {
                    task.node.clone_from(&row.node);
                }
                task.ended = has_ended(&row.state).then(|| task.ended.unwrap_or_else(Instant::now));
                (task.state, task.reason) = (row.state, row.reason);
            }
        }
    }

    /// Decides what becomes of items whose task has ended without a word of them, or never starts.
    fn bury(&mut self, news: &mut Vec<News>) {
        let mut hopeless = Vec::new();
        // A letter may come as late as the store is reached again.
        let post = self.post.as_ref().map(|(_, post)| post);
        let all_read = |by_letters: bool, ended: Instant| {
            !by_letters || post.is_none_or(|post| post.has_looked_since(ended + LAST_WORDS / 2))
        };
        for place in 0..self.batches.len() {
            for number in 0..self.batches[place].tasks.len() {
                let batch = &mut self.batches[place];
                let by_letters = batch.by_letters;
                let task = &mut batch.tasks[number];
                let ended = task.ended.filter(|ended| ended.elapsed() > LAST_WORDS);
                let ended = ended.is_some_and(|ended| all_read(by_letters, ended));
                let never = never_starts(&task.state, &task.reason);
                if task.over || !(ended || never.is_some()) {
                    continue;
                }
                task.over = true;
                let own = batch.own;
                let job = batch.job;
                let name = job.map_or(String::new(), |job| format!("{job}_{number}"));
                let (state, reason) = (task.state.clone(), task.reason.clone());
                let node = Some(task.node.clone()).filter(|node| !node.is_empty());
                let log = log_of(&batch.folder, number);
                let flights: Vec<usize> =
                    task.flights.iter_mut().flat_map(std::mem::take).collect();
                if never.is_some() && batch.own {
                    hopeless.push(name.clone());
                }
                if flights.is_empty() {
                    continue;
                }
                let end = match never {
                    Some(problem) => problem,
                    None => {
                        let asked = job.and_then(|job| commands::ending(job, number));
                        let (state, exit) = asked.unwrap_or((state, String::new()));
                        Ending::of(&state, &exit, &reason)
                    }
                };
                let place =
                    node.as_ref().map_or(String::new(), |node| format!(" on {}", shown(node)));
                let said = last_line(&log)
                    .map_or(String::new(), |said| format!("; it said: {}", shown(&said)));
                let flights = flights.into_iter().filter_map(|flight| self.flights.remove(&flight));
                let flights: Vec<Flight> = flights.collect();
                let any_began = flights.iter().any(|flight| flight.began);
                for flight in flights {
                    let Flight { item, tries, began } = flight;
                    // Others of the task were not at work when it ended.
                    let blamed = began || !any_began;
                    let again = match end.again {
                        // What becomes of another runner's job is its affair.
                        _ if !own => Some(tries),
                        _ if !blamed && end.spares_others => Some(tries),
                        true if tries < item.executor.retries => Some(tries + 1),
                        _ => None,
                    };
                    match again {
                        Some(tries) => {
                            if blamed {
                                let why = format!(
                                    "{}; {} is submitted again{said}",
                                    end.words, item.name
                                );
                                let (job, node) = (name.clone(), node.clone());
                                news.push(News::Job { job, state: "lost", node, why });
                            }
                            self.gathered = Instant::now();
                            self.waiting.push((item, tries.max(1)));
                        }
                        None => {
                            self.keep_folder = true;
                            let times = match tries {
                                0 => String::new(),
                                tries => format!(", as {tries} before it"),
                            };
                            let problem = format!(
                                "it has no result, and the stage is not at fault: {} (job {name}{place}{times}); {}{said}; its log is `{}`",
                                end.words,
                                end.help,
                                log.as_path().shown()
                            );
                            news.push(News::Lost { ticket: item.ticket, problem });
                        }
                    }
                }
            }
        }
        if !hopeless.is_empty()
            && let Err(error) = commands::cancel(&hopeless)
        {
            tracing::warn!("{error}");
        }
    }

    fn count(&mut self, news: &mut Vec<News>) {
        let running = self.flights.values().filter(|flight| flight.began).count();
        let waiting = self.waiting.len() + self.flights.len() - running;
        let counted = (waiting, running, self.done);
        if counted == self.counted {
            return;
        }
        self.counted = counted;
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for task in self.batches.iter().flat_map(|batch| &batch.tasks) {
            if !task.over && task.state == "PENDING" {
                *reasons.entry(&task.reason).or_default() += 1;
            }
        }
        let most = reasons.into_iter().max_by_key(|(_, count)| *count);
        let why = most.map_or(String::new(), |(reason, _)| shown(reason));
        news.push(News::Count { waiting, running, done: self.done, why });
    }

    /// Cancels everything that this runner has in the queue, and waits until it is gone.
    pub fn cancel(&mut self) {
        const PATIENCE: Duration = Duration::from_secs(30);
        let started = Instant::now();
        (self.waiting, self.flights) = (Vec::new(), BTreeMap::new());
        let own: Vec<u64> = self.batches.iter().filter(|b| b.own).filter_map(|b| b.job).collect();
        loop {
            let rows = if own.is_empty() { Ok(Vec::new()) } else { commands::queue(&own) };
            let living: BTreeSet<u64> = match rows {
                Ok(rows) => {
                    rows.into_iter().filter(|row| !has_ended(&row.state)).map(|r| r.job).collect()
                }
                Err(_) => own.iter().copied().collect(),
            };
            let names: Vec<String> = living.iter().map(u64::to_string).collect();
            if names.is_empty() {
                return;
            }
            if let Err(error) = commands::cancel(&names) {
                tracing::warn!("{error}");
            }
            if started.elapsed() > PATIENCE {
                self.keep_folder = true;
                let names = names.join(" ");
                tracing::warn!("jobs may be left in the queue: `scancel {names}` cancels them");
                return;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Ends: what is left in the queue is of no use to this run and is cancelled.
    pub fn finish(mut self) {
        self.cancel();
        for folder in self.adopted.iter().chain([&self.folder]) {
            if let Some((_, post)) = &self.post {
                post.clear(&folder.file_name().unwrap_or_default().to_string_lossy());
            }
            if !self.keep_folder {
                remove(folder);
            }
        }
    }
}

/// Why a submission was refused, with what was to be submitted.
enum Refused {
    ForNow(String, Vec<(Item, usize)>),
    Ever(String, Vec<(Item, usize)>),
}

fn job_in(batch: &Path) -> Option<u64> {
    read(&batch.join("job")).ok()
}

fn last_line(log: &Path) -> Option<String> {
    let mut offset = 0;
    let text = folder::new_text(log, &mut offset);
    let text = String::from_utf8_lossy(&text).into_owned();
    let last = text.lines().rfind(|line| !line.trim().is_empty());
    last.map(|line| line.chars().take(400).collect())
}

fn remove(folder: &Path) {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!("cannot remove `{}`: {error}", folder.shown());
        }
        _ => {}
    }
}

/// Seconds since 1970.
pub fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// A span of time, in words.
pub fn duration(seconds: i64) -> String {
    match seconds {
        s if s < 120 => format!("{s} s"),
        s if s < 7200 => format!("{} min", s / 60),
        s => format!("{} h", s / 3600),
    }
}
