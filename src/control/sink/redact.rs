//! Removes secrets from the texts of other programs and servers.

use std::collections::HashSet;

/// The number of consecutive bytes that count as a part of a secret: fewer occur in a text by
/// chance, and reveal little.
pub(super) const PART: usize = 8;

const REDACTED: &[u8] = b"[redacted]";

/// Returns `said` from byte `start` on, without any verbatim part of `secrets`. The bytes before
/// `start` help to find a secret that reaches into the rest. A secret in another encoding is not
/// found.
pub(super) fn without(said: &[u8], start: usize, secrets: &[&str]) -> String {
    let parts: HashSet<&[u8]> = secrets
        .iter()
        .flat_map(|secret| secret.as_bytes().windows(PART))
        .collect();
    let mut hidden = vec![false; said.len()];
    for (at, window) in said.windows(PART).enumerate() {
        if parts.contains(window) {
            hidden[at..at + PART].fill(true);
        }
    }
    let mut text = Vec::new();
    let mut last_hidden = false;
    for (byte, hidden) in said.iter().zip(hidden).skip(start) {
        match (hidden, last_hidden) {
            (true, false) => text.extend_from_slice(REDACTED),
            (true, true) => {}
            (false, _) => text.push(*byte),
        }
        last_hidden = hidden;
    }
    String::from_utf8_lossy(&text).into_owned()
}
