//! What `pipeline.toml` sets for every stage and a stage may set for itself:
//! model, prompt, seed, arms, recipe, resources.
//!
//! It knows neither ops nor contracts, and reads no model.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::Path;

use super::executor::{Executor, RawExecutor};
use super::fields::{Fields, Put, choose};
use super::problem::{At, Findings, Problem, quoted_list};
use super::{Overrides, Prompt, Resources};
use crate::block_format::BlockFormat;
use crate::chip::chip as chip_of;
use crate::dtype::Format;
use crate::engine::{Activations, EngineFile, EngineKernels};
use crate::op::{
    Accumulate, ActivationScale, Arm, ChipName, Codes, Pin, Recipe, Scale, WeightScale,
};

/// The settings as one file writes them; what it leaves out is inherited.
#[derive(Clone, Debug, Default)]
pub(super) struct RawSettings {
    model: Option<Put<String>>,
    tokens: Option<Put<Vec<Put<i64>>>>,
    prompt: Option<Put<String>>,
    chat: Option<Put<bool>>,
    system: Option<Put<String>>,
    seed: Option<Put<u64>>,
    arms: Option<Put<Vec<Put<String>>>>,
    recipe: RawRecipe,
    resources: RawResources,
    executor: RawExecutor,
}

/// `[resources]`, inherited key by key.
#[derive(Clone, Debug, Default)]
struct RawResources {
    threads: Option<Put<NonZeroUsize>>,
    cores: Option<Put<usize>>,
    memory: Option<Put<usize>>,
    gpus: Option<Put<usize>>,
    gpu_memory: Option<Put<usize>>,
}

/// `[recipe]`, inherited key by key.
#[derive(Clone, Debug, Default)]
struct RawRecipe {
    gemm: Option<Put<Gemm>>,
    weight: Option<Put<WeightScale>>,
    activation: Option<Put<ActivationScale>>,
    accumulate: Option<Put<Accumulate>>,
    output: Option<Put<Format>>,
    stream: Option<Put<Format>>,
    engine: Option<Put<EngineFile>>,
    decoded: Option<Put<usize>>,
    batch: Option<Put<NonZeroU32>>,
    chip: Option<Put<ChipName>>,
    algorithm: Option<Put<u32>>,
    tile: Option<Put<u32>>,
    stages: Option<Put<u32>>,
    split_k: Option<Put<NonZeroU32>>,
    kv_cache: Option<Put<Option<Format>>>,
    tensor_parallel: Option<Put<NonZeroU32>>,
}

/// The settings that hold for one stage.
pub(super) struct Settings {
    pub model: String,
    pub prompt: Prompt,
    pub seed: u64,
    pub arms: Vec<Arm>,
    pub recipe: Recipe,
    pub resources: Resources,
    pub executor: Executor,
}

const KV_CACHES: [(&str, Option<Format>); 5] = [
    ("none", None),
    ("bf16", Some(Format::Bf16)),
    ("f16", Some(Format::F16)),
    ("e4m3", Some(Format::E4m3)),
    ("e5m2", Some(Format::E5m2)),
];

const FORMATS: [(&str, Format); Format::ALL.len()] = {
    let mut named = [("", Format::F32); Format::ALL.len()];
    let mut place = 0;
    while place < named.len() {
        named[place] = (Format::ALL[place].name(), Format::ALL[place]);
        place += 1;
    }
    named
};
/// What the products of a recipe are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gemm {
    Format(Format),
    Blocks(BlockFormat),
    Checkpoint,
}

impl Gemm {
    /// The operands' format; of a checkpoint that of its codes.
    fn format(self) -> Format {
        match self {
            Gemm::Format(format) => format,
            Gemm::Blocks(format) => format.element(),
            Gemm::Checkpoint => Format::E4m3,
        }
    }
}

const BLOCK_FORMATS: usize = BlockFormat::ALL.len();
const GEMMS: [(&str, Gemm); FORMATS.len() + BLOCK_FORMATS + 1] = {
    let mut named = [("checkpoint", Gemm::Checkpoint); FORMATS.len() + BLOCK_FORMATS + 1];
    let mut place = 0;
    while place < FORMATS.len() {
        named[place] = (FORMATS[place].0, Gemm::Format(FORMATS[place].1));
        place += 1;
    }
    let mut block = 0;
    while block < BLOCK_FORMATS {
        let format = BlockFormat::ALL[block];
        named[place + block] = (format.name(), Gemm::Blocks(format));
        block += 1;
    }
    named
};
const WEIGHT_SCALES: [(&str, WeightScale); 3] = [
    ("tensor", WeightScale::Tensor),
    ("channel", WeightScale::Channel),
    ("block128", WeightScale::Block128),
];
const ACTIVATION_SCALES: [(&str, ActivationScale); 3] = [
    ("tensor", ActivationScale::Tensor),
    ("token", ActivationScale::Token),
    ("block128", ActivationScale::Block128),
];
const ACCUMULATIONS: [(&str, Accumulate); 2] =
    [("fast", Accumulate::Fast), ("promoted", Accumulate::Promoted)];
const CHIPS: [(&str, ChipName); ChipName::ALL.len()] = {
    let mut named = [("", ChipName::Auto); ChipName::ALL.len()];
    let mut place = 0;
    while place < named.len() {
        named[place] = (ChipName::ALL[place].name(), ChipName::ALL[place]);
        place += 1;
    }
    named
};

impl RawSettings {
    /// Reads the settings out of a manifest. A relative path of a model file is
    /// one from that manifest's folder.
    pub fn read(fields: &mut Fields<'_>, folder: &Path, findings: &mut Findings) -> RawSettings {
        let settings = RawSettings {
            model: fields
                .take::<String>("model", findings)
                .map(|model| model.map(|name| from_folder(name, folder))),
            tokens: fields.list("tokens", findings),
            prompt: fields.take("prompt", findings),
            chat: fields.take("chat", findings),
            system: fields.take("system", findings),
            seed: fields.take("seed", findings),
            arms: fields.list("arms", findings),
            recipe: RawRecipe::read(fields, folder, findings),
            resources: RawResources::read(fields, findings),
            executor: RawExecutor::read(fields, findings),
        };
        if let (Some(tokens), Some(prompt)) = (&settings.tokens, &settings.prompt) {
            let problem = Problem::new(
                "`tokens` and `prompt` are both given",
                "keep one of them: `tokens` are the prompt's numbers, `prompt` is its text",
            )
            .at_if(prompt.at.as_ref(), "the text")
            .at_if(tokens.at.as_ref(), "the numbers");
            findings.push(problem);
        }
        settings.refuse_chat_of_nothing(findings);
        settings
    }

    /// `chat` says how the `prompt` beside it is read, and `system` what is said before it.
    fn refuse_chat_of_nothing(&self, findings: &mut Findings) {
        let is_chat = self.chat.as_ref().is_some_and(|chat| chat.value);
        let chat = self.chat.as_ref().map(|put| &put.at);
        let system = self.system.as_ref().map(|put| &put.at);
        if let (None, Some(at)) = (&self.prompt, chat.or(system)) {
            findings.push(
                Problem::new(
                    "`chat` and `system` are of a `prompt`, and none is written here",
                    "write the user's message as `prompt` beside them",
                )
                .at_if(at.as_ref(), "of no text"),
            );
        } else if let (false, Some(at)) = (is_chat, system) {
            findings.push(
                Problem::new(
                    "`system` is a message of a chat, and `chat` is not true",
                    "write `chat = true`, or remove `system`",
                )
                .at_if(at.as_ref(), "laid by no template"),
            );
        }
    }

    /// Whether `arms` is written here.
    pub fn names_arms(&self) -> bool {
        self.arms.is_some()
    }

    /// What the command line sets.
    pub fn from_overrides(overrides: &Overrides) -> RawSettings {
        let put = |value: &Vec<u32>| {
            Put::unwritten(value.iter().map(|token| Put::unwritten(i64::from(*token))).collect())
        };
        RawSettings {
            model: overrides.model.clone().map(Put::unwritten),
            tokens: overrides.tokens.as_ref().map(put),
            prompt: overrides.prompt.clone().map(Put::unwritten),
            chat: overrides.chat.map(Put::unwritten),
            system: overrides.system.clone().map(Put::unwritten),
            arms: overrides.arms.as_ref().map(|arms| {
                Put::unwritten(
                    arms.iter().map(|arm| Put::unwritten(arm.name().to_owned())).collect(),
                )
            }),
            executor: RawExecutor::typed(overrides.on),
            ..RawSettings::default()
        }
    }

    /// These settings, as the command line gives them, above those of the manifests: a text that is
    /// typed stands in place of the manifest's, and is laid as that is unless it is said how.
    pub fn over(mut self, written: &RawSettings) -> RawSettings {
        if self.prompt.is_some() {
            self.chat = self.chat.or_else(|| written.chat.clone());
            let is_chat = self.chat.as_ref().is_some_and(|chat| chat.value);
            self.system = self.system.or_else(|| written.system.clone()).filter(|_| is_chat);
        }
        self.or(written)
    }

    /// These settings where they are given, else the inherited ones.
    pub fn or(self, inherited: &RawSettings) -> RawSettings {
        // Tokens and text are one setting written in two ways, and how a text is laid is of the text.
        let read = if self.tokens.is_some() || self.prompt.is_some() { &self } else { inherited };
        let (tokens, prompt) = (read.tokens.clone(), read.prompt.clone());
        let (chat, system) = (read.chat.clone(), read.system.clone());
        RawSettings {
            model: self.model.or_else(|| inherited.model.clone()),
            tokens,
            prompt,
            chat,
            system,
            seed: self.seed.or_else(|| inherited.seed.clone()),
            arms: self.arms.or_else(|| inherited.arms.clone()),
            recipe: self.recipe.or(&inherited.recipe),
            resources: self.resources.or(&inherited.resources),
            executor: self.executor.or(&inherited.executor),
        }
    }

    /// A command reads no model: what only models need is of no use to its stage.
    pub fn refuse_for_command(&self, findings: &mut Findings) {
        let written = [
            ("model", self.model.as_ref().map(|put| &put.at)),
            ("tokens", self.tokens.as_ref().map(|put| &put.at)),
            ("prompt", self.prompt.as_ref().map(|put| &put.at)),
            ("chat", self.chat.as_ref().map(|put| &put.at)),
            ("system", self.system.as_ref().map(|put| &put.at)),
            ("arms", self.arms.as_ref().map(|put| &put.at)),
        ];
        for (key, at) in written {
            if let Some(at) = at {
                findings.push(
                    Problem::new(
                        format!("`{key}` has no use in a stage of `[command]`"),
                        format!("remove `{key}`: a command is its own arm and reads no model"),
                    )
                    .at_if(at.as_ref(), "not read"),
                );
            }
        }
    }

    /// The checked settings; defaults fill what nobody gave.
    pub fn check(&self, findings: &mut Findings) -> Option<Settings> {
        let model = check_model(self.model.as_ref(), findings);
        let prompt = self.check_prompt(findings);
        let arms = check_arms(self.arms.as_ref(), findings);
        let recipe = self.recipe.check(findings);
        self.refuse_too_few_gpus(findings);
        Some(Settings {
            model: model?,
            prompt: prompt?,
            seed: self.seed.as_ref().map_or(DEFAULT_SEED, |seed| seed.value),
            arms: arms?,
            recipe: recipe?,
            resources: self.resources.check(findings)?,
            executor: self.executor.check(findings)?,
        })
    }

    /// A stage that has some GPUs to itself must have those that compute it together.
    fn refuse_too_few_gpus(&self, findings: &mut Findings) {
        let (Some(ranks), Some(gpus)) = (&self.recipe.tensor_parallel, &self.resources.gpus) else {
            return;
        };
        if (1..ranks.value.get() as usize).contains(&gpus.value) {
            findings.push(
                Problem::new(
                    format!(
                        "`tensor_parallel = {}` takes more GPUs than `gpus = {}`",
                        ranks.value, gpus.value
                    ),
                    format!("write `gpus = {}`", ranks.value),
                )
                .at_if(ranks.at.as_ref(), "GPUs that compute together")
                .at_if(gpus.at.as_ref(), "GPUs that the stage has to itself"),
            );
        }
    }

    fn check_prompt(&self, findings: &mut Findings) -> Option<Prompt> {
        match (&self.tokens, &self.prompt) {
            (None, None) => Some(Prompt::Tokens(DEFAULT_TOKENS.to_vec())),
            (_, Some(prompt)) if prompt.value.is_empty() => {
                findings.push(
                    Problem::new("`prompt` is empty", "write a text of at least one token")
                        .at_if(prompt.at.as_ref(), "nothing to compute"),
                );
                None
            }
            (None, Some(prompt)) => {
                let chat = self.chat.as_ref().is_some_and(|chat| chat.value);
                let system = self.system.as_ref().map(|system| system.value.clone());
                Some(Prompt::of_text(prompt.value.clone(), chat, system))
            }
            // Both: reported where they were read, or by the command line's parser.
            (Some(_), Some(_)) => None,
            (Some(tokens), None) => check_tokens(tokens, findings).map(Prompt::Tokens),
        }
    }
}

/// The most threads that a stage may ask for.
pub(crate) const MOST_THREADS: usize = 1024;
const DEFAULT_MODEL: &str = "synthetic:qwen2-tiny";
const DEFAULT_TOKENS: [u32; 4] = [791, 374, 264, 1296];
const DEFAULT_SEED: u64 = 1;

/// `synthetic:...` and absolute paths stay; other paths start at the folder.
fn from_folder(model: String, folder: &Path) -> String {
    let is_name = model.is_empty() || model.starts_with("synthetic:");
    if is_name || Path::new(&model).is_absolute() {
        return model;
    }
    folder.join(&model).to_string_lossy().into_owned()
}

impl RawResources {
    fn read(fields: &mut Fields<'_>, findings: &mut Findings) -> RawResources {
        let Some(mut table) = fields.table("resources", findings) else {
            return RawResources::default();
        };
        let resources = RawResources {
            threads: table.take("threads", findings),
            cores: table.take("cores", findings),
            memory: table.take("memory", findings),
            gpus: table.take("gpus", findings),
            gpu_memory: table.take("gpu_memory", findings),
        };
        table.finish(findings);
        resources
    }

    fn or(self, inherited: &RawResources) -> RawResources {
        RawResources {
            threads: self.threads.or_else(|| inherited.threads.clone()),
            cores: self.cores.or_else(|| inherited.cores.clone()),
            memory: self.memory.or_else(|| inherited.memory.clone()),
            gpus: self.gpus.or_else(|| inherited.gpus.clone()),
            gpu_memory: self.gpu_memory.or_else(|| inherited.gpu_memory.clone()),
        }
    }

    fn check(&self, findings: &mut Findings) -> Option<Resources> {
        if let Some(threads) = self.threads.as_ref().filter(|put| put.value.get() > MOST_THREADS) {
            findings.push(
                Problem::new(
                    format!("`threads` cannot be {}", threads.value),
                    format!(
                        "write at most {MOST_THREADS}; more than a machine's cores gain nothing"
                    ),
                )
                .at_if(threads.at.as_ref(), "out of range"),
            );
            return None;
        }
        let count = |put: &Option<Put<usize>>| put.as_ref().map_or(0, |put| put.value);
        Some(Resources {
            threads: self.threads.as_ref().map(|threads| threads.value),
            cores: count(&self.cores),
            memory: count(&self.memory),
            gpus: count(&self.gpus),
            gpu_memory: count(&self.gpu_memory),
        })
    }
}

fn check_model(model: Option<&Put<String>>, findings: &mut Findings) -> Option<String> {
    match model {
        None => Some(DEFAULT_MODEL.into()),
        Some(model) if model.value.trim().is_empty() => {
            findings.push(
                Problem::new(
                    "`model` is empty",
                    format!("name a GGUF file, a safetensors folder or `{DEFAULT_MODEL}`"),
                )
                .at_if(model.at.as_ref(), "no model"),
            );
            None
        }
        Some(model) => Some(model.value.clone()),
    }
}

fn check_tokens(tokens: &Put<Vec<Put<i64>>>, findings: &mut Findings) -> Option<Vec<u32>> {
    if tokens.value.is_empty() {
        findings.push(
            Problem::new("`tokens` is empty", "list at least one token of the model's vocabulary")
                .at_if(tokens.at.as_ref(), "nothing to compute"),
        );
        return None;
    }
    let mut checked = Vec::with_capacity(tokens.value.len());
    for token in &tokens.value {
        match u32::try_from(token.value) {
            Ok(number) => checked.push(number),
            Err(_) => {
                findings.push(
                    Problem::new(
                        format!("`{}` is not a token", token.value),
                        "a token is its number in the model's vocabulary: zero or more",
                    )
                    .at_if(token.at.as_ref(), "out of range"),
                );
            }
        }
    }
    (checked.len() == tokens.value.len()).then_some(checked)
}

fn check_arms(arms: Option<&Put<Vec<Put<String>>>>, findings: &mut Findings) -> Option<Vec<Arm>> {
    let Some(arms) = arms else { return Some(Arm::USUAL.to_vec()) };
    let choices = Arm::ALL.map(|arm| (arm.name(), arm));
    let mut checked: Vec<Put<Arm>> = Vec::new();
    let mut sound = true;
    for written in &arms.value {
        let Some(arm) = choose("arms", written.clone(), &choices, findings) else {
            sound = false;
            continue;
        };
        if let Some(earlier) = checked.iter().find(|earlier| earlier.value == arm.value) {
            findings.push(
                Problem::new(format!("the arm `{}` is listed twice", arm.value), "remove one")
                    .at_if(arm.at.as_ref(), "again here")
                    .at_if(earlier.at.as_ref(), "first here"),
            );
            sound = false;
            continue;
        }
        checked.push(arm);
    }
    if sound && !checked.iter().any(|arm| arm.value == Arm::Reference) {
        let (title, label) = if checked.is_empty() {
            ("`arms` is empty", "nothing would be computed")
        } else {
            ("`arms` leaves out `reference`", "nothing to judge against")
        };
        findings.push(
            Problem::new(title, "add `reference`: the other arms are judged against it")
                .at_if(arms.at.as_ref(), label),
        );
        sound = false;
    }
    sound.then(|| checked.into_iter().map(|arm| arm.value).collect())
}

impl RawRecipe {
    fn read(fields: &mut Fields<'_>, folder: &Path, findings: &mut Findings) -> RawRecipe {
        let Some(mut table) = fields.table("recipe", findings) else {
            return RawRecipe::default();
        };
        let mut recipe = RawRecipe {
            gemm: table.choice("gemm", &GEMMS, findings),
            accumulate: table.choice("accumulate", &ACCUMULATIONS, findings),
            output: table.choice("output", &FORMATS, findings),
            stream: table.choice("stream", &FORMATS, findings),
            engine: read_engine(&mut table, folder, findings),
            decoded: table.take("decoded", findings),
            batch: table.take("batch", findings),
            chip: table.choice("chip", &CHIPS, findings),
            kv_cache: table.choice("kv_cache", &KV_CACHES, findings),
            tensor_parallel: table.take("tensor_parallel", findings),
            ..RawRecipe::default()
        };
        if let Some(mut scale) = table.table("scale", findings) {
            recipe.weight = scale.choice("weight", &WEIGHT_SCALES, findings);
            recipe.activation = scale.choice("activation", &ACTIVATION_SCALES, findings);
            scale.finish(findings);
        }
        if let Some(mut pin) = table.table("pin", findings) {
            recipe.algorithm = pin.take("algorithm", findings);
            recipe.tile = pin.take("tile", findings);
            recipe.stages = pin.take("stages", findings);
            recipe.split_k = pin.take("split_k", findings);
            pin.finish(findings);
        }
        table.finish(findings);
        recipe
    }

    /// An engine says what its products are: what stands beside it would not be read.
    fn beside_engine(&self) -> Vec<Problem> {
        // The project's own kernels multiply what a recipe says.
        if self.engine.as_ref().is_none_or(|engine| engine.value.stream.is_none()) {
            return Vec::new();
        }
        let written = [
            ("gemm", self.gemm.as_ref().map(|put| &put.at)),
            ("output", self.output.as_ref().map(|put| &put.at)),
            ("accumulate", self.accumulate.as_ref().map(|put| &put.at)),
            ("scale", self.weight.as_ref().map(|put| &put.at)),
            ("scale", self.activation.as_ref().map(|put| &put.at)),
            ("pin", self.algorithm.as_ref().map(|put| &put.at)),
            ("pin", self.tile.as_ref().map(|put| &put.at)),
            ("pin", self.stages.as_ref().map(|put| &put.at)),
            ("pin", self.split_k.as_ref().map(|put| &put.at)),
        ];
        let problem = |(key, at): (&str, Option<&Option<At>>)| {
            let problem = Problem::new(
                format!("`{key}` has no use beside `engine`"),
                format!(
                    "remove `{key}`: an engine's file says what its products are and in which \
                     order they add; or remove `engine`, also where it is inherited from"
                ),
            );
            Some(problem.at_if(at?.as_ref(), "not read"))
        };
        written.into_iter().filter_map(problem).collect()
    }

    fn or(self, inherited: &RawRecipe) -> RawRecipe {
        // An engine stands in place of all that is inherited about products.
        let of_engine = |engine: &EngineFile| match (engine.stream, engine.kernels) {
            // The project's own kernels multiply what is inherited, and stand in place of the
            // engine that would be.
            (None, _) => RawRecipe {
                stream: None,
                engine: None,
                decoded: None,
                batch: None,
                ..inherited.clone()
            },
            (Some(_), None) => RawRecipe { chip: inherited.chip.clone(), ..RawRecipe::default() },
            (Some(_), Some(_)) => RawRecipe {
                stream: inherited.stream.clone(),
                chip: inherited.chip.clone(),
                decoded: inherited.decoded.clone(),
                batch: inherited.batch.clone(),
                ..RawRecipe::default()
            },
        };
        let of_engine = self.engine.as_ref().map(|engine| of_engine(&engine.value));
        let inherited = of_engine.as_ref().unwrap_or(inherited);
        // The checkpoint's scales stand in place of those that are inherited.
        let of_checkpoint = self.gemm.as_ref().is_some_and(|gemm| gemm.value == Gemm::Checkpoint);
        let scales = (inherited.weight.clone(), inherited.activation.clone());
        let scales = if of_checkpoint { (None, None) } else { scales };
        RawRecipe {
            gemm: self.gemm.or_else(|| inherited.gemm.clone()),
            weight: self.weight.or(scales.0),
            activation: self.activation.or(scales.1),
            accumulate: self.accumulate.or_else(|| inherited.accumulate.clone()),
            output: self.output.or_else(|| inherited.output.clone()),
            stream: self.stream.or_else(|| inherited.stream.clone()),
            engine: self.engine.or_else(|| inherited.engine.clone()),
            decoded: self.decoded.or_else(|| inherited.decoded.clone()),
            batch: self.batch.or_else(|| inherited.batch.clone()),
            chip: self.chip.or_else(|| inherited.chip.clone()),
            algorithm: self.algorithm.or_else(|| inherited.algorithm.clone()),
            tile: self.tile.or_else(|| inherited.tile.clone()),
            stages: self.stages.or_else(|| inherited.stages.clone()),
            split_k: self.split_k.or_else(|| inherited.split_k.clone()),
            kv_cache: self.kv_cache.or_else(|| inherited.kv_cache.clone()),
            tensor_parallel: self.tensor_parallel.or_else(|| inherited.tensor_parallel.clone()),
        }
    }

    /// The recipe, unless its parts contradict each other.
    fn check(&self, findings: &mut Findings) -> Option<Recipe> {
        let default = Recipe::default();
        // An engine says the type of its stream and what its products are: of that type, or of
        // FP8 codes.
        let engine = self.engine.as_ref().map(|engine| &engine.value);
        let kernels = engine.and_then(|engine| engine.kernels);
        let of_engine = engine.and_then(|engine| engine.stream);
        let stream = value_of(&self.stream).or(of_engine);
        let of_products = stream.filter(|_| of_engine.is_some());
        let linear = kernels.and_then(|kernels| kernels.linear.first());
        let scaled = linear.and_then(Scale::of);
        let gemm = match (of_products, scaled) {
            (Some(_), Some(_)) => Put::unwritten(Gemm::Format(Format::E4m3)),
            (Some(stream), None) => Put::unwritten(Gemm::Format(stream)),
            (None, _) => or_default(&self.gemm, Gemm::Format(default.gemm)),
        };
        let of_checkpoint = gemm.value == Gemm::Checkpoint;
        let of_blocks = match gemm.value {
            Gemm::Blocks(format) => Some(format),
            _ => None,
        };
        let of_engine = scaled.unwrap_or(default.scale);
        let weight = or_default(&self.weight, of_engine.weight);
        let activation = or_default(&self.activation, of_engine.activation);
        let blocks = activation.value == ActivationScale::Block128;
        let accumulate = match scaled {
            Some(_) if !blocks => Put::unwritten(Accumulate::Fast),
            None if of_blocks.is_some() && self.accumulate.is_none() => {
                Put::unwritten(Accumulate::Fast)
            }
            _ => or_default(&self.accumulate, default.accumulate),
        };
        let output = match of_products {
            Some(stream) => Put::unwritten(stream),
            None => or_default(&self.output, default.output),
        };
        // The engines' kernels are Hopper's, whatever stands in the machine that judges.
        let of_engine = kernels.map(|_| ChipName::Hopper);
        let chip = or_default(&self.chip, of_engine.unwrap_or(default.chip));

        let mut problems = self.beside_engine();
        if let (true, Some(put)) = (of_checkpoint, self.weight.as_ref().map(|put| &put.at)) {
            problems.push(
                Problem::new(
                    "`scale` has no use beside `gemm = \"checkpoint\"`",
                    "remove `scale`, also where it is inherited from: the checkpoint holds the \
                     scales of its weights, and says whether activations have one",
                )
                .at_if(put.as_ref(), "not read")
                .at_if(gemm.at.as_ref(), "the checkpoint's scales"),
            );
        }
        if let Some(format) = of_blocks {
            problems.extend(self.beside_blocks(format, &gemm, &accumulate));
        }
        let fp8 = matches!(gemm.value.format(), Format::E4m3 | Format::E5m2);
        let gemm_name = name_of(gemm.value, &GEMMS);
        let block_weight = weight.value == WeightScale::Block128;
        let block_activation = activation.value == ActivationScale::Block128;
        let block_at = if block_weight { &weight.at } else { &activation.at };

        if of_blocks.is_some() {
            // What stands beside such a format was said already.
        } else if !fp8 && (block_weight || block_activation) {
            problems.push(
                Problem::new(
                    format!("`block128` scales do not go with `gemm = \"{gemm_name}\"`"),
                    match gemm.value {
                        Gemm::Format(Format::Int8) => {
                            "integers have a scale for each channel and token, or for the whole: write \
                             `channel` and `token`, or `tensor`"
                        }
                        _ => {
                            "only FP8 operands are scaled so: write `gemm = \"e4m3\"`, or `tensor` as \
                             scale"
                        }
                    },
                )
                .at_if(block_at.as_ref(), "one scale per 128 elements")
                .at_if(gemm.at.as_ref(), "not an FP8 format"),
            );
        } else if block_weight != block_activation {
            problems.push(
                Problem::new(
                    "`block128` is the scale of one operand only",
                    "write `scale = { weight = \"block128\", activation = \"block128\" }`: both \
                     scales are applied to the same 128 elements of K",
                )
                .at_if(block_at.as_ref(), "this operand")
                .at_if(
                    if block_weight { &activation.at } else { &weight.at }.as_ref(),
                    "the other operand",
                ),
            );
        } else if block_weight && accumulate.value == Accumulate::Fast {
            problems.push(
                Problem::new(
                    "`block128` scales do not go with `accumulate = \"fast\"`",
                    "write `accumulate = \"promoted\"`: a block's scale is applied after its 128 \
                     elements, when the accumulator is promoted",
                )
                .at_if(block_at.as_ref(), "a scale every 128 elements of K")
                .at_if(accumulate.at.as_ref(), "one accumulator all along K"),
            );
        }
        if let Some(split_k) = self.split_k.as_ref().filter(|parts| parts.value.get() > 1)
            && block_weight
        {
            problems.push(
                Problem::new(
                    "`split_k` does not go with `block128` scales",
                    "leave `split_k` out: blocks of 128 elements are added one after the other",
                )
                .at_if(split_k.at.as_ref(), "several parts")
                .at_if(block_at.as_ref(), "a scale every 128 elements of K"),
            );
        }
        if !matches!(output.value, Format::F32 | Format::Bf16 | Format::F16) {
            problems.push(
                Problem::new(
                    format!("a GEMM cannot write `{}`", name_of(output.value, &FORMATS)),
                    "`output` is one of `f32`, `bf16` and `f16`",
                )
                .at_if(output.at.as_ref(), "an operand format"),
            );
        }
        if let Some(stream) = &self.stream
            && !matches!(stream.value, Format::F32 | Format::Bf16 | Format::F16)
        {
            problems.push(
                Problem::new(
                    format!("a stream cannot be `{}`", name_of(stream.value, &FORMATS)),
                    "`stream` is the type in which an engine passes tensors from op to op: `f32`, \
                     `bf16` or `f16`",
                )
                .at_if(stream.at.as_ref(), "an operand format"),
            );
        }
        if let (Some(engine), Some(put)) = (&self.engine, &self.stream)
            && let Some(problem) = match (&engine.value.kernels, engine.value.stream) {
                (Some(kernels), _) => kernels.stream_problem(put.value),
                (None, Some(own)) if own != put.value => {
                    Some(format!("it passes tensors in `{}`", name_of(own, &FORMATS)))
                }
                (None, Some(_)) => None,
                (None, None) => {
                    Some("its kernels pass f32, which is what no `stream` means".to_owned())
                }
            }
        {
            problems.push(
                Problem::new(
                    format!("of the engine `{}`: {problem}", engine.value.name),
                    "leave `stream` or `engine` out",
                )
                .at_if(put.at.as_ref(), "another type"),
            );
        }
        let beside = [
            (
                "decoded",
                "how many tokens came in steps of their own",
                self.decoded.as_ref().map(|put| &put.at),
            ),
            ("batch", "how many prompts a step held", self.batch.as_ref().map(|put| &put.at)),
        ];
        for (key, what, at) in beside {
            if let (None, Some(at)) = (kernels, at) {
                problems.push(
                    Problem::new(
                        format!("`{key}` needs an `engine` whose kernels are known"),
                        format!(
                            "write such an `engine` too: {what} decides which of its kernels ran"
                        ),
                    )
                    .at_if(at.as_ref(), "no engine beside it"),
                );
            }
        }
        if let (Some(engine), Some(put)) = (&self.engine, &self.batch)
            && put.value.get() > 1
            && kernels.is_some_and(|kernels| kernels.is_ggml())
        {
            problems.push(
                Problem::new(
                    format!("`batch` is not known for the engine `{}`", engine.value.name),
                    "leave `batch` out, and record one prompt at a time: what llama.cpp's kernels \
                     make of a row within a batch was not looked at",
                )
                .at_if(put.at.as_ref(), "several prompts in a step"),
            );
        }
        let kv_cache = value_of(&self.kv_cache).flatten();
        if let (Some(put), Some(stream), true) = (&self.kv_cache, stream, kv_cache.is_some()) {
            let stream = name_of(stream, &FORMATS);
            problems.push(
                Problem::new(
                    format!("`kv_cache` is not known of engines that pass tensors in `{stream}`"),
                    "leave `kv_cache` out: what a foreign engine's attention makes of narrow keys \
                     and values was not looked at; where one keeps them in FP8, the cause \
                     `kv-cache-format` names it",
                )
                .at_if(put.at.as_ref(), "the project's own kernels take it"),
            );
        }
        // One GPU is what no key means.
        let ranks = value_of(&self.tensor_parallel).filter(|ranks| ranks.get() > 1);
        if let (Some(engine), Some(put)) = (&self.engine, &self.tensor_parallel)
            && engine.value.stream.is_some()
            && ranks.is_some()
        {
            problems.push(
                Problem::new(
                    format!("`tensor_parallel` is not known of the engine `{}`", engine.value.name),
                    "leave `tensor_parallel` out, or write the recipe without `engine`: `gemm`, \
                     `scale` and `stream` say what its products are, and give its sums a floor. \
                     How an engine adds what its GPUs made was not looked at",
                )
                .at_if(put.at.as_ref(), "several GPUs"),
            );
        }
        let missing = formats_missing_on(chip.value);
        if of_checkpoint && missing.contains(&gemm.value.format()) {
            let (has, lacks): (Vec<_>, Vec<_>) = CHIPS
                .iter()
                .partition(|(_, chip)| !formats_missing_on(*chip).contains(&Format::E4m3));
            let has = quoted_list(has.into_iter().map(|(name, _)| name));
            let plain = FORMATS.iter().filter(|(_, format)| !missing.contains(format));
            let plain = quoted_list(plain.map(|(name, _)| name));
            let lacks = quoted_list(lacks.into_iter().map(|(name, _)| name));
            problems.push(
                Problem::new(
                    format!(
                        "the chip `{}` has no FP8, and `gemm = \"checkpoint\"` multiplies the FP8 \
                         codes of a checkpoint",
                        name_of(chip.value, &CHIPS)
                    ),
                    format!(
                        "write a `chip` that has it, one of {has} ({lacks} have none), or a `gemm` \
                         of this chip, which converts the values: {plain}"
                    ),
                )
                .at_if(gemm.at.as_ref(), "FP8 codes")
                .at_if(chip.at.as_ref(), "this chip"),
            );
        } else if let Some(format) = of_blocks {
            if chip_of(chip.value).block_unit(format).is_none() {
                let has = CHIPS.iter().filter(|(_, name)| {
                    *name != ChipName::Auto && chip_of(*name).block_unit(format).is_some()
                });
                problems.push(
                    Problem::new(
                        format!("the chip `{}` has no `{format}`", name_of(chip.value, &CHIPS)),
                        format!(
                            "write `chip` as one of those that have it: {}",
                            quoted_list(has.map(|(name, _)| *name))
                        ),
                    )
                    .at_if(gemm.at.as_ref(), "this format")
                    .at_if(chip.at.as_ref(), "this chip"),
                );
            }
        } else if missing.contains(&gemm.value.format()) {
            let named = FORMATS.iter().filter(|(_, format)| !missing.contains(format));
            problems.push(
                Problem::new(
                    format!("the chip `{}` has no `{gemm_name}`", name_of(chip.value, &CHIPS)),
                    format!("its formats are {}", quoted_list(named.map(|(name, _)| name))),
                )
                .at_if(gemm.at.as_ref(), "this format")
                .at_if(chip.at.as_ref(), "this chip"),
            );
        }

        let sound = problems.is_empty();
        problems.into_iter().for_each(|problem| findings.push(problem));
        sound.then_some(Recipe {
            gemm: gemm.value.format(),
            codes: if of_checkpoint { Codes::Checkpoint } else { Codes::Made },
            scale: match of_blocks {
                Some(format) => Scale::of_blocks(format),
                None => Scale { weight: weight.value, activation: activation.value },
            },
            accumulate: accumulate.value,
            output: output.value,
            chip: chip.value,
            stream,
            engine: kernels.map(|kernels| EngineKernels {
                decoded: self.decoded.as_ref().map_or(0, |decoded| decoded.value),
                batch: self.batch.as_ref().map_or(1, |batch| batch.value.get() as usize),
                ..kernels
            }),
            emulate: engine.and_then(|engine| engine.activations).map(|activations| {
                match activations {
                    Activations::Ggml8Bit => crate::op::Engine::LlamaCpp,
                }
            }),
            pin: Pin {
                algorithm: value_of(&self.algorithm),
                tile: value_of(&self.tile),
                stages: value_of(&self.stages),
                split_k: value_of(&self.split_k),
            },
            kv_cache,
            tensor_parallel: ranks,
        })
    }
}

impl RawRecipe {
    /// What does not go with operands of a block-scaled format.
    fn beside_blocks(
        &self,
        format: BlockFormat,
        gemm: &Put<Gemm>,
        accumulate: &Put<Accumulate>,
    ) -> Vec<Problem> {
        let mut problems = Vec::new();
        let given = [
            (self.weight.as_ref().map(|put| &put.at), "the weight's scale"),
            (self.activation.as_ref().map(|put| &put.at), "the activation's scale"),
        ];
        if let Some((at, what)) = given.into_iter().find_map(|(at, what)| Some((at?, what))) {
            let block = format.block();
            problems.push(
                Problem::new(
                    format!("`scale` has no use beside `gemm = \"{format}\"`"),
                    format!(
                        "remove `scale`, also where it is inherited from: the format has a scale \
                         for each {block} elements"
                    ),
                )
                .at_if(at.as_ref(), what)
                .at_if(gemm.at.as_ref(), "it has scales of its own"),
            );
        }
        if accumulate.value == Accumulate::Promoted {
            problems.push(
                Problem::new(
                    format!("`accumulate = \"promoted\"` does not go with `gemm = \"{format}\"`"),
                    "leave `accumulate` out, also where it is inherited from: the scales are the \
                     tensor core's own, and its accumulator carries all along K",
                )
                .at_if(accumulate.at.as_ref(), "promoted")
                .at_if(gemm.at.as_ref(), "a block-scaled format"),
            );
        }
        problems
    }
}

/// The engine of a recipe: a shipped one by its name, or a file's.
fn read_engine(
    table: &mut Fields<'_>,
    folder: &Path,
    findings: &mut Findings,
) -> Option<Put<EngineFile>> {
    let name = table.take::<String>("engine", findings)?;
    match EngineFile::find(&name.value, folder) {
        Ok(engine) => Some(name.map(|_| engine)),
        Err(problem) => {
            findings.push(
                Problem::new(problem, "docs/engines.md lists the engines and their kernels")
                    .at_if(name.at.as_ref(), "this engine"),
            );
            None
        }
    }
}

fn or_default<T: Copy>(written: &Option<Put<T>>, default: T) -> Put<T> {
    written.clone().unwrap_or(Put::unwritten(default))
}

fn value_of<T: Copy>(written: &Option<Put<T>>) -> Option<T> {
    written.as_ref().map(|put| put.value)
}

fn name_of<T: PartialEq>(value: T, choices: &[(&'static str, T)]) -> &'static str {
    choices.iter().find(|(_, choice)| *choice == value).map_or("?", |(name, _)| name)
}

/// The formats that a chip cannot multiply.
fn formats_missing_on(name: ChipName) -> Vec<Format> {
    let missing = |format: &Format| chip_of(name).unit(*format, *format).is_none();
    Format::ALL.into_iter().filter(missing).collect()
}
