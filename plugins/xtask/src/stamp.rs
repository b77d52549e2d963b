//! Which sources the checked-in components were built from.
//!
//! Beside the components lies a `stamp.toml`: one table per component, one line per source file
//! with the SHA-256 of its content, and the SHA-256 of the component itself. Self-contained (std
//! and sha2), because a test on the host's side includes this file to find stale components.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use sha2::{Digest as _, Sha256};

/// Components that are built into one folder and stamped together.
pub(crate) struct Set {
    /// Folder of the components and their stamp, below the root.
    pub(crate) built: &'static str,
    /// The components.
    pub(crate) guests: &'static [Guest],
}

/// One component.
pub(crate) struct Guest {
    /// File stem of the component, and its id as a plugin.
    pub(crate) name: &'static str,
    /// Package that makes it: its library, or an example of the component's name.
    pub(crate) package: &'static str,
    /// Folder of that package below the root; every `.rs` file in it counts as a source.
    pub(crate) folder: &'static str,
    /// Folder of a library it is made with, whose files count too.
    pub(crate) library: Option<&'static str>,
}

const fn plugin(name: &'static str, package: &'static str, folder: &'static str) -> Guest {
    Guest {
        name,
        package,
        folder,
        library: None,
    }
}

/// A request adapter, made with what adapters share.
const fn adapter(name: &'static str, package: &'static str, folder: &'static str) -> Guest {
    Guest {
        library: Some("plugins/body"),
        ..plugin(name, package, folder)
    }
}

const fn test_guest(name: &'static str) -> Guest {
    Guest {
        name,
        package: TEST_GUESTS,
        folder: "tests/guests",
        library: None,
    }
}

/// Package of the guests that only tests load; each is an example of it.
pub(crate) const TEST_GUESTS: &str = "visor-test-guests";

/// Everything that is built.
pub(crate) const SETS: [Set; 2] = [
    Set {
        built: "plugins/built",
        guests: &[
            adapter("openai", "visor-plugin-openai", "plugins/openai"),
            adapter("responses", "visor-plugin-responses", "plugins/responses"),
            adapter("anthropic", "visor-plugin-anthropic", "plugins/anthropic"),
            adapter("ollama", "visor-plugin-ollama", "plugins/ollama"),
            plugin("phi3", "visor-plugin-phi3", "plugins/phi3"),
            plugin("hd", "visor-plugin-hd", "plugins/hd"),
            plugin("lru", "visor-plugin-lru", "plugins/lru"),
        ],
    },
    Set {
        built: "tests/guests/built",
        guests: &[
            test_guest("bad-adapter"),
            test_guest("bad-template"),
            test_guest("bad-policy"),
            test_guest("bad-strategy"),
            test_guest("other-track"),
            test_guest("phi3-loud"),
            test_guest("hd-one"),
            test_guest("hd-backwards"),
            test_guest("no-response-cache"),
        ],
    },
];

/// What does not match any more, one sentence per component; empty when every component was built
/// from the sources in the tree.
///
/// # Errors
/// A source or a stamp that cannot be read. A component or a stamp that is not there is stale.
pub(crate) fn stale(root: &Path) -> io::Result<Vec<String>> {
    let mut stale = Vec::new();
    for set in &SETS {
        let path = root.join(set.built).join("stamp.toml");
        let recorded = match fs::read_to_string(&path) {
            Ok(text) => parse(&text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        let current = parse(&text(root, set)?);
        let names: BTreeSet<&String> = recorded.keys().chain(current.keys()).collect();
        for name in names {
            let none = BTreeMap::new();
            let [was, is] = [&recorded, &current].map(|stamp| stamp.get(name).unwrap_or(&none));
            let paths: BTreeSet<&String> = was.keys().chain(is.keys()).collect();
            let changed = paths
                .into_iter()
                .filter(|path| was.get(*path) != is.get(*path));
            let changed: Vec<_> = changed.map(String::as_str).collect();
            if was.is_empty() {
                stale.push(format!("{name} was never built"));
            } else if !changed.is_empty() {
                stale.push(format!("{name} does not match {}", changed.join(", ")));
            }
        }
    }
    Ok(stale)
}

/// The stamp of a set as it would be written now.
///
/// # Errors
/// A source that cannot be read.
pub(crate) fn text(root: &Path, set: &Set) -> io::Result<String> {
    let mut text = String::from(
        "# SHA-256 of every component here and of the sources it was built from.\n\
         # Written by `cargo xtask plugins`; a test fails when it does not match.\n",
    );
    for guest in set.guests {
        let component = format!("{}/{}.wasm", set.built, guest.name);
        let mut paths = vec![component];
        for folder in [Some(guest.folder), guest.library].into_iter().flatten() {
            paths.push(format!("{folder}/Cargo.toml"));
            files(root, folder, "rs", &mut paths)?;
        }
        files(root, "wit", "wit", &mut paths)?;
        text.push_str(&format!("\n[{}]\n", guest.name));
        for path in paths {
            match fs::read(root.join(&path)) {
                Ok(bytes) => text.push_str(&format!("\"{path}\" = \"{}\"\n", hex_digest(&bytes))),
                // Not built yet: the stamp has no line for it, so it is "not there".
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(text)
}

/// Files below `folder` with that extension, sorted, as paths from the root.
fn files(root: &Path, folder: &str, extension: &str, found: &mut Vec<String>) -> io::Result<()> {
    let mut entries = fs::read_dir(root.join(folder))?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let path = format!("{folder}/{}", name.to_string_lossy());
        if entry.file_type()?.is_dir() {
            files(root, &path, extension, found)?;
        } else if Path::new(&name)
            .extension()
            .is_some_and(|own| own == extension)
        {
            found.push(path);
        }
    }
    Ok(())
}

/// Digests by component, then by path.
fn parse(text: &str) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut stamp: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    let mut guest = "";
    for line in text.lines() {
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            guest = name;
        } else if let Some((path, digest)) = line.split_once(" = ") {
            let [path, digest] = [path, digest].map(|quoted| quoted.trim_matches('"').to_owned());
            stamp
                .entry(guest.to_owned())
                .or_default()
                .insert(path, digest);
        }
    }
    stamp
}

fn hex_digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree with a source and a component for every guest, stamped; removed when dropped.
    struct Tree(std::path::PathBuf);

    impl Tree {
        fn stamped(name: &str) -> Self {
            let name = format!("visor-stamp-{}-{name}", std::process::id());
            let tree = Self(std::env::temp_dir().join(name));
            tree.write("wit/worlds.wit", "package a:b;");
            tree.write("plugins/body/src/lib.rs", "//! A library.");
            for set in &SETS {
                for guest in set.guests {
                    tree.write(&format!("{}/Cargo.toml", guest.folder), "[package]");
                    tree.write(&format!("{}/src/lib.rs", guest.folder), "//! A guest.");
                    tree.write(&format!("{}/{}.wasm", set.built, guest.name), "\0asm");
                }
                let stamp = text(&tree.0, set).unwrap();
                tree.write(&format!("{}/stamp.toml", set.built), &stamp);
            }
            tree
        }

        fn write(&self, path: &str, content: &str) {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn stale(&self) -> Vec<String> {
            stale(&self.0).unwrap()
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).ok();
        }
    }

    #[test]
    fn a_fresh_stamp_matches() {
        assert_eq!(Tree::stamped("fresh").stale(), [""; 0]);
    }

    #[test]
    fn a_changed_source_makes_its_component_stale() {
        let tree = Tree::stamped("changed");
        tree.write("plugins/hd/src/lib.rs", "//! Another guest.");
        assert_eq!(tree.stale(), ["hd does not match plugins/hd/src/lib.rs"]);
    }

    #[test]
    fn a_changed_library_makes_the_adapters_stale() {
        let tree = Tree::stamped("library");
        tree.write("plugins/body/src/lib.rs", "//! Another library.");
        let stale = tree.stale();
        assert!(stale.contains(&"openai does not match plugins/body/src/lib.rs".to_owned()));
        assert!(
            !stale.iter().any(|line| line.starts_with("hd ")),
            "{stale:?}"
        );
    }

    #[test]
    fn a_new_source_and_a_changed_component_are_noticed() {
        let tree = Tree::stamped("new");
        tree.write("plugins/lru/src/more.rs", "//! More.");
        tree.write("plugins/built/phi3.wasm", "another");
        let stale = tree.stale();
        assert_eq!(stale.len(), 2, "{stale:?}");
        assert_eq!(stale[0], "lru does not match plugins/lru/src/more.rs");
        assert_eq!(stale[1], "phi3 does not match plugins/built/phi3.wasm");
    }

    #[test]
    fn a_changed_contract_makes_every_component_stale() {
        let tree = Tree::stamped("contract");
        tree.write("wit/worlds.wit", "package a:c;");
        let guests: usize = SETS.iter().map(|set| set.guests.len()).sum();
        assert_eq!(tree.stale().len(), guests);
    }

    #[test]
    fn a_missing_component_or_stamp_is_stale() {
        let tree = Tree::stamped("missing");
        fs::remove_file(tree.0.join("plugins/built/hd.wasm")).unwrap();
        assert_eq!(tree.stale(), ["hd does not match plugins/built/hd.wasm"]);
        fs::remove_file(tree.0.join("plugins/built/stamp.toml")).unwrap();
        assert!(tree.stale().contains(&"openai was never built".to_owned()));
    }
}
