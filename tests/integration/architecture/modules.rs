//! The modules of a crate and what each imports from which, read from its sources.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::{Path, PathBuf},
};

use syn::{Attribute, Item, ItemMod, ItemUse, Macro, UseTree, visit::Visit};

/// The path of a module below the root of its crate, such as `["authz", "request"]`.
pub(crate) type ModulePath = Vec<String>;

/// A module that is not compiled for tests only.
#[derive(Debug, Default)]
pub(crate) struct Module {
    /// The file that holds it, below the directory of the root file.
    pub(crate) file: PathBuf,
    /// The source of the file without comments and without the tests at its end. Empty for a module inside a file.
    pub(crate) code: String,
    /// Its modules that are not compiled for tests only.
    children: BTreeSet<String>,
    /// The names that it imports, for itself or for others, each with the path that it stands for.
    names: BTreeMap<String, Vec<String>>,
    /// The modules of which it imports every name.
    globs: Vec<Vec<String>>,
    /// The paths that its code names, as they are written.
    paths: BTreeSet<Vec<String>>,
}

/// A name that one module uses and another one defines.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Import {
    pub(crate) from: ModulePath,
    pub(crate) to: ModulePath,
    pub(crate) name: String,
}

/// The modules of a crate.
#[derive(Debug)]
pub(crate) struct Modules(BTreeMap<ModulePath, Module>);

impl Modules {
    /// Reads the crate whose root is `root`, such as `src/lib.rs`.
    pub(crate) fn read(root: &Path) -> Self {
        let mut modules = Self(BTreeMap::new());
        modules.read_file(root, &root.with_file_name(""), root, &Vec::new());
        modules
    }

    /// A crate of one file.
    fn parse(text: &str) -> Self {
        let mut modules = Self(BTreeMap::new());
        modules.add(text, Path::new(""), Path::new("lib.rs"), Vec::new());
        modules
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&ModulePath, &Module)> {
        self.0.iter()
    }

    /// Everything that one module uses of another one, however it is re-exported on the way.
    pub(crate) fn imports(&self) -> BTreeSet<Import> {
        let mut found = BTreeSet::new();
        for (from, module) in &self.0 {
            for path in &module.paths {
                if let Some((to, name)) = self.definition(from, path, 0)
                    && to != *from
                {
                    let from = from.clone();
                    found.insert(Import { from, to, name });
                }
            }
        }
        found
    }

    fn read_file(&mut self, file: &Path, children: &Path, root: &Path, path: &ModulePath) {
        let text = fs::read_to_string(file)
            .unwrap_or_else(|error| panic!("{} is not readable: {error}", file.display()));
        let below = root.parent().expect("the root is in a directory");
        let shown = file.strip_prefix(below).unwrap_or(file).to_owned();
        for declared in self.add(&text, children, &shown, path.clone()) {
            let mut path = path.clone();
            path.push(declared.name);
            self.read_file(&declared.file, &declared.children, root, &path);
        }
    }

    /// Adds the modules of a file. Returns those that it declares and other files hold.
    fn add(&mut self, text: &str, below: &Path, file: &Path, path: ModulePath) -> Vec<Declared> {
        let parsed = syn::parse_file(text)
            .unwrap_or_else(|error| panic!("{} is not Rust: {error}", file.display()));
        let whole = path.clone();
        let mut declared = Vec::new();
        let mut inline = vec![(path, parsed.items)];
        while let Some((path, items)) = inline.pop() {
            let mut module = Module {
                file: file.to_owned(),
                ..Module::default()
            };
            for mut item in items {
                if is_test_only(attributes(&item)) {
                    continue;
                }
                match &mut item {
                    Item::Mod(ItemMod {
                        ident,
                        content: Some((_, items)),
                        ..
                    }) => {
                        module.children.insert(ident.to_string());
                        let mut path = path.clone();
                        path.push(ident.to_string());
                        inline.push((path, std::mem::take(items)));
                    }
                    Item::Mod(item) => {
                        module.children.insert(item.ident.to_string());
                        declared.push(Declared::of(item, below, file));
                    }
                    _ => Paths(&mut module).visit_item(&item),
                }
            }
            self.0.insert(path, module);
        }
        self.0.entry(whole).or_default().code = without_comments_and_tests(text);
        declared
    }

    /// The module that defines what `path` names where `from` names it, and the name. Nothing for what another crate defines.
    fn definition(
        &self,
        from: &ModulePath,
        path: &[String],
        hops: usize,
    ) -> Option<(ModulePath, String)> {
        /// A re-export that leads to itself does not compile, but `use self::name` of a name that shadows another one does.
        const MOST_HOPS: usize = 16;
        if hops > MOST_HOPS {
            return None;
        }
        let module = self.0.get(from)?;
        let (first, rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" => Vec::new(),
            "self" => from.clone(),
            "super" => from[..from.len().checked_sub(1)?].to_vec(),
            child if module.children.contains(child) => [&from[..], &[child.to_owned()]].concat(),
            name => {
                let path = module.names.get(name)?;
                let whole = [&path[..], rest].concat();
                return self.definition(from, &whole, hops + 1);
            }
        };
        for (index, name) in rest.iter().enumerate() {
            let module = self.0.get(&at)?;
            if name == "super" {
                at.pop();
            } else if module.children.contains(name) {
                at.push(name.clone());
            } else if let Some(target) = module.names.get(name) {
                let whole = [&target[..], &rest[index + 1..]].concat();
                return self.definition(&at, &whole, hops + 1);
            } else {
                let through = module.globs.iter().find_map(|target| {
                    let whole = [&target[..], &rest[index..]].concat();
                    self.definition(&at, &whole, hops + 1)
                });
                return Some(through.unwrap_or((at, name.clone())));
            }
        }
        None
    }
}

impl Import {
    /// Whether it leads from the module `from` to the module `to`, both written as `authz/request`.
    pub(crate) fn is(&self, from: &str, to: &str) -> bool {
        self.from.join("/") == from && self.to.join("/") == to
    }
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = (self.from.join("/"), self.to.join("/"));
        write!(f, "{from} -> {to}: {}", self.name)
    }
}

impl Module {
    /// Its file, as in `authz/request.rs`.
    pub(crate) fn shown(&self) -> String {
        self.file.display().to_string()
    }

    fn read_use(&mut self, item: &ItemUse) {
        let mut leaves = Vec::new();
        collect(&item.tree, &mut Vec::new(), &mut leaves);
        for (name, path) in leaves {
            match name {
                None => self.globs.push(path),
                Some(name) => {
                    self.paths.insert(path.clone());
                    self.names.insert(name, path);
                }
            }
        }
    }
}

/// A module that another file holds.
struct Declared {
    name: String,
    file: PathBuf,
    /// The directory of its own modules.
    children: PathBuf,
}

impl Declared {
    fn of(item: &ItemMod, below: &Path, declaring: &Path) -> Self {
        let name = item.ident.to_string();
        let moved = item.attrs.iter().find_map(path_attribute);
        let file = match moved {
            Some(moved) => below.join(moved),
            None => below.join(&name).with_extension("rs"),
        };
        let nested = below.join(&name).join("mod.rs");
        let file = if nested.exists() { nested } else { file };
        assert!(
            file.exists(),
            "{} declares {name}, which no file holds",
            declaring.display()
        );
        Self {
            children: below.join(&name),
            name,
            file,
        }
    }
}

/// The names that a tree of imports brings in, each with its path; without a name for all that a module has.
fn collect(
    tree: &UseTree,
    before: &mut Vec<String>,
    found: &mut Vec<(Option<String>, Vec<String>)>,
) {
    let with = |last: String, before: &[String]| [before, &[last]].concat();
    match tree {
        UseTree::Path(tree) => {
            before.push(tree.ident.to_string());
            collect(&tree.tree, before, found);
            before.pop();
        }
        UseTree::Group(group) => {
            for tree in &group.items {
                collect(tree, before, found);
            }
        }
        UseTree::Name(name) if name.ident == "self" => {
            found.push((before.last().cloned(), before.clone()));
        }
        UseTree::Name(name) => {
            let name = name.ident.to_string();
            found.push((Some(name.clone()), with(name, before)));
        }
        UseTree::Rename(renamed) => {
            let path = match renamed.ident.to_string() {
                name if name == "self" => before.clone(),
                name => with(name, before),
            };
            found.push((Some(renamed.rename.to_string()), path));
        }
        UseTree::Glob(_) => found.push((None, before.clone())),
    }
}

/// Collects the paths of the code of a module.
struct Paths<'a>(&'a mut Module);

impl Visit<'_> for Paths<'_> {
    fn visit_path(&mut self, path: &syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        if names.len() > 1 {
            self.0.paths.insert(names);
        }
        syn::visit::visit_path(self, path);
    }

    /// What a macro is given is no syntax tree yet; a path from the root of the crate is one by its looks.
    fn visit_macro(&mut self, called: &Macro) {
        let tokens = called.tokens.to_string().replace(' ', "");
        for written in tokens.split("crate::").skip(1) {
            let is_of_path =
                |letter: char| letter.is_ascii_alphanumeric() || ['_', ':'].contains(&letter);
            let end = written.find(|letter| !is_of_path(letter));
            let written = &written[..end.unwrap_or(written.len())];
            let names = written.trim_end_matches(':').split("::");
            let path = std::iter::once("crate").chain(names).map(str::to_owned);
            self.0.paths.insert(path.collect());
        }
        syn::visit::visit_macro(self, called);
    }

    /// What is compiled for tests only is not in the crate.
    fn visit_item(&mut self, item: &Item) {
        if !is_test_only(attributes(item)) {
            syn::visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &ItemUse) {
        self.0.read_use(item);
    }

    fn visit_impl_item_fn(&mut self, item: &syn::ImplItemFn) {
        if !is_test_only(&item.attrs) {
            syn::visit::visit_impl_item_fn(self, item);
        }
    }
}

fn is_test_only(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let syn::Meta::List(list) = &attribute.meta else {
            return attribute.path().is_ident("test");
        };
        list.path.is_ident("cfg") && list.tokens.to_string() == "test"
    })
}

fn path_attribute(attribute: &Attribute) -> Option<String> {
    let syn::Meta::NameValue(pair) = &attribute.meta else {
        return None;
    };
    let syn::Expr::Lit(literal) = &pair.value else {
        return None;
    };
    let syn::Lit::Str(path) = &literal.lit else {
        return None;
    };
    pair.path.is_ident("path").then(|| path.value())
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn without_comments_and_tests(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests {").next();
    let lines = code.unwrap_or_default().lines();
    lines.fold(String::new(), |mut code, line| {
        code.push_str(line.split("//").next().unwrap_or_default());
        code.push('\n');
        code
    })
}

#[test]
fn imports_are_found_however_they_are_written() {
    let modules = Modules::parse(
        "mod key { pub(crate) use self::id::{KeyId, Version as KeyVersion}; mod id { pub struct KeyId; pub struct Version; }\n\
                   pub fn f() {} }\n\
         mod wire { pub const SIZE: usize = 1; }\n\
         mod authz {\n\
             use crate::{key::{KeyId, KeyVersion}, wire};\n\
             mod later { use super::{Answer, KeyId}; }\n\
             struct Answer(crate::key::KeyId);\n\
             fn g() { crate::key::f(); assert!(wire::SIZE > crate::wire::LEAST); later::h(); }\n\
             #[cfg(test)] mod tests { use crate::store::Store; }\n\
         }\n\
         mod store { pub struct Store; #[cfg(test)] use crate::authz::Answer; }",
    );
    let imports: Vec<_> = modules.imports().iter().map(Import::to_string).collect();
    let expected = [
        "authz -> authz/later: h",
        "authz -> key: f",
        "authz -> key/id: KeyId",
        "authz -> key/id: Version",
        "authz -> wire: LEAST",
        "authz/later -> authz: Answer",
        "authz/later -> key/id: KeyId",
        "key -> key/id: KeyId",
        "key -> key/id: Version",
    ];
    assert_eq!(imports, expected);
}
