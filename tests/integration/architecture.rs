//! The split between the parts, checked against the sources.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::LazyLock,
};

use self::modules::{Import, Module, ModulePath, Modules};

mod modules;

/// The library.
static LIBRARY: LazyLock<Modules> = LazyLock::new(|| read("src/lib.rs"));

/// The programs that are no single file.
const BENCHES: [&str; 3] = [
    "benches/check/main.rs",
    "benches/on_demand/main.rs",
    "benches/swarm/main.rs",
];

/// The imports that may close a circle inside a folder: from where, to where, and why.
const EXCEPTIONS: [(&str, &str, &str); 1] = [(
    "keyring/on_demand/follower",
    "keyring/slot",
    "the slot owns the cache, and the side that writes the cache stands beside it, to keep its parts private",
)];

fn read(root: &str) -> Modules {
    Modules::read(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(root))
}

/// Two parts of one folder, of which the first imports from the second. A part is a file with the folder of its name.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Edge<'a> {
    from: &'a str,
    to: &'a str,
}

/// The imports among the parts of each folder.
fn folders(imports: &BTreeSet<Import>) -> BTreeMap<ModulePath, BTreeMap<Edge<'_>, Vec<&Import>>> {
    let mut found: BTreeMap<_, BTreeMap<_, Vec<_>>> = BTreeMap::new();
    for import in imports {
        let both = import.from.iter().zip(&import.to);
        let shared = both.take_while(|(from, to)| from == to).count();
        // Between a file and the folder of its name there is no such edge.
        if let (Some(from), Some(to)) = (import.from.get(shared), import.to.get(shared)) {
            let folder = found.entry(import.from[..shared].to_vec()).or_default();
            folder.entry(Edge { from, to }).or_default().push(import);
        }
    }
    found
}

/// Whether one part of a folder imports another one, directly or through others.
fn reaches(edges: &BTreeMap<Edge<'_>, Vec<&Import>>, start: &str, end: &str) -> bool {
    let mut reached = BTreeSet::from([start]);
    let mut next = vec![start];
    while let Some(part) = next.pop() {
        let imported = edges.keys().filter(|edge| edge.from == part);
        next.extend(imported.map(|edge| edge.to).filter(|to| reached.insert(to)));
    }
    reached.contains(end)
}

/// The imports that close circles inside a folder, each as `from -> to: name`.
fn circles(imports: &BTreeSet<Import>) -> Vec<String> {
    let mut found = Vec::new();
    for edges in folders(imports).values() {
        let closing = edges
            .iter()
            .filter(|(edge, _)| reaches(edges, edge.to, edge.from));
        found.extend(
            closing
                .flat_map(|(_, imports)| imports)
                .map(ToString::to_string),
        );
    }
    found
}

/// The files of a part of the library of which a line of code holds one of `words`.
fn naming(part: &str, words: &[&str]) -> Vec<String> {
    let files = files_of(part).filter(|module| words.iter().any(|word| module.code.contains(word)));
    files.map(Module::shown).collect()
}

/// The files of a part of the library.
fn files_of(part: &str) -> impl Iterator<Item = &'static Module> {
    let of_part = LIBRARY
        .iter()
        .filter(move |(path, _)| path.first().is_some_and(|first| first == part));
    let mut files = of_part
        .map(|(_, module)| module)
        .filter(|module| !module.code.is_empty())
        .peekable();
    assert!(files.peek().is_some(), "there is no src/{part}");
    files
}

/// Fails where code of a part of the library uses another one that is not `allowed`.
#[track_caller]
fn assert_imports(part: &str, allowed: &[&str]) {
    for import in LIBRARY.imports() {
        let other = import.to.first().filter(|other| *other != part);
        if let (true, Some(other)) = (import.from.first().is_some_and(|from| from == part), other) {
            assert!(
                allowed.contains(&&**other),
                "{import}, which {part} may not import"
            );
        }
    }
}

#[test]
fn no_parts_of_a_folder_import_each_other() {
    for root in ["src/lib.rs"].into_iter().chain(BENCHES) {
        let modules = read(root);
        let mut imports = modules.imports();
        assert!(!imports.is_empty(), "the imports of {root} are found");
        imports.retain(|import| !EXCEPTIONS.iter().any(|(from, to, _)| import.is(from, to)));
        let circles = circles(&imports);
        assert!(
            circles.is_empty(),
            "{root}: parts import each other: {circles:#?}"
        );
    }
}

#[test]
fn each_exception_is_needed() {
    let imports = LIBRARY.imports();
    let closing = circles(&imports);
    for (from, to, why) in EXCEPTIONS {
        let mut named = imports.iter().filter(|import| import.is(from, to));
        assert!(
            named.any(|import| closing.contains(&import.to_string())),
            "{from} -> {to} ({why}) closes no circle"
        );
    }
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
    assert_imports("store", &["draft", "duration", "key"]);
    let network = ["tonic", "prost", "hyper", "axum"];
    let found = naming("store", &network);
    assert!(found.is_empty(), "the store touches the network: {found:?}");
}

#[test]
fn a_check_waits_for_nothing_but_the_lookup_of_its_key() {
    let waiting = [".await", "block_on", "tokio::time::sleep", "thread::sleep"];
    for part in ["authz", "keyring"] {
        let mut found = naming(part, &waiting);
        found.retain(|file| file != "authz/later.rs");
        assert!(found.is_empty(), "the data path waits: {found:?}");
    }
}

#[test]
fn responses_are_made_in_one_place() {
    let makers: Vec<_> = ["authz", "sidecar", "telemetry"]
        .into_iter()
        .flat_map(files_of)
        .filter(|module| module.shown() != "authz/response.rs")
        .filter(|module| {
            let code = module.code.replace("-> CheckResponse {", "");
            code.contains("CheckResponse {") || code.contains("CheckResponse::default")
        })
        .map(Module::shown)
        .collect();
    assert!(
        makers.is_empty(),
        "a response is made elsewhere: {makers:?}"
    );
}
