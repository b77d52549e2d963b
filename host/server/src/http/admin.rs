//! What whoever runs the server may do, on a listener of its own: look, reload, step aside, forget.
//!
//! Nothing here can be reached from the address that clients have.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response, StatusCode, header};
use axum::middleware::{self, Next};
use axum::routing::{get, post};
use serde_json::json;

use super::cors::asks_this_machine;
use super::error;
use super::routes::{json, whole};
use crate::wiring::House;

#[derive(Clone)]
struct Admin {
    house: Arc<House>,
    /// Whether only this machine reaches the listener.
    local: bool,
}

/// Every path of the admin listener.
pub fn router(house: Arc<House>, local: bool) -> Router {
    let admin = Admin { house, local };
    Router::new()
        .route("/plugins", get(plugins))
        .route("/reload", post(reload))
        .route("/drain", post(step_aside).delete(step_back))
        .route("/caches/reset", post(forget))
        .layer(middleware::from_fn_with_state(admin.clone(), guard))
        .with_state(admin)
}

/// Keeps out web pages and whoever has no key.
async fn guard(State(admin): State<Admin>, request: Request<Body>, next: Next) -> Response<Body> {
    let headers = request.headers();
    // A page anywhere can make a browser on this machine ask; it can neither leave its origin out
    // nor, when its own name resolves to loopback, choose the host.
    if headers.contains_key(header::ORIGIN) || (admin.local && !asks_this_machine(headers)) {
        return forbidden("web pages may not administer a server");
    }
    let wiring = admin.house.wiring();
    match wiring.keys.may_administer(headers, admin.local) {
        Ok(true) => next.run(request).await,
        Ok(false) => forbidden("this key may not administer: only one with admin = true does"),
        Err(failure) => whole(error::fallback_response(&failure)),
    }
}

/// For who is known and may not, or is no program: another try with a key would end the same.
fn forbidden(message: &str) -> Response<Body> {
    json(
        StatusCode::FORBIDDEN,
        &json!({ "error": { "message": message } }),
    )
}

/// What is in service, by file and revision, and what is not and why.
async fn plugins(State(admin): State<Admin>) -> Response<Body> {
    json(StatusCode::OK, &admin.house.admin_json())
}

/// Reads the configuration and the plugin folder again; answers when what is there is in force or refused.
async fn reload(State(admin): State<Admin>) -> Response<Body> {
    let house = Arc::clone(&admin.house);
    let looked = tokio::task::spawn_blocking(move || house.look_again()).await;
    match looked {
        Ok(()) => json(StatusCode::OK, &admin.house.admin_json()),
        Err(_) => whole(error::fallback_response(
            &crate::pipeline::Failure::internal(),
        )),
    }
}

/// From here on `/ready` says no and everything is served on, so that a balancer can turn away first.
async fn step_aside(State(admin): State<Admin>) -> Response<Body> {
    admin.house.step_aside(true);
    json(
        StatusCode::OK,
        &json!({ "ready": admin.house.ready().is_ok() }),
    )
}

async fn step_back(State(admin): State<Admin>) -> Response<Body> {
    admin.house.step_aside(false);
    json(
        StatusCode::OK,
        &json!({ "ready": admin.house.ready().is_ok() }),
    )
}

/// Empties every cache: what is asked next is computed anew.
async fn forget(State(admin): State<Admin>) -> Response<Body> {
    admin.house.forget();
    json(StatusCode::OK, &admin.house.admin_json()["caches"])
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderMap;

    use super::*;

    #[test]
    fn only_names_of_this_machine_are_asked_without_a_key() {
        let ask = |host: &'static str| {
            let pair = (header::HOST, header::HeaderValue::from_static(host));
            asks_this_machine(&HeaderMap::from_iter([pair]))
        };
        assert!(asks_this_machine(&HeaderMap::new()));
        for own in [
            "localhost",
            "localhost:9",
            "127.0.0.1:9",
            "127.0.0.2",
            "[::1]:9",
            "LOCALHOST",
            "app.localhost:9",
            "host.docker.internal:9",
            "0.0.0.0:9",
            "192.168.1.5",
            "[fd00::1]:9",
        ] {
            assert!(ask(own), "{own}");
        }
        for other in [
            "evil.example:9",
            "localhost.evil.example",
            "internal.evil.example",
            "evilinternal",
            "93.184.215.14",
            "[::2]",
            "",
            "a b",
        ] {
            assert!(!ask(other), "{other}");
        }
    }
}
