//! A stream whose reader may not stand still: a client that takes nothing of its answer would hold its
//! connection, and the place of its request, for as long as it likes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// A stream that gives up when a write has been stuck for so long. Reading has limits of its own.
pub(super) struct Patient<S> {
    stream: S,
    patience: Duration,
    /// Runs while a write is stuck.
    running_out: Pin<Box<Sleep>>,
    stuck: bool,
}

impl<S> Patient<S> {
    pub(super) fn new(stream: S, patience: Duration) -> Self {
        Self {
            stream,
            patience,
            running_out: Box::pin(tokio::time::sleep(patience)),
            stuck: false,
        }
    }

    /// Passes on what a write came to, or that it has been stuck for too long.
    fn judge<T>(
        &mut self,
        context: &mut Context<'_>,
        came: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if came.is_ready() {
            self.stuck = false;
            return came;
        }
        if !self.stuck {
            self.stuck = true;
            self.running_out
                .as_mut()
                .reset(Instant::now() + self.patience);
        }
        ready!(self.running_out.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client takes nothing of its answer",
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
        self.judge(context, came)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let came = Pin::new(&mut self.stream).poll_flush(context);
        self.judge(context, came)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let came = Pin::new(&mut self.stream).poll_shutdown(context);
        self.judge(context, came)
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
        self.judge(context, came)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Read;
    use std::thread;

    use tokio::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(300);
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

    #[tokio::test]
    async fn a_reader_that_stands_still_is_given_up() {
        let (mut stream, client) = connected().await;
        let began = Instant::now();
        let error = write(&mut stream).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= PATIENCE);
        drop(client);
    }

    #[tokio::test]
    async fn a_reader_that_is_only_slow_gets_everything() {
        let (mut stream, mut client) = connected().await;
        let reading = thread::spawn(move || {
            let (mut seen, mut pauses) = (0, 0);
            let mut piece = vec![0; 1 << 20];
            loop {
                match client.read(&mut piece).unwrap() {
                    0 => return seen,
                    length => seen += length,
                }
                // Longer in all than the server's patience, though never at once.
                if pauses < 8 {
                    thread::sleep(PATIENCE / 4);
                    pauses += 1;
                }
            }
        });
        let began = Instant::now();
        write(&mut stream).await.unwrap();
        assert!(began.elapsed() > PATIENCE);
        drop(stream);
        assert!(reading.join().unwrap() >= BYTES);
    }
}
