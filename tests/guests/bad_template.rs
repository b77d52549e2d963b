//! A template that misbehaves when told to; see `misdeeds.rs`. Main function: `render`.
//!
//! Left alone, it writes all text and images in order, without control tokens. Deeds of its own:
//! `lie` (an image that is not there), `lose` (no image at all), `twice` (every image twice),
//! `control` (a control token the model does not have), `huge` (8 MiB of text), `flood` (the log),
//! `handles`.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

use visor_test_guests::{configure, deed, huge_string, main_deed};

wit_bindgen::generate!({ world: "template-plugin", path: "../../wit" });

use exports::visor::plugin::lifecycle;
use exports::visor::plugin::template::{self, Prompt, Segment};
use visor::plugin::model::Handle;
use visor::plugin::template_input::Conversation;
use visor::plugin::types::{Error, Part};
use visor::plugin::{log, model};

struct Bad;

#[cfg(target_arch = "wasm32")]
export!(Bad);

impl lifecycle::Guest for Bad {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "bad-template".to_owned(),
            version: "1".to_owned(),
            description: "misbehaves when told to".to_owned(),
            config_schema: None,
        }
    }

    fn configure(config: String) -> Result<(), Vec<lifecycle::Issue>> {
        configure(&config);
        deed("configure");
        Ok(())
    }
}

impl template::Guest for Bad {
    fn render(conversation: &Conversation, _model: &Handle) -> Result<Prompt, Error> {
        let messages = conversation.messages();
        let parts: Vec<Part> = messages
            .into_iter()
            .flat_map(|message| message.parts)
            .collect();
        let text = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            _ => String::new(),
        };
        let deed = main_deed("render", &parts.iter().map(text).collect::<String>());
        let mut segments = vec![Segment::Text("\n".to_owned())];
        for part in parts {
            match part {
                Part::Text(text) => segments.push(Segment::Text(text)),
                Part::Image(index) if deed == "twice" => {
                    segments.extend([Segment::Image(index), Segment::Image(index)])
                }
                Part::Image(index) if deed != "lose" => segments.push(Segment::Image(index)),
                _ => {}
            }
        }
        match deed.as_str() {
            "lie" => segments.push(Segment::Image(conversation.image_count() + 7)),
            "control" => segments.push(Segment::Control("<|no such token|>".to_owned())),
            "huge" => segments.push(Segment::Text(huge_string())),
            "flood" => {
                (0..2_000).for_each(|_| log::emit(log::Level::Error, &"flood ".repeat(2_000), &[]))
            }
            "handles" => loop {
                std::mem::forget(model::available());
            },
            _ => {}
        }
        Ok(Prompt {
            segments,
            stop: Vec::new(),
            stop_control: Vec::new(),
            prefill: None,
            calls: None,
            extensions: Vec::new(),
        })
    }
}
