//! Errors of the command line. Such an error repeats words of the command line, and one of them may be a pasted secret;
//! errors are logged more often than command lines.

use std::ffi::OsString;

use clap::error::ErrorKind;

use super::stream;

/// The length of a run of letters and digits that counts as random text: the shortest secret that relatch creates, or reads
/// from a secret store, has this length, and few names do.
const RANDOM: usize = 24;
/// The prefix of the signing secret of a webhook, before its base64.
const SIGNING: &str = "whsec_";
const REDACTED: &str = "[redacted]";

/// Prints the error, without the words of `arguments` that may be secrets, and ends the process. For clap, help and version
/// are such an error, too.
pub fn exit(error: &clap::Error, arguments: impl IntoIterator<Item = OsString>) -> ! {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        error.exit();
    }
    let text = error.render().to_string();
    match without_secrets(&text, arguments) {
        None => error.exit(),
        Some(text) => {
            stream::write_err(&text);
            std::process::exit(error.exit_code());
        }
    }
}

/// Returns `text` without the secrets among `arguments`; none if it contains none of them.
fn without_secrets(text: &str, arguments: impl IntoIterator<Item = OsString>) -> Option<String> {
    let mut clean = text.to_owned();
    for argument in arguments {
        let argument = argument.to_string_lossy();
        let value = argument.split_once('=').map(|(_, value)| value);
        for word in [Some(&*argument), value].into_iter().flatten() {
            if is_like_a_secret(word) {
                clean = clean.replace(word, REDACTED);
            }
        }
    }
    (clean != text).then_some(clean)
}

fn is_like_a_secret(word: &str) -> bool {
    let mut runs = word.split(|c: char| !c.is_ascii_alphanumeric());
    word.starts_with(SIGNING) || runs.any(|run| run.len() >= RANDOM)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::{
        cli::Cli,
        key::{KeyId, Prefix, Secret},
    };

    /// What is said of a command line.
    fn said(line: &[&str]) -> String {
        let line = [&["relatch"], line].concat();
        let error = Cli::try_parse_from(&line).expect_err("it cannot be");
        let text = error.render().to_string();
        without_secrets(&text, line.iter().map(OsString::from)).unwrap_or(text)
    }

    #[test]
    fn secrets_are_not_repeated_wherever_they_stand() {
        let id = KeyId::generate().expect("the random source works");
        let key = Secret::generate(&Prefix::default(), id).expect("the random source works");
        let key = key.expose();
        let signing = "whsec_MfKQ9r8+KYqr/wjU9r8+KYqr/wjUMfKQ9r8+KYqr/wj=";
        let snapshot = "relatch-snapshot-key-1:".to_owned() + &"0123456789abcdef".repeat(4);
        for secret in [key, signing, &snapshot, "hvs.CAESIJbXlMzqXlMzqXlMzqXl"] {
            let flag = format!("--key={secret}");
            let name = format!("--keyring={secret}");
            for line in [
                &[secret][..],
                &["check", secret],
                &["fleet", &flag],
                &["key", "list", &name],
                &["keyring", "show", secret],
                &["explain", "--keyring", "payments", "--at", secret],
            ] {
                let said = said(line);
                assert!(!said.contains(secret), "{said}");
                assert!(said.starts_with("error: "), "{said}");
            }
        }
    }

    #[test]
    fn what_is_no_secret_is_repeated() {
        for (line, words) in [
            (&["kye", "list"][..], "'kye'"),
            (&["fleet", "--keyrign", "payments"], "'--keyrign'"),
            (&["keyring", "show", "Payments"], "'Payments'"),
        ] {
            let said = said(line);
            assert!(said.contains(words), "{said}");
            assert!(!said.contains(REDACTED), "{said}");
        }
    }
}
