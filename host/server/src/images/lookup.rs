//! Addresses of names, without letting slow names hold up anything else.
//!
//! The system's resolver blocks, and nothing ends it early: whoever stops waiting leaves a thread
//! behind until the last name server has been given up. These threads are counted and nobody else's,
//! so that a client who names many slow hosts takes no thread from an exchange.

use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};

/// Finds the addresses of a name; may block for as long as it likes.
type Resolve = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

/// The way from names to addresses.
pub(super) struct Names {
    resolve: Arc<Resolve>,
    /// One for each look-up under way; given back when the resolver answers, not when nobody waits.
    places: Arc<Semaphore>,
}

impl Names {
    /// Names as the system knows them, at most `lookups_max` looked up at once.
    pub(super) fn system(lookups_max: usize) -> Self {
        Self::new(lookups_max, |name| {
            Ok((name, 0)
                .to_socket_addrs()?
                .map(|found| found.ip())
                .collect())
        })
    }

    /// As [`Self::system`], with another resolver.
    pub(super) fn new(
        lookups_max: usize,
        resolve: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            resolve: Arc::new(resolve),
            places: Arc::new(Semaphore::new(lookups_max)),
        }
    }

    /// Every address of a name.
    ///
    /// # Errors
    /// The name is not known, or that was not found out within `patience`.
    pub(super) async fn addresses(
        &self,
        name: &str,
        patience: Duration,
    ) -> io::Result<Vec<IpAddr>> {
        let found = tokio::time::timeout(patience, self.look_up(name.to_owned())).await;
        found.unwrap_or_else(|_| {
            let seconds = patience.as_secs();
            let late = format!("not looked up within {seconds} s (images.fetch.lookup_timeout_s)");
            Err(io::Error::new(io::ErrorKind::TimedOut, late))
        })
    }

    async fn look_up(&self, name: String) -> io::Result<Vec<IpAddr>> {
        let places = Arc::clone(&self.places);
        let place = places.acquire_owned().await.map_err(io::Error::other)?;
        let resolve = Arc::clone(&self.resolve);
        let (found, answer) = oneshot::channel();
        thread::Builder::new()
            .name("look-up".to_owned())
            .spawn(move || {
                // Nobody may be waiting any more.
                _ = found.send(resolve(&name));
                drop(place);
            })?;
        answer.await.map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::time::Instant;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const SOON: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn names_that_do_not_answer_take_their_own_places_and_no_thread_of_an_exchange() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let stuck = Arc::new(Mutex::new(()));
        let held = stuck.lock().unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let names = Names::new(2, {
            let (stuck, asked) = (Arc::clone(&stuck), Arc::clone(&asked));
            move |_| {
                asked.fetch_add(1, SeqCst);
                drop(stuck.lock());
                Ok(vec![HERE])
            }
        });
        runtime.block_on(async {
            for number in 0..8 {
                let name = format!("slow{number}.example");
                let late = names.addresses(&name, SOON).await.unwrap_err();
                assert_eq!(late.kind(), io::ErrorKind::TimedOut);
            }
            assert_eq!(asked.load(SeqCst), 2, "the others wait for a place");
            let exchange = tokio::task::spawn_blocking(|| ());
            tokio::time::timeout(LONG, exchange).await.unwrap().unwrap();
            drop(held);
            let began = Instant::now();
            assert_eq!(
                names.addresses("quick.example", LONG).await.unwrap(),
                [HERE]
            );
            assert!(began.elapsed() < LONG);
        });
        assert_eq!(
            asked.load(SeqCst),
            3,
            "who gave up while waiting is not looked up"
        );
    }

    #[tokio::test]
    async fn the_system_knows_addresses_and_what_is_no_name() {
        let names = Names::system(1);
        assert_eq!(names.addresses("127.0.0.1", LONG).await.unwrap(), [HERE]);
        let unknown = names.addresses("no such name", LONG).await;
        assert!(unknown.is_err(), "{unknown:?}");
    }
}
