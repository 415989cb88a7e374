//! Interleaved rounds: the sides of a comparison are measured seconds apart, and no side is always the first.

use anyhow::Result;

/// Measures each of `subjects` in each of `rounds` rounds, and returns the results of each. Every round begins with another
/// subject.
///
/// # Errors
///
/// When a measurement fails.
pub(crate) fn interleaved<S, T>(
    rounds: u32,
    subjects: &mut [S],
    name: impl Fn(&S) -> String,
    mut measure: impl FnMut(&mut S) -> Result<T>,
) -> Result<Vec<Vec<T>>> {
    let mut measured: Vec<Vec<T>> = subjects.iter().map(|_| Vec::new()).collect();
    let mut order: Vec<usize> = (0..subjects.len()).collect();
    for round in 1..=rounds {
        for &at in &order {
            eprintln!("round {round} of {rounds}: {}", name(&subjects[at]));
            measured[at].push(measure(&mut subjects[at])?);
        }
        order.rotate_left(1);
    }
    Ok(measured)
}

/// One figure of every round.
pub(crate) fn figures<T>(rounds: &[T], figure: impl Fn(&T) -> f64) -> Vec<f64> {
    rounds.iter().map(figure).collect()
}
