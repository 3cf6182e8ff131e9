//! The measures of a pair of streams, laid out as layers x sites.
//!
//! It knows names and places; what the numbers mean is the readers' concern.

use std::collections::{BTreeMap, BTreeSet};

use crate::compare::Measure;
use crate::layer_sites::LAYER_SITES;
use crate::metric::Metric;
use crate::op::{Stream, in_layer};

/// Sites before the layers; all other sites outside of them come after.
const BEFORE: [&str; 2] = ["embed", "embed_scaled"];

/// The measures of one pair of streams.
pub struct Grid<'a> {
    /// Whose numbers are in question.
    pub subject: Stream,
    /// What they are held against.
    pub judge: Stream,
    /// The layers, smallest first.
    pub layers: Vec<u32>,
    /// The rows, in the order of the flow.
    pub sites: Vec<&'a str>,
    /// By site and column: the place among the stage's measures, and the measure.
    pub cells: BTreeMap<(&'a str, usize), (usize, &'a Measure)>,
}

impl<'a> Grid<'a> {
    /// A grid for each pair of streams, in the order in which they were measured.
    pub fn of(measures: &'a [Measure]) -> Vec<Grid<'a>> {
        let mut pairs: Vec<(Stream, Stream)> = Vec::new();
        for measure in measures {
            let pair = (measure.subject, measure.judge);
            if !pairs.contains(&pair) {
                pairs.push(pair);
            }
        }
        pairs.into_iter().map(|pair| Grid::of_pair(measures, pair)).collect()
    }

    fn of_pair(measures: &'a [Measure], (subject, judge): (Stream, Stream)) -> Grid<'a> {
        let of_pair = || {
            let all = measures.iter().enumerate();
            all.filter(|(_, m)| m.subject == subject && m.judge == judge)
        };
        let layers: BTreeSet<u32> =
            of_pair().filter_map(|(_, m)| in_layer(&m.site.0).map(|(layer, _)| layer)).collect();
        let layers: Vec<u32> = layers.into_iter().collect();
        let (mut before, mut inside, mut after) = (Vec::new(), Vec::new(), Vec::new());
        let mut cells = BTreeMap::new();
        for (place, measure) in of_pair() {
            let (rows, site, column) = match in_layer(&measure.site.0) {
                Some((layer, inner)) => {
                    (&mut inside, inner, layers.binary_search(&layer).unwrap_or(0))
                }
                None if BEFORE.contains(&measure.site.0.as_str()) => {
                    (&mut before, measure.site.0.as_str(), 0)
                }
                None => (&mut after, measure.site.0.as_str(), layers.len().saturating_sub(1)),
            };
            if !rows.contains(&site) {
                rows.push(site);
            }
            cells.insert((site, column), (place, measure));
        }
        // A site that a later layer has first (they may differ) still gets its place.
        let flow = |site: &&str| LAYER_SITES.iter().position(|known| known == site);
        inside.sort_by_key(|site| flow(site).unwrap_or(LAYER_SITES.len()));
        let sites = [before, inside, after].concat();
        Grid { subject, judge, layers, sites, cells }
    }

    /// The pair as people write it.
    pub fn pair(&self) -> String {
        if self.subject == self.judge {
            format!("{} against its repeats", self.subject)
        } else {
            format!("{} against {}", self.subject, self.judge)
        }
    }

    /// One site's measures from layer to layer: column, place, measure.
    pub fn row(&self, site: &str) -> Vec<(usize, usize, &'a Measure)> {
        let cells = self.cells.iter().filter(|((row, _), _)| *row == site);
        cells.map(|((_, column), (place, measure))| (*column, *place, *measure)).collect()
    }

    /// Whether some measure has a metric.
    pub fn has(&self, metric: Metric) -> bool {
        self.cells.values().any(|(_, measure)| measure.metrics.contains_key(&metric))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::{Arm, Site};

    fn at(site: &str) -> Measure {
        Measure {
            subject: Stream::Arm(Arm::Emulated),
            judge: Stream::Arm(Arm::Reference),
            site: Site(site.to_owned()),
            shape: [1, 1],
            metrics: BTreeMap::from([(Metric::Nmse, 1.0)]),
            unmeasured: None,
            worst: None,
            first_mismatches: Vec::new(),
            z_histogram: None,
            chance: BTreeMap::new(),
        }
    }

    #[test]
    fn rows_follow_the_flow_and_columns_the_layers() {
        let measures: Vec<Measure> =
            ["blk.10.v", "embed", "logits", "blk.2.q", "blk.2.v"].map(at).into();
        let grids = Grid::of(&measures);
        assert_eq!(grids.len(), 1);
        assert_eq!(grids[0].layers, [2, 10]);
        assert_eq!(grids[0].sites, ["embed", "q", "v", "logits"]);
        let row = grids[0].row("v");
        assert_eq!(
            row.iter().map(|(column, place, _)| (*column, *place)).collect::<Vec<_>>(),
            [(0, 4), (1, 0)]
        );
    }
}
