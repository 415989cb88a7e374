//! For any content, a configuration file gives settings or problems with their places, and the same settings when it is read
//! again. The error about a file of a secret does not show the content of the file.

use std::{error::Error, fmt::Debug, fs, os::unix::fs::PermissionsExt};

use relatch::{
    config::{self, ConfigError, control, sidecar},
    control::secrets,
    snapshot::SnapshotKey,
    wire::token::SidecarToken,
};
use tempfile::NamedTempFile;

/// The first byte selects what the others are: the configuration of a sidecar or of a control plane, such a file on the
/// disk, the key of a snapshot file, the token of a sidecar, or a pepper.
pub(crate) fn holds(bytes: &[u8]) {
    let Some((mode, bytes)) = bytes.split_first() else {
        return;
    };
    match mode % 5 {
        0 => reads(bytes, sidecar::parse),
        1 => reads(bytes, control::parse),
        2 => is_read_from_the_disk(bytes),
        3 => {
            keeps_its_secret(bytes, |file| SnapshotKey::read(file.path()));
            keeps_its_secret(bytes, |file| SidecarToken::read(file.path()));
        }
        _ => keeps_its_secret(bytes, |file| secrets::read_pepper(file.path())),
    }
}

/// The name of the file in errors.
const NAME: &str = "daemon.yaml";

fn reads<T: Debug>(bytes: &[u8], parse: fn(&str, &str) -> Result<T, ConfigError>) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    match (parse(text, NAME), parse(text, NAME)) {
        (Ok(first), Ok(second)) => assert_eq!(format!("{first:?}"), format!("{second:?}")),
        (Err(first), Err(second)) => {
            assert_eq!(first.to_string(), second.to_string());
            has_places(&first, NAME, text);
        }
        (first, second) => panic!("{first:?} when read first, {second:?} then"),
    }
}

fn has_places(error: &ConfigError, name: &str, text: &str) {
    // YAML has several line ends.
    let lines = text
        .split(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}'])
        .count() as u64;
    assert!(!error.problems().is_empty(), "{error:?} names no problem");
    for problem in error.problems() {
        // The end of a text is on the line after its last one.
        assert!((1..=lines + 1).contains(&problem.line), "{problem:?}");
        assert!(problem.column >= 1, "{problem:?}");
        assert!(!problem.message.is_empty(), "{problem:?}");
        let place = format!("{name}:{}:{}: ", problem.line, problem.column);
        assert!(error.to_string().contains(&place), "{error}");
    }
}

fn is_read_from_the_disk(bytes: &[u8]) {
    let file = file_of(bytes);
    match config::check(file.path()) {
        Ok(checked) => assert!(!checked.settings.to_string().is_empty()),
        Err(error @ ConfigError::Invalid { .. }) => {
            let name = file.path().display().to_string();
            has_places(&error, &name, &String::from_utf8_lossy(bytes));
        }
        Err(ConfigError::UnknownKind { .. }) => {}
        Err(error @ (ConfigError::Unreadable { .. } | ConfigError::TooLarge { .. })) => {
            panic!("{error}: a small file is there");
        }
    }
}

fn keeps_its_secret<T: Debug, E: Error>(bytes: &[u8], read: fn(&NamedTempFile) -> Result<T, E>) {
    let file = file_of(bytes);
    let mut told = String::new();
    match read(&file) {
        Ok(secret) => told = format!("{secret:?}"),
        Err(error) => {
            let mut cause: Option<&dyn Error> = Some(&error);
            while let Some(error) = cause {
                told.extend([error.to_string(), format!(" {error:?} ")]);
                cause = error.source();
            }
        }
    }
    let told = told.replace(&file.path().display().to_string(), "");
    for part in bytes.split(|byte| !byte.is_ascii_alphanumeric()) {
        // Every secret contains a digit, and none is shorter than this.
        let is_secret = part.len() >= 12 && part.iter().any(u8::is_ascii_digit);
        let part = str::from_utf8(part).expect("letters and digits");
        assert!(
            !(is_secret && told.contains(part)),
            "{told:?} tells {part:?}"
        );
    }
}

fn file_of(bytes: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), bytes).expect("it is written");
    let owners_alone = fs::Permissions::from_mode(0o600);
    fs::set_permissions(file.path(), owners_alone).expect("it is ours");
    file
}
