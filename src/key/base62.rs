//! Base62: the ASCII digits and letters. Ids and tokens consist of them.

use zeroize::Zeroizing;

use super::random::{RandomError, fill_random};

pub(super) const ALPHABET: &[u8; 62] =
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Returns `N` random characters. All 62 are equally likely.
pub(super) fn random<const N: usize>() -> Result<[u8; N], RandomError> {
    // The largest multiple of 62 in a byte. A byte from 248 on would favour the first characters.
    const LIMIT: u8 = 248;
    let mut characters = [0; N];
    let mut filled = 0;
    let mut pool = Zeroizing::new([0; 64]);
    while filled < N {
        fill_random(pool.as_mut_slice())?;
        for byte in pool.iter().filter(|&&byte| byte < LIMIT).take(N - filled) {
            characters[filled] = ALPHABET[usize::from(byte % 62)];
            filled += 1;
        }
    }
    Ok(characters)
}

/// Returns the character of `digit` modulo 62.
pub(super) fn character(digit: u128) -> u8 {
    ALPHABET[usize::try_from(digit % 62).unwrap_or_default()]
}
