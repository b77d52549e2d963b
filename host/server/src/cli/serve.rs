//! `visor serve`: opens the house, binds the address, and stops in an orderly way.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Notify;

use super::signals::{Signals, obey};
use super::start::{config_source, open_house, start_log_beside};
use super::{EXIT_DONE, Failure, ServeArgs, progress};
use crate::Listeners;
use crate::config::Config;
use crate::http::connections::Listener;
use crate::http::tls;
use crate::wiring::House;

/// Open files beside connections: weights, plugins, watches, fetches.
#[cfg(unix)]
const FILES_BESIDE: u64 = 128;
/// Threads for sockets; exchanges run on blocking threads, the model on its own.
const SOCKET_THREADS: usize = 2;
/// How long a thread waits for its next request. What the allocator keeps for a thread is free only once that has ended.
const IDLE_THREADS: Duration = Duration::from_secs(1);
/// How long threads of requests that were given up may take to end.
const STRAGGLERS: Duration = Duration::from_secs(2);

pub(super) fn run(args: &ServeArgs) -> Result<u8, Failure> {
    let source = config_source(&args.overrides, args.listen.as_deref());
    let config = source.read().map_err(Failure::usage)?;
    let _log = start_log_beside(&config)?;
    #[cfg(unix)]
    raise_open_files(config.server.connections_max);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(SOCKET_THREADS)
        .thread_keep_alive(IDLE_THREADS)
        .max_blocking_threads(
            config
                .server
                .requests_in_flight_max
                .saturating_mul(2)
                .max(64),
        )
        .enable_all()
        .build()
        .map_err(Failure::start)?;
    // Bound before the model loads: a taken address is said at once, and probes get an answer.
    let listeners = runtime.block_on(bind(&config))?;
    // Not driven by the runtime: plugins are run, and what they ask of WASI blocks. What sends spans finds the runtime, though.
    let house = {
        let _entered = runtime.enter();
        open_house(config, Some(source))?
    };
    let served = runtime.block_on(async {
        greet(&house, &listeners)?;
        tell_when_ready(&house);
        let shutdown = stop_signal()?;
        crate::serve(listeners, Arc::clone(&house), shutdown).await;
        house.stop();
        Ok(EXIT_DONE)
    });
    // A request that was given up may be at something long; the process does not wait for it.
    runtime.shutdown_timeout(STRAGGLERS);
    served
}

/// Every connection is an open file, and many systems start a process with room for 1024 that may ask
/// for more.
#[cfg(unix)]
fn raise_open_files(connections_max: usize) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => raised,
        Err(_) => limit,
    };
    let wanted = connections_max as u64 + FILES_BESIDE;
    if let Some(files) = limit.current.filter(|files| *files < wanted) {
        tracing::warn!(
            files,
            connections_max,
            "the system allows fewer open files than server.connections_max needs"
        );
    }
}

async fn bind(config: &Config) -> Result<Listeners, Failure> {
    let tls = tls::acceptor(&config.server).map_err(Failure::start)?;
    let listen = async |address: &str, key: &str| {
        let tcp = TcpListener::bind(address).await.map_err(|error| {
            Failure::start(anyhow::anyhow!(
                "cannot listen on {address}: {error} (see {key})"
            ))
        })?;
        Ok::<_, Failure>(Listener {
            tcp,
            tls: tls.clone(),
        })
    };
    let api = listen(&config.server.listen, "--listen").await?;
    let admin = match config.admin.listen.as_str() {
        "" => None,
        address => Some(listen(address, "admin.listen").await?),
    };
    Ok(Listeners { api, admin })
}

/// The first lines: where, what, and a command to paste.
fn greet(house: &House, listeners: &Listeners) -> Result<(), Failure> {
    let address = listeners.api.tcp.local_addr().map_err(Failure::start)?;
    let scheme = listeners.api.tls.as_ref().map_or("http", |_| "https");
    progress::line(&format!("listening on {scheme}://{address}"));
    if let Some(admin) = &listeners.admin {
        let address = admin.tcp.local_addr().map_err(Failure::start)?;
        progress::line(&format!("administered at {scheme}://{address}"));
    }
    if !address.ip().is_loopback() && house.config().access.keys.is_empty() {
        tracing::warn!(
            %address,
            "everybody who can reach this address may ask: there are no keys in [access], and this is not loopback"
        );
    }
    let demo = if house.model_is_demo() {
        ": a small demo inside the binary that knows simple pictures; serve a real one with --model PATH"
    } else {
        ""
    };
    progress::line(&format!("model {}{demo}", house.model.id));
    for route in &house.wiring().routes {
        let plugins: Vec<String> = route
            .plugins()
            .map(|plugin| format!("{}@{}", plugin.id(), plugin.revision_short()))
            .collect();
        let prefix = &route.prefix;
        progress::line(&format!(
            "{prefix} is served by plugins {}",
            plugins.join(", ")
        ));
    }
    for error in house.plugin_errors() {
        progress::line(&format!(
            "plugin {} is not in use: {}",
            error.path.display(),
            error.message
        ));
    }
    if let Some(path) = house.find_path("POST", "/chat/completions") {
        progress::line(&format!(
            "try: curl {scheme}://{address}{path} -H 'Content-Type: application/json' \
             -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}],\"max_tokens\":16}}'"
        ));
    }
    Ok(())
}

/// Logs the end of loading; a model that cannot be loaded is said, and `/ready` goes on saying it.
fn tell_when_ready(house: &Arc<House>) {
    let house = Arc::clone(house);
    tokio::task::spawn_blocking(move || match house.wait_ready() {
        Ok(()) => progress::line(&format!("ready on {}", house.device_name())),
        Err(reason) => tracing::error!(%reason, "the model cannot be used"),
    });
}

/// Resolves at the first Ctrl-C, SIGTERM or SIGHUP; a second Ctrl-C or SIGTERM ends the process at once.
fn stop_signal() -> Result<impl Future<Output = ()>, Failure> {
    let first = Arc::new(Notify::new());
    let told = Arc::clone(&first);
    let signals = Signals::new().map_err(Failure::start)?;
    let stopping = "stopping: finishing what is in flight";
    tokio::spawn(obey(signals, stopping, move || told.notify_one()));
    Ok(async move { first.notified().await })
}
