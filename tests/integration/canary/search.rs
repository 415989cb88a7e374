//! A search for secrets in what programs leave behind, in each way in which a program may have written them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write as _,
};

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD_NO_PAD, BASE64_URL_SAFE_NO_PAD},
};
use sha2::{Digest as _, Sha256};

/// The secrets that are searched for.
#[derive(Debug, Default)]
pub(super) struct Canaries {
    names: BTreeMap<Vec<u8>, String>,
    forms: Forms,
}

/// A secret where none belongs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Found {
    pub(super) canary: String,
    pub(super) form: &'static str,
    /// What stands around it.
    pub(super) context: String,
}

/// All forms of all secrets, by the first bytes of each.
#[derive(Debug)]
struct Forms {
    /// Whether any form begins with these two bytes: nearly nothing does, which makes the search quick.
    begins: Vec<bool>,
    by_probe: HashMap<[u8; PROBE], Vec<Form>>,
}

#[derive(Debug)]
struct Form {
    name: String,
    way: &'static str,
    bytes: Vec<u8>,
}

/// What every form is at least as long as.
const PROBE: usize = 8;
/// A part of a secret is found, too: of random text so long there is no second one by chance, and whatever shows twice as
/// much of a secret shows one whole part.
const PART: usize = 16;
/// How much is told around a finding.
const CONTEXT: usize = 100;

impl Canaries {
    /// Takes a secret that is to be found nowhere, neither whole nor in part, nor its digest.
    pub(super) fn add(&mut self, name: &str, secret: &[u8]) {
        assert!(secret.len() >= PROBE, "{name} is too short to search for");
        if self.names.contains_key(secret) {
            return;
        }
        self.names.insert(secret.to_vec(), name.to_owned());
        let parts = secret.chunks_exact(PART).filter(|_| secret.len() > PART);
        for part in parts.chain([secret]) {
            self.forms.add(name, part);
        }
        // Whoever has it tests guesses as quickly as with the secret itself.
        self.forms
            .add(&format!("SHA-256 of {name}"), &Sha256::digest(secret));
    }

    /// Takes a key or an admin token: what follows its public id.
    pub(super) fn add_token(&mut self, name: &str, token: &str) {
        let (_, secret) = token.rsplit_once('_').expect("a token has three parts");
        self.add(name, secret.as_bytes());
        let digest = Sha256::digest(token);
        self.forms
            .add(&format!("SHA-256 of {name}, whole"), &digest);
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    /// Every secret that `place` holds, each form of it once.
    pub(super) fn search(&self, place: &[u8]) -> BTreeSet<Found> {
        let mut found = BTreeSet::new();
        self.forms.search(place, &mut found);
        // Base64 is folded into lines, and lists of numbers have a space or a line's end after each comma.
        let squeezed: Vec<u8> = place
            .iter()
            .copied()
            .filter(|byte| !byte.is_ascii_whitespace())
            .collect();
        self.forms.search(&squeezed, &mut found);
        found
    }
}

impl Default for Forms {
    fn default() -> Self {
        Self {
            begins: vec![false; 1 << 16],
            by_probe: HashMap::new(),
        }
    }
}

impl Forms {
    fn add(&mut self, name: &str, secret: &[u8]) {
        for (form, bytes) in forms(secret) {
            let probe = *bytes.first_chunk().expect("a form is as long as a probe");
            self.begins[beginning(&probe)] = true;
            let others = self.by_probe.entry(probe).or_default();
            if others.iter().all(|other| other.bytes != bytes) {
                let (name, way) = (name.to_owned(), form);
                others.push(Form { name, way, bytes });
            }
        }
    }

    fn search(&self, place: &[u8], found: &mut BTreeSet<Found>) {
        for (at, probe) in place.windows(PROBE).enumerate() {
            if !self.begins[beginning(probe)] {
                continue;
            }
            let Some(forms) = self.by_probe.get(probe) else {
                continue;
            };
            for form in forms {
                let is_new = || {
                    let mut known = found.iter();
                    !known.any(|known| known.canary == form.name && known.form == form.way)
                };
                if place[at..].starts_with(&form.bytes) && is_new() {
                    let from = at.saturating_sub(CONTEXT);
                    let to = (at + form.bytes.len() + CONTEXT).min(place.len());
                    found.insert(Found {
                        canary: form.name.clone(),
                        form: form.way,
                        context: String::from_utf8_lossy(&place[from..to]).into_owned(),
                    });
                }
            }
        }
    }
}

/// How programs write `secret`; some are the same for some secrets.
fn forms(secret: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let each = |one: &dyn Fn(u8) -> String, between: &str| each(secret, one, between).into_bytes();
    let mut forms = vec![
        ("as it is", secret.to_vec()),
        ("hex", each(&|byte| format!("{byte:02x}"), "")),
        ("HEX", each(&|byte| format!("{byte:02X}"), "")),
        ("hex with colons", each(&|byte| format!("{byte:02x}"), ":")),
        ("a list of numbers", each(&|byte| byte.to_string(), ",")),
        ("a list in hex", each(&|byte| format!("{byte:x}"), ",")),
        ("a list in 0x", each(&|byte| format!("{byte:#04x}"), ",")),
        ("percent-encoded", each(&|byte| format!("%{byte:02X}"), "")),
        (
            "percent-encoded, in lower case",
            each(&|byte| format!("%{byte:02x}"), ""),
        ),
        (
            "percent-encoded where it has to be",
            each(&needed_percents, ""),
        ),
        (
            "escaped bytes",
            secret.escape_ascii().to_string().into_bytes(),
        ),
        (
            "escaped for JSON, every byte",
            each(&|byte| format!("\\u{byte:04x}"), ""),
        ),
    ];
    let debug = format!("{:?}", bytes::Bytes::copy_from_slice(secret));
    forms.push((
        "escaped as `bytes` does",
        debug.as_bytes()[2..debug.len() - 1].to_vec(),
    ));
    if let Ok(text) = str::from_utf8(secret) {
        let json = serde_json::Value::from(text).to_string();
        for (form, quoted) in [
            ("escaped for JSON", json),
            ("escaped as Rust does", format!("{text:?}")),
        ] {
            forms.push((form, quoted.as_bytes()[1..quoted.len() - 1].to_vec()));
        }
    }
    for (form, engine) in [
        ("base64", BASE64_STANDARD_NO_PAD),
        ("base64, for URLs", BASE64_URL_SAFE_NO_PAD),
    ] {
        // What stands before it moves it by so many bytes against the groups of three. The first and the last character
        // depend on the neighbours, too.
        for before in 0..3 {
            let encoded = engine.encode([&vec![0; before][..], secret].concat());
            let first = (before * 8).div_ceil(6);
            let end = (before + secret.len()) * 8 / 6;
            forms.push((form, encoded.as_bytes()[first..end].to_vec()));
        }
    }
    forms
}

/// Each byte as `one` writes it.
pub(super) fn each(bytes: &[u8], one: impl Fn(u8) -> String, between: &str) -> String {
    let all: Vec<String> = bytes.iter().map(|byte| one(*byte)).collect();
    all.join(between)
}

fn needed_percents(byte: u8) -> String {
    let mut text = String::new();
    if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
        text.push(char::from(byte));
    } else {
        write!(text, "%{byte:02X}").expect("writing to a string cannot fail");
    }
    text
}

fn beginning(probe: &[u8]) -> usize {
    usize::from(probe[0]) << 8 | usize::from(probe[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "s3cret/with+odd=\"chars\\&é\u{7f}more;0123456789";
    const BINARY: [u8; 32] = [
        0, 255, 17, 34, 200, 13, 10, 99, 1, 2, 3, 250, 251, 252, 9, 8, 7, 120, 121, 122, 44, 45,
        46, 91, 92, 93, 128, 129, 130, 131, 132, 133,
    ];

    /// The forms in which each of the two is found in a place.
    fn found(place: &[u8]) -> Vec<(String, &'static str)> {
        let mut canaries = Canaries::default();
        canaries.add("text", TEXT.as_bytes());
        canaries.add("binary", &BINARY);
        let found = canaries.search(place);
        found
            .into_iter()
            .map(|found| (found.canary, found.form))
            .collect()
    }

    #[track_caller]
    fn assert_found(what: &str, form: &str, planted: impl AsRef<[u8]>) {
        // Among other things, at each alignment.
        for before in 0..3 {
            let place = [
                &vec![b'x'; before][..],
                b" what=",
                planted.as_ref(),
                b"; and more",
            ]
            .concat();
            let found = found(&place);
            let is_there = found
                .iter()
                .any(|(canary, found)| canary == what && *found == form);
            let place = String::from_utf8_lossy(&place);
            assert!(is_there, "{what} as {form} in {place}: {found:?}");
        }
    }

    #[test]
    fn nothing_is_found_where_nothing_is() {
        let mut place: Vec<u8> = (0..100_000_u32).flat_map(u32::to_be_bytes).collect();
        place.extend(b"s3cret/with+odd, and no more of it");
        place.extend(&BINARY[..15]);
        assert_eq!(found(&place), []);
    }

    #[test]
    fn each_way_of_writing_is_found() {
        assert_found("text", "as it is", TEXT);
        assert_found("binary", "as it is", BINARY);
        let hex = each(&BINARY, |byte| format!("{byte:02x}"), "");
        assert_found("binary", "hex", &hex);
        assert_found("binary", "HEX", hex.to_uppercase());
        let hex: Vec<String> = BINARY.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_found("binary", "hex", hex.join(" "));
        assert_found("binary", "hex with colons", hex.join(":"));
        assert_found("binary", "a list of numbers", format!("{BINARY:?}"));
        assert_found("binary", "a list of numbers", format!("{BINARY:#?}"));
        let json = serde_json::to_string(&BINARY.to_vec()).expect("JSON");
        assert_found("binary", "a list of numbers", json);
        assert_found("binary", "a list in hex", format!("{BINARY:x?}"));
        assert_found("binary", "a list in 0x", format!("{BINARY:#04x?}"));
        assert_found("binary", "escaped bytes", BINARY.escape_ascii().to_string());
        let bytes = bytes::Bytes::from_static(&BINARY);
        assert_found("binary", "escaped as `bytes` does", format!("{bytes:?}"));
        let percents = each(TEXT.as_bytes(), |byte| format!("%{byte:02X}"), "");
        assert_found("text", "percent-encoded", &percents);
        assert_found(
            "text",
            "percent-encoded, in lower case",
            percents.to_lowercase(),
        );
        let url: String = url::form_urlencoded::byte_serialize(TEXT.as_bytes()).collect();
        assert_found("text", "percent-encoded where it has to be", url);
        assert_found(
            "text",
            "escaped for JSON",
            serde_json::json!(TEXT).to_string(),
        );
        assert_found("text", "escaped as Rust does", format!("{TEXT:?}"));
        let every = each(TEXT.as_bytes(), |byte| format!("\\u{byte:04x}"), "");
        assert_found("text", "escaped for JSON, every byte", every);
    }

    #[test]
    fn base64_is_found_wherever_the_secret_stands_in_it() {
        for before in 0..5 {
            for after in 0..5 {
                let whole = [&vec![b'a'; before][..], &BINARY, &vec![b'z'; after]].concat();
                let encoded = BASE64_STANDARD_NO_PAD.encode(&whole);
                assert_found("binary", "base64", &encoded);
                let lines: Vec<&[u8]> = encoded.as_bytes().chunks(16).collect();
                assert_found("binary", "base64", lines.join(&b"\n"[..]));
                let encoded = BASE64_URL_SAFE_NO_PAD.encode(&whole);
                assert_found("binary", "base64, for URLs", encoded);
            }
        }
    }

    #[test]
    fn a_part_is_found() {
        assert_found("text", "as it is", &TEXT[..PART]);
        assert_found("text", "as it is", &TEXT[PART..2 * PART]);
        assert_found(
            "binary",
            "a list of numbers",
            format!("{:?}", &BINARY[PART..]),
        );
    }

    #[test]
    fn a_digest_is_found() {
        let digest = Sha256::digest(TEXT);
        let hex = each(&digest, |byte| format!("{byte:02x}"), "");
        assert_found("SHA-256 of text", "hex", hex);
        assert_found("SHA-256 of text", "as it is", digest);
    }

    #[test]
    fn of_a_token_what_follows_its_public_id_is_found() {
        let mut canaries = Canaries::default();
        canaries.add_token(
            "key",
            "rlk_7Qm2Xc91TbKe_0123456789abcdefghijABCDEFGHIJKLwxyz42",
        );
        assert_eq!(canaries.search(b"key_id=7Qm2Xc91TbKe"), BTreeSet::new());
        let found = canaries.search(b"key=rlk_7Qm2Xc91TbKe_0123456789abcdef...");
        let found: Vec<_> = found.iter().map(|found| found.canary.as_str()).collect();
        assert_eq!(found, ["key"]);
    }
}
