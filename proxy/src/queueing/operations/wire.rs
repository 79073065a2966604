//! The messages of `google.longrunning`, as far as they are used here, by their field numbers.
//!
//! On the message's life.

use std::time::Duration;

/// `google.longrunning.Operation`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Operation {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(bool, tag = "3")]
    pub(super) done: bool,
    #[prost(oneof = "Outcome", tags = "4, 5")]
    pub(super) outcome: Option<Outcome>,
}

/// What an operation ended with.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Outcome {
    #[prost(message, tag = "4")]
    Error(RpcStatus),
    #[prost(message, tag = "5")]
    Response(Any),
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RpcStatus {
    #[prost(int32, tag = "1")]
    pub(super) code: i32,
    #[prost(string, tag = "2")]
    pub(super) message: String,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Any {
    #[prost(string, tag = "1")]
    pub(super) type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) value: Vec<u8>,
}

/// `GetOperationRequest`, `CancelOperationRequest` and `DeleteOperationRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct NamedRequest {
    #[prost(string, tag = "1")]
    pub(super) name: String,
}

/// `ListOperationsRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ListRequest {
    #[prost(string, tag = "1")]
    pub(super) filter: String,
    #[prost(int32, tag = "2")]
    pub(super) page_size: i32,
    #[prost(string, tag = "3")]
    pub(super) page_token: String,
    #[prost(string, tag = "4")]
    pub(super) name: String,
}

/// `ListOperationsResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ListResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) operations: Vec<Operation>,
    #[prost(string, tag = "2")]
    pub(super) next_page_token: String,
}

/// `WaitOperationRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WaitRequest {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(message, optional, tag = "2")]
    pub(super) timeout: Option<Span>,
}

/// `google.protobuf.Duration`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Span {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

impl Span {
    /// Nothing where it is negative.
    pub(super) fn span(self) -> Duration {
        let seconds = u64::try_from(self.seconds).unwrap_or(0);
        let nanos = u32::try_from(self.nanos).unwrap_or(0).min(999_999_999);
        Duration::new(seconds, nanos)
    }
}
