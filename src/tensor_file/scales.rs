//! The scales of a tensor's codes: one for all, one per row, or one per block, read from
//! the shape of the tensor that holds them.
//!
//! Orientation and block follow from both shapes, never from a count. It knows no format
//! and no arithmetic.

/// Widths of blocks that engines use, the commonest first.
const USUAL: [usize; 5] = [128, 32, 64, 16, 256];

/// What a tensor's codes are multiplied with: one scale for each block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockScales {
    /// Rows that share a scale.
    pub rows_per_block: usize,
    /// Elements of a row that share a scale.
    pub width_per_block: usize,
    /// Scales in a row of blocks.
    pub blocks_per_row: usize,
    /// The scales, row-major `[blocks of rows, blocks_per_row]`.
    pub values: Vec<f32>,
    /// What was assumed where the shape leaves a choice.
    pub remark: Option<String>,
}

impl BlockScales {
    /// One scale for the whole tensor of this shape.
    pub fn one(scale: f32, rows: usize, width: usize) -> BlockScales {
        BlockScales {
            rows_per_block: rows,
            width_per_block: width,
            blocks_per_row: 1,
            values: vec![scale],
            remark: None,
        }
    }

    /// Fits scales of a shape to an operand of this shape, whose last two dimensions are a matrix.
    ///
    /// # Errors
    /// In words, with the shapes that would fit, where the shapes do not say which values share one.
    pub fn fit(
        shape: &[usize],
        operand: &[usize],
        values: Vec<f32>,
    ) -> Result<BlockScales, String> {
        let (matrices, height, width) = match operand {
            [] => (1, 1, 1),
            [width] => (1, 1, *width),
            [outer @ .., rows, width] => (outer.iter().product::<usize>(), *rows, *width),
        };
        let rows = matrices * height;
        if values.len() == 1 {
            return Ok(BlockScales::one(values[0], rows, width));
        }
        let refused = |problem: String| {
            Err(format!(
                "is {operand:?}, and {problem}; one scale, [{rows}, 1] for one per row, or \
                 [ceil({height} / r), ceil({width} / c)] for blocks of r x c is read"
            ))
        };
        let [of_rows, wide] = match shape {
            [count] if *count == rows => [rows, 1],
            [count] if rows == 1 || *count == width => [1, *count],
            [count] => {
                return refused(format!(
                    "{count} scales of the shape {shape:?} may be of its rows or of its columns: \
                     write [{count}, 1] or [1, {count}]"
                ));
            }
            [outer @ .., high, wide] => {
                let outer: usize = outer.iter().product();
                if outer != 1 && (shape.len() != operand.len() || outer != matrices) {
                    return refused(format!("scales of the shape {shape:?} are of more matrices"));
                }
                [outer * high, *wide]
            }
            [] => [1, 1],
        };
        let high = of_rows;
        // Of each matrix by itself, so that no block lies in two.
        let direct = match matrices > 1 && high.is_multiple_of(matrices) {
            true => blocks(height, high / matrices).filter(|block| height.is_multiple_of(*block)),
            false => blocks(rows, high),
        };
        let direct = direct.zip(blocks(width, wide));
        let is_matrix = shape.len() > 1 && shape.iter().rev().skip(2).all(|outer| *outer == 1);
        let turned = blocks(rows, wide).zip(blocks(width, high)).filter(|_| is_matrix);
        let usual = |(high, wide): (usize, usize)| {
            (high == 1 || high == 128 || high == rows)
                && (wide == width || USUAL.contains(&wide) || wide == 1)
        };
        let of = |(high, wide): (usize, usize)| format!("blocks of {high} x {wide}");
        let likely = |block: Option<(usize, usize)>| block.filter(|&block| usual(block));
        // A row or a column of scales says along which axis they lie.
        let is_line = high == 1 || wide == 1;
        let (block, is_turned, remark) = match (direct, turned) {
            (direct, Some(turned)) if is_line && !direct.is_some_and(usual) && usual(turned) => {
                let stands = direct.map_or("fit no blocks".to_owned(), |direct| {
                    format!("are {} as they stand", of(direct))
                });
                return refused(format!(
                    "scales of the shape {shape:?} {stands}, and {} transposed: write the second \
                     as [{wide}, {high}]",
                    of(turned)
                ));
            }
            (Some(direct), Some(turned)) if usual(turned) && !usual(direct) => {
                let remark = format!(
                    "the scales {shape:?} are read transposed, as {}; read as they stand they \
                     would be {}",
                    of(turned),
                    of(direct)
                );
                (turned, true, Some(remark))
            }
            (Some(direct), turned) => {
                let other = likely(turned).filter(|&turned| turned != direct || high != wide);
                let remark = other.filter(|_| direct != (1, width)).map(|turned| {
                    format!(
                        "the scales {shape:?} are read as {}; transposed they would be {}",
                        of(direct),
                        of(turned)
                    )
                });
                let row_or_column = (shape.len() == 1 && rows == width).then(|| {
                    format!(
                        "{rows} scales for an operand of {rows} x {width} are read as one per row"
                    )
                });
                (direct, false, remark.or(row_or_column))
            }
            (None, Some(turned)) => {
                let remark = format!(
                    "the scales {shape:?} fit only transposed: they are read as {}",
                    of(turned)
                );
                (turned, true, Some(remark))
            }
            (None, None) => {
                return refused(format!("scales of the shape {shape:?} fit no blocks of it"));
            }
        };
        let values = if is_turned { transposed(&values, wide) } else { values };
        let (rows_per_block, width_per_block) = block;
        let blocks_per_row = if is_turned { high } else { wide };
        Ok(BlockScales { rows_per_block, width_per_block, blocks_per_row, values, remark })
    }

    /// The scale of one element.
    pub fn at(&self, row: usize, column: usize) -> f32 {
        let block = row / self.rows_per_block * self.blocks_per_row;
        self.values[block + column / self.width_per_block]
    }

    /// Whether one scale holds for a whole row.
    pub fn is_by_row(&self) -> bool {
        self.blocks_per_row == 1
    }

    /// The scales of some rows alone, in the given order.
    pub fn select_rows(&self, rows: &[usize], width: usize) -> BlockScales {
        if self.values.len() == 1 {
            return BlockScales::one(self.values[0], rows.len(), width);
        }
        // The rows may cut a block, so each gets its own copy.
        let values = rows.iter().flat_map(|row| {
            let first = row / self.rows_per_block * self.blocks_per_row;
            self.values[first..first + self.blocks_per_row].iter().copied()
        });
        BlockScales { rows_per_block: 1, values: values.collect(), ..self.clone() }
    }

    /// What the scales are, in words.
    pub fn in_words(&self, rows: usize, width: usize) -> String {
        match (self.rows_per_block, self.width_per_block) {
            _ if self.values.len() == 1 => format!("one scale {:e}", self.values[0]),
            (1, wide) if wide >= width => "one scale per row".to_owned(),
            (high, 1) if high >= rows => "one scale per column".to_owned(),
            (high, wide) => format!("one scale per {high} x {wide}"),
        }
    }
}

/// The block along an axis of `size` elements that is cut into `parts`: a usual one if
/// one fits, else an exact share.
fn blocks(size: usize, parts: usize) -> Option<usize> {
    match parts {
        0 => None,
        1 => Some(size),
        _ if parts == size => Some(1),
        _ => {
            let usual = USUAL.into_iter().chain([8, 512, 1024, 48, 96, 192]);
            usual
                .into_iter()
                .find(|&block| size.div_ceil(block) == parts)
                .or_else(|| (size.is_multiple_of(parts)).then(|| size / parts))
        }
    }
}

fn transposed(values: &[f32], width: usize) -> Vec<f32> {
    let rows = values.len() / width;
    (0..width).flat_map(|column| (0..rows).map(move |row| values[row * width + column])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(shape: &[usize], rows: usize, width: usize) -> Result<BlockScales, String> {
        let count = shape.iter().product();
        BlockScales::fit(shape, &[rows, width], (0..count).map(|i| 1.0 + i as f32).collect())
    }

    #[test]
    fn block_and_orientation_come_from_the_shapes() {
        let block = |shape: &[usize], rows, width| {
            let fitted = fit(shape, rows, width).expect("scales that fit");
            ((fitted.rows_per_block, fitted.width_per_block), fitted.remark.is_some())
        };
        assert_eq!(block(&[128, 8], 128, 1024), ((1, 128), false));
        assert_eq!(block(&[8, 128], 128, 1024), ((1, 128), true), "transposed, and said");
        assert_eq!(block(&[4, 8], 512, 1024), ((128, 128), false));
        assert_eq!(block(&[3, 8], 300, 1000), ((128, 128), false), "cut blocks at the edges");
        assert_eq!(block(&[512], 512, 1024), ((1, 1024), false));
        assert_eq!(block(&[512, 1], 512, 1024), ((1, 1024), false));
        assert_eq!(block(&[1], 512, 1024), ((512, 1024), false));
        assert_eq!(block(&[1, 1024], 512, 1024), ((512, 1), false));
        assert_eq!(block(&[512, 32], 512, 1024), ((1, 32), false));
        assert!(block(&[512], 512, 512).1, "one per row or one per column?");
    }

    #[test]
    fn as_many_scales_as_rows_are_not_therefore_one_per_row() {
        let fitted = fit(&[8, 16], 128, 2048).expect("blocks");
        assert_eq!((fitted.rows_per_block, fitted.width_per_block), (16, 128));
        let error = fit(&[7, 5], 128, 1024).expect_err("no blocks");
        assert!(error.contains("[128, 1]"), "{error}");
    }

    #[test]
    fn scales_whose_shape_leaves_open_which_values_share_one_are_refused() {
        for (shape, rows, width, said) in [
            (
                &[2, 1][..],
                4,
                256,
                "blocks of 2 x 256 as they stand, and blocks of 4 x 128 transpos",
            ),
            (&[2, 1], 512, 256, "blocks of 256 x 256 as they stand"),
            (&[1, 300], 300, 1024, "write the second as [300, 1]"),
            (&[2], 256, 256, "write [2, 1] or [1, 2]"),
            (&[2, 2, 1], 4, 256, "of more matrices"),
            (&[4, 1, 1], 4, 256, "of more matrices"),
        ] {
            let error = fit(shape, rows, width).expect_err(said);
            assert!(error.contains(said), "`{said}` is not in: {error}");
            assert!(error.starts_with(&format!("is [{rows}, {width}], and ")), "{error}");
        }
        // What a shape says, it says.
        let block = |shape: &[usize], rows, width| {
            let fitted = fit(shape, rows, width).expect("scales that fit");
            [fitted.rows_per_block, fitted.width_per_block]
        };
        assert_eq!(block(&[4, 1], 512, 512), [128, 512]);
        assert_eq!(block(&[1, 2], 256, 256), [256, 128]);
        assert_eq!(block(&[8], 1, 1024), [1, 128]);
        assert_eq!(block(&[1, 4, 1], 4, 256), [1, 256]);
    }

    #[test]
    fn a_block_of_scales_lies_in_one_matrix() {
        let scales = |shape: &[usize], operand: &[usize]| {
            BlockScales::fit(shape, operand, vec![1.0; shape.iter().product()])
        };
        let each = scales(&[2, 1, 1], &[2, 130, 64]).expect("one for each matrix");
        assert_eq!((each.rows_per_block, each.width_per_block), (130, 64));
        let blocks = scales(&[2, 2, 1], &[2, 256, 128]).expect("two for each matrix");
        assert_eq!((blocks.rows_per_block, blocks.width_per_block), (128, 128));
        let cut = scales(&[2, 2, 1], &[2, 130, 128]).expect_err("a block at the edge of a matrix");
        assert!(cut.contains("is [2, 130, 128]"), "{cut}");
    }

    #[test]
    fn transposed_scales_stand_where_they_belong() {
        let fitted = fit(&[8, 128], 128, 1024).expect("scales that fit");
        // Row 3, second block of K: the file has it at [1, 3].
        assert_eq!(fitted.at(3, 128), 1.0 + 128.0 + 3.0);
        let some = fitted.select_rows(&[3, 7], 1024);
        assert_eq!(some.at(0, 128), fitted.at(3, 128));
    }
}
