//! The split between the parts, checked against the sources.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// A source file of the library.
struct Source {
    /// Below `src/`, without the ending.
    place: PathBuf,
    text: String,
}

impl Source {
    /// The top-level module that it belongs to.
    fn module(&self) -> &str {
        let first = self.place.iter().next().expect("a file has a name");
        first.to_str().expect("module names are ASCII")
    }

    /// Without comments and without the tests at its end.
    fn code(&self) -> String {
        let code = self.text.split("#[cfg(test)]\nmod tests {").next();
        let lines = code.unwrap_or_default().lines();
        lines.fold(String::new(), |mut code, line| {
            code.push_str(line.split("//").next().unwrap_or_default());
            code.push('\n');
            code
        })
    }

    /// The modules of which it says that they are compiled for tests only.
    fn test_modules(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for declared in self.text.split("#[cfg(test)]\n").skip(1) {
            let words = declared.split_whitespace();
            let mut words = words.skip_while(|word| word.starts_with("pub"));
            if words.next() == Some("mod")
                && let Some(name) = words.next().and_then(|name| name.strip_suffix(';'))
            {
                found.push(self.place.join(name));
            }
        }
        found
    }

    /// The top-level modules that its code names.
    fn imports(&self) -> BTreeSet<String> {
        let code = self.code();
        let mut found = BTreeSet::new();
        for path in code.split("crate::").skip(1) {
            match path.strip_prefix('{') {
                Some(group) => found.extend(first_names(group)),
                None => found.extend(name_of(path)),
            }
        }
        found.retain(|name| name != self.module());
        found
    }
}

/// The name that a text begins with.
fn name_of(text: &str) -> Option<String> {
    let is_of_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let name: String = text
        .trim_start()
        .chars()
        .take_while(|letter| is_of_name(*letter))
        .collect();
    (!name.is_empty()).then_some(name)
}

/// The first name of each path of a group of imports, whose brace is open.
fn first_names(group: &str) -> Vec<String> {
    let mut depth = 1;
    let mut names: Vec<String> = name_of(group).into_iter().collect();
    for (at, letter) in group.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => names.extend(name_of(&group[at + 1..])),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    names
}

/// What is compiled into the library and is no test.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut places = vec![root.clone()];
    while let Some(place) = places.pop() {
        if place.is_dir() {
            let entries = fs::read_dir(&place).expect("a readable directory");
            places.extend(entries.map(|entry| entry.expect("a readable entry").path()));
        } else if place.extension().is_some_and(|end| end == "rs") {
            let text = fs::read_to_string(&place).expect("a readable file");
            let place = place.with_extension("");
            let place = place.strip_prefix(&root).expect("it is below src/");
            found.push(Source {
                place: place.to_owned(),
                text,
            });
        }
    }
    found.retain(|source| !["lib", "main"].contains(&source.module()));
    let tests: Vec<_> = found.iter().flat_map(Source::test_modules).collect();
    found.retain(|source| !tests.iter().any(|test| source.place.starts_with(test)));
    found
}

/// What belongs to a top-level module.
fn sources_of(module: &str) -> Vec<Source> {
    let mut found = sources();
    found.retain(|source| source.module() == module);
    assert!(!found.is_empty(), "there is no src/{module}");
    found
}

/// The files of a top-level module of which a line of code holds one of `words`.
fn naming(module: &str, words: &[&str]) -> Vec<PathBuf> {
    let mut found = sources_of(module);
    found.retain(|source| {
        let code = source.code();
        words.iter().any(|word| code.contains(word))
    });
    found.into_iter().map(|source| source.place).collect()
}

/// Fails where code of a top-level module names another one that is not `allowed`.
#[track_caller]
fn assert_imports(module: &str, allowed: &[&str]) {
    for source in sources_of(module) {
        for import in source.imports() {
            let place = source.place.display();
            assert!(
                allowed.contains(&&*import),
                "src/{place}.rs imports crate::{import}, which {module} may not"
            );
        }
    }
}

#[test]
fn no_two_parts_import_each_other() {
    let mut imports: BTreeMap<String, BTreeMap<String, PathBuf>> = BTreeMap::new();
    for source in sources() {
        let of_module = imports.entry(source.module().to_owned()).or_default();
        for import in source.imports() {
            of_module
                .entry(import)
                .or_insert_with(|| source.place.clone());
        }
    }
    assert!(
        imports["control"].contains_key("serving"),
        "imports are found"
    );
    // A module that imports none of those that are left, or that none of them imports, is in no cycle.
    loop {
        let before = imports.len();
        let left: BTreeSet<_> = imports.keys().cloned().collect();
        for of_module in imports.values_mut() {
            of_module.retain(|import, _| left.contains(import));
        }
        let imported: BTreeSet<_> = imports.values().flat_map(BTreeMap::keys).cloned().collect();
        imports.retain(|module, of_module| imported.contains(module) && !of_module.is_empty());
        if imports.len() == before {
            break;
        }
    }
    assert!(imports.is_empty(), "these import each other: {imports:#?}");
}

#[test]
fn imports_are_found_however_they_are_written() {
    let source = Source {
        place: PathBuf::from("authz/request"),
        text: "use crate::{\n    key::{Digest, KeyId},\n    authz::Check,\n    trace,\n};\n// crate::tls\nfn f(_: \
               crate::clock::Clock) {}\n#[cfg(test)]\nmod tests {\n    use crate::store::Store;\n}\n"
            .to_owned(),
    };
    let imports: Vec<_> = source.imports().into_iter().collect();
    assert_eq!(imports, ["clock", "key", "trace"]);
    let source = Source {
        place: PathBuf::from("serving"),
        text: "mod run;\n#[cfg(test)]\nmod model;\n#[cfg(test)]\npub(crate) mod testing;\n"
            .to_owned(),
    };
    let tests = source.test_modules();
    assert_eq!(
        tests,
        ["serving/model", "serving/testing"].map(PathBuf::from)
    );
}

#[test]
fn the_domain_is_pure() {
    assert_imports("key", &["duration", "printable"]);
    let edges = [
        "tokio",
        "tonic",
        "prost",
        "opentelemetry",
        "rusqlite",
        "hyper",
        "axum",
        "tracing",
        "SystemTime::now",
        "Instant::now",
    ];
    let impure = naming("key", &edges);
    assert!(impure.is_empty(), "the domain touches an edge: {impure:?}");
}

#[test]
fn who_may_serve_is_decided_without_clocks_and_edges() {
    assert_imports("serving", &["clock", "key", "tls"]);
    let edges = [
        "Clock",
        "tokio",
        "tonic",
        "prost",
        "rusqlite",
        "tracing",
        "SystemTime::now",
        "Instant::now",
    ];
    let impure = naming("serving", &edges);
    assert!(
        impure.is_empty(),
        "what decides who may serve touches an edge: {impure:?}"
    );
}

#[test]
fn the_store_knows_nothing_of_the_network() {
    assert_imports("store", &["duration", "key"]);
    let network = ["tonic", "prost", "hyper", "axum"];
    let found = naming("store", &network);
    assert!(found.is_empty(), "the store touches the network: {found:?}");
}

#[test]
fn a_check_waits_for_nothing_but_the_lookup_of_its_key() {
    let waiting = [".await", "block_on", "tokio::time::sleep", "thread::sleep"];
    for module in ["authz", "keyring"] {
        let mut found = naming(module, &waiting);
        found.retain(|place| place != Path::new("authz/later"));
        assert!(found.is_empty(), "the data path waits: {found:?}");
    }
}

#[test]
fn responses_are_made_in_one_place() {
    let makers: Vec<_> = ["authz", "sidecar", "telemetry"]
        .into_iter()
        .flat_map(sources_of)
        .filter(|source| source.place != Path::new("authz/response"))
        .filter(|source| {
            let text = source.text.replace("-> CheckResponse {", "");
            text.contains("CheckResponse {") || text.contains("CheckResponse::default")
        })
        .map(|source| source.place)
        .collect();
    assert!(
        makers.is_empty(),
        "a response is made elsewhere: {makers:?}"
    );
}
