//! Texts that the host writes.

use super::*;

/// Has told that it began.
fn begun(mut reply: Reply) -> Reply {
    reply.advance(vec![Event::Started((0, USAGE))]).unwrap();
    reply
}

#[test]
fn a_frame_gives_what_is_written_for_a_text() {
    for shape in [Shape::Chat, Shape::Completion] {
        let mut reply = reply_of(shape, 1, true, true);
        reply.model = r#"m"content":"","text":"""#.to_owned();
        let mut reply = begun(reply);
        let first = reply.advance(vec![delta("Hé")]).unwrap();
        let frame = first.frame.expect("nothing is told beside the text");
        for text in ["", "llo", "\"quoted\"\\\n\u{1}\u{2028}😀"] {
            let written = reply.advance(vec![delta(text)]).unwrap().bytes;
            let text = serde_json::to_vec(text).unwrap();
            assert_eq!(written, [&frame.before[..], &text, &frame.after].concat());
        }
    }
}

#[test]
fn an_answer_does_not_change_when_texts_are_written_in_the_frame() {
    for end in [finish(FinishReason::Length), Event::Failed((0, failure()))] {
        let ends = || vec![end.clone(), done()];
        let mut told = begun(reply(true, true));
        let mut bytes = told.advance(vec![delta("a"), delta("b")]).unwrap().bytes;
        bytes.extend(told.advance(ends()).unwrap().bytes);
        let mut framed = begun(reply(true, true));
        let Progress {
            bytes: mut written,
            frame,
            ..
        } = framed.advance(vec![delta("a")]).unwrap();
        let frame = frame.expect("nothing is told beside the text");
        written.extend([&frame.before[..], b"\"b\"", &frame.after].concat());
        written.extend(framed.advance(ends()).unwrap().bytes);
        assert_eq!(written, bytes);
    }
}

#[test]
fn there_is_no_frame_for_what_is_more_than_text() {
    let frame = |mut reply: Reply, events| reply.advance(events).unwrap().frame;
    let not_begun = reply(true, false);
    assert!(frame(not_begun, vec![delta("a")]).is_none(), "who speaks");
    let of = |choices, stream| begun(reply_of(Shape::Chat, choices, stream, false));
    assert!(frame(of(1, true), vec![delta("a")]).is_some());
    let two = vec![delta("a"), delta("b")];
    assert!(frame(of(1, true), two).is_none(), "two texts");
    assert!(frame(of(1, false), vec![delta("a")]).is_none(), "one piece");
    assert!(
        frame(of(2, true), vec![delta("a")]).is_none(),
        "two choices"
    );
    let mut telling = of(1, true);
    telling.logprobs = true;
    assert!(frame(telling, vec![delta("a")]).is_none(), "tokens");
    let events = vec![delta("a"), finish(FinishReason::Stop), done()];
    assert!(frame(of(1, true), events).is_none(), "it is over");
}
