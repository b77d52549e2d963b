//! Cancelling when the client leaves: whoever holds the connection holds one of these.

use visor_engine::CancelToken;

/// Cancels a token when dropped, unless the work was done by then.
#[derive(Debug)]
pub struct CancelOnDrop(Option<CancelToken>);

impl CancelOnDrop {
    /// Watches over a token.
    pub fn new(token: CancelToken) -> Self {
        Self(Some(token))
    }

    /// The work is done: nothing is left to cancel.
    pub fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(token) = &self.0 {
            token.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_cancels_and_disarming_does_not() {
        let (left, done) = (CancelToken::default(), CancelToken::default());
        drop(CancelOnDrop::new(left.clone()));
        CancelOnDrop::new(done.clone()).disarm();
        assert!(left.is_cancelled() && !done.is_cancelled());
    }
}
