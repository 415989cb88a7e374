//! The examples of a page of the documentation, as they stand in it.

use std::path::{Path, PathBuf};

/// The block of `page` that begins with a comment which ends with `file`, without its fence.
pub(crate) fn example(page: &'static str, file: &str) -> &'static str {
    let named = |block: &&str| {
        let first = block.lines().nth(1).unwrap_or_default();
        first.ends_with(&format!(" {file}"))
    };
    // Every second part stands within a fence, and begins with the name of its language.
    let mut blocks = page.split("```").skip(1).step_by(2).filter(named);
    let block = blocks.next().expect("the page has the example");
    assert!(blocks.next().is_none(), "{file} is there twice");
    block.split_once('\n').expect("a block has lines").1
}

/// The Node.js that runs the examples in TypeScript.
pub(crate) fn node() -> PathBuf {
    let node = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/node/bin/node");
    assert!(
        node.exists(),
        "{} is missing: run scripts/test.sh once, it fetches Node.js",
        node.display()
    );
    node
}
