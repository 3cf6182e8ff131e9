//! `runner falsify`: planted bugs and clean runs, and what the runner said to each.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{FALSIFIED, PASS, graph_of, print};
use crate::block_format::BlockFormat;
use crate::cache::{Stamps, Store};
use crate::dtype::Format;
use crate::falsify::{
    Alarm, Beside, Bug, CLEAN_MODELS, CleanRuns, CleanTally, Noise, Plot, Setting, Trial, bugs,
    chosen, clean_runs, load, not_clean, recordings, sites_of, try_bug, try_recording, vacuous,
    with_noise, with_recipe,
};
use crate::graph::{Graph, select};
use crate::manifest::{Overrides, Pipeline};
use crate::op::{Accumulate, ActivationScale, Arm, ChipName, Recipe, Scale, WeightScale};
use crate::plan::open_model;
use crate::terminal::tell_line;
use crate::verdict::Verdict;

#[derive(Args)]
pub(super) struct FalsifyArgs {
    /// The folder of stages. Where stages of it hold a recording of every site to an engine's
    /// kernels, bugs are planted into the recording unless `--models` is given; `--recipes`,
    /// `--tokens`, `--roles`, `--noise` and `--gpu` then have no effect.
    #[arg(default_value = "stages")]
    folder: PathBuf,
    /// Models to plant into, with commas: `synthetic:<preset>`, GGUF files or folders.
    /// [default: synthetic:qwen2-tiny,synthetic:llama-tiny; for clean runs also shapes that a
    /// seed draws]
    #[arg(long, value_delimiter = ',', hide_default_value = true)]
    models: Vec<String>,
    /// GEMM formats to plant into, with commas.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "e4m3,bf16")]
    recipes: Vec<Gemm>,
    /// The prompt as token ids.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "791,374,264,1296,13,220,845,1021,7,99,512,3,1847,60,411,2"
    )]
    tokens: Vec<u32>,
    /// The stages to run; all by default.
    #[arg(long)]
    select: Option<String>,
    /// Only bugs whose names contain this text.
    #[arg(long)]
    bugs: Option<String>,
    /// Decides at which layer, column or block each bug is planted.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only every Nth bug.
    #[arg(long, default_value_t = NonZeroUsize::MIN)]
    every: NonZeroUsize,
    /// Arms that carry the bugs.
    #[arg(long, value_delimiter = ',', default_value = "emulated,device")]
    roles: Vec<Arm>,
    /// Let this machine's GPU compute the device arm beside a planted emulated one,
    /// so that a change on one side stands against real hardware.
    #[arg(long)]
    gpu: bool,
    /// Plant into an engine whose every op carries this noise besides; with commas. Such an
    /// engine is judged by the contract `engine`, at the stages that capture every site.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "none")]
    noise: Vec<Noise>,
    /// Clean runs, each with another prompt, recipe and model.
    #[arg(long, default_value_t = 0)]
    clean: u64,
    /// The number of the first clean run; with `--clean 1` it repeats one of them.
    #[arg(long, default_value_t = 0)]
    clean_from: u64,
    /// Plant nothing: only the clean runs.
    #[arg(long, requires = "clean")]
    clean_only: bool,
    /// Write every trial to this file, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Gemm {
    E4m3,
    E5m2,
    Bf16,
    F16,
    Int8,
    Mxfp8,
    Mxfp4,
    Nvfp4,
}

impl Gemm {
    /// The recipe with these operands; block-scaled ones are Blackwell's.
    fn of(self, base: &Recipe) -> Recipe {
        let single = |gemm| Recipe { gemm, ..*base };
        let blocks = |format: BlockFormat| Recipe {
            gemm: format.element(),
            scale: Scale::of_blocks(format),
            accumulate: Accumulate::Fast,
            chip: ChipName::Blackwell,
            ..*base
        };
        match self {
            Gemm::E4m3 => single(Format::E4m3),
            Gemm::E5m2 => single(Format::E5m2),
            Gemm::Bf16 => single(Format::Bf16),
            Gemm::F16 => single(Format::F16),
            // Per tensor, as the folder's recipe, or as every engine of this format has it.
            Gemm::Int8 => Recipe {
                scale: Scale { weight: WeightScale::Channel, activation: ActivationScale::Token },
                ..single(Format::Int8)
            },
            Gemm::Mxfp8 => blocks(BlockFormat::Mxfp8),
            Gemm::Mxfp4 => blocks(BlockFormat::Mxfp4),
            Gemm::Nvfp4 => blocks(BlockFormat::Nvfp4),
        }
    }
}

/// Runs the catalogue and the clean runs, prints the tables.
pub(super) fn falsify(args: &FalsifyArgs) -> Result<u8, String> {
    let wanted: Vec<_> = bugs(args.bugs.as_deref()).into_iter().step_by(args.every.get()).collect();
    if wanted.is_empty() {
        return Err(
            "no bug of the catalogue has such a name; leave `--bugs` out for all".to_owned()
        );
    }
    let folder = tempfile::tempdir().map_err(|error| format!("cannot make a folder: {error}"))?;
    let (store, stamps) = (Store::new(folder.path()), Stamps::forgetful());
    let beside = Beside::new(&store, args.gpu)?;
    let mut trials = Vec::new();
    let mut silent: Option<BTreeSet<String>> = None;
    let of_recordings = match args.models.is_empty() && !args.clean_only {
        true => into_recordings(args, &wanted, &beside, &store)?,
        false => None,
    };
    let planted_already = of_recordings.is_some();
    trials.extend(of_recordings.into_iter().flatten());
    let tiny = ["synthetic:qwen2-tiny", "synthetic:llama-tiny"].map(str::to_owned);
    let models = if args.models.is_empty() { tiny.as_slice() } else { args.models.as_slice() };
    for model in models.iter().filter(|_| !args.clean_only && !planted_already) {
        let whole = load(&args.folder, model, Some(args.tokens.clone()))?;
        let mut of_model = Vec::new();
        for &noise in &args.noise {
            let pipeline = with_noise(&whole, noise)?;
            let graph = graph_of(&pipeline)?;
            let stages = match &args.select {
                None => pipeline.stages.iter().map(|stage| stage.id.clone()).collect(),
                Some(text) => select(&graph, &pipeline.stages, text).map_err(|e| e.to_string())?,
            };
            let base = pipeline.stages.first().ok_or("the folder has no stage")?;
            let open = open_model(&base.model, base.seed, &store, &stamps)?;
            for gemm in &args.recipes {
                let recipe = gemm.of(&base.recipe);
                for (number, bug) in wanted.iter().enumerate() {
                    if !bug.may_be_in(&recipe) {
                        continue;
                    }
                    let seed = args.seed.wrapping_mul(1009).wrapping_add(number as u64);
                    let sites = sites_of(bug, &open.model, &recipe);
                    let Some(site) = sites.get(chosen(seed, sites.len())).cloned() else {
                        // A model of one layer has no layer before.
                        continue;
                    };
                    // An engine of somebody else's stands for the device, and repeats and batches of
                    // it are not at hand.
                    if noise != Noise::None && (bug.of_repeats || bug.in_batch) {
                        continue;
                    }
                    let reference = bug.of_repeats.then_some(Arm::Reference);
                    let roles = if noise == Noise::None { &*args.roles } else { &[Arm::Device] };
                    for &role in roles.iter().chain(&reference) {
                        let pipeline = with_recipe(&pipeline, recipe);
                        let setting = Setting {
                            name: match noise {
                                Noise::None => format!("{} {}", short(model), recipe.operands()),
                                noise => format!(
                                    "{} {}, {}",
                                    short(model),
                                    recipe.operands(),
                                    noise.in_words()
                                ),
                            },
                            pipeline: &pipeline,
                            graph: &graph,
                            stages: &stages,
                            store: &store,
                            beside: &beside,
                        };
                        let plot = Plot { bug, site: site.clone(), seed, role, noise };
                        let trial = try_bug(&setting, plot)?;
                        tell_line(&line_of(&trial));
                        of_model.push(trial);
                    }
                }
            }
        }
        let pipeline = &whole;
        let stages = pipeline.stages.iter().map(|stage| stage.id.clone()).collect();
        let never: BTreeSet<String> = vacuous(pipeline, &stages, &of_model).into_iter().collect();
        silent = Some(match silent {
            None => never,
            Some(silent) => silent.intersection(&never).cloned().collect(),
        });
        trials.extend(of_model);
    }
    let tally = clean(args)?;
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&trials).map_err(|error| error.to_string())?;
        crate::cache::write_whole(path, json.as_bytes()).map_err(|error| error.to_string())?;
    }
    // A part of the catalogue says nothing of the falsifiers that it leaves alone.
    let whole_catalogue = args.bugs.is_none()
        && args.every.get() == 1
        && args.select.is_none()
        && !planted_already
        && args.noise.contains(&Noise::None);
    let silent: Vec<String> =
        silent.unwrap_or_default().into_iter().filter(|_| whole_catalogue).collect();
    let (text, good) = report(&trials, &tally, args.clean, &silent);
    print(&text)?;
    Ok(if good { PASS } else { FALSIFIED })
}

/// Plants into the recordings that the folder's stages hold to an engine's kernels; nothing where
/// they hold none.
fn into_recordings(
    args: &FalsifyArgs,
    wanted: &[&'static Bug],
    beside: &Beside,
    store: &Store,
) -> Result<Option<Vec<Trial>>, String> {
    let whole = crate::manifest::load(&args.folder, &Overrides::default())
        .map_err(|problems| problems.render(false))?;
    let groups = recordings(&whole);
    if groups.is_empty() {
        return Ok(None);
    }
    let folder = tempfile::tempdir().map_err(|error| format!("cannot make a folder: {error}"))?;
    let mut trials = Vec::new();
    for (name, pipeline) in &groups {
        let graph = graph_of(pipeline)?;
        let stages: BTreeSet<_> = match &args.select {
            None => pipeline.stages.iter().map(|stage| stage.id.clone()).collect(),
            // Those of other recordings are no stages of this group.
            Some(text) => {
                let all = select(&graph_of(&whole)?, &whole.stages, text);
                let all: BTreeSet<_> = all.map_err(|error| error.to_string())?;
                let own = pipeline.stages.iter().map(|stage| stage.id.clone());
                own.filter(|id| all.contains(id)).collect()
            }
        };
        let Some(base) = pipeline.stages.iter().find(|stage| stages.contains(&stage.id)) else {
            continue;
        };
        let setting = Setting {
            name: format!("{name}, recorded"),
            pipeline,
            graph: &graph,
            stages: &stages,
            store,
            beside,
        };
        if let Some(problem) = not_clean(&setting)? {
            return Err(problem);
        }
        let open = open_model(&base.model, base.seed, store, &beside.stamps)?;
        for (number, bug) in wanted.iter().enumerate() {
            // Repeats and batches of an engine are not at hand.
            let of_passes = bug.of_repeats || bug.in_batch;
            if of_passes || !bug.may_be_in(&base.recipe) {
                continue;
            }
            let seed = args.seed.wrapping_mul(1009).wrapping_add(number as u64);
            let sites = sites_of(bug, &open.model, &base.recipe);
            let Some(site) = sites.get(chosen(seed, sites.len())).cloned() else {
                // A model of one layer has no layer before.
                continue;
            };
            let (role, noise) = (Arm::Recorded, Noise::None);
            let plot = Plot { bug, site, seed, role, noise };
            let trial = try_recording(&setting, plot, folder.path())?;
            tell_line(&line_of(&trial));
            trials.push(trial);
        }
    }
    // Where nothing could be planted nothing was tried, and that is no pass.
    if trials.iter().all(|trial| trial.error.is_some()) {
        let why = trials.into_iter().find_map(|trial| trial.error).unwrap_or_else(|| {
            "`--select` names no stage that holds a recording to an engine's kernels, or no bug of \
             `--bugs` is for one"
                .to_owned()
        });
        return Err(format!("no bug was planted: {why}"));
    }
    Ok(Some(trials))
}

fn short(model: &str) -> &str {
    let name = model.rsplit('/').next().unwrap_or(model);
    name.strip_prefix("synthetic:").unwrap_or(name)
}

fn line_of(trial: &Trial) -> String {
    let found = trial.found.first().map_or("-", |site| site.0.as_str());
    format!(
        "{:22} {:9} {:50} {:20} moved {:9.3e}  {:9} {:20} {}",
        trial.setting,
        trial.role,
        trial.bug,
        trial.site,
        trial.effect.moved,
        if trial.detected { "detected" } else { "-" },
        found,
        trial.named.as_deref().unwrap_or("-")
    )
}

/// Clean runs over models, recipes and prompts that the seed draws.
fn clean(args: &FalsifyArgs) -> Result<CleanTally, String> {
    let models: Vec<String> = match args.models.is_empty() {
        true => CLEAN_MODELS.map(str::to_owned).to_vec(),
        false => args.models.clone(),
    };
    let selected = |graph: &Graph, pipeline: &Pipeline| match &args.select {
        None => Ok(pipeline.stages.iter().map(|stage| stage.id.clone()).collect()),
        Some(text) => select(graph, &pipeline.stages, text).map_err(|e| e.to_string()),
    };
    let runs = CleanRuns {
        folder: &args.folder,
        models: &models,
        seed: args.seed,
        numbers: args.clean_from..args.clean_from.saturating_add(args.clean),
        selected: &selected,
        gpu: args.gpu,
    };
    clean_runs(&runs, &|alarm| {
        let Alarm { setting, stage, verdict, why } = alarm;
        tell_line(&format!("clean: {setting}, stage {stage}: {verdict}: {why}"));
    })
}

/// Of so few trials each verdict is told in full.
const TOLD: usize = 4;

/// Counts of one group of trials.
#[derive(Default)]
struct Score {
    trials: usize,
    detected: usize,
    located: usize,
    named: usize,
}

impl Score {
    fn of<'t>(trials: impl Iterator<Item = &'t Trial>) -> Score {
        let mut score = Score::default();
        for trial in trials {
            score.trials += 1;
            score.detected += usize::from(trial.detected);
            score.located += usize::from(trial.detected && trial.located());
            score.named += usize::from(trial.detected && trial.named_right());
        }
        score
    }

    /// One line of the table; whole passes have no place that could be named.
    fn row(&self, name: &str, placed: bool) -> String {
        let share = |count: usize| match self.trials {
            0 => "-".to_owned(),
            all => format!("{count} ({:.1} %)", 100.0 * count as f64 / all as f64),
        };
        format!(
            "{name:48} {:>6} {:>15} {:>15} {:>15}\n",
            self.trials,
            share(self.detected),
            if placed { share(self.located) } else { "-".to_owned() },
            share(self.named)
        )
    }
}

/// The tables, and whether all is as it must be.
fn report(trials: &[Trial], tally: &CleanTally, clean: u64, silent: &[String]) -> (String, bool) {
    let CleanTally { stages, alarms } = tally;
    let real: Vec<&Trial> = trials.iter().filter(|trial| trial.effect.changed > 0).collect();
    let idle: BTreeSet<&str> =
        trials.iter().filter(|trial| trial.effect.changed == 0).map(|t| t.bug.as_str()).collect();
    let mut text = String::new();
    if trials.len() <= TOLD {
        for trial in trials {
            let _ = writeln!(text, "planted: {} at {} ({})", trial.bug, trial.site, trial.role);
            let _ = writeln!(text, "stage {}\n", trial.why);
        }
    }
    let group = |role: Arm, above: bool| {
        let of_group = move |t: &&Trial| {
            t.noise == Noise::None && !t.of_passes && t.role == role && t.above_floor() == above
        };
        Score::of(real.iter().copied().filter(of_group))
    };
    text += &format!(
        "{:48} {:>6} {:>15} {:>15} {:>15}\n",
        "planted", "trials", "detected", "located", "named"
    );
    let above = group(Arm::Emulated, true);
    let with_device = [group(Arm::Device, true), group(Arm::Device, false)];
    let of_passes = Score::of(real.iter().copied().filter(|trial| trial.of_passes));
    let recorded = [group(Arm::Recorded, true), group(Arm::Recorded, false)];
    if trials.iter().any(|trial| trial.role == Arm::Recorded) {
        text += &recorded[0].row("into a recording, above the floor", true);
        text += &recorded[1].row("into a recording, below the floor", true);
    } else if trials.iter().any(|trial| trial.noise == Noise::None) {
        text += &above.row("without a device, above the floor", true);
        text += &group(Arm::Emulated, false).row("without a device, below the floor", true);
        text += &with_device[0].row("with a device, above the floor", true);
        text += &with_device[1].row("with a device, below the floor", true);
        text += &of_passes.row("told by repeats or batches of a whole pass", false);
    }
    let mut with_noise = Vec::new();
    for noise in [Noise::Ulp, Noise::Bf16, Noise::Order] {
        let of_noise = |t: &&Trial| t.noise == noise && t.above_floor();
        let score = Score::of(real.iter().copied().filter(of_noise));
        if score.trials > 0 {
            let name = format!("{}, above the floor", noise.in_words());
            text += &score.row(&name, true);
            with_noise.push(score);
        }
    }
    text += &confusion(&real);
    text += &misses(&real);
    if !idle.is_empty() {
        let idle: Vec<&str> = idle.into_iter().collect();
        let _ = writeln!(
            text,
            "\nchanged nothing in some setting (no such tensor, or equal operands): {}",
            idle.join("; ")
        );
    }
    if !silent.is_empty() {
        let _ = writeln!(text, "\nfalsifiers that fired on nothing: {}", silent.join(", "));
    }
    if trials.is_empty() {
        text.clear();
    }
    let count = |verdict| alarms.iter().filter(|alarm| alarm.verdict == verdict).count();
    let (drift, unmeasured) = (count(Verdict::Drift), count(Verdict::Unmeasured));
    let false_alarms = alarms.len() - drift - unmeasured;
    if clean > 0 {
        let _ = writeln!(
            text,
            "\nclean runs: {clean}, of {stages} stages; false alarms: {false_alarms}; stages with \
             drift beyond a budget: {drift}; stages with too few values to measure: {unmeasured}"
        );
    }
    let whole = |score: &Score| score.detected == score.trials && score.located == score.trials;
    let told = of_passes.detected == of_passes.trials;
    let good = whole(&above)
        && with_device.iter().all(whole)
        && whole(&recorded[0])
        && with_noise.iter().all(whole)
        && told
        && false_alarms == 0;
    (text, good)
}

/// What was named for each expected cause.
fn confusion(trials: &[&Trial]) -> String {
    let mut table: BTreeMap<(&str, &str), BTreeMap<&str, usize>> = BTreeMap::new();
    for trial in trials.iter().filter(|trial| trial.detected) {
        let expected = trial.expected.first().map_or("", String::as_str);
        let named = match &trial.named {
            Some(named) if trial.named_right() => named.as_str(),
            Some(named) => named.as_str(),
            None => "(no name)",
        };
        let floor = if trial.above_floor() { "above" } else { "below" };
        *table.entry((expected, floor)).or_default().entry(named).or_default() += 1;
    }
    let mut text = format!("\n{:24} {:6} named as\n", "planted cause", "floor");
    for ((expected, floor), named) in table {
        let mut named: Vec<(&str, usize)> = named.into_iter().collect();
        named.sort_by_key(|(name, count)| (std::cmp::Reverse(*count), *name));
        let named: Vec<String> =
            named.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let _ = writeln!(text, "{expected:24} {floor:6} {}", named.join(", "));
    }
    text
}

/// Every bug that should have been found or named and was not.
fn misses(trials: &[&Trial]) -> String {
    let mut text = String::new();
    for trial in trials {
        let must = trial.above_floor() || (trial.role == Arm::Device && trial.noise == Noise::None);
        let problem = if !must {
            continue;
        } else if !trial.detected {
            "not detected".to_owned()
        } else if !trial.of_passes && !trial.located() {
            let found: Vec<&str> = trial.found.iter().map(|site| site.0.as_str()).collect();
            format!(
                "located at {}",
                if found.is_empty() { "no site".to_owned() } else { found.join(", ") }
            )
        } else if !trial.named_right() {
            format!("named {}", trial.named.as_deref().unwrap_or("nothing"))
        } else {
            continue;
        };
        let _ = writeln!(
            text,
            "{} as {}: {} at {} (moved {:.2} floors): {problem}; {}",
            trial.setting,
            trial.role,
            trial.bug,
            trial.site,
            trial.effect.moved,
            trial.error.as_deref().unwrap_or(&trial.sentence)
        );
    }
    if text.is_empty() { text } else { format!("\nmissed:\n{text}") }
}
