//! The documented file against the code, and mistakes against their messages.

use std::path::Path;

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("visor.toml"))
}

fn mistake(text: &str) -> Issue {
    let error = parse(text).expect_err("the text has a mistake");
    assert_eq!(error.issues.len(), 1, "{error}");
    error.issues[0].clone()
}

fn keys(value: &toml::Value, path: &str, into: &mut Vec<String>) {
    match value {
        toml::Value::Table(table) => {
            for (name, value) in table {
                keys(value, &format!("{path}.{name}"), into);
            }
        }
        toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
            for item in items {
                keys(item, path, into);
            }
        }
        _ => into.push(path.to_owned()),
    }
}

#[test]
fn the_documented_file_is_the_default() {
    assert_eq!(parse(DOCUMENTED).unwrap(), Config::default());
}

#[test]
fn the_documented_file_has_every_key_and_says_why() {
    let mut in_code = Vec::new();
    keys(
        &toml::Value::try_from(Config::default()).unwrap(),
        "",
        &mut in_code,
    );
    let mut in_file = Vec::new();
    keys(
        &toml::Value::Table(DOCUMENTED.parse().unwrap()),
        "",
        &mut in_file,
    );
    in_code.sort();
    in_file.sort();
    assert_eq!(in_code, in_file);
    let lines: Vec<&str> = DOCUMENTED.lines().collect();
    // Told of once, above the first of them.
    let repeats = |section: &str| section == "routes" || section.starts_with("sandbox.");
    let mut section = "";
    for (at, line) in lines.iter().enumerate() {
        if let Some(opened) = line.strip_prefix('[') {
            section = opened.trim_matches(['[', ']']);
        } else if line.contains(" = ") && !line.starts_with('#') && !repeats(section) {
            let above = lines[..at].iter().rev();
            let told = above.take_while(|above| !above.is_empty() && !above.starts_with('['));
            let word = told.into_iter().any(|above| above.starts_with('#'));
            assert!(word, "[{section}] has no word on {line}");
        }
    }
}

#[test]
fn an_empty_file_is_the_default() {
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn a_config_written_out_reads_back_equal() {
    let mut config = Config::default();
    let tokens = toml::Value::Integer(3);
    config
        .plugins
        .by_id
        .entry("hd".to_owned())
        .or_default()
        .config
        .insert("a".to_owned(), tokens);
    assert_eq!(parse(&config.to_toml()).unwrap(), config);
}

#[test]
fn a_partial_table_keeps_the_other_defaults() {
    let config = parse("[sandbox.adapter.call_ms]\nstart = 20\n").unwrap();
    assert_eq!(config.sandbox.adapter.call_ms.start, 20);
    assert_eq!(
        config.sandbox.adapter.call_ms.advance,
        Config::default().sandbox.adapter.call_ms.advance
    );
    assert_eq!(config.sandbox.adapter.memory_mib_max, 64);
}

#[test]
fn an_unknown_key_names_line_column_key_and_the_near_miss() {
    let issue = mistake("[server]\n# a comment\nlisten = \"127.0.0.1:1\"\n  lisen = 3\n");
    assert_eq!((issue.line, issue.column), (Some(4), Some(3)));
    assert_eq!(issue.key, "server.lisen");
    assert_eq!(issue.message, "unknown key `lisen`; did you mean `listen`?");
    assert!(
        issue.allowed.contains("`keep_alive_s`"),
        "{}",
        issue.allowed
    );
}

#[test]
fn a_wrong_type_names_the_key_and_what_is_expected() {
    let issue = mistake("[images]\ncount_max = \"many\"\n");
    assert_eq!((issue.line, issue.column), (Some(2), Some(13)));
    assert_eq!(issue.key, "images.count_max");
    assert!(
        issue.message.contains("the string \"many\""),
        "{}",
        issue.message
    );
    assert_eq!(issue.allowed, "a whole number, 0 or more");
}

#[test]
fn every_mistake_of_type_is_told_and_in_words_of_the_file() {
    let text = "[server]\nlisten = 8080\ndrain_s = -1\n[acces]\nkeys = 1\n[images]\napply_exif_orientation = \"no\"\n\
                [images.fetch]\nports = 443\n[generation]\ntop_p = \"most\"\n[plugins.hd]\nconfg = {}\nlimits = 3\n\
                [[access.keys]]\nname = 1\nsha256 = 2\n[model]\naliases = [1]\n";
    let error = parse(text).expect_err("many mistakes");
    let found = |key: &str| {
        let issue = error.issues.iter().find(|issue| issue.key == key);
        let issue = issue.unwrap_or_else(|| panic!("{key} is not told: {error}"));
        (
            issue.line.unwrap(),
            issue.message.as_str(),
            issue.allowed.as_str(),
        )
    };
    let whole = "a whole number, 0 or more";
    let string = "a string, in quotes";
    assert_eq!(
        found("server.listen"),
        (2, "the whole number `8080` cannot stand here", string)
    );
    assert_eq!(
        found("server.drain_s"),
        (3, "the whole number `-1` cannot stand here", whole)
    );
    assert_eq!(
        found("acces").1,
        "unknown key `acces`; did you mean `access`?"
    );
    let exif = found("images.apply_exif_orientation");
    assert_eq!(
        exif,
        (7, "the string \"no\" cannot stand here", "true or false")
    );
    assert_eq!(found("images.fetch.ports").2, "a list, in brackets");
    assert_eq!(found("generation.top_p").2, "a number");
    assert_eq!(found("plugins.hd.limits").2, "a table");
    assert!(found("plugins.hd.confg").1.contains("`config`"));
    assert_eq!(found("access.keys.0.name").2, string);
    assert_eq!(found("access.keys.0.sha256").2, string);
    assert_eq!(found("model.aliases.0").0, 19);
    assert_eq!(error.issues.len(), 11, "{error}");
}

#[test]
fn broken_toml_names_the_place() {
    let issue = mistake("[server]\nlisten = \n");
    assert_eq!(issue.line, Some(2));
}

#[test]
fn mistakes_inside_a_plugin_table_keep_their_line() {
    let issue = mistake("[plugins]\npoll_s = 1\n[plugins.hd.limits]\ncall_ms = -1\n");
    assert_eq!(issue.line, Some(4), "{issue:?}");
    let issue = mistake("[plugins.hd]\nconfg = {}\n");
    assert_eq!(
        (issue.line, issue.key.as_str()),
        (Some(2), "plugins.hd.confg")
    );
}

#[test]
fn every_mistake_of_meaning_is_listed_at_its_key() {
    let text = "[server]\nlisten = \"nowhere\"\nrequests_in_flight_max = 0\n\
                [[routes]]\nprefix = \"/v1\"\n[[routes]]\nprefix = \"/v1\"\n";
    let error = parse(text).expect_err("three mistakes");
    let found: Vec<_> = error
        .issues
        .iter()
        .map(|issue| (issue.key.as_str(), issue.line, issue.column))
        .collect();
    let expected = [
        ("server.listen", Some(2), Some(10)),
        ("server.requests_in_flight_max", Some(3), Some(26)),
        ("routes.1.prefix", Some(7), Some(10)),
    ];
    assert_eq!(found, expected);
    assert!(error.issues.iter().all(|issue| !issue.allowed.is_empty()));
}

#[test]
fn the_error_reads_like_a_compilers() {
    let error = parse("[images]\nside_px_max = 0\n").expect_err("zero is out of range");
    let expected = "error: 0 is out of range\n  --> visor.toml:2:15 (images.side_px_max)\n   |\n \
                    2 | side_px_max = 0\n   |               ^\n   = allowed: 64 to 65535";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn values_that_contradict_each_other_are_refused() {
    let issue = mistake("[generation]\nprompt_tokens_max = 4096\n");
    assert_eq!(issue.key, "generation.prompt_tokens_max");
    let issue = mistake("[generation]\nmax_tokens = 10\nmax_tokens_limit = 5\n");
    assert_eq!(
        (issue.key.as_str(), issue.allowed.as_str()),
        ("generation.max_tokens", "1 to 5")
    );
    let issue = mistake("[images]\ncanvases_mib_max = 64\n");
    assert_eq!(issue.key, "images.canvases_mib_max");
    assert!(issue.message.contains("images.pixels_max"), "{issue:?}");
    parse("[images]\ncanvases_mib_max = 64\npixels_max = 8000000\n").unwrap();
    let issue = mistake("[plugins.hd.limits]\nmemory_mib_max = 65\n");
    assert_eq!(issue.key, "plugins.hd.limits.memory_mib_max");
    assert_eq!(issue.allowed, "1 to 64");
}

#[test]
fn no_route_hides_behind_a_page_of_the_server() {
    for page in ["/health", "/ready", "/stats", "/metrics", "/openapi.json"] {
        let issue = mistake(&format!("[[routes]]\nprefix = \"{page}\"\n"));
        assert_eq!(issue.key, "routes.0.prefix", "{page}");
    }
}

#[test]
fn numbers_that_are_no_numbers_are_refused() {
    assert_eq!(
        mistake("[generation]\ntop_p = nan\n").key,
        "generation.top_p"
    );
    assert_eq!(
        mistake("[generation]\ntemperature = nan\n").key,
        "generation.temperature"
    );
    assert_eq!(mistake("[model]\ndevice = \"tpu\"\n").key, "model.device");
    assert_eq!(
        mistake("[model]\nactivations = \"int2\"\n").key,
        "model.activations"
    );
    assert_eq!(
        mistake("[model]\nquantization = \"int3\"\n").key,
        "model.quantization"
    );
}

#[test]
fn a_file_that_is_not_there_says_so() {
    let error = Config::load(Path::new("no-such-folder/visor.toml")).expect_err("not there");
    assert!(
        error.to_string().contains("no-such-folder/visor.toml"),
        "{error}"
    );
    let line = error.one_line();
    assert!(
        line.starts_with("no-such-folder/visor.toml: cannot be read"),
        "{line}"
    );
    let broken = parse("[server]\nlisten = \n").expect_err("no TOML");
    assert!(
        broken.one_line().starts_with("visor.toml, line 2: "),
        "{}",
        broken.one_line()
    );
}

#[test]
fn hosts_are_written_as_urls_have_them() {
    let hosts = |hosts: &str| format!("[images.fetch]\nhttps = true\nhosts = [{hosts}]\n");
    let good = r#""*", "a.example", "*.b.example", "93.184.216.34", "[2606:4700::1111]", "xn--bcher-kva.example""#;
    parse(&hosts(good)).unwrap();
    for bad in [
        "A.example",
        "https://a.example",
        "a.example:443",
        "a.example/x",
        "bücher.example",
        "0x7f.1",
        "*",
        "*.*",
        "",
        "a.*",
        "2606:4700::1111",
    ] {
        let text = hosts(&format!("\"a.example\", \"*.{bad}\""));
        assert_eq!(mistake(&text).key, "images.fetch.hosts.1", "*.{bad}");
        if bad != "*" {
            let text = hosts(&format!("\"{bad}\""));
            assert_eq!(mistake(&text).key, "images.fetch.hosts.0", "{bad}");
        }
    }
    let asked = |host: &str| format!("[access]\nhosts = [\"{host}\"]\n");
    for good in ["*", "a.example", "A.Example", "192.168.0.7", "[::1]"] {
        parse(&asked(good)).unwrap();
    }
    for bad in [
        "",
        "a.example:80",
        "https://a.example",
        "*.a.example",
        "a b",
        "::1",
    ] {
        assert_eq!(mistake(&asked(bad)).key, "access.hosts.0", "{bad}");
    }
    let networks = |list: &str| format!("[images.fetch]\nrefused_networks = [{list}]\n");
    parse(&networks("\"192.0.2.0/24\", \"2001:db8::/32\"")).unwrap();
    for bad in ["192.0.2.0/33", "192.0.2.7", "example.org", ""] {
        let issue = mistake(&networks(&format!("\"{bad}\"")));
        assert!(issue.key.contains("refused_networks"), "{issue:?}");
    }
    let issue = mistake(&hosts(""));
    assert_eq!(issue.key, "images.fetch.hosts");
    let issue = mistake("[images]\nfiles_root = \"pictures\"\n");
    assert_eq!(issue.key, "images.files_root");
}

#[test]
fn a_mistaken_key_is_named_and_never_repeated() {
    let hash = "0123456789abcdef".repeat(4);
    let keys = |keys: &[(&str, &str)]| {
        let one = |(name, hash): &(&str, &str)| {
            format!("[[access.keys]]\nname = \"{name}\"\nsha256 = \"{hash}\"\n")
        };
        keys.iter().map(one).collect::<String>()
    };
    let config = parse(&keys(&[("alice", &hash), ("bob", &hash.replace('0', "1"))])).unwrap();
    assert_eq!(parse(&config.to_toml()).unwrap(), config);
    for name in ["", "al ice", "al\\nice", &"x".repeat(65)] {
        let issue = mistake(&keys(&[(name, &hash)]));
        assert_eq!(issue.key, "access.keys.0.name", "{name}");
    }
    let issue = mistake(&keys(&[
        ("alice", &hash),
        ("alice", &hash.replace('0', "1")),
    ]));
    assert_eq!(issue.key, "access.keys.1.name");
    let issue = mistake(&keys(&[("alice", &hash), ("bob", &hash.to_uppercase())]));
    assert_eq!(issue.key, "access.keys.1.sha256");
    let secret = "sk-not-a-hash";
    let error = parse(&keys(&[("alice", secret)])).expect_err("the key itself");
    assert_eq!(error.issues[0].key, "access.keys.0.sha256");
    assert!(!error.one_line().contains(secret), "{}", error.one_line());
    let issue = mistake("[[access.keys]]\nname = \"alice\"\n");
    assert!(issue.message.contains("sha256"), "{issue:?}");
}

#[test]
fn origins_are_written_as_browsers_have_them() {
    let origins = |one: &str| format!("[access]\ncors_origins = [\"{one}\"]\n");
    for good in [
        "*",
        "https://a.example",
        "http://localhost:3000",
        "http://[::1]:8080",
    ] {
        parse(&origins(good)).unwrap();
    }
    for bad in [
        "a.example",
        "https://a.example/",
        "https://A.example",
        "https://a.example:443",
        "null",
        "https://a.example/app",
        "",
    ] {
        let found = parse(&origins(bad)).map_err(|error| error.issues[0].key.clone());
        assert_eq!(found, Err("access.cors_origins.0".to_owned()), "{bad}");
    }
}

#[test]
fn the_admin_listener_is_local_or_guarded() {
    let admin = |listen: &str| format!("[admin]\nlisten = \"{listen}\"\n");
    let key = |admin: bool| {
        let hash = "0123456789abcdef".repeat(4);
        format!("[[access.keys]]\nname = \"root\"\nsha256 = \"{hash}\"\nadmin = {admin}\n")
    };
    for local in ["127.0.0.1:1", "[::1]:1", "127.3.2.1:0"] {
        parse(&admin(local)).unwrap();
    }
    for open in ["0.0.0.0:1", "[::]:1", "192.168.0.1:1"] {
        assert_eq!(mistake(&admin(open)).key, "admin.listen");
        let guarded = parse(&(admin(open) + &key(true))).unwrap();
        assert_eq!(parse(&guarded.to_toml()).unwrap(), guarded);
        assert_eq!(mistake(&(admin(open) + &key(false))).key, "admin.listen");
    }
    assert_eq!(mistake(&admin("localhost:1")).key, "admin.listen");
    let both = |server: &str, admin: &str| {
        parse(&format!(
            "[server]\nlisten = \"{server}\"\n[admin]\nlisten = \"{admin}\"\n"
        ))
    };
    for server in ["127.0.0.1:7", "0.0.0.0:7", "[::]:7"] {
        let error = both(server, "127.0.0.1:7").expect_err("one address for two");
        assert_eq!(error.issues[0].key, "admin.listen", "{error}");
    }
    for server in ["127.0.0.1:8", "127.0.0.2:7", "[::1]:7", "127.0.0.1:0"] {
        both(server, "127.0.0.1:7").unwrap();
    }
    both("127.0.0.1:0", "127.0.0.1:0").unwrap();
}
