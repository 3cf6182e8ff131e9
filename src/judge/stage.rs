//! A stage's product of coded operands held to its rounding: the floor that its contract
//! judges by, the answer in words, and where it is wrong.
//!
//! It knows operands, a recording and a recipe; which claim fell is handed to it.

use super::operands::{mostly, recognised};
use super::product::Product;
use super::{Answer, Epilogue, Judgement, Place};
use crate::compare::fingerprints::Fit;
use crate::compare::{Diagnosis, Suspect};
use crate::compute::ComputeError;
use crate::compute::emulated::chip::chip;
use crate::op::Recipe;
use crate::tensor::Tensor;
use crate::tensor_file::CodedTensor;

/// The product of a stage and what was recorded of it.
pub struct Recording<'a> {
    /// The activation's codes.
    pub x: &'a CodedTensor,
    /// The weight's codes.
    pub w: &'a CodedTensor,
    /// The recorded outputs.
    pub observed: &'a CodedTensor,
    /// The stage's recipe: its chip is asked, its output type is the recording's own.
    pub recipe: &'a Recipe,
}

impl Recording<'_> {
    /// The deviation that rounding gives each output, under the way to add that explains
    /// the recording, or else under the coarsest.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn floor(&self) -> Result<Tensor, ComputeError> {
        self.with_product(|product| {
            let exam = product.exam()?;
            let name = exam.marks().z.floor;
            let floor = exam.floors.into_iter().find(|floor| floor.name == name);
            let sigma = floor.map(|floor| floor.sigma).unwrap_or_default();
            Ok(Tensor::new(exam.y.width(), sigma))
        })
    }

    /// The answer.
    ///
    /// # Errors
    /// As [`Product::judge`].
    pub fn judgement(&self) -> Result<Judgement, ComputeError> {
        self.with_product(|product| product.judge())
    }

    /// What is to be said where a claim on it fell.
    ///
    /// # Errors
    /// As [`Product::judge`].
    pub fn diagnosis(&self, suspect: &Suspect) -> Result<Diagnosis, ComputeError> {
        let judgement = self.judgement()?;
        let elements = judgement.values;
        let fits = judgement.causes.into_iter().map(|cause| Fit {
            cause: cause.cause,
            detail: cause.detail,
            explained: cause.explained,
            mismatches: judgement.steps.differ.max(1),
            elements,
            parameters: 0,
            significant: cause.named,
            gain: 0.0,
        });
        let known = judgement.place.as_ref().map(|place| {
            let noun = if place.values == 1 { "value" } else { "values" };
            format!("{} {noun}, {}; {}", place.values, place.in_words(), place.instead)
        });
        Ok(Diagnosis {
            subject: suspect.subject,
            judge: suspect.judge,
            site: suspect.site.clone(),
            op: "matmul".to_owned(),
            evidence: suspect.evidence.clone(),
            ratio: Some(judgement.z.rms),
            later_layers: 0,
            also: Vec::new(),
            prescribed: judgement.answer == Answer::ToTheBit,
            within_rounding: judgement.answer == Answer::WithinRounding,
            same_input: true,
            other_kernel: None,
            known,
            fits: fits.collect(),
        })
    }

    /// The product, with the recording's own output type: the narrowest of all its values, or
    /// of nearly all.
    fn with_product<T>(
        &self,
        then: impl FnOnce(&Product<'_>) -> Result<T, ComputeError>,
    ) -> Result<T, ComputeError> {
        let Recording { x, w, observed, recipe } = *self;
        if (observed.rows, observed.width) != (x.rows, w.rows) {
            return Err(ComputeError::Shape {
                what: "the recorded outputs of a product".to_owned(),
                left: format!("y [{}, {}]", observed.rows, observed.width),
                right: format!("x w^T [{}, {}]", x.rows, w.rows),
            });
        }
        let output = recognised(observed.clone()).0.format;
        let epilogue = Epilogue { alpha: 1.0, bias: None };
        let chips = [chip(recipe.chip).name];
        let y = observed.values();
        let mut product = Product { x, w, y, output, epilogue, chips: &chips, all: true };
        if let Some(mostly) = mostly(observed) {
            let exam = product.exam()?;
            let marks = exam.marks();
            // More are wrong than have another type than nearly all: the others are to blame.
            if !marks.z.within && Place::of(&exam, &marks).values > mostly.others {
                product.output = mostly.format;
            }
        }
        then(&product)
    }
}
