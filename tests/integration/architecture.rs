//! The split between the parts, held against the sources.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// All Rust files below `place` in `src/`, with their text.
fn sources(place: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut places = vec![root.join(place)];
    while let Some(place) = places.pop() {
        if place.is_dir() {
            let entries = fs::read_dir(&place).expect("a readable directory");
            places.extend(entries.map(|entry| entry.expect("a readable entry").path()));
        } else if place.extension().is_some_and(|end| end == "rs") {
            let text = fs::read_to_string(&place).expect("a readable file");
            found.push((place, text));
        }
    }
    assert!(!found.is_empty(), "there is nothing in src/{place}");
    found
}

/// The files below `place` of which a line of code holds one of `words`. Tests do not count.
fn naming(place: &str, words: &[&str]) -> Vec<PathBuf> {
    sources(place)
        .into_iter()
        .filter(|(path, _)| !path.ends_with("tests.rs"))
        .filter(|(_, text)| {
            let code = text.split("#[cfg(test)]\nmod tests {").next();
            code.unwrap_or_default()
                .lines()
                .map(|line| line.split("//").next().unwrap_or_default())
                .any(|code| words.iter().any(|word| code.contains(word)))
        })
        .map(|(path, _)| path)
        .collect()
}

#[test]
fn the_domain_is_pure() {
    let edges = [
        "tokio",
        "tonic",
        "prost",
        "opentelemetry",
        "rusqlite",
        "hyper",
        "axum",
        "tracing",
        "crate::proto",
        "crate::store",
        "crate::control",
        "crate::discovery",
        "crate::authz",
        "crate::clock",
        "SystemTime::now",
        "Instant::now",
    ];
    let impure = naming("key", &edges);
    assert!(impure.is_empty(), "the domain touches an edge: {impure:?}");
}

#[test]
fn who_may_serve_is_decided_without_clocks_and_edges() {
    let edges = [
        "Clock",
        "tokio",
        "tonic",
        "prost",
        "rusqlite",
        "tracing",
        "crate::proto",
        "crate::store",
        "crate::control",
        "crate::discovery",
        "SystemTime::now",
        "Instant::now",
    ];
    let mut impure = naming("serving.rs", &edges);
    impure.extend(naming("serving", &edges));
    // The model is a test.
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/serving/model");
    impure.retain(|path| !path.with_extension("").starts_with(&model));
    assert!(
        impure.is_empty(),
        "what decides who may serve touches an edge: {impure:?}"
    );
}

#[test]
fn the_store_knows_nothing_of_the_network() {
    let network = [
        "tonic",
        "prost",
        "hyper",
        "axum",
        "crate::proto",
        "crate::discovery",
    ];
    let found = naming("store", &network);
    assert!(found.is_empty(), "the store touches the network: {found:?}");
}

#[test]
fn a_check_waits_for_nothing_but_the_lookup_of_its_key() {
    let waiting = [".await", "block_on", "tokio::time::sleep", "thread::sleep"];
    for place in ["authz", "keyring"] {
        let mut found = naming(place, &waiting);
        found.retain(|path| !path.ends_with("authz/later.rs"));
        assert!(found.is_empty(), "the data path waits: {found:?}");
    }
}

#[test]
fn responses_are_made_in_one_place() {
    let makers: Vec<_> = ["authz", "sidecar", "telemetry"]
        .into_iter()
        .flat_map(sources)
        .filter(|(path, _)| !path.ends_with("authz/response.rs"))
        .filter(|(_, text)| {
            let text = text.replace("-> CheckResponse {", "");
            text.contains("CheckResponse {") || text.contains("CheckResponse::default")
        })
        .map(|(path, _)| path)
        .collect();
    assert!(
        makers.is_empty(),
        "a response is made elsewhere: {makers:?}"
    );
}
