//! What a stranger is told, who has no key or may not ask: in the dialect they speak, and at no cost.
//!
//! The adapter renders it, for a client of its dialect understands nothing else. That is safe before anybody is authenticated:
//! it is asked for the words of one of a few errors, which are ours, and sees nothing of the request. So they are the same for
//! everybody and are kept for as long as the adapter runs; only the first stranger costs a call into a guest.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use visor_sandbox::{Plugin, Response};

use super::error;
use crate::pipeline::Failure;

/// The answers of one adapter, by the message of the error. There are as many as `keys` and `cors` have reasons.
#[derive(Debug, Default)]
pub struct Strangers(Mutex<BTreeMap<String, Response>>);

impl Strangers {
    /// The answer, if it was rendered before.
    pub fn known(&self, failure: &Failure) -> Option<Response> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&failure.error.message).cloned()
    }

    /// Has the answer rendered and keeps it; blocks while the adapter runs. One that fails has had its chance.
    pub fn render(&self, adapter: &Plugin, failure: &Failure) -> Response {
        let response = match adapter.render_error(&failure.error, false) {
            Ok(response) => error::completed(response, failure),
            Err(fault) => {
                tracing::error!(%fault, "an error was rendered by the host");
                error::fallback_response(failure)
            }
        };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(failure.error.message.clone(), response.clone());
        response
    }
}
