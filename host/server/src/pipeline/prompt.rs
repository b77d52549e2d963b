//! From messages to token ids: the template decides, the tokenizer carries out.

use std::sync::Arc;
use std::time::Instant;

use visor_model::{Prompt, PromptPart};
use visor_sandbox::{
    CallSyntax, Conversation, Extensions, Input, Message, ModelFacts, Part, PromptSegments,
    Segment, ToolSpec,
};

use super::failure::Failure;
use super::record::Stage;
use super::work::{Stop, Work};

/// A prompt ready for the model, and what ends its answer.
#[derive(Debug)]
pub(super) struct Rendered {
    /// Token ids and image slots.
    pub prompt: Prompt,
    /// Strings of the template that end the output.
    pub stop_strings: Vec<String>,
    /// Tokens that end the output: the model's own and the template's.
    pub stop_ids: Vec<u32>,
    /// Text the answer begins with.
    pub prefill: Option<String>,
    /// How tool calls are written.
    pub calls: Option<CallSyntax>,
    /// Whether the prompt ends with text that the answer goes on with.
    pub continues: bool,
}

/// Tokens of all the text in an input: the least a prompt made of it can take. The parts of a
/// message are counted as one text, for a template may join them. More than `tokens_max` are not
/// counted to the end: megabytes take gigabytes to be taken apart.
pub(super) fn text_tokens(work: &Work, input: &Input, tokens_max: u32) -> u32 {
    let tokenizer = &work.call.house.model.tokenizer;
    let bytes = match input {
        Input::Text(text) => text.len(),
        Input::Chat(messages) => messages.iter().flat_map(texts).map(str::len).sum(),
    };
    let least = tokenizer.count_least(bytes);
    if least > tokens_max {
        return least;
    }
    match input {
        Input::Text(text) => tokenizer.count(text),
        Input::Chat(messages) => {
            let count = |message: &Message| tokenizer.count(&texts(message).collect::<String>());
            messages.iter().map(count).fold(0, u32::saturating_add)
        }
    }
}

fn texts(message: &Message) -> impl Iterator<Item = &str> {
    message.parts.iter().filter_map(|part| match part {
        Part::Text(text) => Some(text.as_str()),
        Part::Image(_) | Part::ToolCall(_) | Part::ToolResult { .. } => None,
    })
}

/// What the template is asked to render.
#[derive(Clone)]
pub(super) struct Task {
    /// Messages, or text to be used as it is.
    pub input: Input,
    /// Tools the model may call.
    pub tools: Vec<ToolSpec>,
    /// Prompt tokens of each picture.
    pub image_tokens: Vec<u32>,
    /// Tokens the prompt may take.
    pub budget_tokens: u32,
    /// Hints of the adapter.
    pub extensions: Extensions,
}

/// Renders and tokenizes.
pub(super) fn render(work: &mut Work, task: Task) -> Result<Rendered, Stop> {
    let began = Instant::now();
    let rendered = render_untimed(work, task);
    work.trace.stages.add(Stage::Template, began.elapsed());
    rendered
}

fn render_untimed(work: &Work, task: Task) -> Result<Rendered, Stop> {
    let template = &work.call.pinned.template;
    let model = &work.call.house.model;
    let image_tokens = task.image_tokens.clone();
    let is_text = matches!(task.input, Input::Text(_));
    let segments = match task.input {
        Input::Text(text) => as_it_is(text, image_tokens.len()),
        Input::Chat(messages) => template
            .render(conversation(
                work,
                messages,
                task.tools,
                task.budget_tokens,
                (task.image_tokens, task.extensions),
            ))
            .map_err(Failure::from)?,
    };
    check_images(&segments.segments, image_tokens.len())
        .map_err(|what| Failure::nonsense(template.id(), &what))?;
    let mut parts: Vec<PromptPart> = segments
        .segments
        .into_iter()
        .filter_map(|segment| part(segment, &image_tokens))
        .collect();
    if let Some(prefill) = &segments.prefill {
        parts.push(PromptPart::Text(prefill.clone()));
    }
    let prompt = model
        .tokenizer
        .assemble(&parts)
        .map_err(|error| Failure::nonsense(template.id(), &error.to_string()))?;
    let template_stops = segments
        .stop_control
        .iter()
        .filter_map(|name| model.tokenizer.control_token(name));
    let mut stop_ids: Vec<u32> = model
        .stop_ids
        .iter()
        .copied()
        .chain(template_stops)
        .collect();
    stop_ids.sort_unstable();
    stop_ids.dedup();
    let stop_strings = segments
        .stop
        .into_iter()
        .filter(|stop| !stop.is_empty())
        .collect();
    Ok(Rendered {
        prompt,
        stop_strings,
        stop_ids,
        continues: is_text || segments.prefill.is_some(),
        prefill: segments.prefill,
        calls: segments.calls,
    })
}

fn conversation(
    work: &Work,
    messages: Vec<Message>,
    tools: Vec<ToolSpec>,
    budget_tokens: u32,
    (image_tokens, extensions): (Vec<u32>, Extensions),
) -> Conversation {
    Conversation {
        messages,
        tools,
        image_tokens,
        budget_tokens,
        open_turn: true,
        extensions,
        model: Arc::clone(&work.call.house.model) as Arc<dyn ModelFacts>,
        request_id: work.call.incoming.id.clone(),
    }
}

/// A text that goes past the template: its pictures in order, then the text.
fn as_it_is(text: String, image_count: usize) -> PromptSegments {
    let images = (0..image_count)
        .filter_map(|index| u32::try_from(index).ok())
        .map(Segment::Image);
    PromptSegments {
        segments: images.chain([Segment::Text(text)]).collect(),
        stop: Vec::new(),
        stop_control: Vec::new(),
        prefill: None,
        calls: None,
        extensions: Vec::new(),
    }
}

/// Every picture stands in the prompt exactly once: one left out is an answer made up.
fn check_images(segments: &[Segment], image_count: usize) -> Result<(), String> {
    let mut times = vec![0_u32; image_count];
    for segment in segments {
        if let Segment::Image(index) = segment {
            let slot = times.get_mut(*index as usize);
            *slot.ok_or_else(|| format!("image {index} of {image_count} in the prompt"))? += 1;
        }
    }
    match times.iter().position(|times| *times != 1) {
        Some(index) => Err(format!(
            "image {index} stands {} times in the prompt",
            times[index]
        )),
        None => Ok(()),
    }
}

fn part(segment: Segment, image_tokens: &[u32]) -> Option<PromptPart> {
    match segment {
        Segment::Text(text) => Some(PromptPart::Text(text)),
        Segment::Control(name) => Some(PromptPart::Control(name)),
        Segment::Image(index) => {
            let tokens = image_tokens.get(index as usize).copied()?;
            Some(PromptPart::Image { index, tokens })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_picture_has_to_stand_in_the_prompt_exactly_once() {
        let image = Segment::Image;
        assert_eq!(check_images(&[image(1), image(0)], 2), Ok(()));
        for (segments, says) in [
            (vec![image(0)], "image 1 stands 0 times"),
            (vec![image(0), image(1), image(0)], "image 0 stands 2 times"),
            (vec![image(0), image(1), image(2)], "image 2 of 2"),
        ] {
            let message = check_images(&segments, 2).expect_err(says);
            assert!(message.contains(says), "{message}");
        }
    }

    /// What the real processor made of the real prompt, with a picture of 757 tokens in front.
    #[test]
    fn the_shipped_template_makes_the_real_models_ids() {
        let path = "/../../tests/golden/real/phi3_5-vision-instruct.json";
        let text = std::fs::read(format!("{}{path}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let golden: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let want: Vec<i64> = serde_json::from_value(golden["input_ids"].clone()).unwrap();

        let options = crate::wiring::HouseOptions {
            source: None,
            cache_folder: None,
            progress: Box::new(|_| {}),
        };
        let mut config = crate::config::Config::default();
        let golden = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/golden/ckpt_mha_int4"
        );
        config.model.path = golden.into();
        let house = crate::wiring::House::open(config, options).expect("the defaults open");
        let pinned = house
            .pin("/v1/chat/completions")
            .expect("the default route");
        let question = Part::Text("What is shown in this image?".to_owned());
        let conversation = Conversation {
            // The picture comes after the text, as many clients send it; the template moves it.
            messages: vec![Message {
                role: visor_sandbox::ChatRole::User,
                parts: vec![question, Part::Image(0)],
            }],
            tools: Vec::new(),
            image_tokens: vec![757],
            budget_tokens: 4096,
            open_turn: true,
            extensions: Vec::new(),
            model: Arc::clone(&house.model) as Arc<dyn ModelFacts>,
            request_id: "test".to_owned(),
        };
        let segments = pinned.template.render(conversation).unwrap().segments;
        let parts = segments.into_iter().filter_map(|s| part(s, &[757]));
        let parts: Vec<PromptPart> = parts.collect();
        let prompt = house.model.tokenizer.assemble(&parts).unwrap();
        assert_eq!((prompt.ids, prompt.image_tokens), (want, 757));
    }
}
