//! What is a case, and what is wrong with what is none.

use super::*;

const GOOD: &str =
    r#"{"id":"a-1","category":"colour","images":["p/a.png"],"question":"Which?","accept":["red"]}"#;

/// The good line with `with` in place of `part`.
fn changed(part: &str, with: &str) -> String {
    assert!(GOOD.contains(part), "{part}");
    GOOD.replace(part, with)
}

#[test]
fn a_short_case_leaves_the_rest_at_its_defaults() {
    let case = Case::parse(GOOD).unwrap();
    assert_eq!(
        (case.id.as_str(), case.category.as_str()),
        ("a-1", "colour")
    );
    assert_eq!(case.rule, Rule::Words);
    assert!(case.history.is_empty() && case.reject.is_empty());
    assert_eq!((case.crops, case.detail), (None, None));
}

#[test]
fn a_long_case_has_everything() {
    let more = r#"["red"],"reject":["blue"],"match":"exact","crops":4,
        "history":[{"question":"What is it?","answer":"A cup."}]"#;
    let case = Case::parse(&changed(r#"["red"]"#, more)).unwrap();
    assert_eq!((case.rule, case.crops), (Rule::Exact, Some(4)));
    assert_eq!(case.history[0].answer, "A cup.");
    let case = Case::parse(&changed(r#"["p/a.png"]"#, "[]")).unwrap();
    assert!(
        case.images.is_empty(),
        "a question may come without a picture"
    );
}

#[track_caller]
fn check(line: &str, key: &str, says: &str) {
    let error = Case::parse(line).expect_err(line);
    assert_eq!(error.key, key, "{line}: {}", error.message);
    assert!(error.message.contains(says), "{line}: {}", error.message);
}

#[test]
fn mistakes_are_told_with_their_key() {
    for (part, with, key, says) in [
        ("\"id\":\"a-1\",", "", "id", "is missing"),
        ("\"a-1\"", "3", "id", "has to be a string"),
        ("\"a-1\"", "\" \"", "id", "is empty"),
        ("\"a-1\"", "\"a b\"", "id", "letters, digits"),
        ("\"colour\"", "\"all\"", "category", "stands for all"),
        ("images", "imagse", "", "unknown field `imagse`"),
        ("\"category\"", "\"id\"", "", "duplicate field `id`"),
        ("[\"p/a.png\"]", "\"a.png\"", "images", "has to be a list"),
        ("[\"p/a.png\"]", "[1]", "images[0]", "has to be a string"),
        ("\"Which?\"", "null", "question", "is missing"),
        ("[\"red\"]", "[]", "accept", "no accepted answer"),
        ("\"red\"", "\"!\"", "accept[0]", "no letters or digits"),
    ] {
        check(&changed(part, with), key, says);
    }
    check("[1]", "", "a JSON object");
    check("{", "", "at column 1");
    let many = format!("[{}]", vec!["\"p\""; ITEMS_MAX + 1].join(","));
    let line = changed("[\"p/a.png\"]", &many);
    check(&line, "images", "65 entries; 64");
}

#[test]
fn mistakes_in_optional_keys_are_told_as_well() {
    for (more, key, says) in [
        (r#""match":"fuzzy""#, "match", "words, all, exact, text"),
        (r#""match":"yes-no""#, "accept[0]", "neither"),
        (r#""reject":["?"]"#, "reject[0]", "no letters or digits"),
        (r#""crops":0"#, "crops", "from 1 on"),
        (r#""crops":1.5"#, "crops", "from 1 on"),
        (r#""detail":"ultra""#, "detail", "low, auto, high"),
        (r#""detail":"low","crops":1"#, "detail", "without `crops`"),
        (r#""history":["a"]"#, "history[0]", "an object"),
        (r#""history":[{"said":"a"}]"#, "history[0]", "field `said`"),
        (
            r#""history":[{"question":"a"}]"#,
            "history[0].answer",
            "is missing",
        ),
    ] {
        let line = changed("[\"red\"]", &format!("[\"red\"],{more}"));
        check(&line, key, says);
    }
}

#[test]
fn pictures_stay_below_the_folder() {
    for path in [
        "../a.png",
        "p/../../a.png",
        "/etc/passwd",
        "./a.png",
        "p\\\\a.png",
        "C:a.png",
    ] {
        let error = Case::parse(&changed("p/a.png", path)).expect_err(path);
        assert_eq!(error.key, "images[0]", "{path}");
    }
    assert!(Case::parse(&changed("p/a.png", "p/q/ä 1.png")).is_ok());
}
