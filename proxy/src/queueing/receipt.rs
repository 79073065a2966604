//! The 202, and what a gRPC caller gets in its place.
//!
//! Says that a message is durable; made only after the store has said so. On the message's life.

use http::header::{LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use outrigger_core::headers::{self, Prefer};
use outrigger_queue::{MessageId, State};
use serde::Serialize;

use crate::http::body::ResponseBody;
use crate::http::respond;
use crate::queueing::status::{self, COME_BACK};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Receipt<'a> {
    id: &'a str,
    status: &'a str,
    status_url: &'a str,
}

/// The 202. A repeat with the same key gets the same, whatever became of the message meanwhile.
pub(super) fn receipt(id: MessageId, prefer: Prefer) -> Response<ResponseBody> {
    let text = id.to_string();
    let url = status::url(id);
    let receipt = Receipt {
        id: &text,
        status: State::Queued.as_str(),
        status_url: &url,
    };
    let mut response = respond::json(StatusCode::ACCEPTED, &receipt);
    let fields = response.headers_mut();
    // Both are made of ASCII letters, digits, dots and slashes.
    fields.insert(
        LOCATION,
        HeaderValue::from_str(&url).expect("an id is ASCII"),
    );
    fields.insert(headers::MESSAGE_ID, status::id_value(id));
    fields.insert(RETRY_AFTER, respond::seconds(COME_BACK));
    if prefer.respond_async {
        fields.insert(
            headers::PREFERENCE_APPLIED,
            HeaderValue::from_static("respond-async"),
        );
    }
    response
}

pub(super) fn grpc_receipt(id: MessageId) -> Response<ResponseBody> {
    let mut metadata = HeaderMap::with_capacity(2);
    metadata.insert(headers::MESSAGE_ID, status::id_value(id));
    respond::grpc_accepted(metadata)
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn the_receipt_is_what_the_contract_shows() {
        let id = MessageId::from_bytes([1; 16]);
        let prefer = Prefer {
            respond_async: true,
            wait: None,
        };
        let response = receipt(id, prefer);
        assert_eq!(response.status(), 202);
        let fields = response.headers();
        assert_eq!(fields["location"], format!("/.outrigger/messages/{id}"));
        assert_eq!(fields["retry-after"], "1");
        assert_eq!(fields["preference-applied"], "respond-async");
        assert_eq!(fields["outrigger-message-id"], id.to_string());
        let unasked = receipt(id, Prefer::default());
        assert!(!unasked.headers().contains_key("preference-applied"));
    }
}
