//! Connections that run where their answers are made: whoever has something for a connection wakes it, and the runtime would wake a
//! thread for that, which takes as long as writing a token. A request's own thread runs the connection itself, if nobody does.
//!
//! There it has none of the budgets by which the runtime makes a future give way: only for futures that do a bounded amount of work
//! whenever they run.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, fence};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::task::{Context, Poll, Wake, Waker};

thread_local! {
    /// Whether what this thread wakes runs on it.
    static SERVES: Cell<bool> = const { Cell::new(false) };
}

/// Does a request's work on a thread of the runtime's that may block; connections it wakes run on it, too.
pub(super) fn serve<T>(work: impl FnOnce() -> T) -> T {
    let _before = Before(SERVES.replace(true));
    work()
}

/// Puts back what was before, even behind a panic: the thread has other work later.
struct Before(bool);

impl Drop for Before {
    fn drop(&mut self) {
        SERVES.set(self.0);
    }
}

/// A future of the runtime's that also runs on threads which [`serve`] and wake it.
pub(super) struct InPlace<F: Future<Output = ()>> {
    inner: Arc<Inner<F>>,
    waker: Waker,
}

struct Inner<F> {
    /// `None` when it is over. Nobody who wakes it waits for it while it runs: `missed` tells whoever runs it.
    future: Mutex<Option<Pin<Box<F>>>>,
    /// It was woken while it ran.
    missed: AtomicBool,
    /// Has the runtime run it.
    runtime: Mutex<Waker>,
}

impl<F: Future<Output = ()> + Send + 'static> InPlace<F> {
    pub(super) fn new(future: F) -> Self {
        let inner = Arc::new(Inner {
            future: Mutex::new(Some(Box::pin(future))),
            missed: AtomicBool::new(false),
            runtime: Mutex::new(Waker::noop().clone()),
        });
        let waker = Waker::from(Arc::clone(&inner));
        Self { inner, waker }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Future for InPlace<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let inner = &self.inner;
        let mut runtime = inner.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        runtime.clone_from(context.waker());
        drop(runtime);
        inner.run(&self.waker)
    }
}

impl<F: Future<Output = ()>> Drop for InPlace<F> {
    /// What the future waits for has its waker, which has the future: neither would go by itself.
    fn drop(&mut self) {
        let future = self.inner.future.lock();
        let future = future.unwrap_or_else(PoisonError::into_inner).take();
        drop(future);
    }
}

impl<F: Future<Output = ()>> Inner<F> {
    /// Runs the future as far as it comes, unless it runs already.
    fn run(&self, waker: &Waker) -> Poll<()> {
        let mut future = match self.future.try_lock() {
            Ok(future) => future,
            // It panicked on a thread that had other work to go on with.
            Err(TryLockError::Poisoned(future)) => {
                future.into_inner().take();
                return Poll::Ready(());
            }
            Err(TryLockError::WouldBlock) => {
                self.missed.store(true, Relaxed);
                // Either it still runs behind this, and then `missed` is seen, or it can be had.
                fence(SeqCst);
                match self.future.try_lock() {
                    Ok(future) => future,
                    Err(_) => return Poll::Pending,
                }
            }
        };
        let came = match future.as_mut() {
            Some(future) => future.as_mut().poll(&mut Context::from_waker(waker)),
            None => Poll::Ready(()),
        };
        if came.is_ready() {
            *future = None;
        }
        drop(future);
        fence(SeqCst);
        if self.missed.swap(false, Relaxed) {
            self.wake_runtime();
        }
        came
    }

    fn wake_runtime(&self) {
        let runtime = self.runtime.lock();
        let runtime = runtime.unwrap_or_else(PoisonError::into_inner).clone();
        runtime.wake();
    }
}

impl<F: Future<Output = ()> + Send + 'static> Wake for Inner<F> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // What runs here wakes others as everybody does.
        let before = Before(SERVES.replace(false));
        let waits_again = before.0 && {
            let waker = Waker::from(Arc::clone(self));
            let run = catch_unwind(AssertUnwindSafe(|| self.run(&waker)));
            run.is_ok_and(|came| came.is_pending())
        };
        // The runtime hears of its end, too, be it a panic.
        if !waits_again {
            self.wake_runtime();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread::{self, ThreadId};
    use std::time::Duration;

    use tokio::sync::{mpsc as pieces, oneshot};

    use super::*;

    /// Longer than anything takes that happens at all.
    const PATIENCE: Duration = Duration::from_secs(20);

    struct Relay<F> {
        send: pieces::UnboundedSender<u32>,
        future: F,
        /// When it waits for its first piece.
        begun: oneshot::Receiver<()>,
        /// Every piece, and where the future ran.
        told: mpsc::Receiver<(u32, ThreadId)>,
    }

    fn relay() -> Relay<impl Future<Output = ()> + Send> {
        let (send, mut pieces) = pieces::unbounded_channel();
        let (tell, told) = mpsc::channel();
        let (begin, begun) = oneshot::channel();
        let future = InPlace::new(async move {
            _ = begin.send(());
            while let Some(piece) = pieces.recv().await {
                _ = tell.send((piece, thread::current().id()));
            }
        });
        Relay {
            send,
            future,
            begun,
            told,
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_a_request_wakes_runs_on_its_thread() {
        let relay = relay();
        let task = tokio::spawn(relay.future);
        relay.begun.await.unwrap();
        let request = tokio::task::spawn_blocking(move || {
            let here = thread::current().id();
            let piece = |serves: bool| {
                let send = || relay.send.send(1);
                let sent = if serves { serve(send) } else { send() };
                sent.unwrap();
                relay.told.recv_timeout(PATIENCE).unwrap().1
            };
            // It may still be on its way into its first wait.
            assert!((0..1000).any(|_| piece(true) == here), "here");
            assert_ne!(piece(false), here, "the runtime's, where nobody serves");
            serve(|| drop(relay.send));
            assert!(relay.told.recv().is_err(), "over");
        });
        request.await.unwrap();
        task.await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nothing_is_missed_that_comes_while_it_runs() {
        const THREADS: u32 = 8;
        const EACH: u32 = 20_000;
        let relay = relay();
        let task = tokio::spawn(relay.future);
        let send_all = |number: u32| {
            let send = relay.send.clone();
            tokio::task::spawn_blocking(move || {
                let all = || (0..EACH).try_for_each(|_| send.send(number));
                let sent = if number < THREADS / 2 {
                    serve(all)
                } else {
                    all()
                };
                sent.unwrap();
            })
        };
        let all: Vec<_> = (0..THREADS).map(send_all).collect();
        for thread in all {
            thread.await.unwrap();
        }
        // Nobody sends any more: were the last of all missed, it would be missing now.
        let seen = tokio::task::spawn_blocking(move || {
            let told = (0..THREADS * EACH).map(|_| relay.told.recv_timeout(PATIENCE));
            told.take_while(Result::is_ok).count()
        });
        assert_eq!(seen.await.unwrap(), (THREADS * EACH) as usize);
        drop(relay.send);
        task.await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_is_dropped_while_it_waits_is_gone() {
        let relay = relay();
        let task = tokio::spawn(relay.future);
        relay.begun.await.unwrap();
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
        let told = relay.told.recv();
        assert!(told.is_err(), "its end of the channel went with it");
        assert!(serve(|| relay.send.send(1)).is_err());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_panic_ends_the_connection_and_not_the_request() {
        let (send, wait) = oneshot::channel();
        let mut future = Box::pin(InPlace::new(async move {
            wait.await.unwrap();
            panic!("on purpose");
        }));
        // Nobody but the request runs it a second time.
        let first = std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context)));
        assert!(first.await.is_pending());
        let request = tokio::task::spawn_blocking(move || serve(|| send.send(())));
        assert_eq!(request.await.unwrap(), Ok(()));
        future.await;
    }
}
