//! A text is a token of a keyring exactly if it has the documented form, and a parsed token gives the same text again. Every
//! change of one character is detected. The form is implemented here a second time, with its own checksum.

use relatch::{
    control::token,
    key::{KeyId, Prefix, PresentedKey, Secret},
};
use zeroize::Zeroizing;

/// The first byte selects what the others are: a key as in a request, a key without its checksum, a prefix, or the header
/// with an admin token.
pub(crate) fn holds(bytes: &[u8]) {
    let Some((mode, bytes)) = bytes.split_first() else {
        return;
    };
    match mode % 4 {
        0 => is_a_token_when_its_form_says_so(bytes),
        1 => is_a_token_when_its_form_says_so(&[bytes, &checksum(bytes)].concat()),
        2 => is_a_prefix_when_its_form_says_so(bytes),
        _ => is_taken_out_of_its_header(bytes),
    }
}

fn is_a_token_when_its_form_says_so(bytes: &[u8]) {
    let Ok(presented) = PresentedKey::new(bytes) else {
        let is_printable = bytes.iter().all(|byte| (0x21..=0x7e).contains(byte));
        assert!(!is_printable || bytes.is_empty() || bytes.len() > PresentedKey::MAX_LEN);
        return;
    };
    assert_eq!(format!("{presented:?}"), "PresentedKey(redacted)");
    // The default prefix of a keyring, a prefix with an environment, and the prefix of admin tokens.
    for prefix in ["rlk", "rlk-test", "rlat"] {
        let keyring: Prefix = prefix.parse().expect("a prefix");
        let parsed = presented.parse(&keyring).ok();
        assert_eq!(parsed.as_ref().map(KeyId::as_str), key_id(bytes, prefix));
        if let Some(id) = parsed {
            goes_out_as_it_came(bytes, &keyring, id);
            notices_each_change(bytes, &keyring);
        }
    }
}

/// The key id of a token, if the bytes are one of a keyring with `prefix`.
fn key_id<'b>(bytes: &'b [u8], prefix: &str) -> Option<&'b str> {
    let text = str::from_utf8(bytes).ok()?;
    let (id, secret) = text
        .strip_prefix(prefix)?
        .strip_prefix('_')?
        .split_once('_')?;
    let is_base62 = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let body = &bytes[..bytes.len().checked_sub(6)?];
    let is_token = id.len() == 12
        && secret.len() == 32 + 6
        && is_base62(id)
        && is_base62(secret)
        && bytes.ends_with(&checksum(body));
    is_token.then_some(id)
}

/// CRC-32 (IEEE), bit by bit, as six base62 digits.
fn checksum(body: &[u8]) -> [u8; 6] {
    const DIGITS: &[u8] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut sum = u32::MAX;
    for byte in body {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = if sum & 1 == 1 {
                (sum >> 1) ^ 0xedb8_8320
            } else {
                sum >> 1
            };
        }
    }
    let mut rest = !sum;
    let mut digits = [0; 6];
    for digit in digits.iter_mut().rev() {
        *digit = DIGITS[(rest % 62) as usize];
        rest /= 62;
    }
    digits
}

fn goes_out_as_it_came(bytes: &[u8], prefix: &Prefix, id: KeyId) {
    let text = String::from_utf8(bytes.to_vec()).expect("it is printable");
    let secret = Secret::import(Zeroizing::new(text)).expect("a token is a key");
    assert_eq!(secret.expose().as_bytes(), bytes);
    assert_eq!(secret.presented().parse(prefix), Ok(id));
    let printed = format!("{secret:?}");
    assert_eq!(printed, "Secret(redacted)");
}

/// A CRC-32 detects every change of one byte.
fn notices_each_change(token: &[u8], prefix: &Prefix) {
    let mut changed = token.to_vec();
    for at in 0..token.len() {
        // Another digit or letter, the other case, and a character that is neither.
        for other in [token[at] ^ 1, token[at] ^ 0x20, b'_'] {
            changed[at] = other;
            if other != token[at] {
                let parsed = PresentedKey::new(&changed).map(|key| key.parse(prefix).is_ok());
                assert!(!parsed.unwrap_or(false), "a change at {at} is not noticed");
            }
        }
        changed[at] = token[at];
    }
}

fn is_a_prefix_when_its_form_says_so(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    let is_plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_prefix = (2..=16).contains(&bytes.len())
        && bytes.iter().all(|byte| is_plain(byte) || *byte == b'-')
        && bytes.first().is_some_and(is_plain)
        && bytes.last().is_some_and(is_plain);
    let parsed = text.parse::<Prefix>();
    assert_eq!(parsed.is_ok(), is_prefix);
    if let Ok(prefix) = parsed {
        assert_eq!(prefix.as_str(), text);
    }
}

fn is_taken_out_of_its_header(bytes: &[u8]) {
    let Ok(header) = str::from_utf8(bytes) else {
        return;
    };
    let has_scheme = header
        .get(..7)
        .is_some_and(|scheme| scheme.eq_ignore_ascii_case("bearer "));
    let taken = token::bearer(header);
    assert_eq!(taken.is_some(), has_scheme);
    if let Some(taken) = taken {
        assert_eq!(taken.as_str(), header[7..].trim());
        is_a_token_when_its_form_says_so(taken.as_bytes());
    }
}
