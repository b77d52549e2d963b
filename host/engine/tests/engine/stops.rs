//! Stop strings: never seen by the client, wherever the tokens are cut.

use visor_engine::{Finish, GenerateRequest};

use crate::heard::*;
use crate::scripted::*;

fn stopping_at(stops: &[&str]) -> GenerateRequest {
    let mut request = request(100);
    request.stop_strings = stops.iter().map(ToString::to_string).collect();
    request
}

#[track_caller]
fn check(said: &str, stops: &[&str], want: &str, matched: Option<&str>) {
    let heard = ask(&start(&Script::saying(said)), stopping_at(stops));
    assert_eq!(heard.text, want);
    assert_eq!(heard.matched_stop(), matched);
    assert_eq!(heard.reason(), Some(Finish::Stop));
}

#[test]
fn a_stop_string_over_token_boundaries_is_held_back() {
    check(
        "The answer is forty-two. Next question",
        &["forty-two"],
        "The answer is ",
        Some("forty-two"),
    );
    check(
        "Hello\n\nUser: more",
        &["\n\nUser:"],
        "Hello",
        Some("\n\nUser:"),
    );
    check("one 🦀 two", &["🦀 t"], "one ", Some("🦀 t"));
}

#[test]
fn what_only_looks_like_a_stop_string_arrives() {
    check(
        "forty-one and forty",
        &["forty-two"],
        "forty-one and forty",
        None,
    );
    check("the end\n", &["\n\n"], "the end\n", None);
}

#[test]
fn the_first_of_several_stop_strings_ends_the_answer() {
    check("a b c d e", &["e", "d e", "c"], "a b ", Some("c"));
}

#[test]
fn a_newline_stops_at_once() {
    // A newline is a byte token: its text settles with the next token, the stop does not wait.
    let said = "first\nsecond";
    let script = Script::saying(said);
    let heard = ask(&start(&script), stopping_at(&["\n"]));
    assert_eq!(
        (heard.text.as_str(), heard.matched_stop()),
        ("first", Some("\n"))
    );
    assert_eq!(
        heard.usage().completion_tokens,
        tokenizer().count("first\n")
    );
}

#[test]
fn a_stop_token_wins_over_text_that_is_held() {
    let engine = start(&Script::saying("wait for"));
    let heard = ask(&engine, stopping_at(&["for ever"]));
    assert_eq!(
        (heard.text.as_str(), heard.matched_stop()),
        ("wait for", None)
    );
}

#[test]
fn the_length_ends_an_answer_that_is_held() {
    let mut request = stopping_at(&["two three four"]);
    request.tokens_max = tokenizer().count("one two three");
    let heard = ask(&start(&Script::saying("one two three four")), request);
    assert_eq!(heard.text, "one two three");
    assert_eq!(heard.reason(), Some(Finish::Length));
}
