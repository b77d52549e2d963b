//! Commands that answer and end.

use serde_json::Value;

use super::{VARIABLES, repository, run, text, visor};

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).expect("one JSON document")
}

#[test]
fn help_names_every_command_and_the_exit_codes() {
    let folder = tempfile::tempdir().unwrap();
    let out = run(folder.path(), &["--help"]);
    let help = text(&out.stdout);
    for word in [
        "serve",
        "ask",
        "verify",
        "config",
        "plugin",
        "models",
        "bench",
        "quantize",
        "Exit codes",
    ] {
        assert!(help.contains(word), "{word} is missing:\n{help}");
    }
}

#[test]
fn a_bad_configuration_is_explained_and_ends_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("my.toml");
    std::fs::write(&file, "[server]\nlisten = \"nowhere\"\n").unwrap();
    let out = run(folder.path(), &["config", "check", "my.toml"]);
    assert_eq!(out.status.code(), Some(2));
    let said = text(&out.stderr);
    assert!(said.contains("my.toml:2:10 (server.listen)"), "{said}");
    let out = run(folder.path(), &["serve", "--config", "my.toml"]);
    assert_eq!(out.status.code(), Some(2), "serving refuses it as well");
}

#[test]
fn the_configuration_shown_is_one_that_checks() {
    let folder = tempfile::tempdir().unwrap();
    // As a shell does for `visor config show > visor.toml`.
    std::fs::write(folder.path().join("visor.toml"), "").unwrap();
    let shown = run(folder.path(), &["config", "show"]).stdout;
    assert!(
        text(&shown).contains("# Address and port (restart)."),
        "documented"
    );
    std::fs::write(folder.path().join("visor.toml"), &shown).unwrap();
    let out = run(folder.path(), &["config", "check", "visor.toml"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
}

#[test]
fn what_the_plugins_refuse_is_a_mistake_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let check = |file: &str| {
        std::fs::write(folder.path().join("my.toml"), file).unwrap();
        let out = run(folder.path(), &["config", "check", "my.toml"]);
        (out.status.code(), text(&out.stderr))
    };
    let documented = std::fs::read_to_string(repository("config/visor.toml")).unwrap();
    let (_, example) = documented.split_once("# [plugins.hd]\n").unwrap();
    let (example, _) = example.split_once("\n\n").unwrap();
    let example: String = example
        .lines()
        .map(|line| format!("{}\n", &line[1..]))
        .collect();
    let (code, said) = check(&format!("[plugins.hd]\n{example}"));
    assert_eq!(code, Some(0), "the example of the documented file: {said}");
    let (code, said) = check("[plugins.hd.config]\nmost_crops = 4\n");
    assert!(
        code == Some(2) && said.contains("most_crops"),
        "{code:?} {said}"
    );
    let (code, said) = check(
        "[[routes]]\nprefix = \"/v1\"\nadapter = \"nothing\"\ntemplate = \"phi3\"\nimage_policy = \"hd\"\ncache_strategy = \"lru\"\n",
    );
    assert!(
        code == Some(2) && said.contains("nothing"),
        "{code:?} {said}"
    );
}

#[test]
fn what_a_configuration_names_outside_itself_is_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = "[server]\ntls_cert_file = \"no.pem\"\ntls_key_file = \"key.pem\"\n\
                [plugins.hdd.config]\nauto_crops = 4\n[plugins.hd.config]\nmost_crops = 4\n";
    std::fs::write(folder.path().join("my.toml"), file).unwrap();
    let out = run(folder.path(), &["config", "check", "my.toml"]);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{said}");
    for words in [
        "my.toml:2:17 (server.tls_cert_file)",
        "no.pem",
        "my.toml:4:10 (plugins.hdd)",
        "no plugin `hdd`",
        "most_crops",
    ] {
        assert!(said.contains(words), "no {words}: {said}");
    }
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file =
        "[server]\nlisten = \"127.0.0.1:1\"\n[model]\ndevice = \"cuda\"\nserved_name = \"mine\"\n";
    std::fs::write(folder.path().join("visor.toml"), file).unwrap();
    let out = visor(folder.path(), &["config", "show", "--device", "cpu"])
        .env("VISOR_DEVICE", "metal")
        .env("VISOR_LOG", "debug")
        .env("VISOR_LISTEN", "127.0.0.1:2")
        .output()
        .unwrap();
    let shown: toml::Table = text(&out.stdout).parse().unwrap();
    assert_eq!(shown["model"]["device"].as_str(), Some("cpu"));
    assert_eq!(shown["server"]["log_filter"].as_str(), Some("debug"));
    assert_eq!(shown["server"]["listen"].as_str(), Some("127.0.0.1:2"));
    assert_eq!(shown["model"]["served_name"].as_str(), Some("mine"));
}

#[test]
fn shipped_plugins_are_listed_and_a_bad_file_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let out = run(folder.path(), &["plugin", "list", "--json"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let listed = json(&out.stdout);
    let ids: Vec<_> = listed["plugins"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["id"].as_str().unwrap())
        .collect();
    let shipped = [
        "anthropic",
        "hd",
        "lru",
        "ollama",
        "openai",
        "phi3",
        "responses",
    ];
    assert_eq!(ids, shipped);

    let plugins = folder.path().join("visor-plugins");
    std::fs::create_dir(&plugins).unwrap();
    std::fs::copy(
        repository("plugins/built/phi3.wasm"),
        plugins.join("mine.wasm"),
    )
    .unwrap();
    std::fs::copy(repository("plugins/built/hd.wasm"), plugins.join("hd.wasm")).unwrap();
    std::fs::write(plugins.join("broken.wasm"), b"\0asm").unwrap();
    let out = run(folder.path(), &["plugin", "list", "--json"]);
    assert_eq!(out.status.code(), Some(1), "a bad file is an answer of no");
    let listed = json(&out.stdout);
    let state = |id: &str| {
        let rows = listed["plugins"].as_array().unwrap();
        rows.iter()
            .find(|row| row["id"] == id)
            .unwrap_or_else(|| panic!("{id} is not listed"))["state"]
            .clone()
    };
    assert_eq!(state("mine"), "file");
    assert_eq!(state("hd"), "overrides shipped");
    assert_eq!(state("broken"), "bad");
    assert_eq!(state("openai"), "shipped");
}

#[test]
fn a_plugin_file_is_checked_as_the_server_would() {
    let folder = tempfile::tempdir().unwrap();
    let good = repository("plugins/built/openai.wasm");
    let out = run(
        folder.path(),
        &["plugin", "check", "--json", good.to_str().unwrap()],
    );
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stdout));
    let report = json(&out.stdout);
    assert_eq!(report["roles"][0], "adapter@0.1.0");
    assert!(
        report["routes"]
            .as_array()
            .unwrap()
            .iter()
            .any(|route| route == "POST /chat/completions")
    );

    let whole = std::fs::read(&good).unwrap();
    let cut = folder.path().join("cut.wasm");
    std::fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let out = run(folder.path(), &["plugin", "check", "cut.wasm"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text(&out.stdout).contains("truncated"),
        "{}",
        text(&out.stdout)
    );
}

#[test]
fn the_demo_model_says_that_it_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let described = json(&run(folder.path(), &["models", "--json"]).stdout);
    assert_eq!(described["id"], "visor-demo");
    assert_eq!(described["demo"], true);
    assert_eq!(described["context_tokens"], 4096);
}

#[test]
fn a_checkpoint_that_is_not_there_ends_with_3() {
    let folder = tempfile::tempdir().unwrap();
    let out = run(folder.path(), &["models", "--model", "no-such-folder"]);
    assert_eq!(out.status.code(), Some(3));
    assert!(
        text(&out.stderr).contains("no-such-folder"),
        "{}",
        text(&out.stderr)
    );
}

#[test]
fn asking_goes_through_the_plugins_and_repeats_itself_when_greedy() {
    let folder = tempfile::tempdir().unwrap();
    let picture = repository("tests/golden/images/tiny_20x20.png");
    let ask = || {
        let args = [
            "ask",
            picture.to_str().unwrap(),
            "What is this?",
            "--max-tokens",
            "4",
        ];
        let out = run(folder.path(), &args);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        text(&out.stdout)
    };
    let first = ask();
    assert!(first.trim().len() > 1, "{first:?}");
    let key = format!(
        "[[access.keys]]\nname = \"alice\"\nsha256 = \"{}\"\n",
        "0".repeat(64)
    );
    std::fs::write(folder.path().join("visor.toml"), key).unwrap();
    assert_eq!(first, ask(), "inside the process nobody needs a key");
}

#[test]
fn a_picture_that_is_none_is_refused_with_1() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("text.jpg"), "not a picture").unwrap();
    let out = run(folder.path(), &["ask", "text.jpg", "What is this?"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text(&out.stderr).contains("not a JPEG, PNG or WebP"),
        "{}",
        text(&out.stderr)
    );
}

#[test]
fn a_float_checkpoint_is_quantized_and_serves() {
    let folder = tempfile::tempdir().unwrap();
    let source = repository("tests/golden/ckpt_mha").display().to_string();
    let out = run(
        folder.path(),
        &["quantize", &source, "int4", "--vision", "int4"],
    );
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let table = text(&out.stdout);
    assert!(
        table.contains("model.layers.0.self_attn.qkv_proj"),
        "{table}"
    );
    assert!(table.contains("int4: "), "{table}");
    assert!(
        table.contains("vision layer 0") && table.contains("most likely next tokens"),
        "{table}"
    );
    let out = run(folder.path(), &["models", "--json", "--model", "int4"]);
    assert_eq!(json(&out.stdout)["quantization"], "int4 group 64");
    let copy = folder.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(format!("{source}/{name}"), copy.join(name)).unwrap();
    }
    for inside in ["copy/int4", "copy/../copy/a/b", "copy"] {
        let out = run(folder.path(), &["quantize", "copy", inside]);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(3), "{inside}: {said}");
        assert!(said.contains("inside the checkpoint"), "{inside}: {said}");
    }
    assert_eq!(std::fs::read_dir(copy).unwrap().count(), 2);
    let out = run(folder.path(), &["quantize", &source, "int4"]);
    assert_eq!(out.status.code(), Some(3));
    assert!(
        text(&out.stderr).contains("it exists"),
        "{}",
        text(&out.stderr)
    );
}

/// Every number below a value, with the keys that lead there.
fn numbers(path: &str, value: &Value, found: &mut Vec<(String, f64)>) {
    match value {
        Value::Object(keys) => keys
            .iter()
            .for_each(|(key, value)| numbers(&format!("{path}.{key}"), value, found)),
        Value::Array(values) => values.iter().for_each(|value| numbers(path, value, found)),
        _ => found.extend(value.as_f64().map(|number| (path.to_owned(), number))),
    }
}

#[test]
fn a_shape_is_made_once_and_measured_stage_by_stage() {
    let folder = tempfile::tempdir().unwrap();
    let config = repository("tests/golden/ckpt_mha_int4/config.json");
    let bench = |flag: &str| {
        let shape = config.to_str().unwrap();
        run(
            folder.path(),
            &["bench", "--shape", shape, "--shape-folder", "kept", flag],
        )
    };
    let out = bench("--json");
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("making random weights in kept"));
    let report = json(&out.stdout);
    let mut found = Vec::new();
    numbers("", &report, &mut found);
    for (key, number) in &found {
        assert!(*number > 0.0 && number.is_finite(), "{key} is {number}");
    }
    for stage in [
        ".ceilings.read_gb_per_s",
        ".ceilings.products.f32_gop_per_s",
        ".measured.load_s",
        ".measured.warm_load_s",
        ".measured.vision.seconds_per_crop",
        ".measured.vision.tower_seconds_per_crop",
        ".measured.prefill.tokens_per_s",
        ".measured.decode.read_gb_per_s",
        ".measured.decode.read_share",
        ".measured.first_tokens.seconds",
    ] {
        assert!(found.iter().any(|(key, _)| key == stage), "no {stage}");
    }
    assert_eq!(report["measured"]["first_tokens"][0]["prompt_tokens"], 775);

    let out = bench("--long");
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(!text(&out.stderr).contains("making"), "it was kept");
    for told in [
        "prefill      2509 tokens",
        "17 crops in",
        "2527 prompt tokens",
    ] {
        assert!(text(&out.stdout).contains(told), "no {told}");
    }
}

#[test]
fn a_shape_that_is_none_is_refused_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let out = run(folder.path(), &["bench", "--shape", "phi-4"]);
    assert_eq!(out.status.code(), Some(2));
    let said = text(&out.stderr);
    assert!(said.contains("give phi-3.5-vision"), "{said}");
}

#[test]
fn a_plugin_under_a_name_that_routes_give_another_role_is_bad() {
    let folder = tempfile::tempdir().unwrap();
    let built = repository("plugins/built/phi3.wasm");
    std::fs::copy(&built, folder.path().join("hd.wasm")).unwrap();
    let out = run(folder.path(), &["plugin", "check", "hd.wasm"]);
    let said = text(&out.stdout);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(
        said.contains("hd.wasm: bad") && said.contains("names `hd` for its image-policy"),
        "{said}"
    );
    std::fs::copy(&built, folder.path().join("mine.wasm")).unwrap();
    let out = run(folder.path(), &["plugin", "check", "mine.wasm"]);
    assert_eq!(out.status.code(), Some(0), "no route names it");
}

#[test]
fn what_makes_no_sense_on_the_command_line_ends_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let picture = repository("tests/golden/images/tiny_20x20.png");
    let picture = picture.to_str().unwrap();
    let cases: [(&[&str], &str); 7] = [
        (&["ask", picture, "?", "--temperature", "nan"], "0 to 2"),
        (&["ask", picture, "?", "--temperature", "3"], "0 to 2"),
        (&["ask", picture, "?", "--detail", "foo"], "low, high, auto"),
        (&["ask", picture, "?", "--max-tokens", "0"], "not in 1.."),
        (&["ask", "no-such.jpg", "?"], "no-such.jpg cannot be read"),
        (&["bench", "--requests", "0"], "not in 1.."),
        (&["bench", "--max-tokens", "0"], "not in 1.."),
    ];
    for (args, words) in cases {
        let out = run(folder.path(), args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
    }
}

#[cfg(unix)]
#[test]
fn what_never_ends_is_not_read_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    for args in [
        &["config", "check", "/dev/zero"] as &[&str],
        &["serve", "--config", "/dev/zero"],
        &["bench", "--shape", "/dev/zero"],
        &["ask", "/dev/zero", "What is this?"],
    ] {
        let out = run(folder.path(), args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains("has more than"), "{args:?}: {said}");
    }
    let source = folder.path().join("source");
    std::fs::create_dir(&source).unwrap();
    let golden = repository("tests/golden/ckpt_mha");
    for pipe in ["model.safetensors", "config.json"] {
        for name in ["model.safetensors", "config.json"] {
            let _ = std::fs::remove_file(source.join(name));
            std::fs::copy(golden.join(name), source.join(name)).unwrap();
        }
        std::fs::remove_file(source.join(pipe)).unwrap();
        let made = std::process::Command::new("mkfifo")
            .arg(source.join(pipe))
            .status();
        assert!(made.unwrap().success());
        let out = run(folder.path(), &["quantize", "source", "target"]);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(3), "{said}");
        assert!(
            said.contains(pipe) && said.contains("not a plain file"),
            "{said}"
        );
    }
}

#[test]
fn an_empty_variable_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = visor(folder.path(), &["config", "show"]);
    for name in VARIABLES {
        command.env(format!("VISOR_{name}"), "");
    }
    let out = command.output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(text(&out.stdout).contains("# Address and port (restart)."));
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_that_is_not_in_this_build_ends_with_3() {
    let folder = tempfile::tempdir().unwrap();
    let out = run(
        folder.path(),
        &["--listen", "127.0.0.1:0", "--device", "cuda"],
    );
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{said}");
    assert!(
        said.contains("--features cuda") && said.contains("device = cpu"),
        "{said}"
    );
}
