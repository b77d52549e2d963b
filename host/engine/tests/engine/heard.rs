//! What a client of the engine hears.

use visor_engine::{
    Engine, EngineError, Event, EventReceiver, Finish, GenerateRequest, TokenInfo, Usage,
};

use crate::scripted::PATIENCE;

/// Everything a client got.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) started: bool,
    pub(crate) text: String,
    pub(crate) deltas: Vec<String>,
    pub(crate) infos: Vec<TokenInfo>,
    pub(crate) end: End,
}

#[derive(Debug)]
pub(crate) enum End {
    Finished {
        reason: Finish,
        matched_stop: Option<String>,
        usage: Usage,
    },
    Failed(EngineError),
}

impl Heard {
    pub(crate) fn reason(&self) -> Option<Finish> {
        match &self.end {
            End::Finished { reason, .. } => Some(*reason),
            End::Failed(_) => None,
        }
    }

    pub(crate) fn matched_stop(&self) -> Option<&str> {
        match &self.end {
            End::Finished { matched_stop, .. } => matched_stop.as_deref(),
            End::Failed(_) => None,
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        match &self.end {
            End::Finished { usage, .. } => *usage,
            End::Failed(error) => panic!("failed: {error}"),
        }
    }

    pub(crate) fn error(&self) -> &EngineError {
        match &self.end {
            End::Failed(error) => error,
            end => panic!("not failed: {end:?}"),
        }
    }
}

/// Reads a request to its end and checks the order of its events.
pub(crate) fn hear(events: &EventReceiver) -> Heard {
    let (mut started, mut deltas, mut delta_tokens) = (false, Vec::new(), 0);
    let mut infos = Vec::new();
    let end = loop {
        match events.recv_timeout(PATIENCE).expect("an event") {
            Event::Started { .. } => {
                assert!(
                    !started && deltas.is_empty(),
                    "Started comes once and first"
                );
                started = true;
            }
            Event::Delta {
                text,
                tokens,
                infos: more,
            } => {
                assert!(started, "a delta before Started");
                assert!(!text.is_empty(), "an empty delta");
                delta_tokens += tokens;
                deltas.push(text);
                infos.extend(more);
            }
            Event::Finished {
                reason,
                matched_stop,
                usage,
                ..
            } => {
                assert!(delta_tokens <= usage.completion_tokens);
                break End::Finished {
                    reason,
                    matched_stop,
                    usage,
                };
            }
            Event::Failed(error) => break End::Failed(error),
        }
    };
    assert!(
        events.recv().is_none(),
        "something behind the terminal event"
    );
    Heard {
        started,
        text: deltas.concat(),
        deltas,
        infos,
        end,
    }
}

/// All at once, in order.
pub(crate) fn submit_all(engine: &Engine, requests: &[GenerateRequest]) -> Vec<EventReceiver> {
    let submit = |request: &GenerateRequest| engine.submit(request.clone()).expect("admitted");
    requests.iter().map(submit).collect()
}

pub(crate) fn ask(engine: &Engine, request: GenerateRequest) -> Heard {
    hear(&engine.submit(request).expect("admitted"))
}
