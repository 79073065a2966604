//! What a callback tells: a CloudEvent 1.0 in structured mode about the end of a message.
//!
//! On the message's life.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use outrigger_queue::{MessageId, StatusView, StoredResult};
use serde_json::{Value, json};

use crate::queueing::status::{self, Status};
use crate::queueing::text;
use crate::snapshot::Snapshot;

/// The media type of an event.
pub(super) const CONTENT_TYPE: &str = "application/cloudevents+json";

/// A longer answer is not in the event, which says where it is: CloudEvents asks for events of at
/// most 64 KiB, and a body may grow by a third on its way into one.
const MAX_BODY: usize = 32 * 1024;

/// The event about `view`, which is final. `id` is that of the callback, the same for every try.
pub(super) fn of(
    snapshot: &Snapshot,
    workload: &str,
    id: MessageId,
    view: &StatusView,
    result: Option<&StoredResult>,
) -> Value {
    let mut data = json!(Status::of(snapshot, view));
    data["statusUrl"] = json!(status::url(view.id));
    if let Some(result) = result {
        data["result"] = answer(view.id, result);
    }
    let mut event = json!({
        "specversion": "1.0",
        "id": id.to_string(),
        "source": format!("/workloads/{workload}/queues/{}", view.queue),
        "type": format!("dev.outrigger.message.{}", view.state),
        "subject": view.id.to_string(),
        "time": text::rfc3339(view.finished_at.unwrap_or(view.enqueued_at)),
        "datacontenttype": "application/json",
        "data": data,
    });
    if let Some(trace) = &view.trace_context {
        event["traceparent"] = json!(trace);
    }
    event
}

fn answer(id: MessageId, result: &StoredResult) -> Value {
    let mut fields = result.headers.iter();
    let content_type = fields.find(|(name, _)| name == "content-type");
    let content_type = content_type.map(|(_, value)| String::from_utf8_lossy(value));
    let mut view = json!({
        "status": result.status,
        "contentType": content_type,
        "url": format!("{}/result", status::url(id)),
    });
    if result.body.len() <= MAX_BODY {
        match std::str::from_utf8(&result.body) {
            Ok(body) => view["body"] = json!(body),
            Err(_) => view["bodyBase64"] = json!(STANDARD.encode(&result.body)),
        }
    }
    view
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use outrigger_core::time::UnixMillis;

    use super::*;

    #[test]
    fn a_body_is_text_base64_or_elsewhere() {
        let id = MessageId::from_bytes([7; 16]);
        let of = |body: Bytes| {
            let result = StoredResult {
                status: 201,
                headers: vec![("content-type".into(), b"text/plain".to_vec())],
                body,
                trailers: None,
                finished_at: UnixMillis(0),
                truncated: false,
            };
            answer(id, &result)
        };
        let made = of(Bytes::from_static(b"made"));
        assert_eq!(
            (&made["status"], &made["body"]),
            (&json!(201), &json!("made"))
        );
        assert_eq!(made["contentType"], "text/plain");
        assert_eq!(made["url"], format!("/.outrigger/messages/{id}/result"));
        let binary = of(Bytes::from_static(&[0xff, 0]));
        assert_eq!(
            (&binary["body"], &binary["bodyBase64"]),
            (&Value::Null, &json!("/wA="))
        );
        let long = of(Bytes::from(vec![b'x'; MAX_BODY + 1]));
        assert_eq!(
            (&long["body"], &long["bodyBase64"]),
            (&Value::Null, &Value::Null)
        );
    }
}
