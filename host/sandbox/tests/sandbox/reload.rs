//! The plugin folder: what is dropped in is served, what is broken is not, and nothing is torn.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use visor_sandbox::{
    FolderOptions, Origin, PluginFolder, PluginSet, PluginSettings, Registry, ReloadError, Sandbox,
    Segment, SettingsFor, Shipped,
};

use crate::guests::{conversation, sandbox, template};

/// A template that says `word` (two letters) instead of `hi`.
fn says(word: &str) -> Vec<u8> {
    let bytes = word.as_bytes();
    let body = format!(
        "(i32.store8 (i32.const 8192) (i32.const {})) (i32.store8 (i32.const 8193) (i32.const {}))",
        bytes[0], bytes[1]
    );
    template("", &body)
}

struct House {
    folder: PluginFolder,
    registry: Arc<Registry>,
    changes: Arc<Mutex<mpsc::Receiver<u64>>>,
    refuse: Arc<AtomicBool>,
    path: PathBuf,
    _temporary: tempfile::TempDir,
}

fn settings() -> SettingsFor {
    Arc::new(|_| PluginSettings::default())
}

fn options(path: &Path, on_change: visor_sandbox::OnChange) -> FolderOptions {
    let bytes: &'static [u8] = Box::leak(says("hi").into_boxed_slice());
    FolderOptions {
        folder: path.to_owned(),
        poll: Duration::from_millis(500),
        shipped: vec![Shipped { id: "greet", bytes }],
        settings: settings(),
        on_change,
    }
}

impl House {
    fn new(sandbox: Sandbox, subfolder: &str) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join(subfolder);
        let registry = Arc::new(Registry::new());
        let refuse = Arc::new(AtomicBool::new(false));
        let (told, changes) = mpsc::channel();
        let refusing = Arc::clone(&refuse);
        let on_change = Box::new(move |set: &Arc<PluginSet>| {
            if refusing.load(Ordering::SeqCst) {
                return Err("the wiring says no".to_owned());
            }
            told.send(set.number).unwrap();
            Ok(())
        });
        let options = options(&path, on_change);
        let folder = PluginFolder::watch(sandbox, Arc::clone(&registry), options).unwrap();
        let changes = Arc::new(Mutex::new(changes));
        let house = Self {
            folder,
            registry,
            changes,
            refuse,
            path,
            _temporary: temporary,
        };
        house.wait_for_change();
        house
    }

    fn wait_for_change(&self) {
        let changes = self.changes.lock().unwrap();
        changes
            .recv_timeout(Duration::from_secs(60))
            .expect("a swap within a minute");
        drop(changes);
        self.folder.scan(); // The callback comes just before the swap; this waits for it.
    }

    /// Atomically, as `mv` does.
    fn drop_in(&self, name: &str, bytes: &[u8]) {
        let temporary = self.path.join(format!(".{name}.tmp"));
        fs::write(&temporary, bytes).unwrap();
        fs::rename(temporary, self.path.join(name)).unwrap();
    }

    fn word(&self) -> String {
        word(&self.registry.current(), "greet")
    }
}

fn word(set: &PluginSet, id: &str) -> String {
    let prompt = set.get(id).unwrap().render(conversation("r")).unwrap();
    match &prompt.segments[..] {
        [Segment::Text(text)] => text.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_shadows_the_shipped_plugin_until_it_is_removed() {
    let house = House::new(sandbox(), "");
    assert_eq!(house.word(), "hi");
    let held = house.registry.current();

    house.drop_in("greet.wasm", &says("yo"));
    house.wait_for_change();
    assert_eq!(house.word(), "yo");
    let plugin = Arc::clone(house.registry.current().get("greet").unwrap());
    assert_eq!(
        plugin.origin(),
        &Origin::File(house.path.join("greet.wasm"))
    );
    assert_eq!(
        word(&held, "greet"),
        "hi",
        "who holds the old set finishes on it"
    );

    house.drop_in("greet.wasm", &says("ho"));
    house.wait_for_change();
    assert_eq!(house.word(), "ho");

    fs::remove_file(house.path.join("greet.wasm")).unwrap();
    house.wait_for_change();
    assert_eq!(house.word(), "hi");
    assert_eq!(house.folder.status().reloads, 4);
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_told_once_and_keeps_nobody_waiting() {
    let house = House::new(sandbox(), "");
    fs::create_dir(house.path.join("greet.wasm")).unwrap();
    std::os::unix::fs::symlink("nowhere", house.path.join("link.wasm")).unwrap();
    let pipe = std::process::Command::new("mkfifo")
        .arg(house.path.join("pipe.wasm"))
        .status();
    assert!(pipe.unwrap().success());
    house.folder.scan();
    let told = |house: &House| -> Vec<(String, String)> {
        let errors = house.folder.status().last_errors.into_iter();
        errors.map(|error| (error.id, error.message)).collect()
    };
    let all = told(&house);
    let ids: Vec<&str> = all.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(ids, ["greet", "link", "pipe"], "{all:?}");
    assert!(all[0].1.contains("not a plain file"), "{all:?}");
    assert!(all[1].1.contains("leads nowhere"), "{all:?}");
    assert!(all[2].1.contains("not a plain file"), "{all:?}");
    assert_eq!(house.word(), "hi", "the shipped one serves on");
    fs::write(house.path.join("greet.wasm/more"), "more").unwrap();
    house.folder.scan();
    assert_eq!(
        house.folder.status().failures,
        3,
        "and nothing is told again"
    );

    fs::remove_dir_all(house.path.join("greet.wasm")).unwrap();
    house.drop_in("nowhere", &says("yo"));
    house.wait_for_change();
    assert_eq!(word(&house.registry.current(), "link"), "yo");
    assert_eq!(told(&house).len(), 1);
}

#[test]
fn a_new_file_is_a_new_plugin_and_leaves_with_it() {
    let house = House::new(sandbox(), "");
    house.drop_in("second.wasm", &says("yo"));
    house.wait_for_change();
    assert_eq!(word(&house.registry.current(), "second"), "yo");
    fs::remove_file(house.path.join("second.wasm")).unwrap();
    house.wait_for_change();
    assert!(house.registry.current().get("second").is_none());
}

#[test]
fn a_bad_file_changes_nothing_and_says_why() {
    let house = House::new(sandbox(), "");
    house.drop_in("greet.wasm", &says("yo"));
    house.wait_for_change();
    let before = house.registry.current().number;
    house.drop_in("greet.wasm", &says("no")[..200]);
    house.drop_in("other.wasm", b"not wasm");
    house.folder.scan();
    assert_eq!(house.word(), "yo");
    assert_eq!(house.registry.current().number, before);
    let errors = house.folder.status().last_errors;
    assert_eq!(errors.len(), 2, "{errors:?}");
    assert_eq!(
        (errors[0].id.as_str(), errors[1].id.as_str()),
        ("greet", "other")
    );
    assert!(errors[0].message.contains("truncated"), "{errors:?}");
    assert_eq!(house.folder.status().failures, 2);

    // Once they are gone, so is the complaint, and the shipped plugin is back.
    fs::remove_file(house.path.join("greet.wasm")).unwrap();
    fs::remove_file(house.path.join("other.wasm")).unwrap();
    house.folder.scan();
    assert_eq!(house.word(), "hi");
    assert_eq!(house.folder.status().last_errors, []);
}

#[test]
fn a_file_that_is_still_being_written_is_not_read_for_good() {
    let house = House::new(sandbox(), "");
    let (bytes, path) = (says("yo"), house.path.join("greet.wasm"));
    for end in [10, 100, bytes.len() / 2] {
        fs::write(&path, &bytes[..end]).unwrap();
        assert_eq!(house.word(), "hi");
    }
    fs::write(&path, &bytes).unwrap();
    house.wait_for_change();
    assert_eq!(house.word(), "yo");
    assert_eq!(house.folder.status().last_errors, []);
}

#[cfg(unix)]
#[test]
fn a_link_that_is_swapped_is_a_change() {
    use std::os::unix::fs::symlink;
    let house = House::new(sandbox(), "");
    // As a Kubernetes ConfigMap does it: names link into `..data`, which is swapped.
    for (version, word) in [("v1", "yo"), ("v2", "ho")] {
        fs::create_dir(house.path.join(version)).unwrap();
        fs::write(house.path.join(version).join("greet.wasm"), says(word)).unwrap();
    }
    symlink("v1", house.path.join("..data")).unwrap();
    symlink("..data/greet.wasm", house.path.join("greet.wasm")).unwrap();
    house.wait_for_change();
    assert_eq!(house.word(), "yo");
    symlink("v2", house.path.join("..next")).unwrap();
    fs::rename(house.path.join("..next"), house.path.join("..data")).unwrap();
    house.wait_for_change();
    assert_eq!(house.word(), "ho");
}

#[test]
fn a_folder_may_come_later_and_be_replaced() {
    let house = House::new(sandbox(), "plugins");
    assert_eq!(house.word(), "hi");
    fs::create_dir(&house.path).unwrap();
    house.drop_in("greet.wasm", &says("yo"));
    house.wait_for_change();
    assert_eq!(house.word(), "yo");

    fs::rename(&house.path, house.path.with_extension("old")).unwrap();
    house.wait_for_change();
    assert_eq!(house.word(), "hi");
    fs::create_dir(&house.path).unwrap();
    house.drop_in("greet.wasm", &says("ho"));
    house.wait_for_change();
    assert_eq!(house.word(), "ho");
}

#[cfg(unix)]
#[test]
fn a_folder_that_cannot_be_read_takes_no_plugin_away() {
    let house = House::new(sandbox(), "plugins");
    let parent = house.path.parent().unwrap();
    // The folder is a link, so that what it is changes at once.
    let point_to = |target: &str| {
        let next = parent.join("next");
        std::os::unix::fs::symlink(target, &next).unwrap();
        fs::rename(next, &house.path).unwrap();
        house.folder.scan();
    };
    fs::create_dir(parent.join("real")).unwrap();
    fs::write(parent.join("real/greet.wasm"), says("yo")).unwrap();
    fs::write(parent.join("file"), "no folder").unwrap();
    point_to("real");
    house.wait_for_change();
    assert_eq!(house.word(), "yo");
    let before = house.registry.current().number;

    point_to("file");
    house.folder.apply(settings()).unwrap(); // It does not look like a removal to a reload either.
    house.wait_for_change();
    (0..3).for_each(|_| house.folder.scan());
    assert_eq!(house.word(), "yo");
    assert_eq!(house.registry.current().number, before + 1);
    let status = house.folder.status();
    assert_eq!((status.last_errors.len(), status.failures), (1, 1));
    let error = &status.last_errors[0];
    assert_eq!((error.id.as_str(), &error.path), ("", &house.path));
    assert!(error.message.contains("cannot be read: Not a directory"));

    // Once it can be read, what happened meanwhile is seen.
    fs::remove_file(parent.join("real/greet.wasm")).unwrap();
    point_to("real");
    assert_eq!(house.folder.status().last_errors, []);
    house.wait_for_change();
    assert_eq!(house.word(), "hi");
}

#[test]
fn the_same_bytes_again_are_no_change() {
    let house = House::new(sandbox(), "");
    house.drop_in("greet.wasm", &says("yo"));
    house.wait_for_change();
    let before = house.registry.current();
    house.drop_in("greet.wasm", &says("yo"));
    house.folder.scan();
    assert_eq!(house.registry.current().number, before.number);
}

#[test]
fn a_set_that_the_server_refuses_does_not_come_into_service() {
    let house = House::new(sandbox(), "");
    house.refuse.store(true, Ordering::SeqCst);
    house.drop_in("greet.wasm", &says("yo"));
    house.folder.scan();
    assert_eq!(house.word(), "hi");
    let errors = house.folder.status().last_errors;
    assert_eq!(errors[0].message, "the wiring says no");

    house.refuse.store(false, Ordering::SeqCst);
    house.drop_in("greet.wasm", &says("ho"));
    house.wait_for_change();
    assert_eq!(house.word(), "ho");
    assert_eq!(house.folder.status().last_errors, []);

    // Neither does a removal go through against its will.
    house.refuse.store(true, Ordering::SeqCst);
    fs::remove_file(house.path.join("greet.wasm")).unwrap();
    house.folder.scan();
    assert_eq!(house.word(), "ho");
    assert_eq!(
        house.folder.status().last_errors[0].message,
        "the wiring says no"
    );
}

#[test]
fn new_settings_are_taken_by_all_plugins_or_by_none() {
    let house = House::new(sandbox(), "");
    house.drop_in("second.wasm", &says("yo"));
    house.wait_for_change();
    let with = |config: &'static str| -> SettingsFor {
        Arc::new(move |_| PluginSettings {
            config_json: config.to_owned(),
            ..PluginSettings::default()
        })
    };
    house.folder.apply(with("{\"a\":1}")).unwrap();
    house.wait_for_change();
    for plugin in house.registry.current().plugins.values() {
        assert_eq!(plugin.settings().config_json, "{\"a\":1}");
    }
    house.refuse.store(true, Ordering::SeqCst);
    let refused = house.folder.apply(with("{\"a\":2}")).unwrap_err();
    assert_eq!(
        refused,
        ReloadError::Refused("the wiring says no".to_owned())
    );
    for plugin in house.registry.current().plugins.values() {
        assert_eq!(plugin.settings().config_json, "{\"a\":1}");
    }
}

#[test]
fn a_file_that_is_there_at_start_is_served_from_the_start() {
    let temporary = tempfile::tempdir().unwrap();
    fs::write(temporary.path().join("greet.wasm"), says("yo")).unwrap();
    fs::write(temporary.path().join("broken.wasm"), b"").unwrap();
    let registry = Arc::new(Registry::new());
    let options = options(temporary.path(), Box::new(|_| Ok(())));
    let folder = PluginFolder::watch(sandbox(), Arc::clone(&registry), options).unwrap();
    assert_eq!(word(&registry.current(), "greet"), "yo");
    assert_eq!(registry.current().number, 1);
    assert_eq!(folder.status().last_errors.len(), 1);
}

#[test]
fn requests_never_see_a_gap_while_plugins_are_swapped() {
    let house = House::new(sandbox(), "");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut words = Vec::new();
            while !stop.load(Ordering::SeqCst) {
                let word = house.word();
                if words.last() != Some(&word) {
                    words.push(word);
                }
            }
            words
        });
        for word in ["yo", "ho"] {
            house.drop_in("greet.wasm", &says(word));
            house.wait_for_change();
        }
        let last = house.word();
        stop.store(true, Ordering::SeqCst);
        let words = asking.join().unwrap();
        assert_eq!(last, "ho");
        let order = ["hi", "yo", "ho"];
        let seen = words
            .iter()
            .map(|word| order.iter().position(|o| o == word).unwrap());
        assert!(seen.is_sorted(), "{words:?}");
    });
}

#[test]
fn a_file_that_never_settles_holds_up_nobody() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().to_owned();
    fs::write(path.join("greet.wasm"), says("yo")).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let restless = std::thread::spawn({
        let (stop, file) = (Arc::clone(&stop), path.join("restless.wasm"));
        move || {
            for count in 0_usize.. {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                fs::write(&file, vec![0; count % 1000]).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
    let (told, words) = mpsc::channel();
    std::thread::spawn(move || {
        let registry = Arc::new(Registry::new());
        let options = options(&path, Box::new(|_| Ok(())));
        let folder = PluginFolder::watch(sandbox(), Arc::clone(&registry), options).unwrap();
        told.send(word(&registry.current(), "greet")).unwrap();
        fs::write(path.join("greet.wasm"), says("ho")).unwrap();
        folder.scan();
        told.send(word(&registry.current(), "greet")).unwrap();
    });
    let minute = Duration::from_secs(60);
    let said = [(); 2].map(|()| words.recv_timeout(minute).expect("within a minute"));
    stop.store(true, Ordering::SeqCst);
    restless.join().unwrap();
    assert_eq!(said, ["yo", "ho"]);
}
