//! Configuration changes against a house with the shipped plugins: applied whole, or not at all.

use std::sync::Arc;

use visor::config::Config;
use visor::wiring::{House, HouseOptions};

/// A house whose plugin folder does not exist; the model may go on loading.
fn open(config: Config) -> Arc<House> {
    let options = HouseOptions {
        source: None,
        cache_folder: None,
        progress: Box::new(|_| {}),
    };
    House::open(config, options).expect("the defaults open")
}

fn config(text: &str) -> Config {
    let folder = std::env::temp_dir().join("visor-no-such-plugin-folder");
    let mut config =
        Config::parse(text, std::path::Path::new("visor.toml")).expect("a good configuration");
    config.plugins.folder = folder;
    config
}

#[test]
fn a_request_keeps_the_configuration_it_was_pinned_to() {
    let house = open(config(""));
    let before = house
        .pin("/v1/chat/completions")
        .expect("the default route");
    house
        .apply(Arc::new(config("[images]\ncount_max = 3\n")))
        .expect("a live key");
    let after = house
        .pin("/v1/chat/completions")
        .expect("the default route");
    assert_eq!(
        (
            before.config.images.count_max,
            after.config.images.count_max
        ),
        (8, 3)
    );
    assert!(after.wiring_revision > before.wiring_revision);
    assert!(
        Arc::ptr_eq(&before.adapter, &after.adapter),
        "no plugin was loaded again"
    );
}

#[test]
fn the_longest_prefix_wins_and_covers_whole_segments() {
    let two =
        "[[routes]]\nprefix = \"/v1\"\n[[routes]]\nprefix = \"/v1/lab\"\ncache_strategy = \"\"\n";
    let house = open(config(two));
    let prefix = |path: &str| house.pin(path).map(|pinned| pinned.prefix);
    assert_eq!(prefix("/v1/models").as_deref(), Some("/v1"));
    assert_eq!(prefix("/v1/lab/models").as_deref(), Some("/v1/lab"));
    assert_eq!(prefix("/v1/laboratory").as_deref(), Some("/v1"));
    assert_eq!(prefix("/v10/models"), None);
    let lab = house.pin("/v1/lab").expect("the prefix itself");
    assert!(
        lab.cache_plugin.is_none(),
        "an empty strategy is the host's own"
    );
    let path = house.find_path("POST", "/chat/completions");
    assert_eq!(path.as_deref(), Some("/v1/lab/chat/completions"));
}

#[test]
fn a_route_without_its_plugin_is_refused_and_changes_nothing() {
    let house = open(config(""));
    let before = house.wiring().revision;
    let route = |key: &str| config(&format!("[[routes]]\nprefix = \"/v1\"\n{key}\n"));
    let absent = house
        .apply(Arc::new(route("template = \"nix\"")))
        .expect_err("no such plugin");
    assert_eq!(
        absent,
        "route /v1: no plugin `nix`; for template there are: `phi3`"
    );
    let wrong = house
        .apply(Arc::new(route("template = \"hd\"")))
        .expect_err("another role");
    assert_eq!(
        wrong,
        "route /v1: plugin `hd` is no template; these are: `phi3`"
    );
    assert_eq!(house.wiring().revision, before);
}

#[test]
fn plugin_settings_are_applied_together_with_the_routes_or_not_at_all() {
    let house = open(config(""));
    let old = house.pin("/v1/models").expect("the default route");
    let bad = "[plugins.hd.config]\nno_such_key = 1\n[images]\ncount_max = 3\n";
    let refused = house
        .apply(Arc::new(config(bad)))
        .expect_err("the plugin refuses the key");
    assert!(
        refused.contains("hd") && refused.contains("no_such_key"),
        "{refused}"
    );
    let same = house.pin("/v1/models").expect("the default route");
    assert_eq!(same.wiring_revision, old.wiring_revision);
    assert_eq!(same.config.images.count_max, 8);

    let good = "[plugins.hd.config]\nmax_crops = 2\n[images]\ncount_max = 3\n";
    house
        .apply(Arc::new(config(good)))
        .expect("the plugin takes the key");
    let new = house.pin("/v1/models").expect("the default route");
    assert_eq!(new.config.images.count_max, 3);
    assert!(
        !Arc::ptr_eq(&old.image_policy, &new.image_policy),
        "loaded with its new settings"
    );
}

#[test]
fn a_cache_turned_off_is_empty_at_once() {
    let house = open(config(""));
    assert_eq!(
        house.stats_json()["caches"]["responses"]["capacity_bytes"],
        32 << 20
    );
    house
        .apply(Arc::new(config("[cache]\nresponses_mib = 0\n")))
        .expect("a live key");
    assert_eq!(
        house.stats_json()["caches"]["responses"]["capacity_bytes"],
        0
    );
}

#[test]
fn stats_and_metrics_name_the_model_and_every_plugin() {
    let house = open(config(""));
    let stats = house.stats_json();
    assert_eq!(stats["model"]["demo"], true);
    let plugins = stats["plugins"].as_array().expect("a list");
    assert_eq!(plugins.len(), 7);
    assert!(plugins.iter().all(|plugin| {
        plugin["revision"]
            .as_str()
            .is_some_and(|text| text.len() == 64)
    }));
    let metrics = house.metrics_text(false);
    for id in [
        "hd",
        "lru",
        "openai",
        "phi3",
        "anthropic",
        "ollama",
        "responses",
    ] {
        assert!(metrics.contains(&format!(
            "visor_plugin_info{{model_name=\"visor-demo\",plugin=\"{id}\""
        )));
    }
    assert!(metrics.contains("vllm:num_requests_running{model_name=\"visor-demo\"} 0"));
}

#[test]
fn a_draining_house_is_not_ready() {
    let house = open(config(""));
    house.wait_ready().expect("the demo loads");
    assert_eq!(house.ready(), Ok(()));
    house.drain();
    assert!(
        house
            .ready()
            .is_err_and(|reason| reason.contains("stopping"))
    );
}
