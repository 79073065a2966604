//! A body as it arrives from a peer, whichever protocol it speaks.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use outrigger_core::headers::{StripPolicy, strip_outrigger};

use crate::http1::client::ResponseStream;
use crate::http1::server::RequestStream;
use crate::http1::wire::WireError;
use crate::http2::request;
use crate::upstream::http2;

/// Why a peer's message did not come whole.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Over HTTP/1.1.
    #[error(transparent)]
    Http1(#[from] WireError),
    /// Over HTTP/2.
    #[error(transparent)]
    Http2(#[from] h2::Error),
    /// The body of the request broke off while it was sent on.
    #[error("the request body broke off")]
    RequestBroken,
    /// A request's body is longer than `limits.maxRequestBody`.
    #[error("the request body is longer than it may be")]
    TooLarge,
}

impl PeerError {
    /// Whether the peer broke the protocol, rather than the connection.
    pub fn is_malformed(&self) -> bool {
        match self {
            Self::Http1(error) => error.is_malformed(),
            // It was us who ended the stream or connection, for what the peer had sent.
            Self::Http2(error) => error.is_library() && error.reason().is_some(),
            Self::RequestBroken | Self::TooLarge => false,
        }
    }
}

/// The body of a peer's message.
pub enum Incoming {
    /// A request over HTTP/1.1.
    Http1Request(RequestStream),
    /// A response over HTTP/1.1.
    Http1Response(ResponseStream),
    /// A request over HTTP/2.
    Http2Request(request::RequestStream),
    /// A response over HTTP/2.
    Http2Response(http2::ResponseStream),
}

impl Incoming {
    /// Moves on what goes the other way on the same connection, while nobody reads this body.
    pub fn poll_upload(&mut self, cx: &mut Context<'_>) {
        match self {
            Self::Http1Response(stream) => stream.poll_upload(cx),
            Self::Http2Response(stream) => stream.poll_upload(cx),
            Self::Http1Request(_) | Self::Http2Request(_) => {}
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = PeerError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, PeerError>>> {
        let mut polled = match self.get_mut() {
            Self::Http1Request(stream) => stream.poll_frame(cx),
            Self::Http2Response(stream) => stream.poll_frame(cx),
            Self::Http1Response(stream) => stream.poll_frame(cx),
            Self::Http2Request(stream) => stream
                .poll_frame(cx)
                .map(|frame| frame.map(|frame| frame.map_err(PeerError::from))),
        };
        if let Poll::Ready(Some(Ok(frame))) = &mut polled
            && let Some(trailers) = frame.trailers_mut()
        {
            // Sidecars say nothing in trailers: what is there is somebody else's.
            strip_outrigger(trailers, StripPolicy::Untrusted);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1Request(stream) => stream.is_end_stream(),
            Self::Http1Response(stream) => stream.is_end_stream(),
            Self::Http2Response(stream) => stream.is_end_stream(),
            Self::Http2Request(stream) => stream.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1Request(stream) => stream.size_hint(),
            Self::Http1Response(stream) => stream.size_hint(),
            Self::Http2Response(stream) => stream.size_hint(),
            Self::Http2Request(stream) => stream.size_hint(),
        }
    }
}
