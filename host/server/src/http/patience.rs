//! A stream whose reader must get on: a client that takes its answer too slowly would hold its connection, and the place of its
//! request, for as long as it likes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// A stream that gives up when its writes have been stuck for too long: time without a byte runs out, and every byte that is
/// taken brings some of it back. Reading has limits of its own.
pub(super) struct Patient<S> {
    stream: S,
    patience: Patience,
    /// What is left of it.
    left: Duration,
    /// Runs while a write is stuck.
    running_out: Pin<Box<Sleep>>,
    /// Since when a write is stuck.
    stuck: Option<Instant>,
}

/// What a reader may do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Longest it may take nothing.
    pub(super) silence: Duration,
    /// Least it takes in a second once that is used up, in bytes.
    pub(super) bytes_per_s_min: u64,
}

impl<S> Patient<S> {
    pub(super) fn new(stream: S, patience: Patience) -> Self {
        Self {
            stream,
            patience,
            left: patience.silence,
            running_out: Box::pin(tokio::time::sleep(patience.silence)),
            stuck: None,
        }
    }

    /// Passes on what a write came to, or that the reader has been too slow.
    fn judge<T>(
        &mut self,
        context: &mut Context<'_>,
        came: Poll<io::Result<T>>,
        bytes: impl FnOnce(&T) -> usize,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(came) = came {
            if let Some(since) = self.stuck.take() {
                self.left = self.left.saturating_sub(since.elapsed());
            }
            let taken = came.as_ref().map_or(0, bytes);
            let earned = taken as f64 / self.patience.bytes_per_s_min as f64;
            let left = self.left.as_secs_f64() + earned;
            self.left = self.patience.silence.min(Duration::from_secs_f64(left));
            return Poll::Ready(came);
        }
        if self.stuck.is_none() {
            let now = Instant::now();
            self.stuck = Some(now);
            self.running_out.as_mut().reset(now + self.left);
        }
        ready!(self.running_out.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client takes too little of its answer",
        )))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let came = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.judge(context, came, |taken| *taken)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let came = Pin::new(&mut self.stream).poll_flush(context);
        self.judge(context, came, |()| 0)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let came = Pin::new(&mut self.stream).poll_shutdown(context);
        self.judge(context, came, |()| 0)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let came = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.judge(context, came, |taken| *taken)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Read;
    use std::thread::{self, JoinHandle};

    use tokio::net::TcpListener;

    use super::*;

    const PATIENCE: Patience = Patience {
        silence: Duration::from_millis(300),
        bytes_per_s_min: 16 << 20,
    };
    /// More than a system keeps for a client that does not read.
    const BYTES: usize = 64 << 20;

    async fn connected() -> (Patient<tokio::net::TcpStream>, std::net::TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().await.unwrap();
        (Patient::new(server, PATIENCE), client)
    }

    async fn write(stream: &mut Patient<tokio::net::TcpStream>) -> io::Result<()> {
        let bytes = vec![b'x'; 1 << 16];
        let mut written = 0;
        while written < BYTES {
            written +=
                poll_fn(|context| Pin::new(&mut *stream).poll_write(context, &bytes)).await?;
        }
        Ok(())
    }

    /// Reads until the end, so much and then nothing for a while; gives what came.
    fn read(mut client: std::net::TcpStream, piece: usize, pause: Duration) -> JoinHandle<usize> {
        thread::spawn(move || {
            let (mut seen, mut piece) = (0, vec![0; piece]);
            loop {
                match client.read_exact(&mut piece) {
                    Ok(()) => seen += piece.len(),
                    Err(_) => return seen,
                }
                thread::sleep(pause);
            }
        })
    }

    #[tokio::test]
    async fn a_reader_that_stands_still_is_given_up() {
        let (mut stream, client) = connected().await;
        let began = Instant::now();
        let error = write(&mut stream).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= PATIENCE.silence);
        drop(client);
    }

    #[tokio::test]
    async fn a_reader_that_takes_a_little_now_and_then_is_given_up_too() {
        let (mut stream, client) = connected().await;
        // At most 1 MiB in a second.
        let reading = read(client, 1 << 17, PATIENCE.silence / 2);
        let error = write(&mut stream).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(stream);
        _ = reading.join().unwrap();
    }

    #[tokio::test]
    async fn a_reader_that_is_only_slow_gets_everything() {
        let (mut stream, client) = connected().await;
        // Silent for longer in all than the server's patience, though it takes more than it must in a second.
        let reading = read(client, 4 << 20, PATIENCE.silence / 8);
        let began = Instant::now();
        write(&mut stream).await.unwrap();
        drop(stream);
        assert_eq!(reading.join().unwrap(), BYTES);
        assert!(began.elapsed() > PATIENCE.silence);
    }
}
