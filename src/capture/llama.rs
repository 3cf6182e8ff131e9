//! llama.cpp's C interface: shared libraries, parameters, a graph's nodes.
//!
//! The only calls into a foreign library beside the CUDA driver's. Where a parameter lies differs from
//! version to version, and no function says it: it is read off the default values, and a
//! library whose defaults are not found where they must be is refused before any other call.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, PoisonError};

use libloading::Library;

use super::{CaptureError, Pass, Recording, joined, libraries, site_of};
use crate::interrupt;

/// Room for either kind of parameters, whose largest has 160 bytes. Both are larger than two
/// words, so that C passes and returns them in memory, where more room does no harm.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params(MaybeUninit<[u64; 32]>);

/// Words of a context's parameters that every version has: all that is looked at lies within them.
const COMMON: usize = 28;
/// The same of a model's.
const OF_MODEL: usize = 6;

impl Params {
    /// The first words.
    fn words<const N: usize>(&self) -> [u32; N] {
        let first = self.0.as_ptr().cast::<u32>();
        // SAFETY: the library has written its own parameters, of which every version has so many
        // words (69 bytes of a model's and 118 of a context's are the fewest); what the compiler
        // leaves between them is memory of this struct, and any bits are a word.
        std::array::from_fn(|place| unsafe { first.add(place).read_volatile() })
    }

    fn put(&mut self, place: usize, word: u32) {
        assert!(place < COMMON, "the place was looked at before");
        // SAFETY: it lies within the struct.
        unsafe { self.0.as_mut_ptr().cast::<u32>().add(place).write(word) }
    }

    fn put_pointer(&mut self, place: usize, pointer: *const c_void) {
        let address = pointer as usize as u64;
        self.put(place, address as u32);
        self.put(place + 1, (address >> 32) as u32);
    }
}

/// Where the parameters of a context lie, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    /// Which attention kernel, where it is a word of its own.
    flash: Option<usize>,
    callback: usize,
    cache: usize,
}

const MINUS_ONE: u32 = u32::MAX;

/// Finds the context's parameters by their default values: sizes first; three settings of
/// which each is -1 (RoPE, pooling, attention), and in newer builds a fourth (flash attention);
/// RoPE's numbers; the callback, which is null; two caches of f16.
fn context_layout(words: &[u32; COMMON]) -> Option<Layout> {
    let one = 1.0f32.to_bits();
    let minus = (-1.0f32).to_bits();
    if words[..4] != [512, 2048, 512, 1] {
        return None;
    }
    let start = words.iter().position(|word| *word == MINUS_ONE)?;
    let settings = words[start..].iter().take_while(|word| **word == MINUS_ONE).count();
    let rope = start + settings;
    let known = matches!((start, settings), (6, 3) | (6 | 9 | 10, 4));
    let numbers: [u32; 8] = words.get(rope..rope + 8)?.try_into().ok()?;
    let [base, scale, extrapolation, factor, fast, slow, original, defragment] = numbers;
    let numbers = [base, scale, extrapolation, original, defragment] == [0, 0, minus, 0, minus]
        && [factor, fast, slow].iter().all(|word| [one, minus, 32.0f32.to_bits()].contains(word));
    // Pointers lie at even words.
    let callback = (rope + 8).next_multiple_of(2);
    let cache = callback + 4;
    let rest = words.get(callback..cache + 2)? == [0, 0, 0, 0, 1, 1];
    (known && numbers && rest).then_some(Layout {
        flash: (settings == 4).then_some(start + 3),
        callback,
        cache,
    })
}

/// Whether a model's parameters lie where they always did: no devices, no overrides, so many
/// layers on a GPU, split by layer.
fn model_layout(words: &[u32; OF_MODEL]) -> bool {
    words[..4] == [0; 4] && [0, 999, MINUS_ONE].contains(&words[4]) && words[5] == 1
}

/// A model's devices, a pointer, and its layers on a GPU.
const DEVICES: usize = 0;
const GPU_LAYERS: usize = 4;

#[repr(C)]
#[derive(Clone, Copy)]
struct Batch {
    tokens: i32,
    token: *mut i32,
    embedding: *mut f32,
    position: *mut i32,
    sequences: *mut i32,
    sequence: *mut *mut i32,
    logits: *mut i8,
}

/// The head of a `ggml_tensor`, down to its first operand.
#[repr(C)]
struct Node {
    kind: c_int,
    buffer: *mut c_void,
    sides: [i64; 4],
    strides: [usize; 4],
    operation: c_int,
    parameters: [i32; 16],
    flags: i32,
    operand: *mut Node,
}

/// `GGML_TYPE_F32`.
const F32: c_int = 0;

type Evaluated = unsafe extern "C" fn(*mut Node, bool, *mut c_void) -> bool;
type Log = unsafe extern "C" fn(c_int, *const c_char, *mut c_void);

/// The functions that are called, with the types that llama.h and ggml.h give them.
struct Functions {
    name: unsafe extern "C" fn(*const Node) -> *const c_char,
    made_by: unsafe extern "C" fn(*const Node) -> *const c_char,
    bytes: unsafe extern "C" fn(*const Node) -> usize,
    get: unsafe extern "C" fn(*const Node, *mut c_void, usize, usize),
    load_backends: unsafe extern "C" fn(*const c_char),
    log: unsafe extern "C" fn(Option<Log>, *mut c_void),
    begin: unsafe extern "C" fn(),
    model_defaults: unsafe extern "C" fn() -> Params,
    context_defaults: unsafe extern "C" fn() -> Params,
    load: unsafe extern "C" fn(*const c_char, Params) -> *mut c_void,
    free_model: unsafe extern "C" fn(*mut c_void),
    context: unsafe extern "C" fn(*mut c_void, Params) -> *mut c_void,
    free_context: unsafe extern "C" fn(*mut c_void),
    vocabulary: unsafe extern "C" fn(*const c_void) -> *const c_void,
    words: unsafe extern "C" fn(*const c_void) -> i32,
    batch: unsafe extern "C" fn(i32, i32, i32) -> Batch,
    free_batch: unsafe extern "C" fn(Batch),
    decode: unsafe extern "C" fn(*mut c_void, Batch) -> i32,
    logits: unsafe extern "C" fn(*mut c_void, i32) -> *const f32,
    /// They stay open as long as their functions are held.
    _libraries: [Library; 3],
}

impl Functions {
    fn open(folder: Option<&Path>) -> Result<Functions, CaptureError> {
        let paths = libraries(folder);
        let [base, ggml, llama] = [open(&paths[0])?, open(&paths[1])?, open(&paths[2])?];
        // SAFETY: each is a function of that name with the type that its header gives it.
        unsafe {
            Ok(Functions {
                name: function(&base, &paths[0], c"ggml_get_name")?,
                made_by: function(&base, &paths[0], c"ggml_op_desc")?,
                bytes: function(&base, &paths[0], c"ggml_nbytes")?,
                get: function(&base, &paths[0], c"ggml_backend_tensor_get")?,
                load_backends: function(&ggml, &paths[1], c"ggml_backend_load_all_from_path")?,
                log: function(&llama, &paths[2], c"llama_log_set")?,
                begin: function(&llama, &paths[2], c"llama_backend_init")?,
                model_defaults: function(&llama, &paths[2], c"llama_model_default_params")?,
                context_defaults: function(&llama, &paths[2], c"llama_context_default_params")?,
                load: function(&llama, &paths[2], c"llama_model_load_from_file")?,
                free_model: function(&llama, &paths[2], c"llama_model_free")?,
                context: function(&llama, &paths[2], c"llama_init_from_model")?,
                free_context: function(&llama, &paths[2], c"llama_free")?,
                vocabulary: function(&llama, &paths[2], c"llama_model_get_vocab")?,
                words: function(&llama, &paths[2], c"llama_vocab_n_tokens")?,
                batch: function(&llama, &paths[2], c"llama_batch_init")?,
                free_batch: function(&llama, &paths[2], c"llama_batch_free")?,
                decode: function(&llama, &paths[2], c"llama_decode")?,
                logits: function(&llama, &paths[2], c"llama_get_logits_ith")?,
                _libraries: [base, ggml, llama],
            })
        }
    }
}

fn open(path: &Path) -> Result<Library, CaptureError> {
    // SAFETY: what a library does when it is opened is its own; the user named its folder.
    let opened = unsafe { Library::new(path) };
    opened.map_err(|error| unusable(path, &error))
}

fn unusable(path: &Path, error: &libloading::Error) -> CaptureError {
    // What the system says stands behind what was tried.
    let problem = std::error::Error::source(error);
    let problem = problem.map_or_else(|| error.to_string(), ToString::to_string);
    CaptureError::Library { path: path.to_owned(), problem }
}

/// # Safety
/// `F` must be the type of that function.
unsafe fn function<F: Copy>(
    library: &Library,
    path: &Path,
    name: &CStr,
) -> Result<F, CaptureError> {
    // SAFETY: the caller says so.
    let found = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
    found.map(|found| *found).map_err(|error| unusable(path, &error))
}

/// The first that llama.cpp said of an error; the last ones repeat that there was one.
static SAID: Mutex<String> = Mutex::new(String::new());
/// `GGML_LOG_LEVEL_ERROR`.
const ERROR: c_int = 4;

unsafe extern "C" fn listen(level: c_int, text: *const c_char, _: *mut c_void) {
    if level == ERROR && !text.is_null() {
        // SAFETY: llama.cpp gives a text that ends with a zero.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned();
        let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_empty() {
            *said = text;
        }
    }
}

fn refused(what: &str) -> CaptureError {
    let said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    let said = if said.is_empty() { "it does not say why" } else { said.as_str() };
    CaptureError::Engine { problem: format!("{what}: {}", crate::text::shown(said)) }
}

/// Is shown every node when it has been computed, and copies the sites.
struct Observer<'f> {
    functions: &'f Functions,
    rows: usize,
    kept: Vec<(String, usize, Vec<u8>)>,
    /// A node that is not what it must be.
    strange: Option<String>,
}

unsafe extern "C" fn observe(node: *mut Node, ask: bool, observer: *mut c_void) -> bool {
    // SAFETY: it is the observer of the running step, which nobody else holds meanwhile.
    let observer = unsafe { &mut *observer.cast::<Observer<'_>>() };
    let site = observer.site(node);
    if ask {
        return site.is_some();
    }
    if let Some(site) = site {
        observer.copy(node, site);
    }
    // Without it the graph is not computed further.
    observer.strange.is_none() && !interrupt::requested()
}

impl Observer<'_> {
    fn text(
        &self,
        of: unsafe extern "C" fn(*const Node) -> *const c_char,
        node: *const Node,
    ) -> String {
        // SAFETY: llama.cpp gives a node of its graph, whose texts end with a zero.
        unsafe { CStr::from_ptr(of(node)) }.to_string_lossy().into_owned()
    }

    fn site(&self, node: *const Node) -> Option<String> {
        let name = self.text(self.functions.name, node);
        let made_by = self.text(self.functions.made_by, node);
        site_of(&name, &made_by, || {
            // SAFETY: the head of a node has been laid so in every version that is known, which
            // `copy` sees confirmed by its sizes.
            let operand = unsafe { (*node).operand };
            match operand.is_null() {
                true => String::new(),
                false => self.text(self.functions.name, operand),
            }
        })
    }

    fn copy(&mut self, node: *const Node, site: String) {
        // SAFETY: as above.
        let (kind, sides, size) =
            unsafe { ((*node).kind, (*node).sides, (self.functions.bytes)(node)) };
        let count = sides
            .iter()
            .try_fold(4usize, |bytes, side| bytes.checked_mul(usize::try_from(*side).ok()?));
        if kind != F32 || count != Some(size) || size == 0 || !size.is_multiple_of(4 * self.rows) {
            self.strange = Some(format!(
                "shows `{site}` as {size} bytes of type {kind} and sides {sides:?}, which is no row \
                 of f32 values for each of {} tokens",
                self.rows
            ));
            return;
        }
        let mut bytes = vec![0u8; size];
        // SAFETY: the node has so many bytes, and so has their place.
        unsafe { (self.functions.get)(node, bytes.as_mut_ptr().cast(), 0, size) };
        let rows = self.rows;
        match self.kept.iter_mut().find(|(known, ..)| *known == site) {
            // The last of several nodes makes the site.
            Some((_, _, values)) => *values = bytes,
            None => self.kept.push((site, rows, bytes)),
        }
    }
}

/// A model or a context, until it is freed.
struct Held {
    it: *mut c_void,
    free: unsafe extern "C" fn(*mut c_void),
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: it was made by llama.cpp, and is freed once.
        unsafe { (self.free)(self.it) }
    }
}

/// Records a pass: the prompt in one step, then a step for each decoded token but the last.
///
/// # Errors
/// If the libraries or the model cannot be used.
pub fn record(pass: &Pass) -> Result<Recording, CaptureError> {
    // A CUDA graph of one node that is observed may be launched for another.
    // SAFETY: the runner's other threads read no variables, and llama.cpp's are not there yet.
    unsafe { std::env::set_var("GGML_CUDA_DISABLE_GRAPHS", "1") };
    let functions = Functions::open(pass.library.as_deref())?;
    // SAFETY: no arguments; parameters are returned in memory.
    let (mut of_model, mut of_context) =
        unsafe { ((functions.model_defaults)(), (functions.context_defaults)()) };
    if !model_layout(&of_model.words()) {
        return Err(CaptureError::Unknown { what: "a model's parameters" });
    }
    let unknown = CaptureError::Unknown { what: "a context's parameters" };
    let layout = context_layout(&of_context.words()).ok_or(unknown)?;
    // SAFETY: the log is a function that is there as long as the program.
    unsafe { (functions.log)(Some(listen), null_mut()) };
    if let Some(folder) = &pass.library {
        // SAFETY: a text that ends with a zero.
        unsafe { (functions.load_backends)(text(folder)?.as_ptr()) };
    }
    // SAFETY: no arguments.
    unsafe { (functions.begin)() };

    of_model.put(GPU_LAYERS, pass.gpu_layers.cast_unsigned());
    let nowhere: [*const c_void; 1] = [null()];
    if pass.gpu_layers == 0 {
        // Else a library with CUDA gives it products of many rows even so.
        of_model.put_pointer(DEVICES, nowhere.as_ptr().cast());
    }
    let path = text(&pass.model)?;
    // SAFETY: the path ends with a zero, and the parameters are llama.cpp's own with two changed.
    let it = unsafe { (functions.load)(path.as_ptr(), of_model) };
    if it.is_null() {
        return Err(refused("cannot load the model"));
    }
    let model = Held { it, free: functions.free_model };
    // SAFETY: the model is there.
    let words = unsafe { (functions.words)((functions.vocabulary)(model.it)) };
    if let Some(token) = pass.tokens.iter().find(|token| !(0..words).contains(*token)) {
        let problem = format!("has {words} tokens in this model's vocabulary, and {token} is none");
        return Err(CaptureError::Engine { problem });
    }

    let mut observer =
        Box::new(Observer { functions: &functions, rows: 0, kept: Vec::new(), strange: None });
    let whole = (pass.tokens.len() + pass.decode).max(64) as u32;
    // The context, a step and what is computed at once are as long as the pass.
    for size in 0..3 {
        of_context.put(size, whole);
    }
    if let Some(flash) = layout.flash {
        // Off, as it was by default in the builds before it had a word of its own.
        of_context.put(flash, 0);
    }
    let observed: Evaluated = observe;
    let address = &raw mut *observer;
    of_context.put_pointer(layout.callback, observed as *const c_void);
    of_context.put_pointer(layout.callback + 2, address.cast_const().cast());
    let cache = if pass.wide_cache { 0 } else { 1 };
    of_context.put(layout.cache, cache);
    of_context.put(layout.cache + 1, cache);
    // SAFETY: the model is there, and the parameters are llama.cpp's own with these changed.
    let it = unsafe { (functions.context)(model.it, of_context) };
    if it.is_null() {
        return Err(refused("cannot make a context"));
    }
    let context = Held { it, free: functions.free_context };

    let (mut steps, mut ids, mut call) = (Vec::new(), Vec::new(), pass.tokens.clone());
    for _ in 0..pass.decode.max(1) {
        let status = step(&functions, &context, address, &call, ids.len());
        // SAFETY: llama.cpp has returned, so that nobody else holds the observer.
        let observer = unsafe { &mut *address };
        if interrupt::requested() {
            return Err(CaptureError::Stopped);
        }
        if let Some(problem) = observer.strange.take() {
            return Err(CaptureError::Engine { problem });
        }
        if status != 0 {
            return Err(refused(&format!("ended `llama_decode` with {status}")));
        }
        steps.push(std::mem::take(&mut observer.kept));
        ids.extend_from_slice(&call);
        // SAFETY: the step gave out the logits of every token.
        let logits = unsafe { (functions.logits)(context.it, call.len() as i32 - 1) };
        if logits.is_null() {
            return Err(refused("gives no logits"));
        }
        // SAFETY: a row has one value for each token of the vocabulary.
        let logits = unsafe { std::slice::from_raw_parts(logits, words as usize) };
        let mut likeliest = 0;
        for (token, value) in logits.iter().enumerate() {
            if *value > logits[likeliest] {
                likeliest = token;
            }
        }
        call = vec![likeliest as i32];
    }
    drop(context);
    let sites = joined(steps);
    if sites.is_empty() {
        let problem = "has shown no tensor of a known name; is this a model of text?".to_owned();
        return Err(CaptureError::Engine { problem });
    }
    Ok(Recording { sites, ids })
}

/// One call of the engine: its status.
fn step(
    functions: &Functions,
    context: &Held,
    observer: *mut Observer<'_>,
    tokens: &[i32],
    first: usize,
) -> i32 {
    // SAFETY: the observer is there, and llama.cpp does not run.
    unsafe { (*observer).rows = tokens.len() };
    // SAFETY: numbers alone.
    let mut batch = unsafe { (functions.batch)(tokens.len() as i32, 0, 1) };
    batch.tokens = tokens.len() as i32;
    for (place, token) in tokens.iter().enumerate() {
        // SAFETY: the batch was made for so many tokens, each of one sequence.
        unsafe {
            batch.token.add(place).write(*token);
            batch.position.add(place).write((first + place) as i32);
            batch.sequences.add(place).write(1);
            batch.sequence.add(place).read().write(0);
            // Without it the last layer drops the rows of all tokens but the last.
            batch.logits.add(place).write(1);
        }
    }
    // SAFETY: the context is there; the batch is whole, and freed once.
    unsafe {
        let status = (functions.decode)(context.it, batch);
        (functions.free_batch)(batch);
        status
    }
}

fn text(path: &Path) -> Result<CString, CaptureError> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| CaptureError::Engine { problem: "takes no path with a zero in it".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Default values as builds return them: the sizes, what stands before the settings, how
    /// many of these there are, and YaRN's numbers.
    fn defaults(before: &[u32], settings: usize, yarn: [f32; 3]) -> [u32; COMMON] {
        let mut words = vec![512, 2048, 512, 1];
        words.extend(before);
        words.extend(vec![MINUS_ONE; settings]);
        words.extend([0, 0, (-1.0f32).to_bits()]);
        words.extend(yarn.map(f32::to_bits));
        words.extend([0, (-1.0f32).to_bits()]);
        // What the compiler leaves between is anything.
        words.resize(words.len().next_multiple_of(2), 0xa5a5_a5a5);
        words.extend([0, 0, 0, 0, 1, 1]);
        words.resize(COMMON, 0);
        words.try_into().expect("words")
    }

    #[test]
    fn the_layouts_of_builds_are_known_by_their_default_values() {
        let layout = |flash, callback| Some(Layout { flash, callback, cache: callback + 4 });
        let old = defaults(&[4, 4], 3, [1.0, 32.0, 1.0]);
        assert_eq!(context_layout(&old), layout(None, 18), "b6133 to b6301");
        let newer = defaults(&[4, 4], 4, [1.0, 32.0, 1.0]);
        assert_eq!(context_layout(&newer), layout(Some(9), 18), "b6431");
        let yarn = defaults(&[4, 4], 4, [-1.0; 3]);
        assert_eq!(context_layout(&yarn), layout(Some(9), 18), "b7347 and b8390");
        let newest = defaults(&[0, 0, 1, 4, 4, 0], 4, [-1.0; 3]);
        assert_eq!(context_layout(&newest), layout(Some(13), 22), "v0.4.0");
    }

    #[test]
    fn other_default_values_are_refused_before_anything_is_called() {
        let sound = defaults(&[4, 4], 4, [-1.0; 3]);
        for place in [0, 1, 2, 3, 6, 10, 12, 16, 17, 18, 20, 22, 23] {
            let mut words = sound;
            words[place] ^= 0x40;
            assert_eq!(context_layout(&words), None, "word {place}");
        }
        assert_eq!(context_layout(&[0; COMMON]), None);
        assert_eq!(context_layout(&defaults(&[4, 4, 4, 4, 4, 4, 4], 4, [-1.0; 3])), None);
        assert!(!model_layout(&[1; OF_MODEL]));
    }
}
