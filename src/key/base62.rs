//! Base62: the digits and letters of ASCII, of which ids and tokens consist.

use zeroize::Zeroizing;

use super::random::{RandomError, fill_random};

pub(super) const ALPHABET: &[u8; 62] =
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// `N` characters, each of the 62 equally likely.
pub(super) fn random<const N: usize>() -> Result<[u8; N], RandomError> {
    // The largest multiple of 62 that a byte can hold; a byte above it would favour the first characters.
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

/// The character of a digit, of which the part below 62 counts.
pub(super) fn character(digit: u128) -> u8 {
    ALPHABET[usize::try_from(digit % 62).unwrap_or_default()]
}
