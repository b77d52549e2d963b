//! The chat format of Phi-3.5-vision, but every user message ends with the word LOUD: a template
//! whose prompts differ from the shipped one's, for the tests that swap it under load.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

wit_bindgen::generate!({ world: "template-plugin", path: "../../wit" });

use exports::visor::plugin::lifecycle;
use exports::visor::plugin::template::{self, Prompt, Segment};
use visor::plugin::model::Handle;
use visor::plugin::template_input::Conversation;
use visor::plugin::types::{Error, Part, Role};

struct Loud;

#[cfg(target_arch = "wasm32")]
export!(Loud);

impl lifecycle::Guest for Loud {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "phi3-loud".to_owned(),
            version: "1".to_owned(),
            description: "the chat format of Phi-3.5-vision, louder".to_owned(),
            config_schema: None,
        }
    }

    fn configure(_config: String) -> Result<(), Vec<lifecycle::Issue>> {
        Ok(())
    }
}

impl template::Guest for Loud {
    fn render(conversation: &Conversation, _model: &Handle) -> Result<Prompt, Error> {
        let control = |token: &str| Segment::Control(token.to_owned());
        let mut segments = Vec::new();
        for message in conversation.messages() {
            let (token, word) = match message.role {
                Role::System => ("<|system|>", ""),
                Role::Assistant => ("<|assistant|>", ""),
                _ => ("<|user|>", "LOUD"),
            };
            segments.push(control(token));
            let mut text = "\n".to_owned();
            for part in message.parts {
                match part {
                    Part::Text(piece) => text.push_str(&piece),
                    Part::Image(index) => {
                        segments.push(Segment::Text(std::mem::replace(&mut text, "\n".to_owned())));
                        segments.push(Segment::Image(index));
                    }
                    _ => {}
                }
            }
            segments.extend([
                Segment::Text(text + word),
                control("<|end|>"),
                Segment::Text("\n".to_owned()),
            ]);
        }
        segments.push(control("<|assistant|>"));
        let stop_control = vec!["<|end|>".to_owned(), "<|endoftext|>".to_owned()];
        Ok(Prompt {
            segments,
            stop: Vec::new(),
            stop_control,
            prefill: None,
            calls: None,
            extensions: Vec::new(),
        })
    }
}
