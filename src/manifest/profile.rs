//! `[profile.NAME]` of `pipeline.toml`: how an unattended run differs from a typed one.
//!
//! It knows no stage: whether a selection finds something is seen when it is used.

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroUsize};

use super::fields::{Fields, Put, choose};
use super::problem::Findings;
use crate::op::Arm;

/// A way to run the folder's stages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// The stages, as `--select` names them.
    pub select: Option<String>,
    /// Arms that are measured anew although their results are there.
    pub fresh: Vec<Arm>,
    /// Arms without which a stage is an error.
    pub require: Vec<Arm>,
    /// The least number of times that forward passes are repeated.
    pub repeats: Option<NonZeroU32>,
    /// Finished runs to keep.
    pub keep: Option<NonZeroUsize>,
}

/// All profiles by name.
pub(super) fn read(fields: &mut Fields<'_>, findings: &mut Findings) -> BTreeMap<String, Profile> {
    let Some(profiles) = fields.table("profile", findings) else { return BTreeMap::new() };
    let named = |arms: &[Arm]| arms.iter().map(|arm| (arm.name(), *arm)).collect::<Vec<_>>();
    let (arms, measured) = (named(&Arm::ALL), named(&Arm::MEASURED));
    let mut known = BTreeMap::new();
    for (name, mut table) in profiles.into_tables(findings) {
        let select = table.take::<String>("select", findings);
        let fresh = table.list::<String>("fresh", findings);
        let require = table.list::<String>("require", findings);
        let repeats = table.take::<NonZeroU32>("repeats", findings);
        let keep = table.take::<NonZeroUsize>("keep", findings);
        table.finish(findings);
        let mut chosen = |key: &'static str, list: Option<Put<Vec<Put<String>>>>, of: &[_]| {
            let list = list.map_or(Vec::new(), |list| list.value).into_iter();
            let arms = list.filter_map(|arm| choose(key, arm, of, findings));
            arms.map(|arm| arm.value).collect()
        };
        let profile = Profile {
            fresh: chosen("fresh", fresh, &measured),
            require: chosen("require", require, &arms),
            select: select.map(|select| select.value),
            repeats: repeats.map(|repeats| repeats.value),
            keep: keep.map(|keep| keep.value),
        };
        known.insert(name, profile);
    }
    known
}
