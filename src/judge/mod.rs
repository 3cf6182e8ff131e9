//! One kernel's dump judged: what a program read and returned, with no model and no stage.
//!
//! There are three answers: the outputs are the bits of a known way to compute them; or
//! not those, but within what rounding costs; or wrong, and then where and how. It knows
//! no contract; the command line is `cli/judge.rs`.

mod bits;
mod causes;
mod epilogue_bugs;
mod exam;
pub mod heads;
mod k_bugs;
mod looks;
mod operand_bugs;
pub mod operands;
mod place;
pub mod product;
pub mod same;
mod scale_bugs;
pub mod single;
pub mod stage;

use serde::Serialize;

pub use bits::{Bits, Epilogue};
pub use exam::{Exam, Floor, Larger, NonFinite, Steps, Z};
pub use place::{Map, Place};

use crate::compute::ComputeError;
use crate::dtype::Format;
use crate::text::{grouped, number, values_are};

/// The three answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The outputs are the bits of a known way to compute them.
    ToTheBit,
    /// They are not, but rounding explains every difference.
    WithinRounding,
    /// Rounding does not explain them.
    Wrong,
}

/// Signed sums of outputs held against their exact values: what covers all values of a
/// product that is too large to compare one by one in a second.
#[derive(Clone, Debug, Serialize)]
pub struct Checksums {
    /// How many.
    pub count: usize,
    /// Values in each, of one row.
    pub of: usize,
    /// Root mean square of their errors over their floors.
    pub rms: f64,
    /// The largest magnitude.
    pub max: f64,
    /// Whether rounding explains them: all, each row's, and those of each block of columns.
    #[serde(skip)]
    within: bool,
    /// By how many deviations they are larger than exact ones, where truncation can only make
    /// them smaller.
    #[serde(skip)]
    larger: f64,
}

/// A cause that was tested against the outputs.
#[derive(Clone, Debug, Serialize)]
pub struct Cause {
    /// Its name, as `k-block-lost`.
    pub cause: String,
    /// It in words, with the numbers that were found.
    pub detail: String,
    /// The share of the difference that it explains.
    pub explained: f64,
    /// Whether that is enough to give the bug its name.
    pub named: bool,
}

/// What is said of a dump.
#[derive(Clone, Debug, Serialize)]
pub struct Judgement {
    /// The answer.
    pub answer: Answer,
    /// The answer in a sentence.
    pub sentence: String,
    /// All values.
    pub values: usize,
    /// Values that were compared one by one.
    pub compared: usize,
    /// The check of all others, where not every value was compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksums: Option<Checksums>,
    /// The output's type.
    pub output: Format,
    /// NaN and infinity.
    pub non_finite: NonFinite,
    /// Errors in units of the floor.
    pub z: Z,
    /// The same under the finest floor, where a coarser one is the answer's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finest: Option<Z>,
    /// A floor of truncated sums that the values are too large for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub larger: Option<Larger>,
    /// Errors in steps of the output's type.
    pub steps: Steps,
    /// The schedules that were tried, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<Bits>,
    /// Where it is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// What it may be, the best first.
    pub causes: Vec<Cause>,
    /// A map of the errors, where something is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub map: Option<Map>,
}

/// A whole of which some rows and columns were looked at.
struct Whole<'a> {
    values: usize,
    rows: &'a [usize],
    columns: &'a [usize],
}

/// The answer to an exam. `search` looks for causes; it is asked only where something is
/// wrong.
fn verdict(
    exam: &Exam,
    marks: exam::Marks,
    bits: Option<Bits>,
    search: impl FnOnce(&Place) -> Result<Vec<Cause>, ComputeError>,
) -> Result<Judgement, ComputeError> {
    let values = exam.truth.len();
    let clean = marks.non_finite.wrong() == 0;
    let within = clean && marks.z.within;
    let known = bits
        .as_ref()
        .is_some_and(|bits| bits.schedule.is_some() && (bits.confirmed == values || within));
    let answer = match (known, within) {
        (true, _) => Answer::ToTheBit,
        (false, true) => Answer::WithinRounding,
        (false, false) => Answer::Wrong,
    };
    let (mut place, mut map, mut causes) = (None, None, Vec::new());
    if answer == Answer::Wrong {
        let found = Place::of(exam, &marks);
        causes = search(&found)?;
        place = Some(found);
        map = Some(Map::of(exam, &marks));
    }
    let mut judgement = Judgement {
        answer,
        sentence: String::new(),
        values,
        compared: values,
        checksums: None,
        output: exam.output,
        non_finite: marks.non_finite,
        z: marks.z,
        finest: marks.finest,
        larger: marks.larger,
        steps: marks.steps,
        bits,
        place,
        causes,
        map,
    };
    judgement.sentence = judgement.say();
    Ok(judgement)
}

impl Judgement {
    /// The same judgement of a whole of which `self` saw a part, and checksums the rest.
    fn of_sample(mut self, whole: Whole<'_>, checksums: Checksums) -> Judgement {
        let Whole { values, rows, columns } = whole;
        let z = |z: &mut Z| {
            z.max_at = [rows[z.max_at[0]], columns[z.max_at[1]]];
            z.worst_row.0 = rows[z.worst_row.0];
            z.worst_column.0 = columns[z.worst_column.0];
        };
        z(&mut self.z);
        if let Some(finest) = &mut self.finest {
            z(finest);
        }
        let [row, column] = self.steps.most_at;
        self.steps.most_at = [rows[row], columns[column]];
        self.values = values;
        self.checksums = Some(checksums);
        self.sentence = self.say();
        self
    }

    fn say(&self) -> String {
        let bits = self.bits.clone().unwrap_or_default();
        match (self.answer, bits.schedule) {
            (Answer::ToTheBit, schedule) => {
                let schedule = schedule.unwrap_or_default();
                let also = match bits.also.len() {
                    0 => String::new(),
                    1 => format!(" (equally exact: {})", bits.also[0]),
                    n => format!(" (equally exact: {} and {} more)", bits.also[0], n - 1),
                };
                let how_many = match bits.confirmed == self.values {
                    true => format!("all {} values", grouped(self.values)),
                    false => format!(
                        "the {} of {} values that were computed so; all {} are within rounding, \
                         z {:.2}",
                        grouped(bits.confirmed),
                        grouped(self.values),
                        if self.checksums.is_some() { "sampled ones" } else { "others" },
                        self.z.rms
                    ),
                };
                let rest = self.rest();
                format!(
                    "to the bit: these are the bits of a known schedule: {schedule}{also}; in \
                     {how_many}{rest}"
                )
            }
            (Answer::WithinRounding, _) => {
                let tried = match bits.count {
                    0 => String::new(),
                    1 => "not the exact result's bits, but ".to_owned(),
                    n => format!("not the bits of any of {n} known schedules, but "),
                };
                format!(
                    "within rounding: {tried}z {:.2} and {}{}; {}",
                    self.z.rms,
                    self.steps_in_words(),
                    self.rest(),
                    match (self.z.coarser, bits.count > 1) {
                        (false, true) => "this is what another order of additions costs".to_owned(),
                        (false, false) => "this is what rounding costs".to_owned(),
                        (true, _) => format!(
                            "this is what {} costs, which is coarser than {}",
                            self.z.floor,
                            self.finest.as_ref().map_or("f32", |finest| finest.floor.as_str())
                        ),
                    }
                )
            }
            (Answer::Wrong, _) => self.say_wrong(),
        }
    }

    /// What is known of values that were not compared one by one.
    fn rest(&self) -> String {
        self.checksums.as_ref().map_or(String::new(), |sums| {
            format!("; all others are within rounding in sums of {}", sums.of)
        })
    }

    fn say_wrong(&self) -> String {
        let mut parts = Vec::new();
        parts.extend(not_finite(&self.non_finite));
        if let Some(place) = self.place.as_ref().filter(|_| !self.z.within) {
            let size = number((place.size * 10.0).round() / 10.0);
            parts.push(format!(
                "{}: the median error is {size} floors, {}",
                place.in_words(),
                place.instead
            ));
        }
        if self.z.within {
            parts.push(format!("all others are within rounding, z {:.2}", self.z.rms));
        }
        parts.push(why(&self.causes));
        format!("wrong, here, so: {}", parts.join("; "))
    }

    fn steps_in_words(&self) -> String {
        let Steps { differ, by_one, most, most_at } = &self.steps;
        if *differ == 0 {
            return format!("every value is the exact one rounded to {}", self.output);
        }
        let sampled = if self.compared < self.values { "sampled " } else { "" };
        let of = format!("{} of {} {sampled}values", grouped(*differ), grouped(self.compared));
        if *most <= 1 {
            return format!("at most 1 {} step, in {of}", self.output);
        }
        format!(
            "{of} differ, {} of them by 1 {} step and at most by {most}, at row {}, column {}",
            grouped(*by_one),
            self.output,
            most_at[0],
            most_at[1]
        )
    }

    /// Everything that is known, in lines.
    pub fn in_text(&self) -> String {
        let mut text = format!("  {}\n\n", capitalised(&self.sentence));
        let mut line = |name: &str, value: String| {
            text += &format!("  {name:<9} {value}\n");
        };
        let z = &self.z;
        let [row, column] = z.max_at;
        line(
            "z",
            format!(
                "{:.2} over all {}values (1 is expected, or less); largest {} at row {row}, \
                 column {column}; worst row {} with {}, worst column {} with {}",
                z.rms,
                if self.checksums.is_some() { "sampled " } else { "" },
                shown(z.max),
                z.worst_row.0,
                shown(z.worst_row.1),
                z.worst_column.0,
                shown(z.worst_column.1)
            ),
        );
        line("floor", format!("{}, and the rounding to {}", z.floor, self.output));
        if let Some(finest) = &self.finest {
            line("", format!("with {} z is {}", finest.floor, shown(finest.rms)));
        }
        if let Some(Larger { floor, deviations }) = &self.larger {
            line(
                "",
                format!(
                    "{floor} would make them smaller: they are larger, by {deviations:.1} \
                     deviations"
                ),
            );
        }
        line(
            "steps",
            format!("{}; a step is from one {} to the next", self.steps_in_words(), {
                self.output
            }),
        );
        if self.non_finite.expected > 0 {
            let many = values_are(self.non_finite.expected);
            line("not finite", format!("{many} not finite in the exact result either"));
        }
        if let Some(bits) = &self.bits {
            line("tried", bits.tried.join("; "));
            if let Some((name, differ)) = bits.nearest.as_ref().filter(|_| bits.schedule.is_none())
            {
                let (differ, of) = (grouped(*differ), grouped(bits.sampled));
                line("nearest", format!("{name}: {differ} of {of} sampled outputs differ"));
            }
            for also in &bits.also {
                line("also", format!("equally exact: {also}"));
            }
        }
        let many = grouped(self.values);
        let sample = self.bits.as_ref().map_or(String::new(), |bits| {
            let confirmed = match bits.schedule {
                Some(_) => format!(", the one that fits on {}", grouped(bits.confirmed)),
                None => String::new(),
            };
            format!("; schedules on {}{confirmed}", grouped(bits.sampled))
        });
        match &self.checksums {
            None => {
                line("compared", format!("all {many} values with the exact result in f64{sample}"))
            }
            Some(sums) => {
                let compared = grouped(self.compared);
                line(
                    "compared",
                    format!("{compared} of {many} values with the exact result in f64{sample}"),
                );
                line(
                    "",
                    format!(
                        "all {many} in {} signed sums of {} values: z {:.2}, largest {:.2}; \
                         `--all` compares every value",
                        grouped(sums.count),
                        sums.of,
                        sums.rms,
                        sums.max
                    ),
                );
            }
        }
        if let Some(place) = &self.place {
            line(
                "where",
                format!(
                    "{}, {}: {} of {many} values beyond rounding, {:.0} % of that block",
                    place.rows,
                    place.columns,
                    grouped(place.values),
                    100.0 * place.filled
                ),
            );
            line("how", place.instead.clone());
        }
        for cause in &self.causes {
            line("cause", cause.in_words());
        }
        if let Some(map) = &self.map {
            text += "\n";
            text += &map.in_text("largest z");
        }
        text
    }
}

impl Cause {
    fn in_words(&self) -> String {
        let share = 100.0 * self.explained.clamp(0.0, 1.0);
        format!("{}: {} ({share:.2} %)", self.cause, self.detail)
    }
}

/// What is not finite and must be, or the other way round.
fn not_finite(found: &NonFinite) -> Option<String> {
    let NonFinite { nan, infinite, lost, first, .. } = found;
    let at = first.map_or(String::new(), |[row, column]| {
        format!(", the first at row {row}, column {column}")
    });
    let strange: Vec<String> = [
        (*nan, "NaN"),
        (*infinite, "infinite"),
        (*lost, "finite where the exact value is not or does not fit"),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, what)| format!("{} {what}", values_are(count)))
    .collect();
    (!strange.is_empty()).then(|| format!("{}{at}", strange.join(" and ")))
}

/// The best cause, in a sentence's end.
fn why(causes: &[Cause]) -> String {
    match causes.first() {
        Some(cause) if cause.named => format!(
            "{}: {} (explains {:.2} % of the difference)",
            cause.cause,
            cause.detail,
            100.0 * cause.explained
        ),
        Some(cause) => format!(
            "not recognised; nearest is {} with {:.0} %",
            cause.cause,
            100.0 * cause.explained.clamp(0.0, 1.0)
        ),
        None => "not recognised".to_owned(),
    }
}

fn shown(z: f64) -> String {
    if z < 1000.0 { format!("{z:.2}") } else { number(z) }
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters
        .next()
        .map_or(String::new(), |first| first.to_uppercase().collect::<String>() + letters.as_str())
}
