//! One request through the rooms, in order. READ THIS FIRST.
//!
//! ```text
//! http ─▶ request: lift the bulk out of the body
//!      ─▶ adapter.start ─▶ respond: written, done
//!                       └▶ generate, for each: vision (decode, image policy) ─▶ prompt (template,
//!                          tokenize) ─▶ plan (count) ─▶ cached (scope, whole answers) ─▶ vision (crops)
//!                          ─▶ engine ─▶ drive: events ─▶ adapter.advance or frame ─▶ output ─▶ http
//! ```
//!
//! An exchange runs on one thread of its own, top to bottom. It is pinned to one revision of the
//! configuration and of every plugin before anything is read, so a reload never changes a request
//! halfway. Nothing is sent before everything that can be refused was: the head goes out with the
//! first bytes of the answer, and a failure before it has the proper status.

mod cached;
mod cancel;
mod drive;
mod failure;
mod frame;
mod generate;
mod output;
mod plan;
mod prompt;
mod record;
mod reply;
mod request;
mod restore;
mod shown;
mod told;
mod vision;
mod work;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use visor_engine::EngineState;
use visor_sandbox::{ErrorCode, Step};

pub use cached::Answer;
pub use cancel::CancelOnDrop;
pub use failure::Failure;
pub use record::{Outcome, RequestRecord, Stage, StageTimes, TokenTotals};
pub use reply::{Piece, Reply, ReplyBody, ReplyHead, ReplyReceiver, SendError};
pub use work::{Call, Incoming};

use crate::http::error;
use crate::wiring::{House, Pinned};
use restore::Restorer;
use shown::Shown;
use work::{Stop, Trace, Work};

/// Status noted for a client that left before a head was sent; never on the wire.
const STATUS_CLIENT_LEFT: u16 = 499;
/// Seconds after which a client that came too early may come back.
const LOADING_RETRY_AFTER_S: u32 = 5;

/// Serves one request from its body to the last byte of its answer.
pub fn run(call: Call, body: Bytes, mut reply: Reply) {
    let in_flight = call.house.metrics.in_flight();
    let mut work = Work::new(call);
    // A panic in one request ends that request. What it leaves half done is dropped with it.
    let served = catch_unwind(AssertUnwindSafe(|| serve(&mut work, &mut reply, body)));
    let ended = served.unwrap_or_else(|_| {
        tracing::error!(request = %Shown(&work.call.incoming.id), "an exchange panicked");
        Err(Failure::internal().into())
    });
    finish(work, reply, ended);
    drop(in_flight);
}

/// Answers with an error, in the words of the adapter.
pub fn reject(call: Call, failure: Failure, reply: Reply) {
    finish(Work::new(call), reply, Err(failure.into()));
}

/// Notes a refusal that the HTTP side answered by itself.
pub fn record_refusal(house: &House, pinned: &Pinned, incoming: &Incoming, failure: &Failure) {
    let status = error::status_of(failure);
    note(
        house,
        pinned,
        incoming,
        Ended {
            status,
            outcome: failure.outcome,
        },
        Trace::default(),
    );
}

/// Names and revisions of everything a request is served with, as `x-visor-plugins` tells them.
pub fn plugins_header(pinned: &Pinned) -> String {
    let roles = [
        ("adapter", Some(&pinned.adapter)),
        ("template", Some(&pinned.template)),
        ("image-policy", Some(&pinned.image_policy)),
        ("cache-strategy", pinned.cache_plugin.as_ref()),
    ];
    let named = roles.into_iter().filter_map(|(role, plugin)| {
        let plugin = plugin?;
        Some(format!(
            "{role}={}@{}",
            plugin.id(),
            plugin.revision_short()
        ))
    });
    named.collect::<Vec<_>>().join(", ")
}

fn serve(work: &mut Work, reply: &mut Reply, body: Bytes) -> Result<(), Stop> {
    work.check()?;
    check_loaded(work)?;
    let config = Arc::clone(&work.call.pinned.config);
    let request = request::build(&work.call.incoming, body, &config.server)?;
    work.restorer = Restorer::new(Arc::clone(&request.lifted));
    let began = Instant::now();
    let started = work.call.pinned.adapter.start(request);
    work.trace.stages.add(Stage::Adapter, began.elapsed());
    let (exchange, step) = started.map_err(Failure::from)?;
    match step {
        Step::Respond(mut response) => {
            let is_json = restore::is_json(&response.headers);
            response.body = work.restorer.answer(response.body, is_json)?;
            output::whole(work, reply, response)
        }
        Step::Generate(head, generations) => drive::run(work, reply, exchange, (head, generations)),
    }
}

/// Nothing is served before the model is there: a list of models is a promise too.
fn check_loaded(work: &Work) -> Result<(), Failure> {
    match work.call.house.engine.state() {
        EngineState::Ready { .. } => Ok(()),
        EngineState::Loading => {
            let failure = Failure::new(ErrorCode::Overloaded, "the model is still loading");
            Err(failure.retry_after(LOADING_RETRY_AFTER_S))
        }
        EngineState::Failed(_) => Err(Failure::new(
            ErrorCode::Internal,
            "the model could not be loaded; the server's log has the reason",
        )),
        EngineState::Stopped => Err(Failure::new(
            ErrorCode::Overloaded,
            "the server is stopping",
        )),
    }
}

/// Tells the client how it ended, if anybody is there, and writes the record.
fn finish(mut work: Work, mut reply: Reply, ended: Result<(), Stop>) {
    let outcome = match ended {
        Ok(()) => work.trace.failed.unwrap_or(Outcome::Ok),
        Err(Stop::Gone) => Outcome::Aborted,
        Err(Stop::Failed(mut failure)) => {
            work.restorer.error(&mut failure.error);
            // Other generations of this exchange have nobody left to talk to.
            work.call.cancel.cancel();
            match tell(&mut work, &mut reply, &failure) {
                Ok(()) => failure.outcome,
                Err(SendError::Gone) => Outcome::Aborted,
                Err(SendError::Slow) => failure.outcome,
            }
        }
    };
    work.trace.stages.add(Stage::Stream, reply.waited());
    let status = reply.status().unwrap_or(STATUS_CLIENT_LEFT);
    let Call {
        house,
        pinned,
        incoming,
        ..
    } = &work.call;
    note(
        house,
        pinned,
        incoming,
        Ended { status, outcome },
        work.trace,
    );
}

/// Renders a failure in the client's dialect, by a fresh instance; in the host's own words where
/// that one fails too.
fn tell(work: &mut Work, reply: &mut Reply, failure: &Failure) -> Result<(), SendError> {
    let mid_stream = reply.head_sent();
    let began = Instant::now();
    let rendered = work
        .call
        .pinned
        .adapter
        .render_error(&failure.error, mid_stream);
    work.trace.stages.add(Stage::Adapter, began.elapsed());
    let response =
        rendered.map_err(|fault| tracing::error!(%fault, "an error was rendered by the host"));
    let deadline = Instant::now() + output::LAST_WORDS;
    if mid_stream {
        let body = response.map_or_else(
            |()| error::fallback_event(failure),
            |response| response.body,
        );
        reply.send_bytes(Bytes::from(body), deadline)?;
        return reply.end(deadline);
    }
    let response = response.map_or_else(
        |()| error::fallback_response(failure),
        |response| error::completed(response, failure),
    );
    reply.send_head(ReplyHead {
        status: response.status,
        headers: response.headers,
        body: ReplyBody::Whole(Bytes::from(response.body)),
    })
}

/// How an exchange ended.
struct Ended {
    status: u16,
    outcome: Outcome,
}

fn note(house: &House, pinned: &Pinned, incoming: &Incoming, ended: Ended, trace: Trace) {
    let Ended { status, outcome } = ended;
    let micros = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let record = RequestRecord {
        prefix: pinned.prefix.clone(),
        status,
        outcome,
        incremental: trace.incremental,
        tokens: trace.tokens,
        finishes: trace.finishes,
        response_cached: trace.response_cached,
        images: trace.images,
        stages: trace.stages,
        first_text_us: trace.first_text.map(micros),
        total_us: micros(incoming.accepted.elapsed()),
    };
    tracing::info!(
        request = %Shown(&incoming.id),
        method = %Shown(&incoming.method),
        path = %Shown(&incoming.full_path),
        principal = incoming.principal,
        traceparent = incoming.traceparent,
        status,
        outcome = outcome.as_str(),
        ms = record.total_us / 1000,
        prompt_tokens = record.tokens.prompt,
        completion_tokens = record.tokens.completion,
        "served"
    );
    if let Some(telemetry) = &house.telemetry {
        telemetry.tell(incoming, &record);
    }
    house.metrics.record(&record);
}
