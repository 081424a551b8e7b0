//! A connection that tells when it has ended: ttrpc keeps that to itself.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
};

/// The connection, and what resolves when its peer has closed it or it has failed.
pub fn watch<S>(stream: S) -> (Watched<S>, oneshot::Receiver<()>) {
    let (tell, told) = oneshot::channel();
    (Watched { stream, tell: Some(tell) }, told)
}

/// See [`watch`].
#[derive(Debug)]
pub struct Watched<S> {
    stream: S,
    tell: Option<oneshot::Sender<()>>,
}

impl<S> Watched<S> {
    fn ended(&mut self) {
        if let Some(tell) = self.tell.take() {
            // Nobody may be listening any more, which is fine.
            let _ = tell.send(());
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        if result.is_err() || (buf.filled().len() == before && buf.remaining() > 0) {
            self.ended();
        }
        Poll::Ready(result)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        if result.is_err() {
            self.ended();
        }
        Poll::Ready(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn the_end_is_told_after_the_last_byte() {
        let (mut near, far) = tokio::io::duplex(8);
        let (mut far, mut told) = watch(far);
        near.write_all(b"x").await.unwrap();
        drop(near);
        assert_eq!(far.read_u8().await.unwrap(), b'x');
        assert!(told.try_recv().is_err());
        assert!(far.read_u8().await.is_err());
        told.await.unwrap();
    }
}
