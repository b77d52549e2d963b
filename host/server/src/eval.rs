//! Judging a model, a template or an image policy by its answers: a suite of pictures with questions
//! and accepted answers, and what became of them under one configuration or two.
//!
//! Rooms, in the order of a run: `suite` (a folder, checked), `case` (one line of it), `verdict` (an
//! answer against what is accepted), `score` (verdicts to figures), then `table` and `page` for people.
//! Nothing here asks a question: `cli/eval.rs` does, through the server's own path. The format is told in
//! `tests/suite/README.md`.

pub mod case;
pub mod page;
pub mod score;
pub mod suite;
pub mod table;
pub mod verdict;

pub use case::{Case, Turn};
pub use score::{Evaluation, Floor, Outcome, Run, Setup, Verdict};
pub use suite::{Suite, SuiteError};
pub use verdict::Rule;
