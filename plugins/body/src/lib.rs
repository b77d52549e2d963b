//! What request adapters share: a JSON body read field by field, so that every complaint names its
//! place. Nothing here knows a dialect or the host.

mod bindings;
mod field;
mod format;
mod picture;
mod tools;
mod wrong;

pub use field::{Field, IsNeutral};
pub use format::{Format, verbatim};
pub use picture::{Picture, Place, is_url, lifted, sources};
pub use tools::{Choice, Tool, Tools, check_name};
pub use wrong::{Kind, Wrong};
