//! Sockets, paths, headers and bodies. The only rooms that know axum, and they know nothing else:
//! what an exchange does is `pipeline`'s.

pub mod admin;
mod allowance;
pub mod arrivals;
pub mod body;
pub mod connections;
mod cors;
pub mod error;
pub mod form;
pub mod gate;
mod head;
mod in_place;
pub mod keys;
mod openapi;
mod page;
pub mod paths;
mod patience;
pub mod routes;
pub mod strangers;
pub mod tls;
mod trace;
