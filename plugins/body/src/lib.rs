//! What request adapters share: a JSON body read field by field, so that every complaint names its
//! place, and moments as text. Nothing here knows a dialect or the host.

mod bindings;
mod field;
mod format;
mod picture;
mod time;
mod tools;
mod wrong;

pub use field::{Field, IsNeutral};
pub use format::{Format, verbatim};
pub use picture::{Picture, Place, is_url, lifted, sources};
pub use time::rfc3339;
pub use tools::{Choice, Names, Tool, Tools, check_name};
pub use wrong::{Kind, Wrong};
