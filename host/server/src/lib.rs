//! The visor server as a library: `serve` is what `main` and the tests call.
//!
//! Rooms, in the order a request meets them: `http` (routes, body, error), `pipeline` (READ THIS FIRST),
//! `blobs`, `images`, `formats`, `calls`, `services`; and what stands around them: `config`, `wiring`, `strategy`, `metrics`,
//! `stats`, `telemetry`, `cli`, and `eval`, which judges the answers.

pub mod blobs;
pub mod calls;
pub mod cli;
pub mod config;
pub mod eval;
pub mod formats;
pub mod http;
pub mod images;
pub mod metrics;
pub mod pipeline;
pub mod services;
pub mod stats;
pub mod strategy;
pub mod telemetry;
pub mod wiring;

use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;

use http::connections::Listener;
use http::gate::Gate;
use wiring::House;

/// Where a server is reached.
pub struct Listeners {
    /// By clients.
    pub api: Listener,
    /// By whoever runs it; none is nowhere.
    pub admin: Option<Listener>,
}

/// Serves until `shutdown` resolves, then drains: refuses new work, finishes what is in flight within
/// `server.drain_s`, and returns.
pub async fn serve(listeners: Listeners, house: Arc<House>, shutdown: impl Future<Output = ()>) {
    // Ends with this function: it is of use for as long as requests are.
    let _admin = listeners.admin.map(|admin| {
        let administering = http::connections::administer(admin, Arc::clone(&house));
        AbortOnDropHandle::new(tokio::spawn(administering))
    });
    let gate = Arc::new(Gate::default());
    http::connections::run(listeners.api, house, gate, shutdown).await;
}
