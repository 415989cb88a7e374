//! `scripts/sbom.sh` tells what the binary is built from.

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

/// Has the list written to standard output, or to a file.
fn run(file: Option<&Path>) -> Output {
    let mut command = Command::new("scripts/sbom.sh");
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("TARGET", "x86_64-unknown-linux-gnu")
        .env("SOURCE_DATE_EPOCH", "1000000000")
        .args(file);
    let output = command.output().expect("the script can be run");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    output
}

fn texts<'v>(values: &'v Value, field: &str) -> BTreeSet<&'v str> {
    let values = values.as_array().expect("a list");
    values
        .iter()
        .map(|value| value[field].as_str().expect("a text"))
        .collect()
}

#[test]
fn the_sbom_lists_what_the_binary_is_built_from() {
    let bytes = run(None).stdout;
    let bom: Value = serde_json::from_slice(&bytes).expect("it is JSON");
    assert_eq!(bom["bomFormat"], "CycloneDX");
    assert_eq!(bom["specVersion"], "1.6");
    assert_eq!(bom["metadata"]["timestamp"], "2001-09-09T01:46:40Z");
    assert_eq!(bom["metadata"]["component"]["name"], "relatch");
    assert_eq!(
        bom["metadata"]["component"]["version"],
        env!("CARGO_PKG_VERSION")
    );

    let components = bom["components"].as_array().expect("a list");
    for component in components {
        let field = |name: &str| component[name].as_str().expect("a text");
        assert_eq!(field("type"), "library");
        assert!(field("purl").starts_with("pkg:cargo/"), "{component}");
        assert_eq!(field("purl"), field("bom-ref"));
        let licence = &component["licenses"][0]["expression"];
        assert!(licence.is_string(), "{component}");
        let hash = component["hashes"][0]["content"].as_str();
        let is_hash = |hash: &str| hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
        assert!(hash.is_some_and(is_hash), "{component}");
        let scope = match component["properties"][0]["value"].as_str() {
            Some("normal") => "required",
            Some("build") => "excluded",
            other => panic!("{other:?} is no kind of dependency"),
        };
        assert_eq!(field("scope"), scope);
    }

    let scope_of = |name: &str| {
        let of_name = components
            .iter()
            .find(|component| component["name"] == name);
        of_name.map(|component| component["scope"].as_str().expect("a text"))
    };
    for linked in ["tonic", "rustls", "ring", "libsqlite3-sys"] {
        assert_eq!(scope_of(linked), Some("required"), "{linked}");
    }
    for made_with in ["protox", "tonic-prost-build", "serde_derive"] {
        assert_eq!(scope_of(made_with), Some("excluded"), "{made_with}");
    }
    for tested_with in ["allocation-counter", "divan", "envoy-types", "proptest"] {
        assert_eq!(scope_of(tested_with), None, "{tested_with}");
    }

    let mut known = texts(&bom["components"], "bom-ref");
    known.extend(bom["metadata"]["component"]["bom-ref"].as_str());
    assert_eq!(texts(&bom["dependencies"], "ref"), known);
    for dependency in bom["dependencies"].as_array().expect("a list") {
        for other in dependency["dependsOn"].as_array().expect("a list") {
            let other = other.as_str().expect("a text");
            assert!(known.contains(other), "{other} is not in the list");
        }
    }
}

#[test]
fn the_same_commit_gives_the_same_sbom() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("relatch.cdx.json");
    let shown = run(Some(&file)).stdout;
    assert!(shown.is_empty());
    let written = std::fs::read(&file).expect("it was written");
    assert_eq!(written, run(None).stdout);
}
